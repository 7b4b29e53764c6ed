"""Checkpoints whose matrices are quantised, as their own libraries dequantise them: GPTQ, AWQ, FP8, bitsandbytes, compressed-tensors."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kvcascade.cache.errors import BadInput
from kvcascade.kernels import int4, linear
from kvcascade.model.metadata import read_json
from kvcascade.model.tensors import Safetensors

METHODS = ("gptq", "awq", "fp8", "fbgemm_fp8", "compressed-tensors", "bitsandbytes")
PARTS = (
    "weight_scale_inv",
    "weight_scale",
    "SCB",
    "weight_format",
    "input_scale",
    "activation_scale",
    "input_scale_ub",
)


def settings(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What a directory says of how it is quantised; empty if it is not. BadInput for a method that is not read."""
    said = config.get("quantization_config") or config.get("compression_config")
    if not said:
        said = read_json(folder / "quantize_config.json", missing={})
        said = said and {"quant_method": "gptq", **said}
    if not isinstance(said, dict):
        raise BadInput(f"{folder}/config.json: quantization_config is {said!r}, not an object")
    method = said.get("quant_method", "bitsandbytes" if "load_in_4bit" in said or "load_in_8bit" in said else None)
    if said and method not in METHODS:
        raise BadInput(f"{folder} is quantised by {method!r}, which is not read; there are {', '.join(METHODS)}")
    return said and {**said, "quant_method": method}


def opened(folder: Path, config: dict[str, Any]) -> "Safetensors | Quantised":
    """The tensors of a directory, dequantised as they are read if its config.json says that they are quantised."""
    said, tensors = settings(folder, config), Safetensors(folder)
    if said and config.get("model_type") == "gpt2":
        raise BadInput(f"{folder} is a quantised GPT-2, which is not read")
    return Quantised(tensors, said) if said else tensors


