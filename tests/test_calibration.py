"""Bases of codecs: attention is the same in any of them, and a calibration is of one model."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcascade.cache import calibration
from kvcascade.cache.calibration import Calibration, Moments
from kvcascade.cache.codec import NAMES
from kvcascade.cache.errors import BadInput
from kvcascade.cache.layer import LayerCache
from kvcascade.cache.spec import parse
from kvcascade.cache.whole import nbytes
from kvcascade.kernels.backend import using
from kvcascade.kernels.heads import Heads
from kvcascade.model import generate, gpt
from kvcascade.model.config import ModelConfig
from kvcascade.train import calibration as training

HEADS = Heads(4, 2, 16)
CONFIG = ModelConfig(vocab=64, context=96, layers=2, width=32, heads=4, kv_heads=2, mlp=48)


def moments(seed: int, K: int, H: int) -> Moments:
    """Of numbers with a mean far from zero, and directions of unlike sizes."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((K, H, H)).astype(np.float32)
    square = np.einsum("KHJ,KIJ->KHI", mix, mix)
    return Moments(0.5 * rng.standard_normal((K, H)).astype(np.float32), square, square[:, ::-1, ::-1].copy())


@functools.cache
def written(folder) -> str:
    path = folder / "some.safetensors"
    Calibration(
        (moments(0, 2, 16),),
        (moments(1, 2, 16),),
        (np.ones(2, np.float32),) * 1,
        (np.ones(2, np.float32),),
        {"model_key": "x"},
    ).write(path)
    return str(path)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    return written(tmp_path_factory.mktemp("calibration"))


def tokens(seed: int, T: int, start: int = 0):
    draw = np.random.default_rng(seed).standard_normal
    q, k, v = (jnp.asarray(draw((2, T, n, 16)), jnp.float32) for n in (4, 2, 2))
    return q, k, v, jnp.broadcast_to(jnp.arange(start, start + T, dtype=jnp.int32), (2, T))


def run(spec: str, implementation=None, steps: int = 6):
    """Outputs of a prompt, of a part after it and of single tokens, and the cache at last."""
    with using(implementation):
        cache, found, start = parse(spec).init(2, [HEADS], 64), [], 0
        step = jax.jit(lambda cache, fresh, *some: cache.step(0, *some, fresh), static_argnums=1)
        for seed, T in enumerate([20, 7, *(1,) * steps]):
            out, cache = step(cache, not start, *tokens(seed, T, start))
            found.append(np.asarray(out))
            start += T
    return found, cache


EXACT = "sink 2{} | recent 6{} | heavy 9{} | keydiff 12{}"


@pytest.mark.parametrize("letter, implementation", [("r", None), ("m", None), ("s", "xla"), ("o", None), ("p", None)])
@pytest.mark.parametrize("place", ["", " on blocks"])
def test_attention_is_the_same_in_any_basis(file: str, letter: str, place: str, implementation, monkeypatch) -> None:
    """With a codec that rounds nothing: the outputs, and what is held, are those of the model's own basis."""
    exact = dataclasses.replace(NAMES["f32"], name=f"exact{letter}", basis=letter)
    monkeypatch.setitem(NAMES, exact.name, exact)
    end = "" if letter == "r" else f" with {file}"
    if place:
        spec, plain = f"full@{exact.name} on blocks{end}", "full@f32 on blocks"
    else:
        name = f"@{exact.name}"
        spec, plain = EXACT.format("@f32", name, name, "@f32") + end, EXACT.format(*["@f32"] * 4)
    ours, mine = run(spec, implementation)
    wanted, its = run(plain, implementation)
    for a, b in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)
    if not place:
        for layer, other in zip(mine.layers, its.layers, strict=True):
            for slots, others in zip(layer.slots, other.slots, strict=True):
                np.testing.assert_array_equal(np.sort(slots.pos_BKS), np.sort(others.pos_BKS))
    assert nbytes(mine) == nbytes(its)  # a basis is the model's


@pytest.mark.parametrize(
    "spec",
    [
        "heads[0]: full@int4m ; heads[1]: recent 9@int8 | heavy 20@int4m",
        "sink 2 | recent 60@lloyd4m/int4o",
    ],
)
def test_by_heads_and_for_keys_and_values_apart(file: str, spec: str) -> None:
    """Four bits in a basis of the model's are near to attention in full, near to as near as the codec's bound allows."""
    ours, _ = run(f"{spec} with {file}")
    wanted, _ = run(spec.replace("lloyd4m/int4o", "f32").replace("int4m", "f32").replace("int8", "f32"))
    for a, b in zip(ours, wanted, strict=True):
        assert np.linalg.norm(a - b) < 0.4 * np.linalg.norm(b)


@pytest.mark.parametrize("ours, theirs", [("kvtc4", "int4h"), ("kvtc3", "lloyd3h"), ("kvtc2", "lloyd2h")])
def test_bits_by_channel_miss_by_less_where_few_directions_count(ours: str, theirs: str) -> None:
    """Of vectors whose directions are of unlike sizes, by the moments that they have, in fewer bytes or as many."""
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.standard_normal((64, 64)))
    x = (rng.standard_normal((2000, 64)) * 0.85 ** np.arange(64)) @ turn + 2
    shown = jnp.asarray(x, jnp.float32)[None, None]
    basis = Moments(x.mean(0)[None], np.cov(x.T)[None], np.eye(64)[None]).basis("p")
    codec, other = NAMES[f"{ours}p"], NAMES[theirs]
    missed = jnp.linalg.norm(basis.back(codec.decode(codec.encode(basis.into(shown)))) - shown)
    assert missed < 0.5 * jnp.linalg.norm(other.decode(other.encode(shown)) - shown)
    assert codec.nbytes(64) <= other.nbytes(64)


