"""Pretrained models as they were converted, kept in the user's cache: the next start maps them into memory instead of converting again."""

import base64
import contextlib
import dataclasses
import hashlib
import logging
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import safetensors
import safetensors.flax

from kvcascade.kernels.files import cache_dir, make_room, write_whole
from kvcascade.model import split
from kvcascade.model.weights import Report, leaves, put

SMALLEST = 2**25
"""Bytes of parameters below which converting takes no time worth a file."""
ROOM = 2**33
"""Bytes that all kept models take at most: the ones not used for longest go."""
CODE = [Path(__file__).parent, Path(__file__).parent.parent / "kernels"]


def load[M: Any](path: Path, weights: str, report: Report, make: Callable[[], M]) -> M:
    """What `make` reads from a GGUF file or a directory with its matrices in `weights`, or the copy of it that was kept.

    A copy is of the same files (by size and time of change) and of the code that reads them. A directory's float32 is not kept: nothing
    is converted there. `make` gives a dataclass with `params`, of which all else can be pickled; the folder is the user's own.
    """
    if weights == "float32" and path.is_dir():
        return make()
    file = cache_dir() / "models" / f"{path.stem}-{weights}-{_key(path, weights)}.safetensors"
    # Whatever is wrong with a copy, it can be made again.
    with contextlib.suppress(
        OSError,
        safetensors.SafetensorError,
        pickle.PickleError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        EOFError,
        ImportError,
    ):
        return _read(file, report)
    begin = time.perf_counter()
    model = make()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    if SMALLEST <= size <= ROOM // 2:
        _write(file, model, size, time.perf_counter() - begin)
    return model


def _key(path: Path, weights: str) -> str:
    """16 hexadecimal digits that differ where the files, or the code that reads them, may differ."""
    files = sorted(path.glob("*")) if path.is_dir() else split.parts(path)
    there = [(str(each.resolve()), each.stat().st_size, each.stat().st_mtime_ns) for each in files if each.is_file()]
    code = [each.read_bytes() for folder in CODE for each in sorted(folder.glob("*.py"))]
    return hashlib.sha256(repr((there, weights)).encode() + b"".join(code)).hexdigest()[:16]


def _read(file: Path, report: Report) -> Any:
    params: dict = {}
    with safetensors.safe_open(file, framework="flax") as tensors:
        model = pickle.loads(base64.b64decode(tensors.metadata()["model"]))
        names = list(tensors.keys())
        for index, name in enumerate(names):
            put(params, name, tensors.get_tensor(name))
            report(index + 1, len(names))
    file.touch()
    return dataclasses.replace(model, params=params)


def _write(file: Path, model: Any, size: int, seconds: float) -> None:
    log = logging.getLogger("kvcascade")
    try:
        make_room(file.parent, ROOM - size)
        rest = base64.b64encode(pickle.dumps(dataclasses.replace(model, params={}))).decode()
        write_whole(file, safetensors.flax.save(leaves(model.params), {"model": rest}))
    except OSError as error:
        log.warning("nothing is kept in %s: %s", file.parent, error.strerror)
    else:
        log.info("converting %s took %.1f s; kept in %s for the next start", model.name, seconds, file)
