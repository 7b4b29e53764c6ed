"""What other people's files say, read by key: every value is of the kind that is asked for, or one line names the file, the key and what is wrong."""

import json
import math
import reprlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kvcascade.cache.errors import BadInput

MOST = 2**31 - 1
REQUIRED: Any = object()
"""The default of a key that has to be there."""


def shown(value: object) -> str:
    """A value of any size in a few words, on one line."""
    try:
        return reprlib.repr(value)
    except Exception:  # a number of so many digits that Python refuses to write them
        return f"a {type(value).__name__}"


def is_whole(value: object) -> bool:
    """Whether a value is a whole number, which a flag is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a finite number, which a flag is not."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond float64
        return False


class Metadata:
    """A table of a file: config.json and its like, or the fields of a GGUF.

    `source` is the file's name in messages, `prefix` what stands before a key in them (`rope_scaling.`, `llama.`). A key whose value is null
    is not there. Each method gives `default` where the key is not there, without one BadInput, as for every value of another kind; `asked`
    are the keys that it was called for.
    """

    def __init__(self, content: object, source: str | Path, prefix: str = ""):
        self.source, self.prefix = str(source), prefix
        if not isinstance(content, dict):
            where = f": {prefix.removesuffix('.')}" if prefix else ""
            raise BadInput(f"{source}{where} must be a table of keys and values, not {shown(content)}")
        self.content: dict[str, Any] = content
        self.asked: set[str] = set()

    @classmethod
    def read(cls, path: Path, *, optional: bool = False) -> "Metadata":
        """The table in a JSON file, an empty one where an optional file is not there; BadInput if it cannot be read."""
        return cls(read_json(path, *([{}] if optional else [])), path)

    def __contains__(self, key: str) -> bool:
        return self.content.get(key) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def bad(self, key: str, problem: str) -> BadInput:
        """The error that this key's value has this problem."""
        return BadInput(f"{self.source}: {self.prefix}{key} {problem}")

    def take(self, key: str, default: Any, wanted: str, right: Callable[[Any], bool]) -> Any:
        """The value as it is; BadInput where it is not right, and then it says what was wanted."""
        self.asked.add(key)
        value = self.content.get(key)
        if value is None:
            if default is REQUIRED:
                raise BadInput(f"{self.source} lacks {self.prefix}{key}")
            return default
        if not right(value):
            raise self.bad(key, f"must be {wanted}, not {shown(value)}")
        return value

    def whole[D](self, key: str, default: D = REQUIRED, *, least: int = 1, most: int = MOST) -> int | D:
        """A whole number from `least` to `most`."""
        wanted = f"a whole number from {least} to {most}"
        return self.take(key, default, wanted, lambda value: is_whole(value) and least <= value <= most)

    def number[D](
        self, key: str, default: D = REQUIRED, *, above: float | int = -math.inf, least: float | int = -math.inf
    ) -> float | D:
        """A finite number, larger than `above` and at least `least`."""
        wanted = "a finite number" + ("" if above == -math.inf else f" above {above:g}")
        wanted += "" if least == -math.inf else f" of at least {least:g}"
        value = self.take(key, default, wanted, lambda value: is_number(value) and above < value and least <= value)
        return float(value) if isinstance(value, int) else value

    def text[D](self, key: str, default: D = REQUIRED) -> str | D:
        """A text."""
        return self.take(key, default, "a text", lambda value: isinstance(value, str))

    def flag[D](self, key: str, default: D = REQUIRED) -> bool | D:
        """True or false."""
        return self.take(key, default, "true or false", lambda value: isinstance(value, bool))

    def table(self, key: str) -> "Metadata":
        """A table within this one, empty where it is not there."""
        found = self.take(key, {}, "a table of keys and values", lambda value: isinstance(value, dict))
        return Metadata(found, self.source, f"{self.prefix}{key}.")

    def many[D](
        self, key: str, default: D = REQUIRED, *, of: str, right: Callable[[Any], bool], count: int | None = None
    ) -> Sequence[Any] | D:
        """A list of values that are all right, so many where it says `count`; `of` is what they are, in the plural."""
        found = self.take(key, default, f"a list of {of}", lambda value: isinstance(value, list | tuple))
        if isinstance(found, list | tuple) and found is not default:
            for index, value in enumerate(found):
                if not right(value):
                    raise self.bad(f"{key}[{index}]", f"must be one of {of}, not {shown(value)}")
            if count is not None and len(found) != count:
                raise self.bad(key, f"has {len(found)} {of}, not {count}")
        return found

    def texts[D](self, key: str, default: D = REQUIRED, *, count: int | None = None) -> Sequence[str] | D:
        """A list of texts."""
        return self.many(key, default, of="texts", right=lambda value: isinstance(value, str), count=count)

    def numbers[D](
        self, key: str, default: D = REQUIRED, *, above: float | int = -math.inf, count: int | None = None
    ) -> Sequence[float] | D:
        """A list of finite numbers, each larger than `above`."""
        of = "finite numbers" + ("" if above == -math.inf else f" above {above:g}")
        return self.many(key, default, of=of, right=lambda value: is_number(value) and value > above, count=count)

    def wholes[D](
        self, key: str, default: D = REQUIRED, *, least: int = 0, most: int = MOST, count: int | None = None
    ) -> Sequence[int] | D:
        """A list of whole numbers, each from `least` to `most`."""
        of = f"whole numbers from {least} to {most}"
        return self.many(
            key, default, of=of, right=lambda value: is_whole(value) and least <= value <= most, count=count
        )


def read_json(path: Path, missing: Any = REQUIRED) -> Any:
    """What a JSON file holds; `missing`, if given, where there is no file; BadInput if it is damaged, or not there."""
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError as error:
        if missing is not REQUIRED:
            return missing
        raise BadInput(f"{path.parent} lacks {path.name}") from error
    except RecursionError as error:
        raise BadInput(f"cannot read {path}: it is nested too deeply") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {path}: {error}") from error
