"""An operation under JAX's transformations: the same numbers through the kernels as by a loop, and reasons for what does not run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcascade.cache.codec import CODECS
from kvcascade.cache.layer import LayerCache
from kvcascade.cache.spec import parse
from kvcascade.kernels import backend, linear, native
from kvcascade.kernels.backend import Kernel, run, using
from kvcascade.kernels.heads import Heads
from kvcascade.model import generate, gpt

SPEC = parse("recent 2 | heavy 3@int8")
EXACT = parse("sink 1@f32 | recent 3@f32")  # a gradient through a cast to few bits is rounded too
IMPLEMENTATIONS = [
    "xla",
    pytest.param("native", marks=pytest.mark.skipif(not native.ready(), reason="no C++ compiler")),
]
all_close = functools.partial(jax.tree.map, functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=2e-5))


STEP = jax.jit(LayerCache.step)
stack = lambda trees: jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def layer(seed: int, spec=SPEC, batch: int = 2, kv_heads: int = 2, head_dim: int = 8) -> tuple[LayerCache, list]:
    """A cache in which every tier has evicted, and the next step's q, k, v and positions."""
    rng = np.random.default_rng(seed)
    cache = spec.init(batch, [Heads(2 * kv_heads, kv_heads, head_dim)], 32).layers[0]
    draw = lambda heads: jnp.asarray(rng.normal(size=(batch, 1, heads, head_dim)), jnp.float32)
    tokens = [
        [draw(2 * kv_heads), draw(kv_heads), draw(kv_heads), jnp.full((batch, 1), now, jnp.int32)] for now in range(8)
    ]
    for each in tokens[:-1]:
        _, cache = STEP(cache, *each)
    return cache, tokens[-1]


