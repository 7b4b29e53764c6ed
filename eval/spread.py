"""Measurements spread over processes, here or on Ray: each makes the jobs anew, and the one that asked writes down what comes."""

import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from kvcascade.cache.errors import BadInput
from kvcascade.eval import measure, record_files
from kvcascade.eval.measure import Job, Measured
from kvcascade.eval.records import Record

type Place = Literal["processes", "ray"]
type Recipe = Callable[[], list[list[Job]]]
"""Makes jobs, the same in every process; it can be hashed and pickled. Those of a list share work and go to one process."""


def spread(
    recipe: Recipe,
    jobs: Sequence[Sequence[Job]],
    out: Path,
    processes: int,
    place: Place = "processes",
    again: bool = False,
    tell: Callable[[int, str], None] = lambda done, words: None,
) -> Measured:
    """Measure the `jobs` that a recipe makes in several processes, and append the records of each list of them as it ends; skip what the file has.

    Raises BadInput where a process ended by itself, or Ray is not there, and what `measure.measure` raises.
    """
    there = {} if again else measure.done(out)
    missing = [tuple(part for part, job in enumerate(some) if job.key not in there) for some in jobs]
    before = sum(not parts for parts in missing)
    done = before
    with measure.stoppable() as unstopped, PLACES[place](processes) as submit:
        tell(done, "")
        waiting = {submit(recipe, index, parts): index for index, parts in enumerate(missing) if parts}
        try:
            for future in concurrent.futures.as_completed(waiting):
                found = [record_files.record_of(each) for each in future.result()]
                with unstopped():
                    record_files.append(out, found)
                    done += 1
                    tell(done, jobs[waiting[future]][0].words)
        except concurrent.futures.BrokenExecutor as error:
            raise BadInput(f"a process ended before its measurement did, so it is missing: {error}") from error
        finally:
            for future in waiting:
                future.cancel()
    everything = measure.done(out)
    lost = [job for some in jobs for job in some if job.key not in everything]
    if lost:
        raise BadInput(f"{lost[0].words} was measured by other code or of another model than is here")
    return Measured([each for some in jobs for job in some for each in everything[job.key]], before)


def _measured(recipe: Recipe, index: int, parts: Sequence[int]) -> list[dict[str, Any]]:
    """In another process: some of one of a recipe's lists."""
    found = measure.measure([_made(recipe)[index][part] for part in parts], None).records
    return [record.given for record in found if isinstance(record, Record)]


@functools.lru_cache(maxsize=1)
def _made(recipe: Recipe) -> list[list[Job]]:
    return recipe()


type Submit = Callable[[Recipe, int, Sequence[int]], concurrent.futures.Future]


@contextlib.contextmanager
def _processes(count: int) -> Iterator[Submit]:
    """Processes of this machine."""
    context = multiprocessing.get_context("spawn")  # JAX has threads, and they are not forked
    executor = concurrent.futures.ProcessPoolExecutor(count, context, _bind, (context.Value("i", 0), count))
    try:
        yield functools.partial(executor.submit, _measured)
    except BaseException:
        for process in [*executor._processes.values()]:  # those that measure would go on to their end
            process.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _bind(counter: Any, processes: int) -> None:
    """In another process: its own share of the processor's cores; Ctrl-C is for the one that asked."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with counter.get_lock():
        index = counter.value
        counter.value += 1
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[index % processes :: processes] or cores)


@contextlib.contextmanager
def _ray(count: int) -> Iterator[Submit]:
    """Tasks on a Ray cluster, `RAY_ADDRESS` or one of this machine, so many at a time and each on its share of the cores."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise BadInput("Ray is not installed: pip install 'kvcascade[ray]'") from None
    mine = not ray.is_initialized()
    if mine:
        ray.init(include_dashboard=False, log_to_driver=False)
    share = max(1, int(ray.cluster_resources()["CPU"]) // count)
    task = ray.remote(num_cpus=share, max_retries=0)(_measured)
    try:
        yield lambda *arguments: task.remote(*arguments).future()
    finally:
        if mine:
            ray.shutdown()


PLACES = {"processes": _processes, "ray": _ray}
