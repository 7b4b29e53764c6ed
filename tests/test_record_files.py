"""Files of records: appended whole, and read whatever else is in them."""

import copy
import json
import logging
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcascade.cache.errors import BadInput
from kvcascade.eval import record_files, records
from kvcascade.eval.report import page
from kvcascade.scripts import cli, readme

FILES = ("ranker", "prompt", "toy", "smollm2", "speed", "stream", "fit", "crash", "parity")
SAMPLES = {each.kind: each.given for name in FILES for each in readme.recorded(name)}
GOOD = SAMPLES["evaluate"]


def write(path: Path, *lines: object) -> Path:
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return path


def test_append_adds_whole_lines(tmp_path):
    """Two appends give all lines, in order."""
    path = tmp_path / "deep" / "records.jsonl"
    record_files.append(path, [{"kind": "a"}])
    record_files.append(path, [{"kind": "b"}, {"kind": "c"}])
    assert record_files.read(path) == [{"kind": "a"}, {"kind": "b"}, {"kind": "c"}]


@pytest.mark.parametrize("torn", [b'{"kind": "a"}', b'{"ki'])
def test_a_torn_last_line_is_ended_before_others_are_added(tmp_path, torn):
    path = write(tmp_path / "x.jsonl", torn)
    record_files.append(path, [{"kind": "b"}])
    assert path.read_bytes() == torn + b'\n{"kind": "b"}\n'
    assert record_files.usable(path)[0][-1] == {"kind": "b"}


def test_a_pipe_is_written_to(tmp_path):
    """The command looks whether it can be written without opening it, since a pipe waits for its reader."""
    os.mkfifo(path := tmp_path / "pipe")
    record_files.check_writable(path)
    heard = []
    reader = threading.Thread(target=lambda: heard.append(path.read_bytes()))
    reader.start()
    record_files.append(path, [{"kind": "a"}])
    reader.join(10)
    assert heard == [b'{"kind": "a"}\n']


def test_a_number_that_is_none_is_not_written(tmp_path):
    with pytest.raises(ValueError):
        record_files.append(tmp_path / "x.jsonl", [{"ppl": float("nan")}])
    assert not list(tmp_path.iterdir())


def test_what_can_be_used_is_used_and_the_rest_named(tmp_path):
    """BOM, CRLF and blank lines are nothing; each bad line is told with its number and its cause."""
    lines = [
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n", b"\n", b"  \n", [1], {"old": 1}, b"{'kind'}\n", b'{"kind": "\xff"}\n',
        {"kind": "evaluate", "cache": "full"}, GOOD | {"ppl": float("nan")}, GOOD | {"ppl": None}, GOOD | {"ppl": 10**400}, GOOD | {"nll": "2"},
        GOOD | {"nll_windows": []}, b"[" * 100_000 + b"\n", {"kind": "another"}, b'{"kind": "eval',
    ]  # fmt: skip
    path = write(tmp_path / "x.jsonl", *lines)
    found, left_out = record_files.usable(path)
    assert found == [records.Compared(**GOOD), {"kind": "another"}]
    assert [line.removeprefix(f"{path}, line ") for line in left_out] == [
        "4: is not an object", "5: has no kind", "6: is not JSON", "7: is not UTF-8", "8: lacks device", "9: ppl is not finite",
        "10: ppl is not finite", "11: ppl is not finite", "12: nll is not a number", "13: nll_windows is to have at least 1 item after validation, not 0",
        "14: is not JSON", "16: is cut short",
    ]  # fmt: skip


def test_report_says_what_it_left_out(tmp_path, capfd, monkeypatch, caplog):
    """A line for each on stderr and on the page; status 2, and no page, where nothing is left."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.jsonl", GOOD, GOOD | {"cache": "recent 4", "ppl": float("inf")})
    with caplog.at_level(logging.WARNING):
        cli.main(["report", "x.jsonl"])
    assert caplog.messages == ["left out: x.jsonl, line 2: ppl is not finite"]
    assert "<li>x.jsonl, line 2: ppl is not finite</li>" in (tmp_path / "report.html").read_text("utf-8")
    write(tmp_path / "y.jsonl", [1], GOOD | {"ppl": None})
    write(tmp_path / "z.jsonl")
    capfd.readouterr()
    for name, said in (
        ("y", "nothing can be reported: y.jsonl, line 1: is not an object, and 1 more"),
        ("z", "z.jsonl holds no records"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["report", f"{name}.jsonl", "--page", "new.html"])
        assert (stopped.value.code, capfd.readouterr().err) == (2, f"kvcascade: {said}\n")
    assert not (tmp_path / "new.html").exists()


def test_records_that_do_not_belong_together_make_a_page(tmp_path):
    """No full cache, other windows, tasks and lengths that one cache alone was asked, a layer and codec that is missing."""
    one = {key: value[:1] for key, value in GOOD.items() if key.endswith("_windows")} | {"sequences": 1}
    asked = SAMPLES["retrieve"] | {"key": "a", "of": 1}  # of a measurement that gave no other
    mixed = [
        GOOD | {"cache": "recent 4"}, GOOD | {"cache": "full", "data": "file:x"}, GOOD | one | {"cache": "recent 8"},
        asked, asked | {"key": "b", "cache": "recent 9", "task": "copying", "length": 7},
        SAMPLES["layer"], SAMPLES["layer"] | {"layer": "MQA", "codec": "other"}, {"kind": "kernel", "device": "x"},
    ]  # fmt: skip
    page.write(tmp_path / "x.html", record_files.read(write(tmp_path / "x.jsonl", *mixed)), "$x$^ \udcff")
    assert "recent 9" in (tmp_path / "x.html").read_text("utf-8")


JUNK = st.sampled_from(
    [None, True, 0, -1, 10**400, 1e308, float("nan"), float("inf"), "", "$^", "\ud800", [], [1], [None], {}, {"x": 1}]
)


@st.composite
def changed(draw) -> dict:
    """A record of some kind with one value, however deep, replaced or left out."""
    record = copy.deepcopy(SAMPLES[draw(st.sampled_from(sorted(SAMPLES)))])
    place = record
    while True:
        key = draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1))
        if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
            place = place[key]
            continue
        if isinstance(place, dict) and draw(st.booleans()):
            del place[key]
        else:
            place[key] = draw(JUNK)
        return record


@given(st.lists(changed(), min_size=1, max_size=3))
def test_any_records_make_a_page_or_one_line(tmp_path_factory, some):
    """Whatever is in a file of records, there is a page or BadInput."""
    folder = tmp_path_factory.mktemp("any")
    try:
        found, _ = record_files.gather([write(folder / "x.jsonl", *some, GOOD)])
        page.write(folder / "x.html", found, "")
    except BadInput as error:
        assert "\n" not in str(error)
