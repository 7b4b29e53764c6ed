"""A ranker says what its networks say, of the heads that it is for; what is no ranker is told in one line; and one learns what can be learned."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from planted_rankers import SHAPE, networks, planted

from kvcascade.cache import ranker
from kvcascade.cache.errors import BadInput
from kvcascade.cache.layer import LayerCache
from kvcascade.cache.learned import Learned, Predicted
from kvcascade.cache.ranker import Ranker, Shape
from kvcascade.cache.spec import CacheSpec, parse
from kvcascade.cache.statistic import HeadIds, Tokens
from kvcascade.kernels.heads import Heads, Rope
from kvcascade.kernels.rotation import rotation, turn

HEADS = Heads(4, 2, 8, rope=Rope(base=100.0))
PLAIN = Heads(4, 2, 8)
SPEC = f"sink 1 | recent 2 | learned[ranker={planted()}] 4"


def said(network: int, k: np.ndarray, v: np.ndarray, position: int) -> float:
    """What one of the planted networks says of one token, in plain sums; k is before RoPE."""
    mine = {name: array[network].astype(np.float64) for name, array in networks(SHAPE).items()}
    norm = lambda x: math.log(math.sqrt(sum(x**2)) + 1e-6)
    x = np.array([*k, *v, norm(k), norm(v), math.log(1 + position)])
    gelu = lambda a: 0.5 * a * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
    hidden = [gelu(sum(x * column) + bias) for column, bias in zip(mine["hidden"].T, mine["hidden_bias"], strict=True)]
    return float(sum(hidden * mine["out"]) + sum(x * mine["skip"]) + mine["bias"])


def test_a_number_is_what_the_network_of_its_layer_and_head_says() -> None:
    """Token by token, of keys that RoPE has turned, in the second layer."""
    draw = np.random.default_rng(0).standard_normal
    k, v = draw((3, 2, 5, 8), np.float32), draw((3, 2, 5, 8), np.float32)
    pos = np.random.default_rng(1).integers(0, 500, (3, 2, 5))
    by = rotation(jnp.asarray(pos.reshape(6, 5)), 8, Rope(base=100.0))
    turned = turn(jnp.asarray(k.reshape(6, 5, 1, 8)), by).reshape(k.shape)
    ids = HeadIds().init(3, HEADS, (2, 3))
    tokens = Tokens(jnp.asarray(pos), turned, jnp.asarray(v), jnp.full((3, 1, 1), 500), (ids,), HEADS)
    got = Predicted(ranker=planted()).enter(tokens)
    for b, h, s in np.ndindex(3, 2, 5):
        assert got[b, h, s] == pytest.approx(said(2 + h, k[b, h, s], v[b, h, s], int(pos[b, h, s])), abs=1e-4)


def test_a_device_with_one_of_the_heads_asks_that_ones_network() -> None:
    """Which heads there are is what the layer remembers, not how many there are."""
    draw = np.random.default_rng(0).standard_normal
    k, v = (jnp.asarray(draw((2, 2, 5, 8), np.float32)) for _ in range(2))
    pos, now, ids = jnp.broadcast_to(jnp.arange(5), (2, 2, 5)), jnp.full((2, 1, 1), 4), HeadIds().init(2, HEADS, (0, 1))
    whole = Predicted(ranker=planted()).enter(Tokens(pos, k, v, now, (ids,), HEADS))
    for head in (0, 1):
        cut = lambda x, head=head: x[:, head : head + 1]
        part = Predicted(ranker=planted()).enter(Tokens(cut(pos), cut(k), cut(v), now, (cut(ids),), HEADS))
        np.testing.assert_allclose(part, cut(whole), rtol=1e-5, atol=1e-6)


def test_the_tier_keeps_what_the_networks_rank_highest() -> None:
    """Of all that left the window, behind a sink."""
    cascade = parse(SPEC).cascades[0]
    cache = LayerCache.empty(cascade, 1, Heads(4, 2, 8), 32)
    draw = np.random.default_rng(0).standard_normal
    k, v = draw((20, 2, 8), np.float32), draw((20, 2, 8), np.float32)
    step = jax.jit(LayerCache.step)
    for t in range(20):
        q = jnp.ones((1, 1, 4, 8))
        _, cache = step(cache, q, jnp.asarray(k[None, t : t + 1]), jnp.asarray(v[None, t : t + 1]), jnp.full((1, 1), t))
    for head in (0, 1):
        ranked = sorted(range(1, 18), key=lambda t: -said(head, k[t, head], v[t, head], t))
        assert sorted(ranked[:4]) == sorted(cache.slots[2].pos_BKS[0, head].tolist())


def refused(spec: CacheSpec, heads: Heads = PLAIN, layers: int = 2) -> str:
    """The one line, which stands where bytes are asked for as well as where a cache is made."""
    told = []
    for ask in (lambda: spec.nbytes([heads] * layers, 32), lambda: spec.init(1, [heads] * layers, 32)):
        with pytest.raises(BadInput) as caught:
            ask()
        told.append(str(caught.value))
    assert told[0] == told[1] and "\n" not in told[0]
    return told[0]


def test_what_is_no_ranker_of_the_model_is_told_in_one_line(tmp_path: Path) -> None:
    assert "learned needs a ranker, which kvcascade rank makes" in refused(parse("learned 4"))
    assert "nowhere is no ranker: there is no ranker.json in it" in refused(parse("learned[ranker=nowhere] 4"))
    (tmp_path / "ranker.json").write_text("[]")
    assert "is no ranker, or damaged: ranker.json cannot be read" in refused(parse(f"learned[ranker={tmp_path}] 4"))
    assert parse(SPEC).nbytes([Heads(4, 2, 8)] * 2, 32) > 0
    for heads, layers in ((Heads(4, 1, 8), 2), (Heads(4, 2, 16), 2), (Heads(4, 2, 8), 3)):
        said = f"is of a model of {SHAPE}, and this one has {Shape.of([heads] * layers)}"
        assert said in refused(parse(SPEC), heads, layers)
    unlike = [Heads(4, 2, 8), Heads(4, 4, 8)]
    with pytest.raises(BadInput, match="KV heads of one number and width"):
        parse(SPEC).nbytes(unlike, 32)
    with pytest.raises(BadInput, match="learned needs a ranker"):  # also where no spec was asked
        no_tokens = jnp.zeros((1, 1, 0, 8))
        Predicted().enter(Tokens(jnp.zeros((1, 1, 0), int), no_tokens, no_tokens, jnp.zeros((1, 1, 1), int), (), HEADS))


def test_a_damaged_ranker_is_told(tmp_path: Path) -> None:
    """Weights that are missing, and weights that are others."""
    made = Ranker(SHAPE, networks(SHAPE))
    for name in ("gone", "other"):
        made.write(tmp_path / name, {})
    (next((tmp_path / "gone" / "weights").glob("*METADATA"))).unlink()
    assert "gone is damaged: its weights cannot be read" in refused(parse(f"learned[ranker={tmp_path}/gone] 4"))
    about = json.loads((tmp_path / "other" / "ranker.json").read_text())
    (tmp_path / "other" / "ranker.json").write_text(json.dumps(about | {"fingerprint": "0" * 16}))
    assert "are not those that were written" in refused(parse(f"learned[ranker={tmp_path}/other] 4"))


@pytest.mark.parametrize("char", " |,;@[]\t")
def test_a_path_that_a_spec_cannot_say_is_refused(char: str) -> None:
    """From Python with the reason, in a spec's text in one line as well."""
    with pytest.raises(BadInput, match="ranker must be a path without spaces"):
        Learned(ranker=f"a{char}b")
    with pytest.raises(BadInput) as caught:
        parse(f"learned[ranker=a{char}b] 4")
    assert "\n" not in str(caught.value)
    assert str(parse("learned[ranker=~/a.b/c-d=é:1] 4")) == "learned[ranker=~/a.b/c-d=é:1] 4"


def test_a_ranker_comes_back_as_it_was_written(tmp_path: Path) -> None:
    """Also where it is read while a program is traced; nothing else is left beside the folder."""
    made = Ranker(SHAPE, networks(SHAPE, seed=1))
    made.write(tmp_path / "made", {"steps": 3})
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    back = []
    jax.jit(lambda x: back.append(ranker.read(str(tmp_path / "made"))) or x)(1.0)
    assert back[0].fingerprint == made.fingerprint and back[0].shape == SHAPE
    for name, array in made.networks.items():
        np.testing.assert_array_equal(back[0].networks[name], array)
    assert made.fingerprint != ranker.read(planted()).fingerprint
    with pytest.raises(OSError):
        made.write(tmp_path / "made", {})
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
