"""The tiny models of `tiny_models` as the libraries of quantised checkpoints write them, from their documented formulas in numpy."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tiny_models

TYPES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "int8": "I8", "uint8": "U8", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
NF4 = np.array([
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
], np.float32)  # fmt: skip


def save(tensors: dict[str, np.ndarray], path: Path) -> None:
    """A safetensors file of any types, which the library's numpy side cannot all write."""
    header, blob = {}, b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        where = [len(blob), len(blob) + len(raw)]
        header[name] = {"dtype": TYPES[array.dtype.name], "shape": array.shape, "data_offsets": where}
        blob += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + blob)


def write(folder: Path, said: dict, quantise, name: str = "llama") -> dict[str, np.ndarray]:
    """A model whose projections `quantise(stem, matrix)` made into (its tensors, what they are in float32); returns all in float32."""
    tiny_models.write(name, folder)
    config = tiny_models.CONFIGS[name] | {"quantization_config": said}
    (folder / "config.json").write_text(json.dumps(config))
    tensors, dense = {}, {}
    for each, array in tiny_models.weights(name).items():
        if "_proj.weight" in each:
            stem = each.removesuffix(".weight")
            parts, dense[each] = quantise(stem, array)
            tensors |= parts
        else:
            tensors[each], dense[each] = array, array
    save(tensors, folder / "model.safetensors")
    return dense


