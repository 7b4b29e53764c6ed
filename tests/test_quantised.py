"""Quantised checkpoints: every matrix is what the formulas of the library that writes them say, in float32 and kept in four bits."""

import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantised_models as made
import tiny_models

from kvcascade.cache.errors import BadInput
from kvcascade.kernels import linear
from kvcascade.model import gpt, pretrained, tensors

forward = jax.jit(gpt.forward, static_argnums=0)
GPTQ = {"quant_method": "gptq", "bits": 4}
OURS = {
    f"layers.{layer}.{ours}": f"model.layers.{layer}.{theirs}_proj.weight"
    for layer in range(tiny_models.LAYERS)
    for ours, theirs in [(f"attention.{x}", f"self_attn.{x}") for x in "qkvo"] + [(x, f"mlp.{x}") for x in ("gate", "up", "down")]
}  # fmt: skip


def _at(params, path):
    for part in path.split("."):
        params = params[int(part) if part.isdigit() else part]
    return params


def _check(folder, dense, four_bits=True):
    """float32 is the formula to the last bit; so is int4 where it was four bits; its logits are those of bfloat16 products."""
    exact = pretrained.load(str(folder))
    for ours, theirs in OURS.items():
        np.testing.assert_array_equal(_at(exact.params, ours)["weight"], dense[theirs])
    small = pretrained.load(str(folder), weights="int4")
    for ours, theirs in OURS.items() if four_bits else ():
        matrix = {name: array for name, array in _at(small.params, ours).items() if array.size}
        assert matrix["weight"].dtype == jnp.uint8
        np.testing.assert_array_equal(linear.rows(matrix, inputs=dense[theirs].shape[1]), dense[theirs])
    if not four_bits:
        return small
    want = forward(exact.config, exact.params, jnp.asarray(tiny_models.PROMPTS, jnp.int32))
    got = forward(small.config, small.params, jnp.asarray(tiny_models.PROMPTS, jnp.int32))
    assert np.std(got - want) < 0.03 * np.std(want)
    return small


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "symmetric", "more"),
    [
        (32, True, {}),
        (32, False, {"act_order": True}),
        (-1, False, {}),
        (128, True, {"act_order": True}),
        (32, False, {"version": 2}),
    ],
)
def test_gptq(group, symmetric, more, tmp_path):
    """Groups of which the last is short, or one for all; zero points; columns in another order; zeros as they are in version 2."""
    said = GPTQ | {"group_size": group, "sym": symmetric, "desc_act": bool(more.get("act_order"))}
    said |= {"checkpoint_format": "gptq_v2"} if more.get("version") == 2 else {}
    dense = made.write(tmp_path, said, made.gptq(np.random.default_rng(0), group, symmetric, **more))
    small = _check(tmp_path, dense)
    down = _at(small.params, "layers.0.down")
    assert bool(down["low"].size) is not symmetric
    assert bool(down["order"].size) is (more.get("act_order", False) and group == 32)


@pytest.mark.parametrize("bits", [2, 8])
def test_gptq_of_other_bits_is_dequantised(bits, tmp_path):
    said = GPTQ | {"bits": bits, "group_size": 16}
    dense = made.write(tmp_path, said, made.gptq(np.random.default_rng(0), 16, False, bits=bits))
    exact = pretrained.load(str(tmp_path))
    np.testing.assert_array_equal(_at(exact.params, "layers.1.gate")["weight"], dense[OURS["layers.1.gate"]])


def test_gptq_in_groups_that_are_not_kept_in_four_bits_is_kept_in_eight(tmp_path):
    dense = made.write(tmp_path, GPTQ | {"group_size": 16}, made.gptq(np.random.default_rng(0), 16, False))
    small = _check(tmp_path, dense, four_bits=False)
    assert _at(small.params, "layers.0.up")["weight"].dtype == jnp.int8


def test_gptq_said_in_a_file_of_its_own(tmp_path):
    """quantize_config.json, as AutoGPTQ wrote it beside a config.json that says nothing."""
    dense = made.write(tmp_path, {}, made.gptq(np.random.default_rng(0), 32, False))
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False}))
    _check(tmp_path, dense)


@pytest.mark.parametrize("key", ["bits", "w_bit"])
def test_awq(key, tmp_path):
    said = {
        "quant_method": "awq",
        key: 4,
        "group_size": 16 if key == "w_bit" else 32,
        "version": "gemm",
        "zero_point": True,
    }
    dense = made.write(tmp_path, said, made.awq(np.random.default_rng(0), said["group_size"]))
    _check(tmp_path, dense, four_bits=key == "bits")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("block", {"quant_method": "fp8", "weight_block_size": [16, 24], "activation_scheme": "dynamic"}),
        ("row", {"quant_method": "fbgemm_fp8"}),
        ("all", {"quant_method": "fp8", "activation_scheme": "static"}),
        ("row", {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    ],
)
def test_fp8(kind, said, tmp_path):
    dense = made.write(tmp_path, said, made.fp8(kind))
    _check(tmp_path, dense, four_bits=False)


