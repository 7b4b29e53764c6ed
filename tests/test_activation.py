"""The fused activation on every backend: values and gradients against float64, one mask everywhere, nothing kept but the inputs."""

import functools
import math
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races

from kvcascade.eval.kernels import two_kernel
from kvcascade.kernels import activation, backend, threefry
from kvcascade.kernels.activation import activate
from kvcascade.kernels.nonlinear import ACTIVATIONS, GATED, Inputs
from kvcascade.kernels.traffic import counting

needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")
KERNELS = ["mosaic", pytest.param("triton", marks=needs_triton)]
BLOCKS = (32, 256)  # what every kernel takes
KEY = jax.random.key(11)


def draw(seed: int, rows: int, columns: int, kind: str, biased: bool, dtype="float32") -> tuple[Inputs, jax.Array]:
    """Inputs and a gradient of the output, from N(0, 4)."""
    rng = np.random.default_rng(seed)
    wide = lambda: jnp.asarray(rng.normal(size=(rows, columns)) * 2, dtype)
    bias = lambda: jnp.asarray(rng.normal(size=columns), jnp.float32) if biased else None
    gated = kind in GATED
    return Inputs(wide(), wide() if gated else None, bias(), bias() if gated else None, None), wide()


def gelu(x: Any) -> tuple[Any, Any]:
    """GELU in its tanh form and its slope."""
    tanh = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    curve = (1 - tanh**2) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * curve


def exact(kind: str, rate: float, inputs: Inputs, dout) -> tuple:
    """The output and the gradients of up, gate and the two biases by the formulas in float64."""
    wide: list[Any] = [None if x is None else np.asarray(x, np.float64) for x in (*inputs[:4], dout)]
    up, gate, bias, gate_bias, dout = wide
    scale = np.asarray(threefry.mask(threefry.key_words(KEY), rate, *up.shape)) / (1 - rate) if rate else 1.0
    up = up if bias is None else up + bias
    slope, dgate = 1.0 * (up > 0), np.zeros(0)
    gate: Any = gate if gate is None or gate_bias is None else gate + gate_bias
    match kind:
        case "relu":
            out = np.maximum(up, 0)
        case "gelu":
            out, slope = gelu(up)
        case "geglu":
            (slope, by_gate), by_up = gelu(gate), scale * dout * up
            out, dgate = slope * up, by_up * by_gate
        case _:
            sigmoid = 1 / (1 + np.exp(-gate))
            out, slope = gate * sigmoid * up, gate * sigmoid
            dgate = scale * dout * up * (sigmoid + gate * sigmoid * (1 - sigmoid))
    dup = scale * dout * slope
    sums = None if bias is None else dup.sum(0), None if gate_bias is None else dgate.sum(0)
    return scale * out, dup, None if gate is None else dgate, *sums


def found(kind: str, rate: float, inputs: Inputs, dout, implementation) -> tuple:
    """The same from `activate`."""
    function = lambda up, gate, bias, gate_bias: activate(
        up, gate, kind, rate, KEY, bias, gate_bias, implementation=implementation
    )
    out, pull = jax.vjp(function, *inputs[:4])
    return out, *pull(dout)


def check(kind: str, rate: float, inputs: Inputs, dout, implementation) -> None:
    """Values within 1e-5, gradients within 1e-4 of float64 over the same inputs; in bfloat16 within the one rounding at the end."""
    ours, right = found(kind, rate, inputs, dout, implementation), exact(kind, rate, inputs, dout)
    for index, (a, b) in enumerate(zip(ours, right, strict=True)):
        assert (a is None) == (b is None)
        if a is None:
            continue
        assert a.dtype == (inputs.up.dtype if index < 3 else jnp.float32)
        tolerance = 1e-4 if index else 1e-5
        rounding = 2**-8 if a.dtype == jnp.bfloat16 else tolerance
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=rounding, atol=tolerance)


