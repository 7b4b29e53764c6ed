"""A child process that speaks JSON lines: work that may end its process, that another Python does, or that has a limit of memory."""

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence

from kvcascade.cache.errors import BadInput

PARENT = "KVCASCADE_PARENT"
CASE_SECONDS = 3600.0
"""How long one case of `results` may take."""


class WorkerEnded(Exception):
    """A worker says no more; the text is how it ended, in one line."""

    def __init__(self, how: str, status: int | None, said: list[str]):
        super().__init__(how)
        self.status, self.said = status, said
        """Its exit status, None where it took too long; and the lines of its standard error."""


class Worker(contextlib.AbstractContextManager):
    """A child process in a session of its own: Ctrl-C at the terminal is its parent's to handle, who ends it, as `with` does."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None):
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        try:
            self._process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True,
                env={**os.environ, PARENT: str(os.getpid()), **(environment or {})}, encoding="utf-8", errors="replace",
            )  # fmt: skip
        except OSError:
            self._errors.close()
            raise

    def tell(self, wanted: object) -> None:
        """Say something to it, in a line; one that has ended does not hear it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(wanted), file=self._process.stdin, flush=True)

    def hear(self, seconds: float) -> dict:
        """The next JSON object that it says; other lines are passed over. WorkerEnded if it has ended, or takes longer, and is killed."""
        late = threading.Event()
        timer = threading.Timer(max(0.0, seconds), lambda: (late.set(), self._kill()))
        timer.start()
        try:
            assert self._process.stdout is not None
            for line in self._process.stdout:
                with contextlib.suppress(ValueError):
                    if isinstance(said := json.loads(line), dict):
                        return said
            status = self._process.wait()
        finally:
            timer.cancel()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        if late.is_set():
            raise WorkerEnded(f"took longer than {seconds:.3g} s", None, lines)
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        raise WorkerEnded(f"{how}: {lines[-1] if lines else 'without a word'}", status, lines)

    def close(self) -> None:
        """End it, with all that it started."""
        self._kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.__exit__(None, None, None)
        self._errors.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses for one that has just ended
            os.killpg(self._process.pid, signal.SIGKILL)


def results(
    command: Sequence[str], cases: Sequence[str], environment: Mapping[str, str], told: Callable[[], None]
) -> dict[str, dict]:
    """What a command finds out of each case: it is told the list of them, and says an object for each, in their order.

    One that ends before its time has failed at the case that it was at, and is started again for those after it.
    """
    found: dict[str, dict] = {}
    while left := [case for case in cases if case not in found]:
        with Worker(command, environment) as worker:
            worker.tell(left)
            for case in left:
                try:
                    found[case] = worker.hear(CASE_SECONDS)
                except WorkerEnded as ended:
                    found[case] = {"failed": str(ended)}
                    break
                finally:
                    told()
    return found


def attend():
    """In the child, first of all: die with the parent, leave no core, and return what it was told."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.getppid() != int(os.environ[PARENT]):  # it went before the line above
        os._exit(1)
    return json.loads(sys.stdin.readline())


def say(**words: object) -> None:
    """In the child: tell the parent."""
    print(json.dumps(words), flush=True)


def serve(work: Callable[[dict], None]) -> None:
    """In the child, all that it does: the work on what it was told. What the user can mend is said, and status 2; 1 with a traceback for the rest."""
    try:
        work(attend())
    except BadInput as error:
        say(bad_input=str(error))
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
