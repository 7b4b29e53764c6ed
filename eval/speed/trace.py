"""What runs when in a program, read from the traces that JAX's profiler writes."""

import collections
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import jax

STEP = "kvcascade step"


class Event(NamedTuple):
    """An instruction of a compiled program that ran; times in nanoseconds."""

    thread: str
    start: float
    stop: float
    module: str
    name: str


class Shares(NamedTuple):
    """How a step's time is divided, in nanoseconds; the parts add up to its length."""

    instructions: dict[tuple[str, str], float]
    """By (module, instruction)."""
    between: float
    """Nothing runs, from an instruction to the next one of the same program."""
    around: float
    """Before, between and after programs: Python, dispatch, and waking up again."""

    @property
    def total(self) -> float:
        """The step's length."""
        return sum(self.instructions.values()) + self.between + self.around


def trace(step: Callable[[], object], count: int) -> list[Shares]:
    """Call a function so often under the profiler, which is told nothing of Python; how the time of each call was divided."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            for _ in range(count):
                with jax.profiler.TraceAnnotation(STEP):
                    step()
        finally:
            jax.profiler.stop_trace()
        [path] = Path(folder).rglob("*.xplane.pb")
        steps, events = _read(path)
    return [divide(start, stop, (e for e in events if e.start < stop and e.stop > start)) for start, stop in steps]


def _read(path: Path) -> tuple[list[tuple[float, float]], list[Event]]:
    steps, events = [], []
    with warnings.catch_warnings(
        action="ignore", category=DeprecationWarning
    ):  # of the type of `stats`, which says no module
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                for event in line.events:
                    start, stop = event.start_ns, event.start_ns + event.duration_ns
                    if event.name == STEP:
                        steps.append((start, stop))
                        continue
                    stats = dict(event.stats) if stop > start else {}
                    # The end of an instruction is an event too; a loop is there while its instructions run.
                    if stats.get("hlo_op") == event.name and not re.match("while|call|conditional", event.name):
                        events.append(Event(line.name, start, stop, str(stats["hlo_module"]), event.name))
    return sorted(steps), events


def divide(start: float, stop: float, events: Iterable[Event]) -> Shares:
    """Divide an interval among what runs in it: a moment goes in equal parts to the threads that run something, on each to the innermost."""
    marks = []
    for event in events:
        marks += [(max(start, event.start), 1, event), (min(stop, event.stop), 0, event)]
    marks.sort(key=lambda mark: mark[:2])
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    running: dict[str, list[Event]] = {}
    between, around = 0.0, 0.0
    last, module = start, ""
    for time, starts, event in marks:
        for stack in running.values():
            found[stack[-1].module, stack[-1].name] += (time - last) / len(running)
        if not running and event.module == module:
            between += time - last
        elif not running:
            around += time - last
        last, module = time, event.module
        if starts:
            running.setdefault(event.thread, []).append(event)
        else:
            running[event.thread].remove(event)
            if not running[event.thread]:
                del running[event.thread]
    return Shares(dict(found), between, around + stop - last)
