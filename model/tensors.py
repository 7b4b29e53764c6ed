"""The tensors of GGUF files and of Hugging Face directories."""

import json
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import safetensors

from kvcascade.cache.errors import BadInput
from kvcascade.kernels import int4, linear
from kvcascade.model import split
from kvcascade.model.metadata import Metadata

FLOATS = {
    "F64": jnp.float64, "F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16, "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2, "F8_E4M3FNUZ": jnp.float8_e4m3fnuz, "F8_E5M2FNUZ": jnp.float8_e5m2fnuz,
    "F8_E8M0": jnp.float8_e8m0fnu,
}  # fmt: skip
"""What a safetensors file calls the types that weights may have."""
INTEGERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1"}
FOUR_BITS = {gguf.GGMLQuantizationType.Q4_0: 2, gguf.GGMLQuantizationType.Q4_1: 4}
"""Bytes of numbers before the codes of 32 weights: a scale, and a value of code 0."""


class _Reader(gguf.GGUFReader):
    """The library's reader, which otherwise goes on behind a file's end, an empty array at a time, as far as a damaged length says."""

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> np.ndarray:
        if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError("it ends within its metadata")
        return super()._get(offset, dtype, count, override_order)


class GGUFFile:
    """The tensors and the metadata of a GGUF; BadInput if it is truncated or not one."""

    def __init__(self, path: Path):
        self.path = path
        there = split.parts(path)
        if missing := [each.name for each in there if not each.exists()]:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise BadInput(f"{path}: there is no {', '.join(missing[:3])}{more}")
        self.fields, self.tensors = {}, {}
        for index, each in enumerate(there):
            fields, tensors = self._read(each)
            split.check(each, index, fields.get("split.no", 0), fields.get("split.count", 1))
            self.fields = fields | self.fields
            if twice := sorted({*self.tensors} & {*tensors}):
                raise BadInput(f"{each}: {twice[0]} is in a part before as well")
            self.tensors |= tensors

    def _read(self, path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
        """The metadata and the tensors of one file."""
        try:
            reader = _Reader(path)
            fields = {key: field.contents() for key, field in reader.fields.items()}
        except OSError as error:
            raise BadInput(f"{path}: {error.strerror or error}") from error
        except Exception as error:  # whatever the library meets in a damaged file
            raise BadInput(f"{path} is not a GGUF file, or is damaged: {error}") from error
        return fields, {tensor.name: tensor for tensor in reader.tensors}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by its name."""
        return {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32."""
        tensor = self.tensors[name]
        try:
            return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(self.shapes()[name])
        except (NotImplementedError, ValueError) as error:
            raise BadInput(f"{self.path}: {name} is of the type {tensor.tensor_type.name}: {error}") from error

    def packed(self, name: str) -> linear.Matrix | None:
        """A matrix of the type Q4_0 or Q4_1 as it is there, None for others."""
        return _four_bits(self.tensors[name])

    @property
    def has_int4(self) -> bool:
        """Whether some matrices are there in four bits that `packed` gives."""
        return any(tensor.tensor_type in FOUR_BITS for tensor in self.tensors.values())


class Safetensors:
    """The tensors of a directory's *.safetensors, mapped; BadInput if a shard is missing or damaged, or of a type that is not read."""

    def __init__(self, folder: Path):
        self.folder = folder
        files = _shards(folder / "model.safetensors.index.json")
        self.files: dict[str, tuple[Path, dict[str, Any], int]] = {}
        for file in files:
            try:
                with safetensors.safe_open(folder / file, framework="numpy"):
                    pass  # what is wrong with the header the library says
                self.files |= _header(folder / file)
            except FileNotFoundError as error:
                raise BadInput(f"{folder} lacks {file}") from error
            except (OSError, ValueError, safetensors.SafetensorError) as error:
                raise BadInput(f"{folder / file} is damaged: {error}") from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by its name."""
        return {name: tuple(about["shape"]) for name, (_, about, _) in self.files.items()}

    def raw(self, name: str) -> np.ndarray:
        """A tensor of the type that it has in the file."""
        path, about, start = self.files[name]
        dtype = {**FLOATS, **INTEGERS}.get(about["dtype"])
        if dtype is None:
            raise BadInput(f"{path}: {name} is of the type {about['dtype']}, which is not read")
        begin, end = (start + offset for offset in about["data_offsets"])
        if begin == end:
            return np.zeros(about["shape"], np.dtype(dtype))
        return np.memmap(path, np.uint8, "r", begin, (end - begin,)).view(np.dtype(dtype)).reshape(about["shape"])

    def read(self, name: str) -> np.ndarray:
        """A tensor of numbers with a fraction, in float32."""
        path, about, _ = self.files[name]
        if about["dtype"] not in FLOATS:
            raise BadInput(f"{path}: {name} is of the type {about['dtype']}; weights are of {', '.join(FLOATS)}")
        return np.asarray(self.raw(name).astype(np.float32))

    has_int4 = False

    def packed(self, name: str) -> None:
        """Nothing is in four bits here."""


def _header(path: Path) -> dict[str, tuple[Path, dict[str, Any], int]]:
    """By name: the file, what its header, which the library has checked, says of the tensor, and where the tensors begin."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {name: (path, about, 8 + size) for name, about in header.items() if name != "__metadata__"}


def _four_bits(tensor: Any) -> linear.Matrix | None:
    """A tensor of the type Q4_0 or Q4_1 as it is there, None for others."""
    if tensor.tensor_type not in FOUR_BITS or tensor.data.ndim != 2:
        return None
    start = FOUR_BITS[tensor.tensor_type]
    blocks = np.asarray(tensor.data).reshape(len(tensor.data), -1, start + 16)
    numbers = np.ascontiguousarray(blocks[..., :start]).view(np.float16)
    codes = np.concatenate([blocks[..., start:] & 15, blocks[..., start:] >> 4], -1).reshape(len(blocks), -1)
    return int4.packed(jnp.asarray(codes), int4.BLOCK, numbers[..., 0], numbers[..., 1] if start == 4 else None)


def _shards(index: Path) -> list[str]:
    """The files that an index names, or the only one where there is no index; BadInput for one that is not beside it."""
    if not index.exists():
        return ["model.safetensors"]
    where = Metadata.read(index).table("weight_map")
    files = sorted({where.text(tensor) for tensor in where})
    if not files:
        raise BadInput(f"{index} lacks weight_map, or it is empty")
    for file in files:
        if Path(file).name != file:
            raise where.bad("", f"names {file!r}, which is no file's name")
    return files
