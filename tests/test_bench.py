"""The bench: what a step must read is counted from the arrays, peers take turns with ours, and what fails in one of them is its row's reason."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval import record_files, records
from kvcascade.eval.records import Bench, BenchFailed
from kvcascade.eval.report import page
from kvcascade.eval.speed import bench, peers
from kvcascade.model import generate, gpt, pretrained
from kvcascade.model.config import ModelConfig
from kvcascade.scripts import bench as script
from kvcascade.scripts import readme

TINY = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, mlp=64, vocab=64, context=64)


def test_a_step_reads_every_matrix_but_the_tables() -> None:
    """A tied table is the head and read whole; an untied one and learned positions give a row per token."""
    size = lambda config: sum(leaf.nbytes for leaf in jax.tree.leaves(gpt.init(config, 0)))
    read = lambda config: bench.weight_bytes(config, gpt.init(config, 0))
    assert read(TINY) == size(TINY)
    untied = dataclasses.replace(TINY, tied=False)
    assert read(untied) == size(TINY) == size(untied) - 64 * 32 * 4
    assert read(dataclasses.replace(TINY, positions="learned")) == size(TINY)
    assert read(dataclasses.replace(TINY, weights="int8")) < size(TINY) / 3


@pytest.mark.parametrize(("spec", "held"), [("full", 10), ("recent 8", 8), ("sink 2 | recent 30", 10)])
def test_only_slots_that_hold_a_token_are_read(spec: str, held: int) -> None:
    """Two rows of ten tokens each, behind caches with more and with fewer slots."""
    cache = generate.empty_cache(TINY, parse(spec), 2, 40)
    tokens = jnp.ones((2, 10), jnp.int32)
    _, cache = generate.prefill(TINY, gpt.init(TINY, 0), cache, tokens, jnp.broadcast_to(jnp.arange(10), (2, 10)))
    per_token = 2 * 8 * 2 + 4  # keys and values of 8 numbers in bf16, and a position
    assert bench.occupied_bytes(cache, 10) == 2 * 2 * 2 * held * per_token


LIBRARY = """
import os, profile, sys, time
NEEDS, VARIANTS = ("json",), ("steady", "one row", "mortal", "unloadable", "stuck")

class Variant:
    about = {"peer": "p 1", "weights": "float32", "loop": "its own"}

    def __init__(self, variant, model, threads):
        print("a library may print")
        self.variant = variant
        if variant == "unloadable":
            raise ImportError("no torch")

    def prepare(self, prompts, room):
        self.batch, self.left = len(prompts), room - len(prompts[0])
        self.about_prompts = sum(map(sum, prompts))
        if self.variant == "one row" and self.batch > 1:
            raise ValueError("one row only")
        if self.variant == "stuck":
            time.sleep(60)

    def prefill(self):
        return 2.0

    def decode(self, steps, loop):
        if self.variant == "mortal" and self.batch > 1:
            print("out of memory", file=sys.stderr, flush=True)
            os._exit(1)
        self.left -= steps
        assert self.left >= 0, "no room"
        return [9.0] * 8 + [0.5, 0.25, 0.5][: steps - 8] if loop else [1.0, 3.0, 1.0][:steps]

    def kv_bytes(self):
        return self.about_prompts
"""
OTHER = """
NEEDS, VARIANTS = (), ("quick", "small")

class Variant:
    __init__ = lambda self, variant, model, threads: setattr(
        self, "about", {"peer": "q 2", "weights": "q8_0" if variant == "quick" else "f32", "loop": "one by one"})
    prepare = lambda self, *case: None
    prefill = lambda self: 1.0
    decode = lambda self, steps, loop: [0.1 if "q8_0" in self.about["weights"] else 0.4] * steps
    kv_bytes = lambda self: None
