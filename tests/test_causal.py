"""Causal attention against a reference in float64 numpy, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcascade.kernels.causal import causal_attention
from kvcascade.kernels.heads import Heads

H = 8


def reference(q_BTNH, k_BTKH, v_BTKH, dout_BTNH, *, window: int = 0, soft_cap: float = 0.0):
    """Output and gradients by the formulas of softmax attention, every logit held at once."""
    T, N, K = q_BTNH.shape[1], q_BTNH.shape[2], k_BTKH.shape[2]
    G = N // K
    k_BSNH, v_BSNH = np.repeat(k_BTKH, G, 2), np.repeat(v_BTKH, G, 2)
    logits = np.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) / np.sqrt(H)
    capped = soft_cap * np.tanh(logits / soft_cap) if soft_cap else logits
    slope = 1 - (capped / soft_cap) ** 2 if soft_cap else 1
    seen = np.tri(T, dtype=bool) & (np.tri(T, k=-window, dtype=bool) == 0 if window else True)
    logits = np.where(seen, capped, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("BNTS,BSNH->BTNH", weights, v_BSNH)
    dweights = np.einsum("BTNH,BSNH->BNTS", dout_BTNH, v_BSNH)
    dlogits = slope * weights * (dweights - (weights * dweights).sum(-1, keepdims=True)) / np.sqrt(H)
    by_group = lambda x_BSNH: x_BSNH.reshape(*k_BTKH.shape[:3], G, -1).sum(3)
    dq = np.einsum("BNTS,BSNH->BTNH", dlogits, k_BSNH)
    dk = by_group(np.einsum("BNTS,BTNH->BSNH", dlogits, q_BTNH))
    dv = by_group(np.einsum("BNTS,BTNH->BSNH", weights, dout_BTNH))
    return out, dq, dk, dv


def draw(T: int, N: int, K: int, B: int = 2, scale: float = 3.0) -> list[np.ndarray]:
    """Queries, keys, values and output gradients; large enough that attention is peaked."""
    rng = np.random.default_rng(T * 100 + N * 10 + K)
    return [scale * rng.standard_normal((B, T, heads, H)) for heads in (N, K, K, N)]


@functools.partial(jax.jit, static_argnames=("window", "soft_cap"))
def forward_and_backward(q, k, v, dout, window=0, soft_cap=0.0):
    heads = Heads(q.shape[2], k.shape[2], q.shape[3], v.shape[3], window=window, soft_cap=soft_cap)
    out, pull = jax.vjp(functools.partial(causal_attention, heads=heads), q, k, v)
    return out, *pull(dout)


# 64 is a block; beyond 1,024 tokens several share a loop.
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize(("N", "K"), [(4, 4), (4, 2), (4, 1)], ids=["G1", "G2", "G4"])
def test_equals_the_reference(T: int, N: int, K: int) -> None:
    """Output and all three gradients, for lengths around the block size and MHA, GQA and MQA."""
    arrays = draw(T, N, K)
    found = forward_and_backward(*(jnp.asarray(x, jnp.float32) for x in arrays))
    for name, ours, exact in zip(("out", "dq", "dk", "dv"), found, reference(*arrays), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("window", [1, 5, 64, 100])
def test_a_window_hides_what_is_older(window: int) -> None:
    """A query sees itself and the window - 1 positions before it."""
    arrays = draw(130, 4, 2)
    found = forward_and_backward(*(jnp.asarray(x, jnp.float32) for x in arrays), window=window)
    for ours, exact in zip(found, reference(*arrays, window=window), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("soft_cap", "window"), [(2.0, 0), (30.0, 20)])
def test_a_soft_cap_bends_the_logits(soft_cap: float, window: int) -> None:
    """Logits are cap · tanh(logit / cap), and so are their gradients."""
    arrays = draw(130, 4, 2)
    sight = {"window": window, "soft_cap": soft_cap}
    found = forward_and_backward(*(jnp.asarray(x, jnp.float32) for x in arrays), **sight)
    for ours, exact in zip(found, reference(*arrays, **sight), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-4)


def test_values_may_be_of_another_width() -> None:
    """The output is as wide as a value."""
    q, k, _, _ = draw(70, 4, 2)
    v, dout = (np.random.default_rng(0).standard_normal((2, 70, heads, 5)) for heads in (2, 4))
    found = forward_and_backward(*(jnp.asarray(x, jnp.float32) for x in (q, k, v, dout)))
    for ours, exact in zip(found, reference(q, k, v, dout), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [0, 70, 1050])
def test_loops_over_several_blocks(window: int) -> None:
    """A length that no block size divides, with two blocks to a loop."""
    arrays = draw(1100, 2, 1, B=1)
    found = forward_and_backward(*(jnp.asarray(x, jnp.float32) for x in arrays), window=window)
    for ours, exact in zip(found, reference(*arrays, window=window), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-3, atol=2e-4)


def test_huge_logits_stay_finite() -> None:
    """The maximum is taken out before exp, forward and backward."""
    q, k, v, dout = draw(70, 2, 2, scale=300.0)
    found = forward_and_backward(*(jnp.asarray(x, jnp.float32) for x in (q, k, v, dout)))
    assert all(np.isfinite(x).all() for x in found)
    np.testing.assert_allclose(found[0], reference(q, k, v, dout)[0], rtol=1e-3, atol=0.1)


def test_bf16_comes_back_as_bf16() -> None:
    """Products in bf16, sums in float32: within bf16's rounding of the reference, gradients of the inputs' types."""
    arrays = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in draw(100, 4, 2, scale=1.0)]
    found = forward_and_backward(*(jnp.asarray(x, jnp.bfloat16) for x in arrays))
    for ours, exact in zip(found, reference(*arrays), strict=True):
        assert ours.dtype == jnp.bfloat16
        assert np.abs(np.asarray(ours, np.float64) - exact).max() < 0.02 * np.abs(exact).max()


def test_the_future_has_no_gradient() -> None:
    """What a token attends to ends at the token: later keys and values get exactly zero."""
    q, k, v, dout = (jnp.asarray(x, jnp.float32) for x in draw(65, 2, 2))
    for t in (0, 31, 63):
        _, _, dk, dv = forward_and_backward(q, k, v, dout * (jnp.arange(65) == t)[:, None, None])
        assert not dk[:, t + 1 :].any() and not dv[:, t + 1 :].any()
        assert dv[:, : t + 1].any()


def test_never_holds_the_logits_of_a_batch() -> None:
    """Forward and backward of eight rows take less memory than their logits alone would, as it goes row by row."""
    B, T, N = 8, 512, 4
    shapes = [jax.ShapeDtypeStruct((B, T, heads, H), jnp.float32) for heads in (N, N, N, N)]
    memory = forward_and_backward.lower(*shapes).compile().memory_analysis()
    assert memory and memory.temp_size_in_bytes < 4 * B * N * T * T


def compiled(T: int, N: int, window: int = 0) -> jax.stages.Compiled:
    """Forward and backward of one row, compiled and not run."""
    shapes = [jax.ShapeDtypeStruct((1, T, heads, 64), jnp.float32) for heads in (N, 1, 1, N)]
    return forward_and_backward.lower(*shapes, window=window).compile()


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 512])
def test_memory_is_linear_in_the_length(window: int) -> None:
    """Four times the tokens take four times the memory, and at 8,192 that is a twentieth of what all logits would take."""
    N = 3
    short, long = (compiled(T, N, window).memory_analysis() for T in (8192, 32768))
    assert short and long and long.temp_size_in_bytes < 4.2 * short.temp_size_in_bytes
    assert 20 * short.temp_size_in_bytes < 4 * N * 8192**2


def test_what_a_window_hides_is_not_multiplied() -> None:
    """Of 1,024 tokens a block of 64 queries with a window of 65 sees 128: an eighth, and without a window half of them on average."""
    shapes = [jax.ShapeDtypeStruct((1, 1024, 1, 64), jnp.float32)] * 3
    call = lambda window: functools.partial(causal_attention, heads=Heads(1, 1, 64, window=window))
    cost = lambda window: jax.jit(call(window)).lower(*shapes).compile().cost_analysis()
    windowed, whole = cost(65), cost(0)
    assert windowed and whole and windowed["flops"] < 0.3 * whole["flops"]


def test_elsewhere_it_is_the_same_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The implementation for other platforms, run here, equals the reference too."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, cpu, default: default(*arrays))
    arrays = draw(65, 4, 2)
    call = functools.partial(causal_attention, heads=Heads(4, 2, H))
    out, pull = jax.vjp(call, *(jnp.asarray(x, jnp.float32) for x in arrays[:3]))
    for ours, exact in zip((out, *pull(jnp.asarray(arrays[3], jnp.float32))), reference(*arrays), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("platform", ["cuda", "cpu"])
def test_lowers_for_the_platform(platform: str) -> None:
    """Elsewhere than on a CPU it is XLA's own attention, which has no loop over rows."""
    shapes = [jax.ShapeDtypeStruct((2, 96, heads, H), jnp.bfloat16) for heads in (4, 2, 2, 4)]
    exported = jax.export.export(forward_and_backward, platforms=[platform])(*shapes)
    assert ("stablehlo.while" in exported.mlir_module()) == (platform == "cpu")