def _into_words(codes: np.ndarray, order: Sequence[int] = range(8), bits: int = 4) -> np.ndarray:
    """Codes [A, B] into int32 [A, B · bits / 32]: nibble i of a word is its code order[i]."""
    many = 32 // bits
    words = np.zeros((codes.shape[0], codes.shape[1] // many), np.uint32)
    for column in range(words.shape[1]):
        for index in range(many):
            words[:, column] |= codes[:, column * many + order[index]].astype(np.uint32) << np.uint32(index * bits)
    return words.view(np.int32)


def draw(rng, O: int, I: int, groups: int, symmetric: bool, bits: int = 4):
    """Codes [I, O], zeros [groups, O] and scales in float16 [groups, O], as a quantiser would leave them."""
    codes = rng.integers(0, 2**bits, (I, O))
    zeros = np.full((groups, O), 2 ** (bits - 1)) if symmetric else rng.integers(1, 2**bits, (groups, O))
    return codes, zeros, (rng.uniform(0.5, 2, (groups, O)) * 0.3 / 2**bits).astype(np.float16)


def gptq(rng, group: int, symmetric: bool, act_order: bool = False, version: int = 1, bits: int = 4):
    """AutoGPTQ's QuantLinear: w[i, o] = scales[g_idx[i], o] · (q[i, o] - zeros[g_idx[i], o]), zeros less by one in version 1."""

    def quantise(stem: str, matrix: np.ndarray):
        O, I = matrix.shape
        size = I if group == -1 else group
        codes, zeros, scales = draw(rng, O, I, -(-I // size), symmetric, bits)
        g_idx = (np.arange(I) // size).astype(np.int32)
        g_idx = rng.permutation(g_idx) if act_order else g_idx
        dense = scales[g_idx].astype(np.float32) * (codes - zeros[g_idx])
        parts = {
            "qweight": np.ascontiguousarray(_into_words(codes.T, range(32 // bits), bits).T),
            "qzeros": _into_words(zeros - (version == 1), range(32 // bits), bits),
            "scales": scales,
            "g_idx": g_idx,
        }
        return {f"{stem}.{part}": array for part, array in parts.items()}, dense.T.astype(np.float32)

    return quantise


def awq(rng, group: int):
    """AutoAWQ's WQLinear_GEMM: w[i, o] = (q[i, o] - zeros[i // group, o]) · scales[i // group, o], words interleaved."""

    def quantise(stem: str, matrix: np.ndarray):
        O, I = matrix.shape
        codes, zeros, scales = draw(rng, O, I, -(-I // group), False)
        index, order = np.arange(I) // group, [0, 2, 4, 6, 1, 3, 5, 7]
        dense = (codes - zeros[index]) * scales[index].astype(np.float32)
        parts = {"qweight": _into_words(codes, order), "qzeros": _into_words(zeros, order), "scales": scales}
        return {f"{stem}.{part}": array for part, array in parts.items()}, dense.T.astype(np.float32)

    return quantise


def fp8(kind: str, block: tuple[int, int] = (16, 24)):
    """Fine-grained FP8 of transformers (`weight_scale_inv` per block), or `weight_scale` per row or for all."""

    def quantise(stem: str, matrix: np.ndarray):
        O, I = matrix.shape
        if kind == "block":
            rows, columns = block
            up = -(-O // rows) * rows - O, -(-I // columns) * columns - I
            blocks = np.pad(np.abs(matrix), ((0, up[0]), (0, up[1]))).reshape(
                -(-O // rows), rows, -(-I // columns), columns
            )
            scale = (blocks.max((1, 3)) / 448).astype(np.float32)
            wide = np.kron(scale, np.ones(block, np.float32))[:O, :I]
        else:
            scale = np.abs(matrix).max(1 if kind == "row" else None, keepdims=kind == "row") / np.float32(448)
            wide = scale
        codes = np.asarray(jnp.asarray(matrix / wide).astype(jnp.float8_e4m3fn))
        name = "weight_scale_inv" if kind == "block" else "weight_scale"
        parts = {f"{stem}.weight": codes, f"{stem}.{name}": np.asarray(scale, np.float32)}
        return parts | {f"{stem}.input_scale": np.ones((), np.float32)}, codes.astype(np.float32) * wide

    return quantise


def llm_int8(stem: str, matrix: np.ndarray):
    """LLM.int8() (Dettmers et al. 2022) of bitsandbytes: rows of absolute maximum SCB, w = q · SCB / 127."""
    largest = np.abs(matrix).max(1).astype(np.float32)
    codes = np.rint(matrix / largest[:, None] * 127).astype(np.int8)
    parts = {f"{stem}.weight": codes, f"{stem}.SCB": largest, f"{stem}.weight_format": np.uint8(0)[None]}
    return parts, codes.astype(np.float32) * (largest / 127)[:, None]


def nf4(nested: bool, blocksize: int = 64):
    """NF4 of bitsandbytes: a table's entry times a block's absolute maximum, the first weight in a byte's high half."""

    def quantise(stem: str, matrix: np.ndarray):
        flat = matrix.reshape(-1, blocksize)
        absmax = np.abs(flat).max(1)
        state = {"quant_type": "nf4", "blocksize": blocksize, "dtype": "float32", "shape": list(matrix.shape)}
        parts = {f"{stem}.weight.absmax": absmax, f"{stem}.weight.quant_map": NF4}
        if nested:
            size, table = 4, np.linspace(-1, 1, 256).astype(np.float32)
            offset = np.float32(absmax.mean())
            padded = np.pad(absmax - offset, (0, -len(absmax) % size)).reshape(-1, size)
            most = np.abs(padded).max(1)
            codes = np.abs((padded / most[:, None])[..., None] - table).argmin(-1).reshape(-1)[: len(absmax)]
            absmax = table[codes] * most.repeat(size)[: len(codes)] + offset
            parts |= {
                f"{stem}.weight.absmax": codes.astype(np.uint8), f"{stem}.weight.nested_absmax": most,
                f"{stem}.weight.nested_quant_map": table,
            }  # fmt: skip
            state |= {"nested_blocksize": size, "nested_dtype": "float32", "nested_offset": float(offset)}
        picks = np.abs(flat[..., None] / absmax[:, None, None] - NF4).argmin(-1)
        dense = (NF4[picks] * absmax[:, None]).astype(np.float32).reshape(matrix.shape)
        pairs = picks.reshape(-1, 2)
        parts[f"{stem}.weight"] = (pairs[:, :1] << 4 | pairs[:, 1:]).astype(np.uint8)
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        return parts | {f"{stem}.weight.quant_state.bitsandbytes__nf4": text}, dense

    return quantise
