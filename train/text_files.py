"""The documents in a file: text, or the column `text` of a table in Parquet, CSV, TSV, JSON or JSON lines; compressed or not."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from kvcascade.cache.errors import BadInput

DOCUMENT = 20_000  # characters: a text file is cut at the first blank line after so many
PACKED: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
NO_COLUMN = "there is no column called text, only {}"


def documents(source: str) -> list[str]:
    """The documents of `file:PATH`, in order: a text's parts, or the texts of a table that are not null.

    A byte order mark says UTF-16, else text is in UTF-8. BadInput that names the file, the place and the cause if it cannot be read.
    """
    path = Path(source.removeprefix("file:")).expanduser()
    if path.is_dir():
        raise BadInput(f"{source}: that is a folder")
    if not path.exists():
        raise BadInput(f"{source}: there is no such file")
    try:
        content = path.read_bytes()
        name = path.name.lower()
        if (packed := Path(name).suffix) in PACKED:
            name = name.removesuffix(packed)
            content = PACKED[packed](content)
    except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{source}: cannot be read ({reason})") from error
    if not content:
        raise BadInput(f"{source}: the file is empty")
    read, kind = READERS.get(Path(name).suffix, _text), Path(name).suffix
    try:
        found = read(content) if read is _parquet else read(_decoded(content))  # pyright: ignore
    except (ValueError, csv.Error, RecursionError, pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadInput(f"{source}: not a readable {kind} file ({reason})") from error
    except BadInput as error:
        raise BadInput(f"{source}: {error}") from error
    found = [re.sub("[\ud800-\udfff]", "\ufffd", text) for text in found]  # half a letter, which JSON can name
    if not any(map(str.strip, found)):
        raise BadInput(f"{source}: there is no text in it")
    return found


def _decoded(content: bytes) -> str:
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise BadInput(f"not a text in {encoding.upper()} (byte {error.start})") from error


def _text(text: str) -> list[str]:
    text = re.sub("\r\n?", "\n", text)
    found = [""]
    for paragraph in re.split(r"(?<=\n\n)(?=[^\n])", text):
        if len(found[-1]) >= DOCUMENT:
            found.append("")
        found[-1] += paragraph
    return found


def _csv(text: str, delimiter: str = ",") -> list[str]:
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = next(rows, [])
    if "text" not in header:
        raise BadInput(NO_COLUMN.format(", ".join(header)))
    column, found = header.index("text"), []
    for row in rows:
        if row and len(row) != len(header):
            raise BadInput(f"line {rows.line_num} has {len(row)} cells, and the header {len(header)}")
        found += [row[column]] if row and row[column] else []
    return found


def _tsv(text: str) -> list[str]:
    return _csv(text, "\t")


def _json_lines(text: str) -> list[str]:
    return _texts(_parsed(text))


def _parsed(text: str) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(re.split("\r\n?|\n", text), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise BadInput(
                    f"not a readable .jsonl file (line {number}, column {error.colno}: {error.msg})"
                ) from error


def _json(text: str) -> list[str]:
    """One list of objects or of texts, one object, or, as often under this name, JSON lines."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        return _json_lines(text)
    rows = whole if isinstance(whole, list) else [whole]
    return _texts(
        (f"row {number}", {"text": row} if isinstance(row, str) else row) for number, row in enumerate(rows, 1)
    )


def _texts(rows: Iterator[tuple[str, object]]) -> list[str]:
    """The texts of objects; a null, and a missing text where others have one, is none."""
    found, seen, others = [], False, dict[str, None]()
    for where, row in rows:
        if not isinstance(row, dict):
            raise BadInput(f"{where} is not an object")
        value = row.get("text")
        if value is not None and not isinstance(value, str):
            raise BadInput(f"{where}: the column called text holds {type(value).__name__}, not strings")
        seen |= "text" in row
        others |= dict.fromkeys(map(str, row))
        found += [] if value is None else [value]
    if not seen:
        raise BadInput(NO_COLUMN.format(", ".join([*others][:20])))
    return found


def _parquet(content: bytes) -> list[str]:
    file = pyarrow.parquet.ParquetFile(pa.BufferReader(content))
    names = file.schema_arrow.names
    if "text" not in names:
        raise BadInput(NO_COLUMN.format(", ".join(names)))
    kind = file.schema_arrow.field("text").type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(is_text(kind) for is_text in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
        raise BadInput(f"the column called text holds {kind}, not strings")
    found = file.read(columns=["text"]).column("text").to_pylist()
    return [text for text in found if text is not None]


READERS: dict[str, Callable] = {
    ".parquet": _parquet, ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _tsv,
}  # fmt: skip