def test_a_look_and_a_commit_are_a_step(file: str) -> None:
    layer = parse(f"sink 2 | recent 4 | heavy 30@int8 | recent 9@int4m with {file}")
    (some,) = layer.bases(layer.groups([HEADS]))
    cache = LayerCache.empty(layer.cascades[0], 2, HEADS, 64, bases=some)
    _, cache = cache.step(*tokens(0, 30), fresh=True)
    look = cache.look(*tokens(1, 5, 30))
    out, after = cache.step(*tokens(1, 5, 30))
    np.testing.assert_allclose(look.out_BTNW, out, atol=1e-5)
    for a, b in zip(jax.tree.leaves(cache.commit(look)), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)


def test_moments_are_those_of_what_a_cache_is_given() -> None:
    """The mean, the covariance and the queries' second moments, without the first tokens of each window, as numpy has them."""
    params = gpt.init(CONFIG, 0)
    rows = np.random.default_rng(0).integers(0, 64, (6, 40)).astype(np.int32)
    found = training.calibrate(CONFIG, params, rows, {})
    prompt = training.Prompt(CONFIG.layer_heads, 40)
    positions = jnp.broadcast_to(jnp.arange(40), (6, 40))
    _, prompt = generate.prefill_step(CONFIG, params, prompt, jnp.asarray(rows), positions)
    for layer, part in enumerate(prompt.parts):
        q, k, v = (np.asarray(x, np.float64)[:, training.SKIP :] for x in part[:3])
        for head in range(2):
            mine = k[:, :, head].reshape(-1, k.shape[-1])
            np.testing.assert_allclose(found.k[layer].mean_KH[head], mine.mean(0), atol=1e-5)
            np.testing.assert_allclose(found.k[layer].covariance_KHH[head], np.cov(mine.T, bias=True), atol=1e-5)
            asked = q[:, :, 2 * head : 2 * head + 2].reshape(-1, q.shape[-1])
            want = 2 * asked.T @ asked / len(asked)
            np.testing.assert_allclose(found.k[layer].read_KHH[head], want, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(found.v[layer].mean_KH[head], v[:, :, head].mean((0, 1)), atol=1e-5)


def test_gates_and_shares_say_which_heads_look_back(monkeypatch) -> None:
    """Against dense attention in numpy: what goes to tokens that are neither first nor recent, and whose tokens get most."""
    monkeypatch.setattr(training, "NEAR", 5)
    params, T = gpt.init(CONFIG, 0), 44  # a length that nothing is compiled for yet
    rows = np.random.default_rng(0).integers(0, 64, (3, T)).astype(np.int32)
    found = training.calibrate(CONFIG, jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, params), rows, {})
    prompt = training.Prompt(CONFIG.layer_heads, T)
    params = jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, params)
    positions = jnp.broadcast_to(jnp.arange(T), (3, T))
    _, prompt = generate.prefill_step(CONFIG, params, prompt, jnp.asarray(rows), positions)
    t = np.arange(T)
    for layer, part in enumerate(prompt.parts):
        q, k = (np.asarray(x, np.float64) for x in part[:2])
        logits = np.einsum("btkgh,bskh->bkgts", q.reshape(3, T, 2, 2, -1), k) * CONFIG.layer_heads[layer].scale
        logits = np.where(t[:, None] >= t, logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        old = (t[:, None] - t >= 5) & (t >= training.SKIP)
        far = (weights * old).sum(-1).mean(2)[:, :, 10:].mean((0, 2))
        np.testing.assert_allclose(found.gates[layer], far, rtol=1e-3, atol=1e-5)
        mass = weights.sum((2, 3))[:, :, training.SKIP :]
        part_of = []
        for row in mass:
            most = row >= np.sort(row.ravel())[-round(training.TOP * 2 * T)]
            part_of.append(most.sum(1) / most.sum())
        np.testing.assert_allclose(found.shares[layer], np.mean(part_of, 0), atol=1e-5)


def test_what_does_not_belong_is_refused(file: str, tmp_path) -> None:
    with pytest.raises(BadInput, match="int4m needs a calibration"):
        parse("full@int4m")
    with pytest.raises(BadInput, match="no codec needs the calibration"):
        parse(f"full@int4h with {file}")
    with pytest.raises(BadInput, match="there is no calibration"):
        parse(f"full@int4m with {tmp_path}/none.safetensors").init(1, [HEADS], 8)
    with pytest.raises(BadInput, match="of another model"):
        parse(f"full@int4m with {file}").init(1, [HEADS, HEADS], 8)
    with pytest.raises(BadInput, match="soft cap"):
        parse(f"full@int4m with {file}").init(1, [dataclasses.replace(HEADS, soft_cap=30.0)], 8)
    (tmp_path / "text.safetensors").write_text("text")
    with pytest.raises(BadInput, match="is no calibration, or damaged"):
        calibration.read(str(tmp_path / "text.safetensors"))
    content = bytearray(Path(file).read_bytes())
    content[-5] ^= 0x40
    (tmp_path / "flipped.safetensors").write_bytes(bytes(content))
    with pytest.raises(BadInput, match="not those that were written"):
        calibration.read(str(tmp_path / "flipped.safetensors"))


def test_the_text_names_the_file(file: str) -> None:
    spec = parse(f"sink 4 | recent 60 | full@int2o/lloyd2m with {file}")
    assert parse(str(spec)) == spec and spec.calibration == file
    assert spec.content == {"cache_content": [calibration.read(file).fingerprint]}
