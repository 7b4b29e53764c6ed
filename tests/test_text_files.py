"""Files of text and tables as people have them."""

import bz2
import gzip
import json
import logging
import lzma
import os
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcascade.cache.errors import BadInput
from kvcascade.train import data, text_files


def read(folder: Path, name: str, content: bytes) -> list[str]:
    (folder / name).write_bytes(content)
    return text_files.documents(f"file:{folder / name}")


GOOD = {
    # name: content, documents
    "words.csv": (b"text\nnull\nhello\nNA\nNone\nnan\n", ["null", "hello", "NA", "None", "nan"]),
    "quoted.csv": (b'id,text\r\n1,"a ""b"",\nc"\r\n2,\r\n\r\n3,d\r\n', ['a "b",\nc', "d"]),
    "mac.csv": (b"text,id\ra,1\rb,2", ["a", "b"]),
    "mark.csv": (b"\xef\xbb\xbftext\na\n", ["a"]),
    "long.csv": (b"text\n" + b"x" * 300_000 + b"\n", ["x" * 300_000]),
    "tabs.tsv": (b"id\ttext\n1\ta, b\n", ["a, b"]),
    "late.jsonl": (
        b'{"text": "a", "id": 1}\r\n\n{"text": "b", "more": {"x": 1}, "id": "x"}\n{"id": 1}\n{"text": null}',
        ["a", "b"],
    ),
    "half.jsonl": (b'{"text": "a\\ud800b"}', ["a\ufffdb"]),
    "line.jsonl": ('{"text": "a\u2028b"}'.encode(), ["a\u2028b"]),
    "pretty.json": (json.dumps([{"text": "a"}, {"text": "b"}], indent=2).encode(), ["a", "b"]),
    "one.json": (b'{"text": "a",\n "id": 1}', ["a"]),
    "lines.json": (b'{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
    "texts.json": (b'["a", "b"]', ["a", "b"]),
    "mark.json": (b'\xef\xbb\xbf[{"text": "a"}]', ["a"]),
    "mark.txt": (b"\xef\xbb\xbfHello", ["Hello"]),
    "wide.txt": ("Größe\n".encode("utf-16"), ["Größe\n"]),
    "wide.txt.gz": (gzip.compress("é".encode("utf-16-be").join([b"\xfe\xff", b""])), ["é"]),
    "ends.txt": (b"a\r\nb\rc\n", ["a\nb\nc\n"]),
    "none": (b"a", ["a"]),
    "x.JSONL.GZ": (gzip.compress(b'{"text": "a"}\n') + gzip.compress(b'{"text": "b"}\n'), ["a", "b"]),
    "x.csv.bz2": (bz2.compress(b"text\na\n"), ["a"]),
    "x.txt.xz": (lzma.compress(b"a"), ["a"]),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_is_in_a_file(tmp_path: Path, name: str) -> None:
    content, documents = GOOD[name]
    assert read(tmp_path, name, content) == documents


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_parquet_of_every_kind_of_text(tmp_path: Path, kind: pa.DataType) -> None:
    """Null and columns that are not read, whatever they hold, are passed over."""
    texts = pa.array(["a", None, "null"]).cast(kind)
    pyarrow.parquet.write_table(pa.table({"other": [[1], None, [2]], "text": texts}), tmp_path / "x.parquet")
    assert text_files.documents(f"file:{tmp_path}/x.parquet") == ["a", "null"]


BAD = {
    "cut.jsonl": (b'{"text": "a"}\n{"text": ', "not a readable .jsonl file (line 2, column 10: Expecting value)"),
    "list.jsonl": (b'{"text": "a"}\n[1]\n', "line 2 is not an object"),
    "nested.json": (b'[{"text": "a"}, {"text": ["b"]}]', "row 2: the column called text holds list, not strings"),
    "deep.json": (b"[" * 100_000, "not a readable .json file (maximum recursion depth"),
    "body.jsonl": (b'{"body": "a"}\n{"id": 1}', "there is no column called text, only body, id"),
    "open.csv": (b'text\n"a\nb', "not a readable .csv file (unexpected end of data)"),
    "wide.csv": (b"text,id\na,1\nb\n", "line 3 has 1 cells, and the header 2"),
    "latin.csv": ("text\nGröße\n".encode("latin-1"), "not a text in UTF-8 (byte 7)"),
    "latin.txt.gz": (gzip.compress(b"caf\xe9"), "not a text in UTF-8 (byte 3)"),
    "odd.txt": (b"\xff\xfea", "not a text in UTF-16 (byte 2)"),
    "cut.txt.gz": (gzip.compress(b"abc" * 99)[:-9], "cannot be read (Compressed file ended"),
    "not.jsonl.gz": (b'{"text": "a"}', "cannot be read (Not a gzipped file"),
    "cut.xz": (lzma.compress(b"abc" * 99)[:-9], "cannot be read (Compressed data ended"),
    "cut.parquet": (b"PAR1 and no more", "not a readable .parquet file ("),
    "empty.gz": (gzip.compress(b""), "the file is empty"),
    "blank.csv": (b"text\n \n", "there is no text in it"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, name: str) -> None:
    content, said = BAD[name]
    with pytest.raises(BadInput) as caught:
        read(tmp_path, name, content)
    assert str(caught.value).startswith(f"file:{tmp_path / name}: {said}") and "\n" not in str(caught.value)


def test_parquet_without_texts(tmp_path: Path) -> None:
    for column, said in (
        ("text", "the column called text holds int64, not strings"),
        ("body", "no column called text, only body"),
    ):
        pyarrow.parquet.write_table(pa.table({column: [1]}), tmp_path / "x.parquet")
        with pytest.raises(BadInput, match=said):
            text_files.documents(f"file:{tmp_path}/x.parquet")


def test_a_pipe_is_read(tmp_path: Path) -> None:
    os.mkfifo(path := tmp_path / "pipe")
    writer = threading.Thread(target=lambda: path.write_bytes(b"from a pipe"))
    writer.start()
    assert text_files.documents(f"file:{path}") == ["from a pipe"]
    writer.join()


def test_a_folder_and_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.txt").write_text("at home", "utf-8")
    assert text_files.documents("file:~/x.txt") == ["at home"]
    with pytest.raises(BadInput, match="that is a folder"):
        text_files.documents(f"file:{tmp_path}")


def test_evaluation_text_is_silent(
    tmp_path: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    """All of a table is one document, and neither a good nor a bad file makes a bar or a line of a log."""
    (tmp_path / "x.csv").write_text("text\nnull\nb\n", "utf-8")
    (tmp_path / "y.jsonl").write_text('{"text": ', "utf-8")
    with caplog.at_level(logging.DEBUG):
        assert data.unseen(f"file:{tmp_path}/x.csv")["text"][:] == ["null\nb"]
        with pytest.raises(BadInput):
            data.unseen(f"file:{tmp_path}/y.jsonl")
    assert capfd.readouterr() == ("", "") and not caplog.messages


SEEDS = [content for content, _ in (GOOD | BAD).values() if len(content) < 500]


@given(
    st.sampled_from([*GOOD, "x.parquet"]),
    st.sampled_from(SEEDS),
    st.integers(0, 99),
    st.binary(max_size=6),
    st.integers(0, 99),
)
def test_any_bytes_are_documents_or_one_line(
    tmp_path_factory, name: str, seed: bytes, at: int, new: bytes, gone: int
) -> None:
    """A file with some bytes replaced is read, or refused in one line."""
    try:
        found = read(tmp_path_factory.getbasetemp(), name, seed[:at] + new + seed[at + gone :])
    except BadInput as error:
        assert "\n" not in str(error)
    else:
        assert "".join(found).encode()