@pytest.mark.parametrize("quantise", [made.llm_int8, made.nf4(False), made.nf4(True)])
def test_bitsandbytes(quantise, tmp_path):
    said = {"quant_method": "bitsandbytes", "load_in_8bit": quantise is made.llm_int8}
    _check(tmp_path, made.write(tmp_path, said, quantise), four_bits=False)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quant_method": "aqlm"}, "quantised by 'aqlm', which is not read; there are gptq, awq"),
        ({"quant_method": "mxfp4"}, "'mxfp4', which is not read"),
        ({"bits": 4}, "None, which is not read"),
        (GPTQ | {"bits": 3}, "gptq with 3 bits, which is not read"),
        (GPTQ | {"checkpoint_format": "marlin"}, "with the format marlin"),
        (GPTQ | {"group_size": "all"}, "group_size is 'all'"),
        (GPTQ | {"group_size": 64}, "qzeros has the shape"),
        ({"quant_method": "awq", "version": "gemv"}, "awq with the version gemv"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "the format pack-quantized"),
        ([4], r"quantization_config is \[4\], not an object"),
    ],
)
def test_what_is_not_read_is_one_line(said, message, tmp_path):
    made.write(tmp_path, said, made.gptq(np.random.default_rng(0), 16, True))
    with pytest.raises(BadInput, match=message):
        pretrained.load(str(tmp_path))


@pytest.mark.parametrize("part", ["qzeros", "scales", "g_idx"])
def test_a_damaged_part_is_named(part, tmp_path):
    """A part that is missing, or of another shape."""
    quantise = made.gptq(np.random.default_rng(0), 32, True)
    for change in ("missing", "shorter"):

        def broken(stem, matrix, change=change):
            parts, dense = quantise(stem, matrix)
            array = parts.pop(f"{stem}.{part}")
            return parts | ({f"{stem}.{part}": array[:-1]} if change == "shorter" else {}), dense

        made.write(tmp_path, GPTQ | {"group_size": 32}, broken)
        if part == "g_idx" and change == "missing":
            pretrained.load(str(tmp_path))  # without it groups follow each other
            continue
        with pytest.raises(BadInput, match=rf"lacks .*{part}" if change == "missing" else rf"{part} has the shape"):
            pretrained.load(str(tmp_path))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16"])
def test_tensors_of_every_type_with_a_fraction(dtype, tmp_path):
    weights = tiny_models.weights("llama")
    tiny_models.write("llama", tmp_path)
    made.save({name: array.astype(jnp.dtype(dtype)) for name, array in weights.items()}, tmp_path / "model.safetensors")
    found = pretrained.load(str(tmp_path)).params["embed"]["weight"]
    want = weights["model.embed_tokens.weight"].astype(jnp.dtype(dtype)).astype(np.float32)
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("dtype", ["I8", "U8", "I64", "BOOL", "C64", "F4", "F6_E2M3"])
def test_tensors_of_other_types_are_named(dtype, tmp_path):
    bits = {"I64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6}.get(dtype, 8)
    tiny_models.write("llama", tmp_path)
    header, start = {}, 0
    for name, array in tiny_models.weights("llama").items():
        end = start + array.size * bits // 8
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(start))
    with pytest.raises(BadInput, match=rf"model.safetensors: model.* is of the type {dtype}"):
        pretrained.load(str(tmp_path))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_four_bits_of_gguf_are_kept_as_they_are(kind, tmp_path):
    """To the last bit what gguf dequantises, also through rows in another order."""
    matrix = np.random.default_rng(0).normal(size=(24, 96)).astype(np.float32)
    writer, kind = gguf.GGUFWriter(tmp_path / "m.gguf", "llama"), gguf.GGMLQuantizationType[kind]
    writer.add_tensor("w", gguf.quantize(matrix, kind), raw_dtype=kind)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    file = tensors.GGUFFile(tmp_path / "m.gguf")
    packed = file.packed("w")
    assert file.has_int4 is (packed is not None) is (kind.name != "Q8_0")
    if packed:
        np.testing.assert_array_equal(linear.rows(packed), file.read("w"))


def test_experts_in_four_bits(tmp_path):
    """Experts stand one below the other as they are in their files; the router is in float32."""
    rng = np.random.default_rng(0)
    dense = made.write(tmp_path, GPTQ | {"group_size": -1}, made.gptq(rng, -1, False), "qwen3_moe")
    exact, small = pretrained.load(str(tmp_path)), pretrained.load(str(tmp_path), weights="int4")
    ups = [dense[f"model.layers.1.mlp.experts.{index}.up_proj.weight"] for index in range(8)]
    np.testing.assert_array_equal(_at(exact.params, "layers.1.experts.up")["weight"], np.concatenate(ups))
    kept = {name: array for name, array in _at(small.params, "layers.1.experts.up").items() if array.size}
    assert kept["weight"].dtype == jnp.uint8
    np.testing.assert_array_equal(linear.rows(kept, inputs=tiny_models.WIDTH), np.concatenate(ups))
    want, got = (
        forward(each.config, each.params, jnp.asarray(tiny_models.PROMPTS, jnp.int32)) for each in (exact, small)
    )
    assert jnp.std(got - want) < 0.03 * jnp.std(want)
