"""What `kvcascade prompt` says is measured: a child's figures are those of the program and of its process."""

import json
from pathlib import Path

import pytest
import tiny_models

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval.memory import prompt

LENGTH = 8192


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


def test_a_prompt_longer_than_the_model_is_refused() -> None:
    with pytest.raises(BadInput, match="longer than the model's"):
        prompt.job("smollm2", parse("full"), 10_000, 0, 1, None).run()
