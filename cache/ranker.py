"""A ranker: small networks, one for each KV head of each layer, that say of a token what attention it will get; and the folder they are kept in."""

import dataclasses
import functools
import hashlib
import json
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvcascade.cache.errors import BadInput
from kvcascade.kernels.heads import Heads

BESIDE = 3
"""Features of a token beside its key and its value."""
TEXT, WEIGHTS = "ranker.json", "weights"

type Networks = dict[str, Any]
"""Arrays of J networks: `hidden` [J, F, D], `hidden_bias` [J, D], `out` [J, D], `skip` [J, F], `bias` [J]."""


def features(
    k_BKSH: Float[Array, "*B S H"], v_BKSW: Float[Array, "*B S W"], pos_BKS: Int[Array, "*B S"]
) -> Float[Array, "*B S F"]:
    """What a network looks at: a token's key before RoPE, its value, the logarithms of their norms and of its position; F = H + W + 3."""
    norm = lambda x: jnp.log(jnp.sqrt((x**2).sum(-1, keepdims=True)) + 1e-6)
    place = jnp.log1p(jnp.maximum(pos_BKS, 0).astype(k_BKSH.dtype))[..., None]
    return jnp.concatenate([k_BKSH, v_BKSW, norm(k_BKSH), norm(v_BKSW), place], -1)


def scores(networks: Networks, x_BJSF: Float[Array, "*B J S F"]) -> Float[Array, "*B J S"]:
    """What J networks say of the features of tokens, each of those of its own head: one hidden layer of GELUs beside a linear way."""
    product = lambda x, w: jnp.einsum("...JSF,JFD->...JSD", x, w)
    hidden = jax.nn.gelu(product(x_BJSF, networks["hidden"]) + networks["hidden_bias"][:, None])
    out = jnp.einsum("...JSD,JD->...JS", hidden, networks["out"])
    return out + jnp.einsum("...JSF,JF->...JS", x_BJSF, networks["skip"]) + networks["bias"][:, None]


@dataclasses.dataclass(frozen=True)
class Shape:
    """The model that a ranker is of: layers, KV heads of each, and the widths of keys and values."""

    layers: int
    kv_heads: int
    width: int
    value_width: int

    @classmethod
    def of(cls, heads: Sequence[Heads]) -> "Shape":
        """That of a model whose layers have these heads; BadInput where they differ from layer to layer."""
        if len(found := {(each.kv, each.width, each.value_width) for each in heads}) > 1:
            raise BadInput(
                "a ranker is of a model whose layers have KV heads of one number and width, which this one's have not"
            )
        return cls(len(heads), *found.pop())

    @property
    def networks(self) -> int:
        """One for each KV head of each layer, those of a layer one after the other."""
        return self.layers * self.kv_heads

    @property
    def features(self) -> int:
        """Numbers that a network looks at."""
        return self.width + self.value_width + BESIDE

    def __str__(self) -> str:
        return f"{self.layers} layers of {self.kv_heads} KV heads of width {self.width} and {self.value_width}"


@dataclasses.dataclass(frozen=True)
class Ranker:
    """Networks and the shape of the model that they are of."""

    shape: Shape
    networks: Networks

    @functools.cached_property
    def fingerprint(self) -> str:
        """What tells its networks from others."""
        found = hashlib.sha256(repr(self.shape).encode())
        for name, array in sorted(self.networks.items()):
            found.update(f"{name} {array.shape}".encode() + np.ascontiguousarray(array, "<f4").tobytes())
        return found.hexdigest()[:16]

    @property
    def nbytes(self) -> int:
        """Bytes of its networks."""
        return sum(array.nbytes for array in self.networks.values())

    def check(self, place: str, shape: Shape) -> None:
        """BadInput unless it is of a model of that shape; `place` is where it was read from."""
        if shape != self.shape:
            raise BadInput(f"the ranker {place} is of a model of {self.shape}, and this one has {shape}")

    def write(self, path: Path, about: dict[str, Any]) -> None:
        """Make a folder of it, whole or not at all, with what `about` says of how it was trained; OSError where that cannot be."""
        from orbax.checkpoint import v1 as ocp  # two seconds of imports, which other policies do not need

        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        text = {"fingerprint": self.fingerprint, "shape": dataclasses.asdict(self.shape)} | about
        try:
            temporary.mkdir(parents=True)
            ocp.save(str(temporary.resolve() / WEIGHTS), self.networks)
            (temporary / TEXT).write_text(json.dumps(text, indent=2) + "\n", "utf-8")
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def read(place: str) -> Ranker:
    """The ranker of a folder; BadInput if there is none, or it is damaged.

    A process reads a folder once: programs that it has compiled have the networks in them as constants.
    """
    if not place:
        raise BadInput("learned needs a ranker, which kvcascade rank makes: learned[ranker=FOLDER]")
    return _read(Path(place).expanduser().resolve(), place)


@functools.lru_cache
def _read(path: Path, place: str) -> Ranker:
    try:
        about = json.loads((path / TEXT).read_text("utf-8"))
        shape, fingerprint = Shape(**about["shape"]), about["fingerprint"]
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"{place} is no ranker: there is no {TEXT} in it") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BadInput(f"{place} is no ranker, or damaged: {TEXT} cannot be read ({type(error).__name__})") from error
    from orbax.checkpoint import v1 as ocp

    try:
        # It may be asked for while a program is traced, of which reading is no part.
        with jax.ensure_compile_time_eval():
            found = ocp.load(str(path / WEIGHTS))
            # On the device once for all layers: of an array that is the same a program has one constant. It is committed to none.
            ranker = Ranker(shape, {name: jnp.asarray(np.asarray(array)) for name, array in found.items()})
    except Exception as error:  # orbax raises what its storage raises, of many types
        raise BadInput(f"{place} is damaged: its {WEIGHTS} cannot be read ({type(error).__name__})") from error
    if ranker.fingerprint != fingerprint:
        raise BadInput(f"{place} is damaged: its {WEIGHTS} are not those that were written")
    return ranker
