"""Measurements that can be stopped: each is recorded as soon as it is there, and what is recorded is not measured again."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kvcascade.cache.errors import BadInput
from kvcascade.eval import record_files, records
from kvcascade.eval.origin import origin
from kvcascade.eval.records import Record
from kvcascade.kernels.files import source_key


class Stopped(KeyboardInterrupt):
    """The user or the system asked for an end; `signal` says by what."""

    def __init__(self, number: int, words: str = "stopped"):
        super().__init__(words)
        self.signal = number


@dataclasses.dataclass(frozen=True)
class Job[R: Record]:
    """One measurement, which gives some records."""

    about: dict[str, Any]
    """Everything that its figures depend on but the code: JSON."""
    room: str
    """The folder of the code that measures, such as `eval/quality`."""
    run: Callable[[], Sequence[R]]
    words: str
    """A few, for a person who waits."""
    also: tuple[str, ...] = ()
    """Other folders whose code it measures."""

    @functools.cached_property
    def key(self) -> str:
        """What tells it from other measurements, and from the same one by other code."""
        told = json.dumps(self.about | {"code": self.code}, sort_keys=True, allow_nan=False)
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    @property
    def code(self) -> str:
        """A hash of the code that its figures depend on."""
        return source_key("cache", "kernels", "model", self.room, *self.also)


@dataclasses.dataclass
class Measured[R: Record]:
    """What came of some jobs: their records in order, and how many of the jobs had been done before."""

    records: list[R]
    before: int


def measure[R: Record](
    jobs: Sequence[Job[R]],
    out: Path | None,
    again: bool = False,
    tell: Callable[[int, str], None] = lambda done, words: None,
) -> Measured[R]:
    """Run jobs one after the other; append the records of each to a file as it ends, and skip what the file has, unless `again`.

    SIGTERM and Ctrl-C raise Stopped as soon as a running computation ends, a second one ends the process at once; what was done is in the
    file, and `tell` has heard of it: how many are done, and which is next. Raises BadInput for a figure that is not finite.
    """
    there: dict[str, Any] = {} if again or out is None else done(out)
    found: list[R] = []
    before = 0
    words = [*(job.words for job in jobs), ""]
    with stoppable() as unstopped:
        tell(0, words[0])
        for index, job in enumerate(jobs, 1):
            new = there.get(job.key) or _run(job)
            with unstopped():
                if job.key in there:
                    before += 1
                elif out is not None:
                    record_files.append(out, new)
                tell(index, words[index])
            there[job.key] = new
            found += new
    return Measured(found, before)


def _run[R: Record](job: Job[R]) -> list[R]:
    start = time.monotonic()
    try:
        new = job.run()
    except ValidationError as error:
        raise BadInput(f"{job.words}: {record_files.wrong(error)}, so nothing is recorded") from error
    share = (time.monotonic() - start) / len(new)  # a job's seconds are counted once: its records share them
    made = {"key": job.key, "of": len(new), "code": job.code}
    stamped = [records.changed(each, **made, **origin(share)) for each in new]
    try:
        json.dumps([each.given for each in stamped], allow_nan=False)
    except ValueError as error:  # in a key that no class names
        raise BadInput(f"{job.words}: a figure is not finite, so nothing is recorded") from error
    return stamped


def done(out: Path) -> dict[str, list[Record]]:
    """The records of each job that a file has, by the job's key; nothing where there is no such file."""
    found = records.of(record_files.usable(out)[0] if out.is_file() else [], Record)
    return {str(mine[0].key): mine for mine in records.grouped(found, lambda record: record.key)}


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Within it SIGTERM and SIGINT raise Stopped, the second one of a kind does what it does without; outside the main thread nothing changes.

    Yields a context for what is done whole or not at all: a signal that comes within raises Stopped at its end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield contextlib.nullcontext
        return
    whole, waiting = False, 0

    def stop(number, frame):
        nonlocal waiting
        signal.signal(number, signal.SIG_DFL)
        if not whole:
            raise Stopped(number)
        waiting = number

    @contextlib.contextmanager
    def unstopped() -> Iterator[None]:
        nonlocal whole
        whole = True
        try:
            yield
        finally:
            whole = False
        if waiting:
            raise Stopped(waiting)

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield unstopped
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
