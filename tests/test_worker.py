"""Workers: what they say is heard object by object, how they end is told in a line, and none waits for ever or outlives its parent."""

import subprocess
import sys
import time
from collections.abc import Sequence

import pytest

from kvcascade.eval import worker
from kvcascade.eval.worker import Worker, WorkerEnded


def program(body: str) -> Sequence[str]:
    """A Python that does this."""
    return sys.executable, "-c", f"import json, os, signal, sys, time\n{body}"


def test_what_is_no_object_is_passed_over() -> None:
    """A library may print; what is told is heard, and answers come one by one."""
    body = "for line in sys.stdin: print('warning'); print(3); print(json.dumps({'twice': 2 * json.loads(line)}), flush=True)"
    with Worker(program(body)) as doubles:
        for number in (4, 5):
            doubles.tell(number)
            assert doubles.hear(30.0) == {"twice": 2 * number}


@pytest.mark.parametrize(
    ("body", "told", "status"),
    [
        ("sys.exit('no room')", "ended with status 1: no room", 1),
        ("print('bye')", "ended with status 0: without a word", 0),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV: without a word", -11),
        ("print('busy', file=sys.stderr, flush=True); time.sleep(60)", "took longer than 2 s", None),
    ],
)
def test_an_end_is_told_in_one_line(body: str, told: str, status: int | None) -> None:
    """With its status and its last words; one that takes too long is killed; telling it more is no error."""
    start = time.monotonic()
    with Worker(program(body)) as ends:
        with pytest.raises(WorkerEnded) as ended:
            ends.hear(2.0 if status is None else 30.0)
        assert (str(ended.value), ended.value.status) == (told, status)
        assert ended.value.said == {None: ["busy"], 1: ["no room"]}.get(status, [])
        ends.tell("more")
    assert time.monotonic() - start < 20


def test_what_a_worker_started_ends_with_it() -> None:
    """Its own children are of its session, so a pipe that they hold is closed."""
    body = "import subprocess; subprocess.Popen(['sleep', '60']); print('{}', flush=True); time.sleep(60)"
    with Worker(program(body)) as parent:
        assert parent.hear(30.0) == {}
        with pytest.raises(WorkerEnded, match="took longer"):
            parent.hear(0.1)


@pytest.mark.slow
def test_a_case_that_ends_or_hangs_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those after it are asked of a new worker; each is told of once."""
    body = """
from kvcascade.eval import worker
for case in worker.attend():
    if case == "hangs": time.sleep(60)
    if case == "dies": os._exit(3)
    worker.say(length=len(case))
"""
    monkeypatch.setattr(worker, "CASE_SECONDS", 5.0)
    counted = []
    found = worker.results(program(body), ["a", "dies", "bc", "hangs", "def"], {}, lambda: counted.append(1))
    assert found == {
        "a": {"length": 1}, "bc": {"length": 2}, "def": {"length": 3},
        "dies": {"failed": "ended with status 3: without a word"}, "hangs": {"failed": "took longer than 5 s"},
    }  # fmt: skip
    assert len(counted) == 5


def test_a_worker_without_its_parent_ends() -> None:
    """Where the parent went before the worker could attend, it does not begin."""
    body = "from kvcascade.eval import worker\nworker.attend(); print('worked')"
    alone = {worker.PARENT: "1", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(program(body), env=alone, input="[]\n", capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout) == (1, "")
