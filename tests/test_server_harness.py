"""EleutherAI's harness, by its own model for OpenAI's completions, finds behind the server what its backend for transformers found."""

import contextlib
from pathlib import Path
from typing import Any

import harness_cases
import pytest
from served import Room, serving
from test_harness import GOLDEN

from kvcascade.model import pretrained
from kvcascade.serve.guard import Rules
from kvcascade.serve.plan import Limits

pytest.importorskip("lm_eval")
from lm_eval.evaluator import simple_evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402


@pytest.mark.slow
def test_the_harness_finds_the_same_through_the_server(tmp_path: Path, monkeypatch) -> None:
    """Choices and answers: what is asked is scored token by token, and generated up to a stop text. Prompts that are too long it cuts otherwise."""
    model = pretrained.load(str(harness_cases.write("plain", tmp_path / "plain")))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    room = Room(harness_cases.CONTEXT, 64, Limits(tokens=32, rows=8))
    with serving(["full@f32 on blocks"], Rules(), room, model) as running, contextlib.chdir(harness_cases.TASKS):
        known = TaskManager(include_path=".", include_defaults=False)
        about = {
            "model": running.server.name, "base_url": f"{running.url}/v1/completions", "tokenizer_backend": "remote", "max_length": harness_cases.CONTEXT,
            "num_concurrent": 1, "max_retries": 1,
        }  # fmt: skip
        for task in ("tiny_choice", "tiny_sums"):
            found: Any = simple_evaluate("local-completions", about, [task], task_manager=known, bootstrap_iters=100)
            assert found
            golden, mine = GOLDEN[f"plain/{task}"]["metrics"], found["results"][task]
            same = [name for name in golden if name in mine and "stderr" not in name]
            assert same
            for name in same:
                assert mine[name] == pytest.approx(golden[name], rel=1e-3), (task, name)