"""
HERE = (Path(sys.executable),)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny model's folder; this Python has two libraries for it, and not the third."""
    folder = tmp_path / "peers"
    folder.mkdir()
    monkeypatch.setattr(peers, "SCRIPT", Path(shutil.copy(peers.SCRIPT, folder)))
    (folder / "peer_transformers.py").write_text(LIBRARY)
    (folder / "profile.py").write_text("raise ImportError('not the one that a library means')")
    (folder / "peer_llamacpp.py").write_text(OTHER)
    (folder / "peer_kvpress.py").write_text("NEEDS, VARIANTS = ('no_such_library',), ('never',)")
    return str(tiny_models.write("llama", tmp_path / "model"))


@pytest.mark.slow
def test_peers_are_timed_in_turns(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm steps are dropped, both ways of decoding are there; one that cannot do a case or takes for ever says why; prompts are the same."""
    monkeypatch.setattr(bench, "bandwidth", lambda: 1e9)
    monkeypatch.setattr(peers, "LEAST", 8.0)
    monkeypatch.setattr(peers, "PATIENCE", 0.0)
    others, loaded = peers.find(HERE, Path(model)), pretrained.load(model)
    found: list[Any] = bench.bench([loaded], [parse("full"), parse("recent 8")], others, 2, 16, 3, 2, 1)
    again = bench.bench([loaded], [parse("full")], others[:4], 1, 16, 3, 1, 1)
    for other in others:
        other.close()
    full, recent, steady, picky, mortal, unloadable, stuck, quick, small = found
    assert steady.cache == "transformers steady" and steady.peer == "p 1" and steady.loop == "its own"
    assert steady.step_ms == 500 and steady.first_token_ms == 2000 and steady.decode_tokens_per_second == 4
    assert steady.alone_ms == 1000 and steady.alone_ms_5_95 == pytest.approx([1000, 3000]) and full.alone_ms > 0
    assert steady.prefills == 1 and steady.last_position == 16 + 2 * (2 * 3 + 8) - 1
    assert full.traces == recent.traces == 2 and full.loop.startswith("generate")
    assert full.steady and full.rounds == full.kept == full.repeats == 2
    assert recent.kv_bytes < full.kv_bytes and recent.step_bytes < full.step_bytes
    assert steady.kv_bytes == sum(map(sum, bench.random_prompts(loaded, 2, 16)))
    assert picky.reason == "ValueError: one row only" and unloadable.reason == "ImportError: no torch"
    assert mortal.reason == "ended with status 1: out of memory" and isinstance(mortal, BenchFailed)
    assert stuck.reason == "took longer than 8 s"
    assert [isinstance(r, BenchFailed) for r in again] == [False, False, False, False, True], (
        "the dead one was started again"
    )


@pytest.mark.parametrize(
    ("measured", "kept", "steady"),
    [
        ([60, 61, 59], 2, True),
        ([60, 30, 60, 61, 60], 2, True),  # a round during which it changed is repeated
        ([60, 61, 30, 31, 32], 2, True),  # rounds at other speeds do not agree, though each was steady
        ([60, 30, 60, 30, 60], 4, False),
    ],
)
def test_rounds_are_repeated_until_the_memory_is_steady(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[int], kept: int, steady: bool
) -> None:
    """At most twice as many as were asked for; then all are kept, and the record and its row say so."""
    rates = iter(measured)
    monkeypatch.setattr(bench, "bandwidth", lambda: next(rates) * 1e9)
    loaded = pretrained.load(str(tiny_models.write("llama", tmp_path)))
    found: Any = bench.bench([loaded], [parse("full")], [], 1, 8, 2, 2, 2)[0]
    assert (found.rounds, found.kept, found.steady) == (len(measured) - 1, kept, steady)
    assert found.prefills == kept and next(rates, None) is None
    low, high = found.bandwidth_range
    assert steady == (low >= 0.9 * high)
    _, columns, (row,) = bench.table([found])
    assert ("unsteady" in row[columns.index("memory, GB/s")]) == (not steady)


def test_like_is_compared_with_like(model: str) -> None:
    """Each way of timing over the library's quickest in the same way; the headline: the best loops, and those of weights of as many bits."""
    common = {"model": "m", "batch": 1, "context": 8, "steps": 3, "repeats": 5, "bandwidth": 1e9}

    def record(cache, weights, loop, alone, prefill=8.0, **more):
        speeds = {
            "first_token_ms": prefill,
            "prefill_tokens_per_second": 8e3 / prefill,
            "decode_tokens_per_second": 1e3 / loop,
        }
        told = {"cache": cache, "weights": weights, "step_ms": loop, "alone_ms": alone}
        return Bench(**common | told | speeds | more)

    peer = lambda library, name, *rest, **more: record(
        f"{library} {name}", *rest, library=library, peer=f"{library} 1", **more
    )
    found = [
        record("full", "float32", 10.0, 12.0),
        record("full", "int8", 4.0, 8.0, steady=False),
        record("recent 8", "int8", 2.0, 6.0),
        peer("transformers", "compiled", "float32", 20.0, 48.0),
        peer("transformers", "eager", "float32", 40.0, 36.0),
        peer("kvpress", "press", "float32", 30.0, 30.0),
        peer("llamacpp", "q8_0 weights", "q8_0", 3.0, 3.0, prefill=4.0),
        peer("llamacpp", "f32 weights", "f32", 12.0, 12.0),
        BenchFailed(**common, cache="llamacpp q4_0", library="llamacpp", reason="killed by SIGILL: without a word"),
    ]
    title, columns, rows = bench.table(found)
    assert {len(row) for row in rows} == {len(columns)} and columns[-3:] == [
        "× transformers",
        "× kvpress",
        "× llamacpp",
    ]
    assert rows[0][-3:] == ["1.00, 2.00, 3.00", "1.00, 3.00, 2.50", "0.50, 0.30, 0.25"]
    assert len(rows) == len(found) - 1 and "transformers 1; kvpress 1" in title
    assert bench.notes(found) == ["llamacpp q4_0 at 1 × 8: killed by SIGILL: without a word"]
    assert bench.headline(found)[1:] == (
        ["batch × context", "weights", "ours, tok/s", "× transformers", "× kvpress", "× llamacpp"],
        [
            ["1 × 8", "best", "250.0 (full, int8)", "5.00 (compiled, unsteady)", "15.00 (press)", "0.75 (q8_0 weights, unsteady)"],
            ["1 × 8", "32 bits", "100.0 (full, float32)", "2.00 (compiled)", "3.00 (press)", "1.20 (f32 weights)"],
            ["1 × 8", "8 bits", "250.0 (full, int8)", "", "", "0.75 (q8_0 weights, unsteady)"],
        ],
    )  # fmt: skip
    assert bench.headline(found[:3]).rows == []


def test_older_records_are_shown() -> None:
    """Those whose steps alone have three quantiles; a record with neither is none."""
    found = records.of(record_files.read(readme.RESULTS / "speed.jsonl"), Bench)
    older = found[0].given | {"alone_ms_50_90_99": [8.5, 10.0, 13.6]}
    for key in ("alone_ms", "alone_ms_5_95"):
        older.pop(key, None)
    record = record_files.record_of(older)
    assert isinstance(record, Bench) and "8.50" in bench.table([record]).rows[0]
    del older["alone_ms_50_90_99"]
    with pytest.raises(ValueError, match="^lacks alone_ms$"):
        record_files.record_of(older)


@pytest.mark.slow
def test_steps_go_on_where_they_ended(tmp_path: Path) -> None:
    """What is timed is greedy decoding: the same tokens as generated, in one stretch or two, and again after a new prefill."""
    loaded = pretrained.load(str(tiny_models.write("llama", tmp_path)))
    prompts = bench.random_prompts(loaded, 2, 12)
    ours = bench.Ours(loaded, parse("full"), prompts, 12 + 10, 1)
    cache = generate.empty_cache(loaded.config, parse("full"), 2, 21)
    expected = np.concatenate(
        [new for new, _ in generate.generate(loaded.config, loaded.params, cache, prompts, 10)]
    ).tolist()
    newest = lambda: ours._state.token_B.tolist()  # pyright: ignore[reportOptionalMemberAccess]
    for _ in range(2):
        ours.prefill()
        assert newest() == expected[0]
        assert len(ours.decode(4, True)) == 4 and newest() == expected[4]
        assert len(ours.decode(5, False)) == 5 and newest() == expected[9]


@pytest.mark.slow
def test_the_command_records_each_row(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without `--peer` the libraries of the Python that runs; `--variant` keeps some; a record for each."""
    out = tmp_path / "records.jsonl"
    arguments = [
        "--model",
        model,
        "--batch",
        "1",
        "--context",
        "8",
        "--steps",
        "2",
        "--repeats",
        "2",
        "--prefills",
        "1",
    ]
    script.main([*arguments, "--variant", "quick", "--variant", "one row", "--out", str(out)])
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["cache"] for r in found] == ["full", "transformers one row", "llamacpp quick"]
    assert all(r["bandwidth"] and r["commit"] for r in found) and "× llamacpp" in capsys.readouterr().out
    with pytest.raises(BadInput, match="no peer is named 'slow'; there are: transformers steady; "):
        script.main([*arguments, "--variant", "slow"])


@pytest.mark.parametrize(
    ("says", "told"),
    [
        ("print('{}'); sys.stdin.read()", "{}"),
        ("sys.exit('no room')", "ended with status 1: no room"),
        ("None", "ended with status 0: without a word"),
    ],
)
def test_an_answer_that_is_none_is_a_reason(tmp_path: Path, says: str, told: str) -> None:
    """It is not waited for, and what is asked afterwards fails too."""
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nimport sys\n{says}\n")
    python.chmod(0o755)
    peer = peers.Peer(python, "transformers", "steady", tmp_path)
    with pytest.raises(peers.PeerFailed, match=told):
        peer.prepare([[1] * 8], 9, 0.0)
    if told != "{}":
        with pytest.raises(peers.PeerFailed, match="it ended before"):
            peer.prefill()
        assert peer.about() == {"cache": "transformers steady", "library": "transformers"}
    peer.close()


def test_a_python_without_libraries_is_bad_input(model: str, tmp_path: Path) -> None:
    """One line each; and no peer is no fault where none was named."""
    with pytest.raises(BadInput, match="cannot run the peer's Python .*: No such file"):
        peers.find((tmp_path / "none",), Path(model))
    with pytest.raises(BadInput, match="does not run peer_main.py"):
        peers.find((Path("/bin/echo"),), Path(model))
    for library in ("transformers", "llamacpp"):
        (peers.SCRIPT.parent / f"peer_{library}.py").write_text("NEEDS, VARIANTS = ('no_such_library',), ('never',)")
    with pytest.raises(BadInput, match="has no library to compare with"):
        peers.find(HERE, Path(model))
    assert peers.find((), Path(model)) == []


def test_the_page_has_both_tables_under_columns_that_stay(tmp_path: Path) -> None:
    """What was recorded, as HTML: the best first, then all rows, which scroll under their first column."""
    found = record_files.read(readme.RESULTS / "speed.jsonl")
    page.write(tmp_path / "page.html", found, "kvcascade report")
    html = (tmp_path / "page.html").read_text()
    assert html.index("<td>best</td>") < html.index("<th>memory, GB/s</th>")
    assert ".scroll td:first-child { position: sticky; left: 0;" in html
    assert "position: sticky" in (Path(__file__).parent.parent / "docs" / "tables.css").read_text()


def test_blocks_hold_what_stands_before_a_position() -> None:
    """Ten tokens of a row, however many its blocks have room for; in its own slots there are none yet."""
    for text, tokens in (("full on blocks", 10), ("sink 4 on blocks | recent 3", 4)):
        cache = generate.empty_cache(TINY, parse(text), 2, 40)
        assert bench.occupied_bytes(cache, 10) == 2 * 2 * 2 * tokens * 2 * 8 * 2
