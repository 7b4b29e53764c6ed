"""What a codec does to a model's keys and values, and to what attention makes of them."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kvcascade.cache.basis import Bases, Basis
from kvcascade.cache.groups import Vectors
from kvcascade.cache.prompt import Prompt
from kvcascade.cache.spec import CacheSpec
from kvcascade.eval.measure import Job
from kvcascade.eval.quality.windows import Windows
from kvcascade.eval.records import Distortion
from kvcascade.eval.table import Column, Table
from kvcascade.kernels.causal import causal_attention
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.slots import Codec, Codecs
from kvcascade.model import generate
from kvcascade.model.pretrained import Model

FIRST = 4
"""Tokens of a window that are in full: they are unlike all others, and a cache that knows them keeps them so."""


def jobs(model: Model, specs: Sequence[CacheSpec], windows: Windows) -> list[Job]:
    """A measurement for each cache of one tier: of its codec, in a calibration if it needs one."""
    parts: list[tuple[Vectors, ...]] = []  # made by the first job that runs

    def made() -> tuple[Vectors, ...]:
        if not parts:
            B, T = windows.rows_BT.shape
            positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
            prompt = Prompt(model.config.layer_heads, T)
            _, prompt = generate.prefill_step(
                model.config, model.params, prompt, jnp.asarray(windows.rows_BT), positions_BT
            )
            parts.append(prompt.parts)
        return parts[0]

    return [_job(model, spec, windows, made) for spec in specs]


def _job(model: Model, spec: CacheSpec, windows: Windows, made) -> Job:
    codecs = spec.cascades[0].tiers[0].codecs
    heads = model.config.layer_heads
    about: dict[str, Any] = {
        "kind": "codec", "model": model.name, "weights": model.config.weights, "weights_key": model.fingerprint, "codec": str(codecs),
        "data": windows.data, "rows": windows.key, "context": windows.rows_BT.shape[1], "windows": len(windows.rows_BT), "first": FIRST,
    } | spec.content  # fmt: skip

    def run() -> list[Distortion]:
        groups = spec.groups(heads)
        found = [
            _distorted(codecs, bases[0] if bases else None, vectors, group.of)
            for group, bases, vectors in zip(groups, spec.bases(groups), made(), strict=True)
        ]
        names = ("key_error", "value_error", "output_error", "keys_alone", "values_alone")
        errors: dict[str, Any] = {
            name: float(each) for name, each in zip(names, np.mean(jax.device_get(found), 0), strict=True)
        }
        size = np.mean([codecs.k.nbytes(each.width) + codecs.v.nbytes(each.value_width) for each in heads])
        return [Distortion(**about | errors | {"width": heads[0].width, "vector_bytes": float(size)})]

    return Job(about, "eval/quality", run, str(codecs))


@functools.partial(jax.jit, static_argnames=("codecs", "heads"))
def _distorted(codecs: Codecs, bases: Bases | None, vectors: Vectors, heads: Heads) -> list[Float[Array, ""]]:
    """The errors of a layer's keys and values, each vector's over its norm, and of attention's output with both, with the keys alone, and with
    the values alone, all numbers' over all numbers'."""
    q, k, v, _ = vectors
    late_T111 = (jnp.arange(q.shape[1]) >= FIRST)[:, None, None]

    def through(codec: Codec, basis: Basis, x_BTKH):
        x_BKTH = x_BTKH.astype(jnp.float32).swapaxes(1, 2)
        back = basis.back(codec.decode(codec.encode(basis.into(x_BKTH))))
        return jnp.where(late_T111, back.swapaxes(1, 2), x_BTKH)

    k2, v2 = (through(codec, basis, x) for codec, basis, x in zip(codecs, bases or Bases(), (k, v), strict=True))
    attention = lambda k, v: causal_attention(
        q.astype(jnp.float32), k.astype(jnp.float32), v.astype(jnp.float32), heads
    )
    exact = attention(k, v)
    norm = functools.partial(jnp.linalg.norm, axis=-1)
    by_vector = lambda x, y: (norm(x - y) / jnp.maximum(norm(y), 1e-30))[:, FIRST:].mean()
    whole = lambda x: jnp.linalg.norm(x - exact) / jnp.linalg.norm(exact)
    return [
        by_vector(k2, k),
        by_vector(v2, v),
        whole(attention(k2, v2)),
        whole(attention(k2, v)),
        whole(attention(k, v2)),
    ]


def table(found: Sequence[Distortion]) -> Table:
    """A row for each codec, the largest first."""
    columns = [
        Column("codec", "codec"),
        Column("bytes of a key and a value", "vector_bytes", "{:.0f}"),
        Column("bits a number", lambda r: 4 * r.vector_bytes / r.width, "{:.2f}"),
        Column("error of keys", "key_error", "{:.3f}"),
        Column("of values", "value_error", "{:.3f}"),
        Column("of attention", "output_error", "{:.3f}"),
        Column("keys alone", "keys_alone", "{:.3f}"),
        Column("values alone", "values_alone", "{:.3f}"),
    ]
    first = found[0]
    title = (
        f"{first.model} in {first.weights}, heads {first.width} wide: {first.windows} windows of {first.context} tokens of {first.data.removeprefix('file:')}, "
        f"but for the first {first.first:.0f} of each"
    )
    return Table.of(title, columns, sorted(found, key=lambda r: (-r.vector_bytes, r.output_error)))
