"""Run by test_sharding.py in a process of its own, where the CPU counts as two devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kvcascade.cache.layer import LayerCache
from kvcascade.cache.spec import parse
from kvcascade.cache.whole import nbytes
from kvcascade.kernels import linear
from kvcascade.kernels.heads import Heads
from kvcascade.model import generate, gpt
from kvcascade.model.config import ModelConfig

SPEC = parse("sink 1 | recent 2 | random 2@int4h | heavy 4@int8")
MESH = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
BATCH, HEADS = P("d"), P(None, "d")


def put(tree, spec):
    """Divide all arrays among the two devices, or put them whole on both; they share nothing with those given."""
    return jax.tree.map(lambda x: jax.device_put(jnp.copy(x), NamedSharding(MESH, spec)), tree)


def exchanged(compiled) -> list[str]:
    """What of a compiled program brings numbers from one device to another."""
    names = "all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter"
    return re.findall(rf"= .*? (?:{names})(?:-start)?\(.*", compiled.as_text())


def check_kept(new, compiled, along):
    """Divided as before, half the bytes on each device, in the places of the donated arrays."""
    for x in jax.tree.leaves(new):
        assert x.sharding.is_equivalent_to(NamedSharding(MESH, along), x.ndim), x.sharding
        assert [2 * share.data.nbytes for share in x.addressable_shards] == [x.nbytes] * 2
    assert compiled.memory_analysis().alias_size_in_bytes >= nbytes(new) / 2


def check_step(along):
    """A layer's step, also under shard_map with its checks, is the whole one's and stays where it is."""
    of_tokens, of_positions = (P("d"), P("d")) if along == BATCH else (P(None, None, "d"), P())
    rng = np.random.default_rng(0)
    cache = SPEC.init(4, [Heads(4, 2, 8)], 16).layers[0]
    divided = put(cache, along)
    step = jax.jit(LayerCache.step, donate_argnums=0)
    inner = jax.shard_map(
        LayerCache.step,
        mesh=MESH,
        in_specs=(along, of_tokens, of_tokens, of_tokens, of_positions),
        out_specs=(of_tokens, along),
    )
    mapped = jax.jit(inner)
    by_hand = jax.tree.map(jnp.copy, divided)
    compiled = None
    for now in range(10):
        q, k, v = (jnp.asarray(rng.normal(size=(4, 1, heads, 8)), jnp.float32) for heads in (4, 2, 2))
        pos = jnp.full((4, 1), now, jnp.int32)
        tokens = [*put((q, k, v), of_tokens), put(pos, of_positions)]
        compiled = compiled or step.lower(divided, *tokens).compile()
        want, cache = step(cache, q, k, v, pos)
        out, divided = step(divided, *tokens)
        np.testing.assert_allclose(out, want, atol=1e-6)
        assert out.sharding.is_equivalent_to(NamedSharding(MESH, of_tokens), 4)
        out, by_hand = mapped(by_hand, *tokens)
        np.testing.assert_allclose(out, want, atol=1e-6)
    assert not exchanged(compiled), exchanged(compiled)
    check_kept(divided, compiled, along)
    for found in (divided, by_hand):
        for ours, theirs in zip(found.slots, cache.slots, strict=True):
            np.testing.assert_array_equal(ours.pos_BKS, theirs.pos_BKS)


def check_model(along):
    """Eight decode steps with copied parameters: the same tokens; along heads, no more than attention's result is exchanged.

    Of rows the devices tell each other one truth value: whether some row draws its token.
    """
    config = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, mlp=64, vocab=61, context=32)
    params = jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, gpt.init(config, seed=0))
    state = generate.start(config, SPEC, 4, 16)
    rows = P("d") if along == BATCH else P()
    others = put((state.token_B, state.position_B, state.by, state.seen_BV), rows)
    divided = generate.State(put(state.cache, along), *others)
    everywhere = put(params, P())
    decode = functools.partial(generate.decode_steps, config, most=8)
    compiled = generate.decode_steps.lower(config, everywhere, divided, 8, most=8).compile()
    for line in exchanged(compiled):
        if line.startswith("= pred[] all-reduce("):
            continue
        assert along == HEADS, line
        sizes = [int(np.prod([int(n) for n in each.split(",") if n])) for each in re.findall(r"\[([\d,]*)\]", line)]
        assert sizes[0] <= 4 * config.width, line
    want, _ = decode(params, state, 8)
    tokens, after = decode(everywhere, divided, 8)
    np.testing.assert_array_equal(tokens, want)
    check_kept(after.cache, compiled, along)


def check_products():
    """Rows that are divided stay so, and outputs are as the matrix is."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 24)), jnp.float32)
    matrices = [linear.store(jnp.asarray(rng.normal(size=(n, 24)), jnp.float32), "int8") for n in (8, 16)]
    product = jax.jit(linear.products)
    want = product(x, matrices)
    for of_x, of_matrix, of_y in ((P("d"), P(), P("d")), (P(), P("d"), P(None, "d"))):
        given = put(x, of_x), put(matrices, of_matrix)
        assert not exchanged(product.lower(*given).compile())
        for y, whole in zip(product(*given), want, strict=True):
            np.testing.assert_allclose(y, whole, atol=1e-5)
            assert y.sharding.is_equivalent_to(NamedSharding(MESH, of_y), 2), y.sharding


if __name__ == "__main__":
    assert jax.device_count() == 2
    for axis in (BATCH, HEADS):
        check_step(axis)
        check_model(axis)
    check_products()