@given(
    kind=st.sampled_from(ACTIVATIONS),
    rate=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    biased=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 99),
)
def test_reference(kind, rate, rows, columns, biased, dtype, seed) -> None:
    """Any shape, odd ones too."""
    check(kind, rate, *draw(seed, rows, columns, kind, biased, dtype), "xla")


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize(
    ("kind", "rate", "biased", "dtype"),
    [
        ("relu", 0.0, True, "float32"),
        ("relu", 0.1, False, "bfloat16"),
        ("gelu", 0.5, True, "float32"),
        ("gelu", 0.1, True, "bfloat16"),
        ("gelu", 0.0, False, "float32"),
        ("swiglu", 0.1, True, "float32"),
        ("swiglu", 0.5, False, "float32"),
        ("swiglu", 0.5, True, "bfloat16"),
        ("geglu", 0.1, True, "float32"),
        ("geglu", 0.0, False, "bfloat16"),
    ],
)
def test_kernels(implementation, kind, rate, biased, dtype) -> None:
    """As exact as the reference, over several blocks of rows and of columns, the mask that of the reference, and no races."""
    inputs, dout = draw(0, 2 * BLOCKS[0], 2 * BLOCKS[1], kind, biased, dtype)
    check(kind, rate, inputs, dout, implementation)
    if implementation == "mosaic":
        assert not get_races().races_found


@needs_triton
@pytest.mark.parametrize("columns", [8, 70, 257])
def test_triton_takes_any_width(columns) -> None:
    """Blocks that end outside of the array, in rows and in each quarter of the columns."""
    check("swiglu", 0.3, *draw(1, 45, columns, "swiglu", True), "triton")


@needs_triton
@pytest.mark.parametrize(("kind", "arrays"), [("gelu", 1), ("swiglu", 2)])
def test_every_byte_moves_once(kind, arrays) -> None:
    """The forward pass reads each element once and writes one for it; the backward pass reads one more and writes as many as it reads."""
    from kvcascade.kernels import activation_triton

    inputs, dout = draw(2, *BLOCKS, kind, False, "bfloat16")
    inputs = inputs._replace(words=threefry.key_words(KEY))
    one, words = dout.nbytes, 8 * BLOCKS[1] // 256
    for function, read, written in (
        (functools.partial(activation_triton.forward, kind, 0.1, inputs), arrays, 1),
        (functools.partial(activation_triton.backward, kind, 0.1, inputs, dout), arrays + 1, arrays),
    ):
        with counting() as traffic:
            jax.block_until_ready(function(interpret=True))
        assert (traffic.read.total(), traffic.written.total()) == (read * one + words, written * one)


@pytest.mark.parametrize("implementation", ["xla", *KERNELS])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_one_mask(implementation, kind) -> None:
    """Forward and backward, on every backend: what is zero in the output is zero in each gradient, and is what the key says."""
    ones = jnp.ones(BLOCKS)
    gate = ones if kind in GATED else None
    out, pull = jax.vjp(lambda up, gate: activate(up, gate, kind, 0.3, KEY, implementation=implementation), ones, gate)
    mask = np.asarray(threefry.mask(threefry.key_words(KEY), 0.3, *BLOCKS))
    assert 0.65 < mask.mean() < 0.75
    for array in (out, *pull(ones)):
        if array is not None:
            np.testing.assert_array_equal(np.asarray(array) != 0, mask)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gradients_of_the_formulas(kind) -> None:
    """The backward pass that is written out is what autodiff makes of the forward one."""
    inputs, dout = draw(3, 6, 20, kind, True)
    inputs = inputs._replace(words=threefry.key_words(KEY))
    ours = activation.backward(kind, 0.2, inputs, dout)
    forward = lambda up, gate, bias, gate_bias: activation.forward(
        kind, 0.2, Inputs(up, gate, bias, gate_bias, inputs.words)
    )
    theirs = jax.vjp(forward, *inputs[:4])[1](dout)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours[:4], theirs)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_only_the_inputs_are_kept(kind) -> None:
    """Between the passes there is no mask and no activation: as many elements as went in, and the key's two words."""
    inputs, _ = draw(0, 8, 12, kind, True)
    keep = [x for x in inputs if x is not None]
    function = lambda *parts: activate(parts[0], parts[1], kind, 0.5, KEY, *parts[2:])
    _, pull = jax.vjp(function, *inputs[:4])
    residuals = sorted(x.shape for x in jax.tree.leaves(pull))
    assert residuals == sorted([x.shape for x in keep] + [(2,)])


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout(rate: float) -> None:
    """A share of about `rate` is zero, the rest is scaled up so that the mean stays; another key drops others."""
    ones = jnp.ones((200, 100))
    out = activate(ones, None, "relu", rate, KEY)
    dropped = np.asarray(out) == 0
    assert abs(dropped.mean() - rate) < 5 * math.sqrt(rate * (1 - rate) / dropped.size)
    np.testing.assert_allclose(np.asarray(out)[~dropped], 1 / (1 - rate), rtol=1e-5)
    np.testing.assert_array_equal(activate(ones, None, "relu", rate, KEY), out)
    assert (activate(ones, None, "relu", rate, jax.random.key(1)) != out).any()


