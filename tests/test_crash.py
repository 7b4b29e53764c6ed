"""The crash test: the search finds the edge, a death is told for what it was, nothing outlives its parent, and memory is what was predicted."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models

from kvcascade.cache.block_cache import BlockCache
from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.cache.whole import nbytes
from kvcascade.eval import record_files
from kvcascade.eval.memory import crash, limits, occupied
from kvcascade.eval.records import Crash, of
from kvcascade.eval.report import page
from kvcascade.scripts import cli, readme

PLACE = limits.cgroup() if sys.platform == "linux" else None
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's limits are Linux's")
WAYS = [
    pytest.param(
        PLACE, marks=pytest.mark.skipif(PLACE is None, reason="no memory cgroup may be made here"), id="cgroup"
    ),
    pytest.param(None, marks=ON_LINUX, id="rlimit"),
]
MB = 10**6


@pytest.mark.parametrize("edge", [1, 2, 3, 17, 100, 1000, 4321])
@pytest.mark.parametrize("guess", [1, 90, 1010, 9000])
@pytest.mark.parametrize("resolution", [0.0, 0.01, 0.3])
def test_the_search_ends_at_the_edge(edge: int, guess: int, resolution: float) -> None:
    """Wherever it starts: the larger one lived and the smaller one died, or are neighbours; no size is tried twice."""
    tried = []
    lives = lambda size: tried.append(size) or size <= edge
    low, high = crash.search(lives, guess, resolution)
    assert low <= edge < high and high - low <= max(1, resolution * low)
    assert high in tried and low in [1, *tried] and len(tried) == len({*tried}) and min(tried) > 1
    assert len(tried) <= 2 * max(guess, edge).bit_length() + 7


def test_a_good_guess_takes_two_children() -> None:
    """One on each side of the edge."""
    tried = []
    assert crash.search(lambda size: tried.append(size) or size <= 1004, 1000, 0.01) == (1000, 1010)
    assert tried == [1000, 1010]


def program(tmp_path: Path, body: str) -> list[str]:
    """A child whose work is this: a cheap stand-in for a model."""
    file = tmp_path / "child.py"
    start = "import os, signal, sys, time\nfrom kvcascade.eval import worker\nwanted = worker.attend()\n"
    file.write_text(start + textwrap.dedent(body))
    return [sys.executable, str(file)]


USERS = """
    worker.say(stage="filling the cache")
    filled = [bytearray(os.urandom(1000) * 10_000) for _ in range(wanted["users"])]  # 10 MB each
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    size = {name: 1024 * int(value.split()[0]) for name, value in status.items() if value.endswith("kB\\n")}
    peak, reserved = size["VmHWM"] - size["RssFile"], size["VmData"] - size["RssAnon"]
    more = {name: 10_000_000 * wanted["users"] for name in ("cache_bytes", "cache_bytes_predicted")}
    about = dict(context=8, tokens=8, room=8)
    worker.say(**about, weights="float32", weight_bytes=0, workspace=0, step_seconds=0.0, peak_rss=peak, peak=peak, reserved=reserved, **more)
