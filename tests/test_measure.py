"""Measurements that are stopped: what was done is there, only what is missing is done, and the end is the same."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kvcascade.cache.errors import BadInput
from kvcascade.eval import measure, record_files
from kvcascade.eval.measure import Job
from kvcascade.eval.measure import measure as run
from kvcascade.eval.records import Layer, Record, of
from kvcascade.scripts import cli

TIMES = {"date", "load", "seconds", "tokens_per_second", "compile_seconds", "command"}


def job(number: int, done: list, records: int = 1, room: str = "eval/quality") -> Job:
    def once():
        done.append(number)
        return [Layer(layer=str(number), codec=str(part), bytes_per_token=1) for part in range(records)]

    return Job({"number": number}, room, once, f"job {number}")


def test_what_is_there_is_skipped(tmp_path):
    """Of the same measurement by the same code, all of its records; their seconds add up to the job's."""
    done, out = [], tmp_path / "records.jsonl"
    first = run([job(0, done), job(1, done, 3)], out)
    assert first.before == 0 and [r.codec for r in first.records] == ["0", "0", "1", "2"]
    again = run([job(1, done, 3), job(2, done), job(0, done)], out)
    assert done == [0, 1, 2] and again.before == 2
    assert [r.layer + r.codec for r in again.records] == ["10", "11", "12", "20", "00"]
    assert len({r.seconds for r in first.records[1:]}) == 1
    run([job(0, done)], out, again=True)
    assert done == [0, 1, 2, 0] and len(record_files.read(out)) == 5 and len(out.read_bytes().splitlines()) == 6
    assert run([job(0, done)], out).records == [record_files.read(out)[-1]]
    run([job(0, done)], None)
    assert done == [0, 1, 2, 0, 0]


def test_other_code_is_another_measurement(tmp_path, monkeypatch):
    done, out = [], tmp_path / "records.jsonl"
    run([job(0, done)], out)
    monkeypatch.setattr(measure, "source_key", lambda *folders: "changed" if "eval/quality" in folders else "")
    run([job(0, done)], out)
    assert done == [0, 0]
    monkeypatch.setattr(measure, "source_key", lambda *folders: " ".join(folders))
    assert job(0, done).key != dataclasses.replace(job(0, done), also=("serve",)).key


def test_half_a_job_is_none(tmp_path):
    """Where its records were cut short it is done again, and the report takes the whole one."""
    done, out = [], tmp_path / "records.jsonl"
    run([job(0, done, 3)], out)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:2]) + lines[2][:30])
    run([job(0, done, 3)], out)
    assert done == [0, 0] and [r.codec for r in run([job(0, done, 3)], out).records] == ["0", "1", "2"]
    assert [r.codec for r in of(record_files.usable(out)[0], Layer)] == ["0", "1", "2"]


def test_a_figure_that_is_not_finite_keeps_what_was_before(tmp_path):
    done, out = [], tmp_path / "records.jsonl"
    bad = Job({}, "eval/quality", lambda: [Layer(layer="m", codec="x", bytes_per_token=float("nan"))], "bad")
    with pytest.raises(BadInput, match="bad: bytes_per_token is not finite, so nothing is recorded"):
        run([job(0, done), bad, job(1, done)], out)
    assert done == [0] and len(record_files.read(out)) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_between_two_lines_of_python(tmp_path, number):
    """What was done is there, and handlers are as before; outside the main thread nothing is touched."""
    done, out = [], tmp_path / "records.jsonl"
    before = signal.getsignal(number)
    stops = Job({}, "eval/quality", lambda: signal.raise_signal(number) or [], "stops")
    with pytest.raises(measure.Stopped) as stopped:
        run([job(0, done), stops, job(1, done)], out)
    assert stopped.value.signal == number and done == [0] and len(record_files.read(out)) == 1
    assert signal.getsignal(number) == before
    thread = threading.Thread(target=lambda: run([job(1, done)], out))
    thread.start()
    thread.join()
    assert done == [0, 1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["write", "fsync", "tell"])
def test_a_signal_waits_until_a_record_is_written_and_counted(tmp_path, monkeypatch, number, moment):
    """However late it comes: what `tell` heard last is what the file has, and the file has whole lines."""
    done, heard, out = [], [], tmp_path / "records.jsonl"
    if moment == "fsync":
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda file: (fsync(file), signal.raise_signal(number)))
    elif moment == "write":
        lines = record_files.lines
        monkeypatch.setattr(record_files, "lines", lambda new: (signal.raise_signal(number), lines(new))[1])

    def tell(index, words):
        if moment == "tell" and index == 1:
            signal.raise_signal(number)
        heard.append(index)

    with pytest.raises(measure.Stopped) as stopped:
        run([job(0, done), job(1, done)], out, tell=tell)
    assert stopped.value.signal == number and done == [0] and heard == [0, 1]
    assert [r.layer for r in of(record_files.read(out), Layer)] == ["0"] and out.read_bytes().endswith(b"\n")


