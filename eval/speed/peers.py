"""Other libraries that are timed in turns with ours, each in a process of its own, whose other side is `peer_main.py`."""

import contextlib
import sys
from pathlib import Path

from kvcascade.cache.errors import BadInput
from kvcascade.eval.worker import Worker, WorkerEnded

SCRIPT = Path(__file__).with_name("peer_main.py")


class PeerFailed(Exception):
    """A peer cannot do a case; the text is its own reason."""


LEAST, PATIENCE = 600.0, 100.0
"""Seconds that a peer may take for an answer at least, and how often as long as ours took to compile, prefill and begin to decode."""


class Peer:
    """One variant of a library in a Python that has it, with the same model; it starts when it is first asked, and again if it died."""

    def __init__(self, python: Path, library: str, variant: str, model: Path):
        self.name, self._known, self._patience = f"{library} {variant}", {"library": library}, LEAST
        self._command = [str(python), str(SCRIPT), library, variant, str(model)]
        self._worker: Worker | None = None

    def prepare(self, prompts: list[list[int]], room: int, seconds: float) -> None:
        """Warm up with prompts of one length and with room for so many tokens per row; `seconds` is what ours took to do the same.

        PeerFailed if this cannot be had or takes far longer than ours, like all that follow.
        """
        self._patience = max(LEAST, PATIENCE * seconds)
        self.start()
        self._ask("prepare", prompts, room)

    def start(self) -> None:
        """Let it load its model, unless it has."""
        if self._worker is None:
            self._worker = Worker(self._command)
            self._known |= self._hear()

    def prefill(self) -> float:
        """Seconds from the prompts to each row's first token."""
        return self._ask("prefill")

    def decode(self, steps: int, loop: bool) -> list[float]:
        """Seconds of each greedy step, going on where the last ended, in the library's own `loop` or one by one."""
        return self._ask("decode", steps, loop)

    def scored(self, cases: list[tuple[str, int]], row: list[int], prefix: int, seed: int) -> list[list]:
        """Of kvpress, for each press and number of tokens that it keeps: mean nats per token after a row's `prefix`, and tokens that stayed."""
        self.start()
        return self._ask("scored", cases, row, prefix, seed)

    def grown(self, kept: int, prompt: list[int]) -> dict:
        """Of kvpress: bytes by which its process' peak grew over a prompt pruned to so many tokens, of its cache then, and seconds."""
        self.start()
        return self._ask("grown", kept, prompt)

    def about(self) -> dict:
        """What it said of itself: library, versions, its loop, formats and bytes of its weights and of its cache as it is now."""
        with contextlib.suppress(PeerFailed):
            self._known["kv_bytes"] = self._ask("kv_bytes")
        return {"cache": self.name} | self._known

    def close(self) -> None:
        """End its process."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _ask(self, *call: object):
        if self._worker is None:
            raise PeerFailed("it ended before")
        self._worker.tell(call)
        return self._hear()

    def _hear(self):
        assert self._worker is not None
        try:
            found = self._worker.hear(self._patience)
        except WorkerEnded as ended:
            self.close()
            raise PeerFailed(str(ended)) from None
        if "value" not in found:
            raise PeerFailed(str(found.get("error", found)))
        return found["value"]


def find(pythons: tuple[Path, ...], model: Path, variants: tuple[str, ...] = ()) -> list[Peer]:
    """The peers that these Pythons have, each library from the first one that has it; without any, those of the Python that runs.

    `variants` keeps those whose name contains one of the texts. Raises BadInput for a Python that cannot be run or has no library,
    and for a text that is in no name.
    """
    libraries: dict[str, tuple[Path, list[str]]] = {}
    for python in pythons or (Path(sys.executable),):
        offered = _offered(python)
        if pythons and not offered:
            raise BadInput(f"{python} has no library to compare with: torch and transformers, kvpress, or llama_cpp")
        for library, names in offered.items():
            libraries.setdefault(library, (python, names))
    peers = [Peer(python, library, name, model) for library, (python, names) in libraries.items() for name in names]
    for text in variants:
        if not any(text in peer.name for peer in peers):
            raise BadInput(f"no peer is named {text!r}; there are: {'; '.join(peer.name for peer in peers) or 'none'}")
    return [peer for peer in peers if not variants or any(text in peer.name for text in variants)]


def _offered(python: Path) -> dict[str, list[str]]:
    try:
        with Worker([str(python), str(SCRIPT)]) as worker:
            return worker.hear(LEAST)["value"]
    except OSError as error:
        raise BadInput(f"cannot run the peer's Python {python}: {error.strerror}") from error
    except (WorkerEnded, KeyError) as error:
        raise BadInput(f"{python} does not run {SCRIPT.name} as Python 3 does: {error}") from error
