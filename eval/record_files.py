"""Files of records, one JSON object per line: written whole, read whatever else is in them."""

import fcntl
import json
import logging
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kvcascade.cache.errors import BadInput
from kvcascade.eval import records
from kvcascade.eval.records import Record

ORIGIN = ("device", "versions", "commit", "seconds")
"""What every record that is read has."""
_log = logging.getLogger(__name__)


def check_writable(path: Path | None) -> None:
    """Raise OSError now if records could not be appended to the file later; an empty file may be left."""
    if path is not None and not (
        path.exists() and not path.is_file() and not path.is_dir()
    ):  # nobody may read a pipe yet
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()


def lines(found: Sequence[Record | dict]) -> bytes:
    """Records as lines of JSON; ValueError for a number that is NaN or infinite, which no record has in a key that its class names."""
    return "".join(json.dumps(_given(record), allow_nan=False) + "\n" for record in found).encode()


def _given(record: Record | dict) -> dict:
    return record.given if isinstance(record, Record) else record


def append(path: Path, found: Sequence[Record | dict]) -> None:
    """Add records to a file, all or none, and on the disk when this returns; a last line without an end is ended first.

    What is not a file, such as a pipe, is written to.
    """
    new = lines(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab" if path.is_file() or not path.exists() else "wb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.write(new)
            return
        fcntl.flock(file, fcntl.LOCK_EX)  # of several that write to one file each waits for the others
        before = file.seek(0, os.SEEK_END)
        try:
            file.write(new if _ended(path, before) else b"\n" + new)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, before)
            raise


def _ended(path: Path, size: int) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, size - 1))
        return file.read(1) in (b"", b"\n")


def read(path: Path) -> list[Record | dict]:
    """All records of a file; BadInput if it is missing or one of them cannot be used."""
    found, left_out = usable(path)
    if left_out:
        raise BadInput(left_out[0])
    return found


def usable(path: Path) -> tuple[list[Record | dict], list[str]]:
    """The records of a file that can be used, and for each other line what is wrong with it; BadInput if there is no such file.

    Of one measurement that is there again the newest records are used, and one of which not all were written is left out.
    """
    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise BadInput(f"{path} is not a file of records: {error.strerror or error}") from error
    found, left_out = [], []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode())
            if (
                b"\\ud" in line.lower()
            ):  # halves of letters, such as a path in no encoding has, cannot be written anywhere
                record = json.loads(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace"))
        except (ValueError, RecursionError) as error:
            torn = not content.endswith(b"\n") and number == content.count(b"\n") + 1
            cause = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "cut short" if torn else "not JSON"
            left_out.append(f"{path}, line {number}: is {cause}")
            continue
        try:
            found.append(record_of(record))
        except ValueError as error:
            left_out.append(f"{path}, line {number}: {error}")
    return _newest(found), left_out


def record_of(given: Any) -> Record | dict:
    """The record that a JSON object is, itself where it is of a kind that no report shows; ValueError that says in a line what is wrong with it."""
    if not isinstance(given, dict):
        raise ValueError("is not an object")
    if not isinstance(kind := given.get("kind"), str):
        raise ValueError("has no kind")
    if kind not in records.KINDS:
        return given
    if missing := [key for key in ORIGIN if key not in given]:
        raise ValueError(f"lacks {missing[0]}")
    made = next(
        (made for (name, key), made in records.OTHERS.items() if name == kind and key in given), records.KINDS[kind]
    )
    try:
        return made(**given)
    except ValidationError as error:
        raise ValueError(wrong(error)) from None


def wrong(error: ValidationError) -> str:
    """The first thing that is wrong with a record, in a line."""
    first = error.errors(include_url=False)[0]
    key = ".".join(part for part in first["loc"] if isinstance(part, str))
    if first["type"] == "missing":
        return f"lacks {key}" if isinstance(first["loc"][-1], str) else f"{key} is too short"
    said = first["msg"].removeprefix("Value error, ")
    for pydantics, ours in ((r"^Input should be", "is not"), (r"^\w+ should have", "is to have")):
        said = re.sub(pydantics, ours, said)
    return f"{key} {said}".lstrip()


def _newest(found: list[Record | dict]) -> list[Record | dict]:
    """Of a measurement that is there several times, or of which only a part was written, the last whole one."""
    parts = [each for each in records.of(found, Record) if each.key and each.of]
    whole = set()
    for mine in records.grouped(parts, lambda each: each.key):
        count = mine[0].of or 1
        whole |= {id(each) for each in mine[-count:] if len(mine) >= count}
    left = {id(each) for each in parts} - whole
    return [each for each in found if id(each) not in left]


def gather(paths: list[Path]) -> tuple[list[Record | dict], list[str]]:
    """The usable records of several files, and what was left out, of which a line is logged for each; BadInput if nothing is left."""
    found, left_out = [], []
    for path in paths:
        some, others = usable(path)
        found, left_out = found + some, left_out + others
    if not found:
        more = f", and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        raise BadInput(f"nothing can be reported: {left_out[0]}{more}" if left_out else f"{paths[0]} holds no records")
    for line in left_out:
        _log.warning("left out: %s", line)
    return found, left_out
