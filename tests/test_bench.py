"""The bench: what a step must read is counted from the arrays, the peer's answers are read, and its failures are one line."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny_models

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval import bench
from kvcascade.model import generate, gpt, pretrained
from kvcascade.model.config import ModelConfig

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


def peer(tmp_path: Path, answer: str) -> bench.Peer:
    """A peer whose Python is a script that says one line, and then one for each question."""
    python = tmp_path / "python"
    python.write_text(
        f'#!{sys.executable}\nimport sys\nprint(\'{{"name": "p 1"}}\', flush=True)\nfor _ in sys.stdin: {answer}\n'
    )
    python.chmod(0o755)
    return bench.Peer(python, str(tiny_models.write("llama", tmp_path / "model")))


def test_a_peer_is_timed_in_turns(tmp_path: Path) -> None:
    """Its warm steps are dropped, its ratio is in the table, and one record is there for each cache and for the peer."""
    other = peer(tmp_path, 'print(\'{"prefill": 2.0, "steps": [9, 9, 9, 0.5, 0.25, 0.5]}\', flush=True)')
    model = pretrained.load(str(tmp_path / "model"))
    found = bench.bench(model, [parse("full"), parse("recent 8")], 2, 16, 3, 2, other)
    other.close()
    *mine, theirs = found
    assert theirs["cache"] == "transformers" and theirs["peer"] == "p 1"
    assert theirs["step_ms"] == 500 and theirs["first_token_ms"] == 2000 and theirs["decode_tokens_per_second"] == 4
    assert [r["cache"] for r in mine] == ["full", "recent 8"] and all(r["traces"] == 2 for r in mine)
    assert mine[1]["kv_bytes"] < mine[0]["kv_bytes"] and mine[1]["step_bytes"] < mine[0]["step_bytes"]
    _, columns, rows = bench.table([r | {"bandwidth": 1e10} for r in found])
    assert {len(row) for row in rows} == {len(columns)}
    prefill, decode = map(float, rows[0][columns.index("× peer: prefill, decode")].split(", "))
    assert prefill == pytest.approx(mine[0]["prefill_tokens_per_second"] / 16, abs=0.01)
    assert decode == pytest.approx(mine[0]["decode_tokens_per_second"] / 4, abs=0.01)


@pytest.mark.parametrize(
    ("answer", "told"),
    [('print(\'{"error": "no torch"}\', flush=True)', "no torch"), ("sys.exit(1)", "ended without a word")],
)
def test_a_peer_that_fails_is_one_line(tmp_path: Path, answer: str, told: str) -> None:
    """Its own reason where it gives one; it is not waited for."""
    other = peer(tmp_path, answer)
    with pytest.raises(BadInput, match=f"the peer failed: .*{told}"):
        other.ask(1, 8, 1)
    other.close()
    with pytest.raises(BadInput, match="cannot run the peer's Python .*: No such file"):
        bench.Peer(tmp_path / "none", str(tmp_path / "model"))
