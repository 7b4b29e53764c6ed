"""Files of records, one JSON object per line: written whole, read whatever else is in them."""

import fcntl
import json
import logging
import os
import stat
from pathlib import Path

from kvcascade.cache.errors import BadInput
from kvcascade.eval.record_keys import wrong

_log = logging.getLogger(__name__)


def check_writable(path: Path | None) -> None:
    """Raise OSError now if records could not be appended to the file later; an empty file may be left."""
    if path is not None and not (
        path.exists() and not path.is_file() and not path.is_dir()
    ):  # nobody may read a pipe yet
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()


def lines(records: list[dict]) -> bytes:
    """Records as lines of JSON; ValueError for a number that is NaN or infinite, which `records.stamp` refuses."""
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode()


def append(path: Path, records: list[dict]) -> None:
    """Add records to a file, all or none, and on the disk when this returns; a last line without an end is ended first.

    What is not a file, such as a pipe, is written to.
    """
    new = lines(records)
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


def read(path: Path) -> list[dict]:
    """All records of a file; BadInput if it is missing or one of them cannot be used."""
    found, left_out = usable(path)
    if left_out:
        raise BadInput(left_out[0])
    return found


def usable(path: Path) -> tuple[list[dict], list[str]]:
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
            reason = wrong(record)
        except (ValueError, RecursionError) as error:
            torn = not content.endswith(b"\n") and number == content.count(b"\n") + 1
            cause = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "cut short" if torn else "not JSON"
            record, reason = None, f"is {cause}"
        if reason:
            left_out.append(f"{path}, line {number}: {reason}")
        elif record is not None:
            found.append(record)
    return _newest(found), left_out


def _newest(records: list[dict]) -> list[dict]:
    """Of a measurement that is there several times, or of which only a part was written, the last whole one."""
    by_key: dict[str, list[dict]] = {}
    for record in records:
        if "key" in record and "of" in record:
            by_key.setdefault(record["key"], []).append(record)
    kept = {id(each) for mine in by_key.values() if len(mine) >= mine[0]["of"] for each in mine[-mine[0]["of"] :]}
    return [record for record in records if "of" not in record or "key" not in record or id(record) in kept]


def gather(paths: list[Path]) -> tuple[list[dict], list[str]]:
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