def flat(step, cache):
    """A step of caches given by their arrays: a stack of caches has no cache's shapes."""
    tree = jax.tree.structure(cache)

    def call(arrays, *arguments):
        out, after = step(tree.unflatten(arrays), *arguments)
        return out, jax.tree.leaves(after)

    return call


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_step_is_mapped(implementation):
    """Once, twice, along the last axis, and over queries of one cache."""
    with using(implementation):
        layers = [layer(seed) for seed in range(4)]
        (cache, (q, k, v, pos)), step = layers[0], jax.jit(flat(LayerCache.step, layers[0][0]))
        given = stack((jax.tree.leaves(cache), *tokens) for cache, tokens in layers)
        want = stack(step(jax.tree.leaves(cache), *tokens) for cache, tokens in layers)
        all_close(jax.jit(jax.vmap(step))(*given), want)
        pairs = lambda tree: jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), tree)
        all_close(jax.jit(jax.vmap(jax.vmap(step)))(*pairs(given)), pairs(want))
        last = jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), given)
        all_close(jax.jit(jax.vmap(step, in_axes=-1))(*last), want)
        queries = jnp.stack([q, 2 * q, -q])
        outs = jax.jit(jax.vmap(lambda q: cache.step(q, k, v, pos)[0]))(queries)
        all_close(outs, jnp.stack([STEP(cache, q, k, v, pos)[0] for q in queries]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_model_is_mapped(nano, implementation):
    """A decode step of the whole model over caches, with one set of parameters, and with parameters that differ too."""
    with using(implementation):
        cache = generate.empty_cache(nano.config, SPEC, 2, 16)
        caches = stack([jax.tree.leaves(cache)] * 3)
        step = lambda params, *rest: flat(functools.partial(gpt.step, nano.config, params), cache)(*rest)
        tokens, positions = jnp.arange(6).reshape(3, 2, 1), jnp.zeros((3, 2, 1), jnp.int32)
        given = lambda i: (jax.tree.leaves(cache), tokens[i], positions[i])
        want = stack(jax.jit(step)(nano.params, *given(i)) for i in range(3))
        mapped = jax.jit(jax.vmap(step, in_axes=(None, 0, 0, 0)))
        all_close(mapped(nano.params, caches, tokens, positions), want)
        params = [jax.tree.map(lambda x, share=share: share * x, nano.params) for share in (0.5, 1.0, 2.0)]
        want = stack(jax.jit(step)(params[i], *given(i)) for i in range(3))
        all_close(jax.jit(jax.vmap(step))(stack(params), caches, tokens, positions), want)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_step_is_differentiated(implementation):
    """Forward mode is the difference quotient; reverse mode, columns at once, the derivative's derivative and rows are forward mode's."""
    with using(implementation):
        cache, (q, k, v, pos) = layer(0, EXACT)
        out = jax.jit(lambda q: (cache.step(q, k, v, pos)[0] ** 2).sum())
        along = jnp.cos(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)
        value, slope = jax.jit(lambda q: jax.jvp(out, (q,), (along,)))(q)
        np.testing.assert_allclose(value, out(q), rtol=1e-6)
        np.testing.assert_allclose(slope, (out(q + 1e-2 * along) - out(q - 1e-2 * along)) / 2e-2, rtol=1e-2)
        gradient = jax.jit(jax.grad(out))
        np.testing.assert_allclose((gradient(q) * along).sum(), slope, rtol=1e-4)
        all_close(jax.jit(jax.jacfwd(out))(q), gradient(q))
        _, bend = jax.jit(lambda q: jax.jvp(jax.grad(out), (q,), (along,)))(q)
        all_close(jax.jit(jax.grad(lambda q: (jax.grad(out)(q) * along).sum()))(q), bend)
        queries = jnp.stack([q, -q])
        want = jnp.stack([gradient(q) for q in queries])
        all_close(jax.jit(jax.vmap(jax.grad(out)))(queries), want)
        all_close(jax.jit(jax.grad(lambda q: jax.vmap(out)(q).sum()))(queries), want)


@pytest.mark.slow
def test_a_step_outside_jit():
    """What runs is compiled by itself, and the numbers are the same: as it is, mapped, in forward mode and in reverse."""
    cache, (q, k, v, pos) = layer(0, EXACT)
    out = lambda q: cache.step(q, k, v, pos)[0]
    all_close(out(q), jax.jit(out)(q))
    all_close(jax.vmap(out)(q[None])[0], jax.jit(out)(q))
    all_close(jax.jvp(out, (q,), (q,))[1], jax.jit(lambda q: jax.jvp(out, (q,), (q,))[1])(q))
    all_close(jax.vjp(out, q)[1](q), jax.jit(lambda q: jax.vjp(out, q)[1](q))(q))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_model_is_differentiated(nano, implementation):
    """A decode step by its parameters, through the MLP's activation: the two modes agree."""
    with using(implementation):
        cache = generate.empty_cache(nano.config, EXACT, 2, 16)
        tokens, positions = jnp.asarray([[3], [5]]), jnp.zeros((2, 1), jnp.int32)
        out = lambda params: (gpt.step(nano.config, params, cache, tokens, positions)[0] ** 2).sum()
        along = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), nano.params)
        _, slope = jax.jit(lambda params: jax.jvp(out, (params,), (along,)))(nano.params)
        gradient = jax.jit(jax.grad(out))(nano.params)
        dots = jax.tree.map(lambda x, y: (x * y).sum(), gradient, along)
        np.testing.assert_allclose(sum(jax.tree.leaves(dots)), slope, rtol=1e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mapped_products(implementation):
    """Rows are put together; where matrices are mapped too, each row meets its own."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 2, 20)), jnp.float32)
    matrices = [linear.store(jnp.asarray(rng.normal(size=(9, 20)), jnp.float32), "int8") for _ in range(3)]
    product = lambda x, matrix: linear.products(x, [matrix], implementation)[0]
    all_close(jax.vmap(product, (0, None))(x, matrices[0]), jnp.stack([product(row, matrices[0]) for row in x]))
    want = jnp.stack([product(*each) for each in zip(x, matrices, strict=True)])
    all_close(jax.vmap(product)(x, stack(matrices)), want)
    all_close(jax.vmap(product, (None, 0))(x[0], stack(matrices)), jnp.stack([product(x[0], m) for m in matrices]))


def test_equal_layers_are_traced_once():
    """Functions that are equal but for their identity, as every layer makes its own."""
    traced = []

    def double(factor, x):
        traced.append(factor)
        return factor * x

    jax.jit(lambda x: [run(None, functools.partial(double, 2.0), {}, x) for _ in range(5)])(jnp.ones((2, 3)))
    assert traced == [2.0]
    jax.jit(lambda x: run(None, functools.partial(double, 3.0), {}, x))(jnp.ones((2, 3)))
    assert traced == [2.0, 3.0]


def test_a_gradient_of_its_own():
    """Taken in reverse mode alone; the kernel is asked in both."""
    called = []

    def kernel(x, interpret):
        called.append(interpret)
        return jnp.sin(x)

    kernels = {"triton": Kernel(kernel, lambda x: None)}
    gradient = lambda x, dout: (7 * dout,)
    sine = lambda x: run("triton", jnp.sin, kernels, x, gradient=gradient)
    x = jnp.linspace(0, 1, 6).reshape(2, 3)
    all_close(jax.jvp(sine, (x,), (x,)), (jnp.sin(x), x * jnp.cos(x)))
    value, pull = jax.vjp(sine, x)
    all_close((value, pull(x)), (jnp.sin(x), (7 * x,)))
    assert set(called) == {True}


def test_reasons():
    """All of a program's operations with what runs them, and why other kernels do not; the same reason in the error."""
    cache, tokens = layer(0)
    found = {each.operation: each for each in backend.choices(LayerCache.step, cache, *tokens)}
    assert found.keys() == {"decode", "write"}
    kernel = {"cpu": "native"} if native.ready() else {}
    for each in found.values():
        assert each.runs == {"default": "xla"} | kernel
        assert each.refused["triton"] == "there is no GPU"
    with backend.target((8, 0)):
        found = {each.operation: each for each in backend.choices(LayerCache.step, cache, *tokens)}
    refused = found["decode"].refused["mosaic"]
    assert refused != "there is no GPU"
    slots = [(cache.slots[0], CODECS["bf16"])]
    with backend.target((8, 0)), pytest.raises(NotImplementedError) as error:
        backend.run("mosaic", lambda x: x, {"mosaic": Kernel(lambda x: x, lambda x: refused)}, slots)
    assert str(error.value) == f"mosaic: {refused}"
    with using("xla"):
        assert all(each.runs == {"default": "xla"} for each in backend.choices(LayerCache.step, cache, *tokens))
    with pytest.raises(NotImplementedError, match="no triton kernel for this operation"):
        linear.products(jnp.ones((1, 4)), [linear.store(jnp.ones((4, 4)), "float32")], "triton")


def test_prefill_has_a_reason(nano):
    """A large chunk of tokens is no native kernel's business, and the caller can read that."""
    config = dataclasses.replace(nano.config, context=80)
    cache = generate.empty_cache(config, SPEC, 1, 80)
    tokens = jnp.arange(65)[None]
    found = backend.choices(functools.partial(gpt.step, config), nano.params, cache, tokens, tokens)
    (write,) = {each.refused["native"] for each in found if each.operation == "write"}
    assert write == "made for 64 newcomers per KV head"