"""


@pytest.mark.parametrize("place", WAYS)
def test_users_until_memory_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: limits.Cgroup | None
) -> None:
    """Users of 10 MB each under 400 MB: the kernel kills where it should, and the record says what the arithmetic had said."""
    monkeypatch.setattr(crash, "PROGRAM", program(tmp_path, USERS))
    monkeypatch.setattr(limits, "cgroup", lambda: place)
    found = crash.crash("m", parse("full"), 0, 400 * MB, 0.0, 1, None, 30.0)
    assert found.died == found.users + 1 and 30 < found.users < 40
    assert found.user_bytes == pytest.approx(10 * MB, rel=0.01)
    assert found.users_predicted == pytest.approx(found.users, abs=1)
    assert found.way == (f"cgroup v{place.version}" if place else "RLIMIT_DATA")
    assert all(child["lived"] == (child["users"] <= found.users) for child in found.children)
    assert {child.get("died") for child in found.children} == {None, "filling the cache"}
    if place:
        assert all(dict[str, Any](child)["peak_cgroup"] <= 400 * MB for child in found.children)
        assert not (place.parent / f"kvcascade-{os.getpid()}").exists()


@ON_LINUX
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A record per cache, the table, and the sentence; bad input is one line before any child."""
    monkeypatch.setattr(crash, "PROGRAM", program(tmp_path, USERS))
    before = signal.getsignal(signal.SIGTERM)
    out = tmp_path / "found.jsonl"
    arguments = ["crash", "--model", "m", "--cache", "full", "--cache", "recent 8", "--limit", "300MB"]
    try:
        cli.main([*arguments, "--resolution", "0.2", "--out", str(out)])
    finally:
        signal.signal(signal.SIGTERM, before)
    first, second = of(record_files.read(out), Crash)
    assert (first.cache, second.cache) == ("full", "recent 8") and first.commit and first.limit == 300 * MB
    shown = capsys.readouterr().out
    assert f"`full` {first.users} users, `recent 8` {second.users} users, +0%" in shown
    for more, told in (
        ("--limit 6", "'6' is not an amount"),
        ("--steps 0", "--steps is 0; it must be at least 1"),
        ("--cache ful", "no policy"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main([*arguments, *more.split()])
        assert told in capsys.readouterr().err


@ON_LINUX
@pytest.mark.parametrize(
    ("body", "failed"),
    [
        ("raise ValueError('a wrong thing')", "ended with status 1: ValueError: a wrong thing"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV: without a word"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL: without a word"),
        ("print('what():  std::bad_alloc', file=sys.stderr); os.abort()", "memory"),
        ("raise RuntimeError('RESOURCE_EXHAUSTED: Shared memory size limit exceeded')", "status 1: .*Shared memory"),
        ("raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes')", "memory"),
        ("worker.say(stage='x'); time.sleep(60)", "took longer than 2 s"),
    ],
)
def test_a_death_is_told_for_what_it_was(tmp_path: Path, body: str, failed: str) -> None:
    """Only what the limit or a refused allocation ended is `memory`."""
    ended = limits.run(program(tmp_path, body), {}, 300 * MB, PLACE, 2.0)
    assert re.search(failed, ended.failed) and (ended.failed == "memory") == (failed == "memory")


@ON_LINUX
@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("worker.say(stage='decoding'); sys.exit('no such thing') if wanted['users'] > 1 else None", "no such thing"),
        ("worker.say(bad_input='no model of that name'); sys.exit(2)", "^no model of that name$"),
        ("x = bytearray(10**9)", "one user does not fit: memory ran out while starting"),
    ],
)
def test_another_failure_ends_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, told: str) -> None:
    """It is not taken for a size that is too large; what is wrong is said in one line."""
    most = "{'peak': 10**8, 'cache_bytes_predicted': 10**7, 'workspace': 0, 'reserved': 0}"
    lived = f"if wanted['users'] == 1: worker.say(**{most})\n"
    monkeypatch.setattr(crash, "PROGRAM", program(tmp_path, lived + body))
    with pytest.raises(BadInput, match=told):
        crash.crash("m", parse("full"), 0, 300 * MB, 0.01, 1, None, 30.0)


PARENT = """
import signal, sys
from kvcascade.eval.memory import limits
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
limits.run({command}, {{}}, 300_000_000, limits.cgroup() if {grouped} else None, 60)
"""


def gone(process: int) -> bool:
    """Whether a process is over, within five seconds; a zombie is."""
    for _ in range(100):
        with contextlib.suppress(OSError):
            if "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text():
                time.sleep(0.05)
                continue
        return True
    return False