def test_no_dropout_without_a_key_or_a_rate() -> None:
    """Evaluation passes no key, and a rate of 0 needs none."""
    up = jnp.linspace(-6, 6, 101)
    plain = activate(up, None, "gelu")
    np.testing.assert_array_equal(activate(up, None, "gelu", 0.5), plain)
    np.testing.assert_array_equal(activate(up, None, "gelu", 0.0, KEY), plain)


def test_leading_axes_are_rows() -> None:
    """The mask is that of the flattened rows."""
    up = draw(0, 12, 20, "gelu", False)[0].up
    flat = activate(up, None, "gelu", 0.5, KEY)
    np.testing.assert_array_equal(activate(up.reshape(3, 4, 20), None, "gelu", 0.5, KEY), flat.reshape(3, 4, 20))


def test_far_from_zero() -> None:
    """No overflow becomes a NaN, in values or slopes."""
    far = jnp.asarray([-1e4, -100.0, -20.0, 20.0, 100.0, 1e4])
    for kind in ACTIVATIONS:
        out, pull = jax.vjp(lambda up, gate, kind=kind: activate(up, gate, kind), far, far)
        assert np.isfinite(out).all() and all(np.isfinite(x).all() for x in pull(jnp.ones(6)))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_two_kernels_give_the_same(kind) -> None:
    """With the mask written to memory and read again: bit for bit in float32, forward and backward."""
    inputs, dout = draw(5, 16, 40, kind, True)
    inputs, rate = inputs._replace(words=threefry.key_words(KEY)), 0.1
    program = lambda function, *static: jax.jit(functools.partial(function, *static))
    hidden = program(two_kernel.activate, kind)(inputs)
    out, mask = program(two_kernel.drop, rate)(hidden, inputs.words)
    np.testing.assert_array_equal(out, program(activation.forward, kind, rate)(inputs))
    dhidden = program(two_kernel.drop_backward, rate)(mask, dout)
    theirs = program(two_kernel.activate_backward, kind)(inputs, dhidden)
    jax.tree.map(np.testing.assert_array_equal, theirs, program(activation.backward, kind, rate)(inputs, dout))


def test_what_it_cannot_do_is_an_error() -> None:
    """Another name, a gated kind without a gate, a rate that keeps nothing, and a key of another generator."""
    up = jnp.ones((2, 4))
    for kind in ("tanh", *GATED):
        with pytest.raises(ValueError, match=f"no activation '{kind}'"):
            activate(up, None, kind)
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match="at least 0 and below 1"):
            activate(up, None, "gelu", rate, KEY)
    with pytest.raises(ValueError, match="draws from threefry2x32"):
        activate(up, None, "gelu", 0.5, jax.random.key(0, impl="rbg"))


@pytest.mark.parametrize("implementation", KERNELS)
def test_a_kernel_says_what_it_refuses(implementation) -> None:
    """Asked for, it says why; not asked for, the reference takes its place."""
    for up, reason in ((jnp.ones((3, 256)), "3 rows"), (jnp.ones(BLOCKS, jnp.float16), "float16")):
        with pytest.raises(NotImplementedError, match=f"{implementation}: .*{reason}"):
            activate(up, None, "gelu", implementation=implementation)
        with backend.target((9, 0)):
            np.testing.assert_array_equal(activate(up, None, "gelu"), activate(up, None, "gelu", implementation="xla"))
