"""GGUF models that are split into several files, as llama.cpp's `gguf-split` names them: NAME-00001-of-00003.gguf and so on."""

import re
from pathlib import Path

from kvcascade.cache.errors import BadInput

_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def parts(path: Path) -> list[Path]:
    """All parts of the model that a file is one of, in order, or the file alone where it is not split."""
    match = _NAME.fullmatch(path.name)
    if not match:
        return [path]
    return [path.with_name(f"{match[1]}-{index + 1:05}-of-{match[3]}.gguf") for index in range(int(match[3]))] or [path]


def first(path: Path) -> Path:
    """The part with the metadata."""
    return parts(path)[0]


def check(path: Path, index: int, number: int, count: int) -> None:
    """BadInput unless a file that says that it is part `number`, from 0, of `count` is the `index`-th by its name."""
    there = parts(path)
    if count > 1 and len(there) != count:
        raise BadInput(
            f"{path} is part {number + 1} of {count}; its name should end in -{number + 1:05}-of-{count:05}.gguf, beside the others"
        )
    if len(there) > 1 and (number, count) != (index, len(there)):
        raise BadInput(f"{path} is part {number + 1} of {count}, and not what its name says")
