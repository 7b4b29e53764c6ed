"""Progress where there is no terminal: lines, neither none nor thousands."""

import types

import pytest

from kvcascade.scripts import console


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds since the start, which a test sets."""
    now = [0.0]
    monkeypatch.setattr(console, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    return now


@pytest.mark.parametrize(("steps", "seconds", "least", "most"), [(1000, 1.0, 38, 42), (100_000, 0.1, 38, 42), (10, 60.0, 10, 10),
                                                                  (1000, 0.01, 3, 5), (5, 0.1, 1, 1)])  # fmt: skip
def test_a_line_every_few_percent_and_seconds(
    clock: list[float], capsys: pytest.CaptureFixture, steps: int, seconds: float, least: int, most: int
) -> None:
    """Long tasks and short ones: at most forty lines or so, three seconds apart, and one at the end."""
    with console.progress("task", steps) as show:
        for step in range(1, steps + 1):
            clock[0] += seconds
            show(step, f"loss {step}")
    out, err = capsys.readouterr()
    assert out == "" and least <= len(err.splitlines()) <= most
    assert f"{steps:,}/{steps:,} (100%)  loss {steps}  after" in err.splitlines()[-1]


def test_a_line_says_how_far_and_how_long(clock: list[float], capsys: pytest.CaptureFixture) -> None:
    """Of a run that goes on, what is left is reckoned from the speed since then."""
    with console.training("runs/x", 1000) as report:
        report(500, {"loss": 4.0, "tokens_per_second": 10.0})
        clock[0] = 100.0
        report(600, {"loss": 3.25, "tokens_per_second": 1234.5, "mfu": 0.41})
        assert capsys.readouterr().err == (
            "runs/x: 600/1,000 (60%)  loss 3.250  1,234 tokens/s  MFU 41%  6:40 left  after 1:40\n"
        )
    assert capsys.readouterr().err == "", "nothing new to say"


def test_a_task_of_unknown_length_speaks_ever_more_seldom(clock: list[float], capsys: pytest.CaptureFixture) -> None:
    """An hour of it is a few dozen lines; a task that fails says how far it came."""
    with pytest.raises(ValueError), console.progress("load", None) as show:
        for step in range(36_000):
            clock[0] += 0.1
            show(step, "of many")
        raise ValueError
    lines = capsys.readouterr().err.splitlines()
    assert 15 <= len(lines) <= 40
    assert lines[-1] == "load: 35,999  of many  after 1:00:00"