@pytest.mark.parametrize("place", WAYS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_parent_leaves_nothing(tmp_path: Path, place: limits.Cgroup | None, number: signal.Signals) -> None:
    """Neither the child nor its cgroup; after SIGKILL, which nobody can handle, the next run takes the empty cgroup away."""
    said = tmp_path / "pid"
    body = f"open({str(said)!r} + '.new', 'w').write(str(os.getpid()))\nos.rename({str(said)!r} + '.new', {str(said)!r})\ntime.sleep(60)"
    text = PARENT.format(command=program(tmp_path, body), grouped=place is not None)
    parent = subprocess.Popen([sys.executable, "-c", text], stderr=subprocess.DEVNULL)
    while not said.exists():
        assert parent.poll() is None
        time.sleep(0.02)
    child = int(said.read_text())
    assert not place or (place.parent / f"kvcascade-{parent.pid}").exists()
    parent.send_signal(number)
    assert parent.wait(10)
    assert gone(child)
    if place and number == signal.SIGKILL:
        with place.group(MB * 100):
            pass
    assert not place or not (place.parent / f"kvcascade-{parent.pid}").exists()


def test_groups_of_version_2_are_made_beside_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group with processes of its own can have none below it that counts memory, so the next place up is taken."""
    monkeypatch.setattr(limits, "_remove", lambda folder: shutil.rmtree(folder, ignore_errors=True))
    (tmp_path / "cgroup.controllers").write_text("memory")
    own = tmp_path / "user" / "session"
    own.mkdir(parents=True)
    own.chmod(0o500)
    made = Path.mkdir
    refuse = lambda path, *rest, **more: (_ for _ in ()).throw(PermissionError) if path.parent == own else made(path)
    monkeypatch.setattr(Path, "mkdir", refuse)
    place = limits.cgroup("0::/user/session\n", tmp_path)
    assert place and place == limits.Cgroup(own.parent, 2)
    with place.group(5 * MB) as folder:
        assert (folder / "memory.max").read_text() == str(5 * MB) and not (folder / "memory.swap.max").exists()
        for kills, peak, told in ((0, 5 * MB, False), (1, 5 * MB, True), (1, 3 * MB, False)):
            (folder / "memory.events").write_text(f"oom {kills}\noom_kill {kills}\n")
            (folder / "memory.peak").write_text(str(peak))
            assert place.killed(folder, 5 * MB) == told
    assert limits.cgroup("", tmp_path) is None


@pytest.mark.parametrize(("text", "size"), [("6GB", 6 * 10**9), ("700MiB", 700 * 2**20), ("1.5 GB", 1_500_000_000)])
def test_an_amount_of_memory(text: str, size: int) -> None:
    assert limits.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["6", "GB", "-6GB", "6 gb", "0GB"])
def test_no_amount_of_memory(text: str) -> None:
    with pytest.raises(BadInput, match="is not an amount of memory"):
        limits.parse_bytes(text)


@pytest.mark.parametrize(
    ("spec", "held"),
    [("full", 28), ("sink 2 | recent 6 | heavy 8@int8", 16), ("sink 4 | recent 28 | full@int4h", 28)],
)
def test_a_cache_is_full_of_distinct_positions(nano, spec: str, held: int) -> None:
    """As many as rows of 28 tokens can have left in it, the same in each row and head, and what a spec says it takes."""
    config = nano.config
    cache = occupied.occupied(parse(spec), config, 32, [32] * 3, 4)
    assert nbytes(cache) == 3 * parse(spec).nbytes(config.layer_heads, 32)
    for layer in cache.layers:
        pos_BKS = np.concatenate([slots.pos_BKS for slots in layer.slots], -1)
        assert (pos_BKS == pos_BKS[:1, :1]).all()
        found = pos_BKS[0, 0][pos_BKS[0, 0] >= 0].tolist()
        assert len(found) == len({*found}) == held and max(found) < 28


@pytest.mark.parametrize(
    ("spec", "room"),
    [
        ("full", 4 * 48), ("full@int8", 4 * 48), ("full@int8 on blocks", 16 * (1 + 2 + 3 + 1)),
        ("sink 20 on blocks | recent 6", 16 * (1 + 2 + 2 + 1) + 4 * 6), ("sink 50% on blocks | recent 6", 16 * (1 + 2 + 2 + 1) + 4 * 6),
        ("layers[0:1]: full ; layers[1:]: sink 20 on blocks | recent 2", 4 * 48), ("layers[0:1]: recent 8 ; layers[1:]: full on blocks", 16 * 7),
    ],
)  # fmt: skip
def test_users_have_the_lengths_of_requests(nano, spec: str, room: int) -> None:
    """Rows take what the longest could, blocks what each needs; bytes as predicted, and each token that a row could have in its place."""
    config, requests = nano.config, [9, 100, 17, 48, 2]
    lengths = occupied.lengths_of(requests, 4, 48, 3)
    assert lengths == [9, 17, 48, 9]
    cache = occupied.occupied(parse(spec), config, 48, lengths, 3)
    assert nbytes(cache) == occupied.predicted(parse(spec), config, 48, lengths)
    assert occupied.room(cache, 4) == room
    if isinstance(cache, BlockCache):
        needed = [[table >= 0 for table in row].count(True) for row in np.asarray(cache.table_RW)]
        named = np.asarray(cache.table_RW)[np.asarray(cache.table_RW) >= 0]
        most = 24 if "50%" in spec else 20 if "sink" in spec else 48
        assert needed == [-(-min(length, most) // 16) for length in lengths] and sorted(named) == [*range(sum(needed))]
    for index, shares in enumerate(cache.of):
        if not shares:
            continue
        layer, first = cache.layers[shares[0].place], 0
        if isinstance(cache, BlockCache) and (shared := cache.shared[index]):
            first = shared.limit
        pos_BKS = np.concatenate([slots.pos_BKS for slots in layer.slots], -1)
        held = [min(max(0, length - 3 - first), pos_BKS.shape[2]) for length in lengths]
        assert [(row[0] >= 0).sum() for row in pos_BKS] == held and pos_BKS.max() < 48 - 3
    with pytest.raises(BadInput, match="no request of the trace has more than 3 and at most 8 tokens"):
        occupied.lengths_of(requests, 4, 8, 3)


@pytest.mark.slow
@pytest.mark.parametrize("place", WAYS[:1])
def test_a_real_child_fills_its_cache_or_is_killed(tmp_path: Path, place: limits.Cgroup) -> None:
    """Every byte of the cache is in memory where it lives; more than the limit is memory's end, and told with where it was."""
    wanted = {
        "model": str(tiny_models.write("llama", tmp_path / "model")),
        "weights": None,
        "context": 64,
        "cache": "full@int8",
        "steps": 2,
        "lengths": None,
    }
    command = [sys.executable, "-m", "kvcascade.eval.memory.crash_child"]
    ended = limits.run(command, wanted | {"users": 50_000}, 900 * MB, place, 60.0)
    assert not ended.failed
    assert ended.said["cache_bytes"] == ended.said["cache_bytes_predicted"] > 300 * MB
    taken = ended.said["cache_bytes"] + ended.said["workspace"]
    assert taken + 100 * MB < ended.said["peak"] < taken + 400 * MB  # 230 MB are the program's own
    assert ended.peak and ended.said["peak"] < 1.02 * ended.peak
    ended = limits.run(command, wanted | {"users": 300_000}, 900 * MB, place, 60.0)
    assert ended.failed == "memory" and ended.said["stage"] in ("filling the cache", "decoding")


def test_the_recorded_tests_agree_with_the_arithmetic(tmp_path: Path) -> None:
    """Within 5 %, the bytes of a user and their number; and the page and the sentences show each of them."""
    found = of(record_files.read(readme.RESULTS / "crash.jsonl"), Crash)
    for one in found:
        assert one.user_bytes_predicted == pytest.approx(one.user_bytes, rel=0.05)
        assert one.users_predicted == pytest.approx(one.users, rel=0.05)
        assert one.given["kv_bytes"] == one.given["kv_bytes_predicted"] and one.peak <= one.limit
    cases = {one.case for one in found}
    assert len(crash.sentences(found)) == len(found) - len(cases) > 0
    assert all(", +" in line for line in crash.sentences(found))
    page.write(tmp_path / "report.html", found, "kvcascade report")
    html = (tmp_path / "report.html").read_text()
    assert "Users until memory broke" in html and "<svg" in html
    assert all(f"<td>{one.users:,}</td>" in html for one in found)
