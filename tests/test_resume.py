"""Training that was stopped and went on, through the real command: the same as training that was not, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from kvcascade.model import gpt
from kvcascade.train import checkpoint, config, loop

COMMAND = [sys.executable, "-W", "error", "-c", "from kvcascade.scripts.cli import main; main()", "train"]
STEPS = 300
CLOCK = ("seconds", "tokens_per_second", "model_tflops_per_second")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def settings(tmp_path_factory, cache_with_kernels) -> Path:
    """A file with a tiny model, dropout included, and a small text."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "text.txt").write_text("".join(f"tier {i} takes what tier {i - 1} evicts.\n" for i in range(400)))
    content = {
        "model": {"layers": 1, "width": 32, "heads": 4, "kv_heads": 2, "mlp": 64, "vocab": 256, "context": 32,
                  "dropout": 0.1},
        "data": {"source": f"file:{folder / 'text.txt'}", "tokenizer": "bytes"},
        "train": {"steps": STEPS, "batch_size": 4, "warmup": 20, "evaluate_every": 50, "evaluate_windows": 4,
                  "checkpoint_every": 30, "log_every": 1},
    }  # fmt: skip
    cache_with_kernels(folder / "cache")
    file = folder / "tiny.yaml"
    file.write_text(json.dumps(content))
    return file


def start(settings: Path, *arguments: str) -> subprocess.Popen:
    environment = os.environ | {"KVCASCADE_CACHE": str(settings.parent / "cache")}
    return subprocess.Popen([*COMMAND, *arguments], env=environment, stdout=-1, stderr=-1, text=True)


def finish(settings: Path, *arguments: str) -> None:
    child = start(settings, *arguments)
    out, err = child.communicate()
    assert child.returncode == 0, err
    assert f"trained {STEPS} steps" in out


def final_state(path: Path) -> checkpoint.State:
    """Parameters and moments of a run's last checkpoint, which must be of its last step."""
    settings, _ = checkpoint.open_run(path)
    abstract = jax.tree.map(loop._abstract, loop.initial_state(settings, gpt.init(settings.model, 0)))
    return checkpoint.Checkpoints(path).load(STEPS, abstract)


def history(path: Path) -> list[dict]:
    """What the log says of each step, without the clock."""
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in checkpoint.read_log(path)]


def assert_same(path: Path, whole: Path) -> None:
    for a, b in zip(jax.tree.leaves(final_state(path)), jax.tree.leaves(final_state(whole)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert history(path) == history(whole)


@pytest.fixture(scope="module")
def whole(settings: Path) -> Path:
    """The uninterrupted run."""
    path = settings.parent / "whole"
    finish(settings, "--config", str(settings), "--run", str(path))
    assert [line["step"] for line in history(path) if "loss" in line] == list(range(1, STEPS + 1))
    return path


def stop_at(settings: Path, path: Path, step: int, number: signal.Signals) -> tuple[subprocess.Popen, str]:
    """Start a run and send it a signal as soon as its log has the step."""
    child = start(settings, "--config", str(settings), "--run", str(path))
    log, waited = path / "log.jsonl", time.monotonic()
    while not log.exists() or log.read_bytes().count(b'"loss"') < step:
        assert child.poll() is None and time.monotonic() - waited < 120, child.stderr and child.stderr.read()
        time.sleep(0.002)
    child.send_signal(number)
    _, err = child.communicate()
    return child, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_stopped_run_goes_on_bit_for_bit(settings: Path, whole: Path, tmp_path: Path, number: signal.Signals) -> None:
    """A signal at a random step saves and exits with 128 + n and one line; --resume ends where the whole run did."""
    path, step = tmp_path / "run", random.randrange(1, STEPS // 2)
    print(f"stopping at step {step}")
    child, err = stop_at(settings, path, step, number)
    stopped = checkpoint.Checkpoints(path).steps()[-1]
    assert step <= stopped < STEPS
    assert child.returncode == 128 + number
    *_, told = err.strip().splitlines()
    assert told == (
        f"kvcascade: stopped at step {stopped} and saved; go on with: kvcascade train --run {path} --resume"
    )
    assert "Traceback" not in err
    finish(settings, "--run", str(path), "--resume")
    assert_same(path, whole)


def test_a_killed_run_goes_on_bit_for_bit(settings: Path, whole: Path, tmp_path: Path) -> None:
    """kill -9 saves nothing more: the run goes on from the checkpoint before, written while training went on."""
    path, step = tmp_path / "run", random.randrange(70, STEPS // 2)
    print(f"killing at step {step}")
    child, _ = stop_at(settings, path, step, signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert 30 <= checkpoint.Checkpoints(path).steps()[-1] < STEPS
    finish(settings, "--run", str(path), "--resume")
    assert_same(path, whole)


def test_signals_are_left_as_they_were() -> None:
    """While training, both signals only leave a note; after it, Ctrl-C stops Python again."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    with loop._stop_requests() as stop:
        assert not any(signal.getsignal(number) in before for number in numbers)
        for number in numbers:
            signal.raise_signal(number)
        assert stop == list(numbers)
    assert [signal.getsignal(number) for number in numbers] == before


def test_the_settings_of_a_run_are_its_own(whole: Path) -> None:
    """What --resume reads back is what was asked for."""
    found, encoding = checkpoint.open_run(whole)
    assert found == config.load(str(whole.parent / "tiny.yaml"))
    assert encoding.name == "bytes"
