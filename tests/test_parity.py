"""Methods beside kvpress' versions: as many tokens are kept on both sides, records and table say what was measured, and what cannot be is one line."""

import ast
import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny_models

from kvcascade.cache.errors import BadInput
from kvcascade.cache.policies import Full
from kvcascade.eval import record_files
from kvcascade.eval.quality import parity
from kvcascade.eval.records import Parity, changed
from kvcascade.eval.speed import peers
from kvcascade.scripts import cli

LIBRARY = """
NEEDS, VARIANTS = (), ("KnormPress to 128",)

class Variant:
    about = {"peer": "kvpress 0", "weights": "float32", "loop": "none"}

    def __init__(self, variant, model, threads):
        pass

    def scored(self, cases, row, prefix, seed):
        if any("TOVA" in press for press, _ in cases):
            raise ValueError("no such press")
        return [(5.0 + seed, kept) for _, kept in cases]
"""


@pytest.mark.parametrize("kept", [96, 192])
@pytest.mark.parametrize("method", parity.METHODS.values(), ids=parity.METHODS)
def test_as_many_tokens_are_kept(method: parity.Method, kept: int) -> None:
    """Of a prompt exactly as many as were asked for, of ChunkKV whole chunks and the last, shorter one; what follows is all kept, in float32."""
    cache = parity.spec(method, kept, 384, 512)
    cascade = cache.parts[0][2]
    assert all(tier.codecs.k.name == tier.codecs.v.name == "f32" for tier in cascade.tiers)
    if isinstance(cascade.tiers[0].policy, Full):
        return
    assert [str(tier) for tier in cascade.tiers[: cascade.front]] == ["recent 128@f32"]
    chunks = {96: 4 * 20 + 4, 192: 9 * 20 + 4}
    assert sum(tier.slots(512) for tier in parity.behind(cache)) == (chunks[kept] if method.name == "ChunkKV" else kept)
    assert isinstance(ast.parse(method.press, mode="eval").body, ast.Call)


@pytest.mark.parametrize(
    ("kept", "prefix", "context", "said"),
    [(96, 384, 385, "fewer than two"), (20, 384, 512, "at least 84"), (384, 384, 512, "fewer than there are")],
)
def test_what_cannot_be_compared_is_refused(kept: int, prefix: int, context: int, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        parity.check([kept], prefix, context)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model and a text; this Python has a library by kvpress' name."""
    (folder := tmp_path / "peers").mkdir()
    monkeypatch.setattr(peers, "SCRIPT", Path(shutil.copy(peers.SCRIPT, folder)))
    for name in ("transformers", "llamacpp"):
        (folder / f"peer_{name}.py").write_text("NEEDS, VARIANTS = ('no_such_library',), ()")
    (folder / "peer_kvpress.py").write_text(LIBRARY)
    config = tiny_models.write("llama", tmp_path / "model") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 128}))
    (tmp_path / "text.txt").write_text("".join(f" = {i} = \n\nthe query {i} meets {i * i} keys.\n" for i in range(200)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMAND = ["parity", "--model", "model", "--data", "file:text.txt", "--peer", sys.executable, "--out", "parity.jsonl"]
SMALL = ["--kept", "90", "--prefix", "100", "--context", "104", "--sequences", "2"]


@pytest.mark.slow
def test_both_are_scored_on_the_same_windows(here: Path, capfd: pytest.CaptureFixture) -> None:
    """A record for each method, unpruned ones once; the table has both, the difference and the reason."""
    methods = ["--method", "full", "--method", "SnapKV"]
    cli.main([*COMMAND, *SMALL, *methods])
    full, snap = (each for each in record_files.read(here / "parity.jsonl") if isinstance(each, Parity))
    assert full.cache == "full@f32" and full.press == "" and full.kept == 100
    assert snap.press == "SnapKVPress()" and snap.kept == snap.peer_kept == 90 and snap.tokens == 2 * 4
    assert snap.peer_nll_windows == [5.0, 6.0] and snap.peer_nll == 5.5 and len(snap.nll_windows) == 2
    assert "SnapKVPress()" in capfd.readouterr().out
    title, columns, (row,) = parity.table(
        [changed(snap, nll_windows=[5.055, 6.055], documents=2, document_windows=[0, 1])]
    )
    cells = dict(zip(columns, row, strict=True))
    assert cells["cache"] == "snap[window=64] 90" and cells["Δ (95 %)"] == "+1.00% (+1.00% … +1.00%)"
    assert cells["why"] == parity.METHODS["SnapKV"].why and "2 windows of 104 tokens of text.txt" in title


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--method", "SnapVK"], "no method 'SnapVK'; there are full, random"),
        (["--method", "TOVA"], "kvpress: ValueError: no such press"),
        (["--peer", "no/python"], "cannot run the peer's Python no/python: No such file or directory"),
        (["--kept", "100"], "100 tokens kept of 100"),
        (["--context", "200"], "200"),
        (["--model", "runs/toy"], "runs/toy"),
    ],
)
def test_bad_input_is_one_line(here: Path, capfd: pytest.CaptureFixture, more: list[str], said: str) -> None:
    """Status 2, nothing on stdout, and nothing is recorded."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([*COMMAND, *SMALL, *more])
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("kvcascade: ")]
    assert stopped.value.code == 2 and out == "" and len(lines) == 1 and said in lines[0]
    assert "".join(path.read_text() for path in here.glob("parity.jsonl")) == ""