def test_two_that_write_to_one_file(tmp_path):
    """Each line is whole: of four writers at once every record is there."""
    out = tmp_path / "records.jsonl"
    program = """
import sys
from pathlib import Path
from kvcascade.eval import record_files
for i in range(50):
    record_files.append(Path(sys.argv[1]), [{"kind": "x", "i": i, "text": "y" * 20000}])
"""
    writers = [subprocess.Popen([sys.executable, "-c", program, str(out)]) for _ in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    found, left_out = record_files.usable(out)
    assert not left_out and sorted(r["i"] for r in found if not isinstance(r, Record)) == sorted([*range(50)] * 4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("measure")
    (folder / "text.txt").write_text("".join(f"the query {i} meets {i * i} keys.\n" for i in range(400)))
    settings = ["--model.layers", "1", "--model.width", "32", "--model.heads", "4", "--model.kv-heads", "2", "--model.mlp", "64",
                "--model.context", "32", "--model.vocab", "256", "--data.tokenizer", "bytes", "--data.source", f"file:{folder / 'text.txt'}",
                "--train.steps", "2", "--train.batch-size", "2", "--train.warmup", "1", "--train.evaluate-every", "2",
                "--train.evaluate-windows", "2", "--train.checkpoint-every", "2"]  # fmt: skip
    cli.main(["train", "--config", "nano", "--run", str(folder / "run"), *settings])
    return folder


CACHES = ["full", "recent 4", "sink 1 | recent 5", "random 6", "recent 8@int8", "recent 4 | heavy 4"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_evaluate_goes_on_where_it_was_stopped(trained: Path, tmp_path: Path, capfd, number) -> None:
    """Killed after some of six caches: the second start does the others alone, and all records are those of an undisturbed run but for times."""
    typed = [
        "evaluate",
        "--model",
        str(trained / "run"),
        "--context",
        "32",
        "--sequences",
        "4",
        *(f"--cache={each}" for each in CACHES),
    ]
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    program = [sys.executable, "-c", "from kvcascade.scripts.cli import main; main()", *typed, "--out", str(out)]
    child = subprocess.Popen(program, stderr=subprocess.PIPE, text=True)
    while not out.exists() or out.read_bytes().count(b"\n") < 2:
        time.sleep(0.02)
        assert child.poll() is None
    child.send_signal(number)
    _, said = child.communicate()
    kept = out.read_bytes().count(b"\n")
    assert 2 <= kept < len(CACHES)
    assert child.returncode == (-number if number == signal.SIGKILL else 128 + number)
    if number == signal.SIGTERM:
        last = " ".join(said.splitlines()[-1].split())
        assert re.match(rf"kvcascade: stopped; {kept} of 6 are in .* goes on with the others$", last), said
    capfd.readouterr()
    cli.main([*typed, "--out", str(out)])
    assert f"kvcascade: {kept} of 6 were in {out} already" in capfd.readouterr().err
    cli.main([*typed, "--out", str(whole)])
    found, wanted = ([json.loads(line) for line in path.read_text().splitlines()] for path in (out, whole))
    plain = lambda records: [{key: r[key] for key in r if key not in TIMES} for r in records]
    assert plain(found) == plain(wanted) and [r["cache"] for r in found] == CACHES
    assert os.path.getsize(out) > 1000


def test_windows_are_added_until_it_is_sure(trained: Path, tmp_path: Path, capfd) -> None:
    """Twice as many each time, none scored twice, up to the end of the text; and again needs a file."""
    out = tmp_path / "out.jsonl"
    typed = [
        "evaluate",
        "--model",
        str(trained / "run"),
        "--context",
        "32",
        "--sequences",
        "2",
        "--cache",
        "full",
        "--cache",
        "recent 4",
    ]
    cli.main([*typed, "--until", "50%", "--out", str(out)])
    enough = [json.loads(line) for line in out.read_text().splitlines()]
    assert {r["sequences"] for r in enough} <= {2, 4, 8, 16, 32}
    capfd.readouterr()
    cli.main([*typed, "--until", "0.0001%", "--out", str(out)])
    said = capfd.readouterr().err
    assert "the widest interval is" in said and "not narrower than 0.0001%" in said and "but the text has" in said
    last = [json.loads(line) for line in out.read_text().splitlines()][-2:]
    assert last[0]["sequences"] > 8 and len(last[0]["nll_windows"]) == last[0]["sequences"]
    for bad, words in ((["--until", "none"], "must be a share such as 0.1%"), (["--again"], "there is no --out")):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*typed, *bad])
        assert stopped.value.code == 2 and words in capfd.readouterr().err