class Grouped(NamedTuple):
    """Codes [O, I] whose weight is scale · code + low: of column i with those [O, G] of `group_I[i]`."""

    codes_OI: np.ndarray
    scale_OG: np.ndarray
    low_OG: np.ndarray
    group_I: np.ndarray

    def dense(self) -> np.ndarray:
        """The matrix in float32, exact where scales are of 16 bits."""
        take = lambda x: x.astype(np.float32)[:, self.group_I]
        return take(self.scale_OG) * self.codes_OI.astype(np.float32) + take(self.low_OG)

    def matrix(self) -> linear.Matrix | None:
        """As `kernels.linear` keeps it in four bits, the columns in the order of their groups; None where groups are of odd sizes."""
        I, G = len(self.group_I), self.scale_OG.shape[1]
        order = np.argsort(self.group_I, kind="stable")
        size = int((self.group_I == 0).sum())
        size = size if G > 1 else -(-I // int4.BLOCK) * int4.BLOCK
        if size % int4.BLOCK or (self.group_I[order] != np.arange(I) // size).any() or self.codes_OI.max() > 15:
            return None
        middle = (self.low_OG == -int4.MIDDLE * self.scale_OG.astype(np.float32)).all()
        found = int4.packed(jnp.asarray(self.codes_OI[:, order]), size, self.scale_OG, None if middle else self.low_OG)
        in_turn = (order == np.arange(I)).all()
        return found if in_turn else found | {"order": jnp.asarray(order, jnp.int32)}


class Quantised:
    """The tensors of a quantised directory, each matrix by the name and in the shape that it has where it is not; BadInput for odd ones."""

    def __init__(self, tensors: Safetensors, said: dict[str, Any]):
        self.tensors, self.said, self.method = tensors, said, said["quant_method"]
        self.bits = said.get("bits", said.get("w_bit", 4))
        self.there = tensors.shapes()
        if self.method in ("gptq", "awq"):
            self._check(self.bits in ((2, 4, 8) if self.method == "gptq" else (4,)), f"{self.bits} bits")
        if self.method == "gptq":
            kind = said.get("checkpoint_format", "gptq")
            self._check(kind in ("gptq", "gptq_v2"), f"the format {kind}")
        if self.method == "awq":
            version = str(said.get("version", "gemm")).lower()
            self._check(version == "gemm", f"the version {version}")
        if self.method == "compressed-tensors":
            kind = said.get("format")
            self._check(kind in ("float-quantized", "int-quantized", "naive-quantized"), f"the format {kind}")
        self.folder = tensors.folder
        self.stems = {name.removesuffix(".qweight") for name in self.there if name.endswith(".qweight")}

    def _check(self, good: bool, what: str) -> None:
        if not good:
            raise BadInput(f"{self.tensors.folder} is quantised by {self.method} with {what}, which is not read")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by its name; what belongs to a quantised matrix is not there."""
        found = {}
        for name, shape in self.there.items():
            stem, _, last = name.rpartition(".")
            if stem in self.stems and last in ("qweight", "qzeros", "scales", "g_idx"):
                if last == "qweight" and len(shape) == 2:
                    rows, columns = shape
                    many = 32 // self.bits
                    found[f"{stem}.weight"] = (columns * many, rows) if self.method == "awq" else (columns, rows * many)
            elif last not in PARTS and ".weight." not in name:
                found[name] = tuple(self._state(name)["shape"]) if self._four_bits(name) else shape
        return found

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32, dequantised."""
        if name.removesuffix(".weight") in self.stems:
            return self._grouped(name).dense()
        if self._four_bits(name):
            return self._normal_float(name)
        if f"{name}_scale_inv" in self.there or f"{name}_scale" in self.there:
            return self._scaled(name)
        columns = name.removesuffix("weight") + "SCB"
        if name.endswith(".weight") and columns in self.there:
            codes, scale = self.tensors.raw(name), self.tensors.read(columns)
            self._shape(columns, scale, (len(codes),))
            return codes.astype(np.float32) * (scale / 127)[:, None]
        return self.tensors.read(name)

    def packed(self, name: str) -> linear.Matrix | None:
        """A matrix in four bits as it is there, None where it is not."""
        return self._grouped(name).matrix() if name.removesuffix(".weight") in self.stems and self.bits == 4 else None

    @property
    def has_int4(self) -> bool:
        """Whether some matrices are there in four bits that `packed` gives."""
        return self.bits == 4 and bool(self.stems)

    def _shape(self, name: str, array: np.ndarray, wanted: tuple[int, ...]) -> None:
        if array.shape != wanted:
            raise BadInput(f"{self.folder}: {name} has the shape {array.shape}, not {wanted}")

    def _grouped(self, name: str) -> Grouped:
        stem = name.removesuffix(".weight")
        O, I = self.shapes()[name]
        for part in ("qzeros", "scales"):
            if f"{stem}.{part}" not in self.there:
                raise BadInput(f"{self.folder} lacks {stem}.{part}")
        size = self.said.get("group_size", self.said.get("q_group_size", 128))
        if not isinstance(size, int) or size == 0 or size < -1:
            raise BadInput(f"{self.folder}/config.json: group_size is {size!r}")
        size = I if size == -1 else size
        groups, many, awq = -(-I // size), 32 // self.bits, self.method == "awq"
        weight, zeros, scales = (self.tensors.raw(f"{stem}.{part}") for part in ("qweight", "qzeros", "scales"))
        self._shape(f"{stem}.qzeros", zeros, (groups, O // many))
        self._shape(f"{stem}.scales", scales, (groups, O))
        for part, array in (("qweight", weight), ("qzeros", zeros)):
            if array.dtype != np.int32:
                raise BadInput(f"{self.folder}: {stem}.{part} is of {array.dtype}, not int32")
        group_I = np.arange(I) // size
        if f"{stem}.g_idx" in self.there and not awq:
            group_I = self.tensors.raw(f"{stem}.g_idx")
            self._shape(f"{stem}.g_idx", group_I, (I,))
            if group_I.min() < 0 or group_I.max() >= groups:
                raise BadInput(f"{self.folder}: {stem}.g_idx has groups that are not among the {groups}")
        codes = unpack(weight, self.bits, awq) if awq else unpack(weight.T, self.bits)
        zero_GO = unpack(zeros, self.bits, awq)
        if not awq and self.said.get("checkpoint_format", "gptq") == "gptq":
            zero_GO = zero_GO + np.uint8(1)  # kept less by one
        scale_OG = scales.T
        low_OG = -zero_GO.T.astype(np.float32) * scale_OG.astype(np.float32)
        return Grouped(codes.T if awq else codes, scale_OG, low_OG, group_I)

    def _scaled(self, name: str) -> np.ndarray:
        """A number of eight bits times the scale of its block, its row, or of all."""
        inverse = f"{name}_scale_inv" in self.there
        part = f"{name}_scale_inv" if inverse else f"{name}_scale"
        weight, scale = self.tensors.raw(name).astype(np.float32), self.tensors.read(part)
        O, I = weight.shape
        if scale.ndim == 2 and scale.shape not in ((O, 1), (1, 1)):
            rows, columns = self.said.get("weight_block_size") or (128, 128)
            self._shape(part, scale, (-(-O // rows), -(-I // columns)))
            scale = scale.repeat(rows, 0)[:O].repeat(columns, 1)[:, :I]
        elif scale.size == O and O > 1:
            scale = scale.reshape(O, 1)
        else:
            self._shape(part, scale.reshape(-1), (1,))
            scale = scale.reshape(1, 1)
        return weight * scale

    def _four_bits(self, name: str) -> str | None:
        found = [f"{name}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")]
        return next((each for each in found if each in self.there), None)

    def _state(self, name: str) -> dict[str, Any]:
        key = self._four_bits(name)
        try:
            state = json.loads(self.tensors.raw(str(key)).astype(np.uint8).tobytes())
            if not all(isinstance(n, int) and n > 0 for n in (state["blocksize"], *state["shape"])):
                raise ValueError("numbers that are not positive")
            return state
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{self.folder}: {key} is damaged: {error}") from error

    def _normal_float(self, name: str) -> np.ndarray:
        """QLoRA's four bits (Dettmers et al. 2023): an entry of a table times its block's size, which may be quantised itself."""
        state = self._state(name)
        part = lambda kind: self.tensors.raw(f"{name}.{kind}").reshape(-1).astype(np.float32)
        try:
            size = part("absmax")
            if "nested_absmax" in "".join(self.there):
                each = part("nested_quant_map")[size.astype(np.uint8)]
                blocks = part("nested_absmax").repeat(state["nested_blocksize"])[: each.size]
                size = each * blocks + np.float32(state["nested_offset"])
            bytes_ = self.tensors.raw(name).reshape(-1).astype(np.uint8)
            table = part("quant_map")[np.stack([bytes_ >> 4, bytes_ & 15], -1).reshape(-1)]
            table = table[: int(np.prod(state["shape"]))]
            return (table * size.repeat(state["blocksize"])[: table.size]).reshape(state["shape"])
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise BadInput(f"{self.folder}: {name} in four bits is damaged: {error}") from error


def unpack(words: np.ndarray, bits: int, interleaved: bool = False) -> np.ndarray:
    """Codes of int32 words along the last axis, from the lowest bits on; AWQ's are interleaved: 0, 2, 4, 6, 1, 3, 5, 7."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    found = (np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts & np.uint32(2**bits - 1)).astype(np.uint8)
    if interleaved:
        found = found[..., [0, 4, 1, 5, 2, 6, 3, 7]]
    return found.reshape(*words.shape[:-1], -1)
