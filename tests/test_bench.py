"""The bench: what a step must read is counted from the arrays, peers take turns with ours, and what fails in one of them is its row's reason."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval.speed import bench, peers
from kvcascade.model import generate, gpt, pretrained
from kvcascade.model.config import ModelConfig
from kvcascade.scripts import bench as script

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
    assert bench.occupied_bytes(cache) == 2 * 2 * 2 * held * per_token


LIBRARY = """
import os, profile, sys
NEEDS, VARIANTS = ("json",), ("steady", "one row", "mortal", "unloadable")

class Variant:
    about = {"peer": "p 1", "weights": "float32"}

    def __init__(self, variant, model, threads):
        print("a library may print")
        self.variant = variant
        if variant == "unloadable":
            raise ImportError("no torch")

    def prepare(self, batch, context, room):
        self.batch, self.left = batch, room - context
        if self.variant == "one row" and batch > 1:
            raise ValueError("one row only")

    def prefill(self):
        return 2.0

    def decode(self, steps):
        if self.variant == "mortal" and self.batch > 1:
            print("out of memory", file=sys.stderr, flush=True)
            os._exit(1)
        self.left -= steps
        assert self.left >= 0, "no room"
        return [9.0] * 8 + [0.5, 0.25, 0.5][: steps - 8]

    def kv_bytes(self):
        return 1000
"""
OTHER = """
NEEDS, VARIANTS = (), ("quick",)

class Variant:
    about = {"peer": "q 2", "weights": "q4_0"}
    __init__ = lambda self, variant, model, threads: None
    prepare = lambda self, *case: None
    prefill = lambda self: 1.0
    decode = lambda self, steps: [0.1] * steps
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


def test_peers_are_timed_in_turns(model: str) -> None:
    """Warm steps are dropped; a row is compared with the quickest variant of each library; one that cannot do a case says why."""
    others, loaded = peers.find(HERE, Path(model)), pretrained.load(model)
    found = bench.bench([loaded], [parse("full"), parse("recent 8")], others, 2, 16, 3, 2, 1)
    again = bench.bench([loaded], [parse("full")], others, 1, 16, 3, 1, 1)
    for other in others:
        other.close()
    full, recent, steady, picky, mortal, unloadable, quick = found
    assert steady["cache"] == "transformers steady" and steady["peer"] == "p 1" and steady["kv_bytes"] == 1000
    assert steady["step_ms"] == 500 and steady["first_token_ms"] == 2000 and steady["decode_tokens_per_second"] == 4
    assert (
        steady["prefills"] == 1
        and steady["last_position"] == 16 + 2 * (2 * 3 + 8) - 1
        and full["traces"] == recent["traces"] == 2
    )
    assert recent["kv_bytes"] < full["kv_bytes"] and recent["step_bytes"] < full["step_bytes"]
    assert picky["reason"] == "ValueError: one row only" and unloadable["reason"] == "ImportError: no torch"
    assert mortal["reason"] == "it ended: out of memory" and "step_ms" not in mortal
    assert [("reason" in r) for r in again] == [False, False, False, False, True, False], (
        "the dead one was started again"
    )

    _, columns, rows = bench.table(found)
    assert {len(row) for row in rows} == {len(columns)} and columns[-2:] == ["× transformers", "× llamacpp"]
    assert "one row only" in rows[3][0] and set(rows[3][3:]) == {""}
    for row, record in zip((rows[0], rows[2], rows[6]), (full, steady, quick), strict=True):
        for name, prefill, decode in ((-2, 16, 4), (-1, 32, 20)):
            expected = record["prefill_tokens_per_second"] / prefill, record["decode_tokens_per_second"] / decode
            assert list(map(float, row[name].split(", "))) == pytest.approx(expected, abs=0.006)


def test_steps_go_on_where_they_ended(tmp_path: Path) -> None:
    """What is timed is greedy decoding: the same tokens as generated, in one stretch or two, and again after a new prefill."""
    loaded = pretrained.load(str(tiny_models.write("llama", tmp_path)))
    ours = bench.Ours(loaded, parse("full"), 2, 12, 12 + 9)
    prompts = ours._prompts
    cache = generate.empty_cache(loaded.config, parse("full"), 2, 21)
    expected = np.concatenate(
        [new for new, _ in generate.generate(loaded.config, loaded.params, cache, prompts, 10)]
    ).tolist()
    newest = lambda: ours._state.token_B.tolist()  # pyright: ignore[reportOptionalMemberAccess]
    for _ in range(2):
        ours.prefill()
        assert newest() == expected[0]
        assert len(ours.decode(4)) == 4 and newest() == expected[4]
        assert len(ours.decode(5, together=1)) == 5 and newest() == expected[9]


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
        ("print('Segmentation fault')", "it answered 'Segmentation fault'"),
        ("print(3)", "it answered '3'"),
        ("sys.exit('no room')", "it ended: no room"),
        ("None", "it ended: it said nothing"),
    ],
)
def test_an_answer_that_is_none_is_a_reason(tmp_path: Path, says: str, told: str) -> None:
    """It is not waited for, and what is asked afterwards fails too."""
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nimport sys\n{says}\n")
    python.chmod(0o755)
    peer = peers.Peer(python, "transformers", "steady", tmp_path)
    with pytest.raises(peers.PeerFailed, match=told):
        peer.prepare(1, 8, 9)
    with pytest.raises(peers.PeerFailed, match="it ended before"):
        peer.prefill()
    assert peer.about() == {"cache": "transformers steady", "library": "transformers"}


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
