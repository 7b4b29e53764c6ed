"""What `kvcascade prompt` says is measured: a child's figures are those of the program and of its process."""

import json
from pathlib import Path

import pytest
import tiny_models

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval.memory import prompt
from kvcascade.eval.records import Prompting
from kvcascade.eval.speed.peers import Peer, PeerFailed

LENGTH = 8192


@pytest.mark.slow
def test_parts_take_a_fraction_of_the_whole(tmp_path: Path) -> None:
    """Of a small model's prompt: bytes as predicted, fewer temporaries in parts, and a process that grew by about what the program takes."""
    model = str(tiny_models.write("llama", tmp_path / "model"))
    file = Path(model) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": LENGTH + 1}))
    found = [
        record
        for chunk in (0, 64)
        for record in prompt.job(model, parse("sink 4 | recent 60"), LENGTH, chunk, 1, "float32").run()
    ]
    whole, parts = found
    assert whole.kv_bytes == whole.kv_bytes_predicted == parts.kv_bytes
    assert parts.temporaries < 0.2 * whole.temporaries and parts.grown < whole.grown
    assert 0.5 < whole.grown / whole.working < 2
    _, columns, rows = prompt.table(found)
    assert {len(row) for row in rows} == {len(columns)} and rows[0][6] == "100.0%" and rows[1][3] == "64"


class Press(Peer):
    """A peer that says what it took, as kvpress' side does, or that it failed."""

    def __init__(self, failed: str = ""):
        self.failed, self.asked, self.closed = failed, [], False
        self.name = "kvpress SnapKVPress to 128"

    def grown(self, kept: int, prompt: list[int]) -> dict:
        self.asked.append((kept, len(prompt)))
        if self.failed:
            raise PeerFailed(self.failed)
        return {"kv_bytes": 1000, "grown": 900_000_000, "peak": 2_000_000_000, "prefill_seconds": 1.5}

    def about(self) -> dict:
        return {"weights": "float32"}

    def close(self) -> None:
        self.closed = True


def test_a_press_stands_beside_parts() -> None:
    peer = Press()
    (theirs,) = prompt.peer_job(peer, "m", 100, 512, 8000).run()
    assert peer.asked == [(512, 8000)] and peer.closed
    ours = [
        Prompting(
            model="m", weights="float32", cache="recent 512", tokens=8000, chunk=chunk, batch=1, kv_bytes=1000, kv_bytes_predicted=1000,
            temporaries=size, peak=10, grown=size, prefill_seconds=1.0,
        )
        for chunk, size in ((0, 700_000_000), (256, 70_000_000))
    ]  # fmt: skip
    _, columns, rows = prompt.table([*ours, theirs])
    assert (
        rows[2][columns.index("temporaries, MB")] == ""
        and "900.0" in rows[2]
        and "kvpress SnapKVPress to 512" in rows[2]
    )
    assert "At once by `kvpress SnapKVPress to 512`: a process that grew by 900 to 900 MB." in prompt.sentence(
        [*ours, theirs], []
    )
    _, _, rows = prompt.table([theirs, *ours])  # in whatever order records are read
    assert [row[6] for row in rows] == ["", "100.0%", "10.0%"] and len(prompt.table([theirs]).rows) == 1
    peer = Press("no memory")
    with pytest.raises(BadInput, match="no memory"):
        prompt.peer_job(peer, "m", 100, 512, 8000).run()
    assert peer.closed


def test_a_prompt_longer_than_the_model_is_refused() -> None:
    with pytest.raises(BadInput, match="longer than the model's"):
        prompt.job("smollm2", parse("full"), 10_000, 0, 1, None).run()
