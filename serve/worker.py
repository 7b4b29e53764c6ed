"""The one thread that owns the device: engines run in it, and everybody else asks it by a queue."""

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol, runtime_checkable

from kvcascade.serve.request import Event, Request

log = logging.getLogger("kvcascade.serve")


@runtime_checkable
class Serves(Protocol):
    """An engine: `engine.Engine`, or what stands in for one."""

    def submit(self, request: Request) -> list[int]:
        """See `engine.Engine.submit`."""
        ...

    def cancel(self, number: int) -> Event | None:
        """See `engine.Engine.cancel`."""
        ...

    @property
    def busy(self) -> bool:
        """See `engine.Engine.busy`."""
        ...

    def run_step(self) -> list[Event]:
        """See `engine.Engine.run_step`."""
        ...


class Ended(Exception):
    """The thread is not there any more, so nobody answers."""


type Hear = Callable[[Event | Exception], None]
"""Called in the engines' thread with each event of a row, or with why there are no more."""


class Worker[E: Serves](threading.Thread):
    """Engines by name, in a thread of their own."""

    def __init__(
        self,
        start: Callable[[], Mapping[str, E]],
        on_end: Callable[[], None] = lambda: None,
        after_step: Callable[[Mapping[str, E]], None] = lambda engines: None,
    ):
        """`start` makes the engines, ready to run, in the thread itself; `on_end` is called when it ends, whatever for."""
        super().__init__(name="engine", daemon=True)
        self.engines: Mapping[str, E] = {}
        self.ready = threading.Event()
        self.failed: BaseException | None = None
        self._start, self._on_end, self._after = start, on_end, after_step
        self._asked: queue.SimpleQueue[tuple[Future, Callable] | None] = queue.SimpleQueue()
        self._slow: queue.SimpleQueue[tuple[Future, Callable]] = queue.SimpleQueue()
        self._heard: dict[tuple[str, int], Hear] = {}
        self._lock = threading.Lock()
        self._stopping = self._over = False

    def ask[R](self, work: Callable[[], R], slow: bool = False) -> "Future[R]":
        """Have something done in the thread; of what is `slow` one at most between two steps. Ended if it is gone."""
        future: Future[R] = Future()
        with self._lock:
            if self._over:
                future.set_exception(Ended())
            elif slow:
                self._slow.put((future, work))
                self._asked.put(None)
            else:
                self._asked.put((future, work))
        return future

    def submit(self, name: str, request: Request, hear: Sequence[Hear]) -> "Future[list[int]]":
        """Give an engine a request, whose rows' events are heard by one each; the future has the rows' numbers."""

        def work() -> list[int]:
            ids = self.engines[name].submit(request)
            self._heard |= {(name, number): each for number, each in zip(ids, hear, strict=True)}
            return ids

        return self.ask(work)

    def cancel(self, name: str, ids: Sequence[int]) -> None:
        """Take rows out, at the next step; nobody hears of them any more."""

        def work() -> None:
            for number in ids:
                self._heard.pop((name, number), None)
                self.engines[name].cancel(number)

        self.ask(work)

    def stop(self) -> None:
        """End as soon as nobody runs or waits."""
        self._stopping = True
        self._asked.put(None)

    def run(self) -> None:
        """Answer what is asked, and step."""
        try:
            self.engines = self._start()
            self.ready.set()
            while self._work():
                pass
            self._finish(Ended())
        except BaseException as error:
            self.failed = error
            log.critical("the engine has failed", exc_info=error)
            self._finish(error if isinstance(error, Exception) else Ended())
        finally:
            self._on_end()

    def _work(self) -> bool:
        """What is asked by now, and a step of each engine; False when it is over."""
        if not any(engine.busy for engine in self.engines.values()) and self._slow.empty():
            if self._stopping:
                return False
            self._do(self._asked.get())
        for _ in range(self._asked.qsize()):  # not what comes meanwhile: rows want their steps
            self._do(self._asked.get())
        if not self._slow.empty():
            self._do(self._slow.get())
        for name, engine in self.engines.items():
            if engine.busy:
                for event in engine.run_step():
                    key = name, event.id
                    if hear := self._heard.pop(key, None) if event.finished else self._heard.get(key):
                        hear(event)
        self._after(self.engines)
        return True

    def _do(self, asked: tuple[Future, Callable] | None) -> None:
        """Something that is asked, unless whoever asked has gone."""
        if asked is None or not asked[0].set_running_or_notify_cancel():
            return
        try:
            asked[0].set_result(asked[1]())
        except Exception as error:  # his who asked
            asked[0].set_exception(error)

    def _finish(self, why: Exception) -> None:
        """Tell all who wait that nobody answers."""
        with self._lock:
            self._over = True
        self.ready.clear()
        for waiting in (self._asked, self._slow):
            while not waiting.empty():
                if (asked := waiting.get()) and asked[0].set_running_or_notify_cancel():
                    asked[0].set_exception(why)
        for hear in self._heard.values():
            hear(why)
        self._heard.clear()
