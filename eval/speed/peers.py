"""Other libraries that are timed in turns with ours, each in a process of its own, whose other side is `peer_main.py`."""

import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from kvcascade.cache.errors import BadInput

SCRIPT = Path(__file__).with_name("peer_main.py")


class PeerFailed(Exception):
    """A peer cannot do a case; the text is its own reason."""


class Peer:
    """One variant of a library in a Python that has it, with the same model; it starts when it is first asked, and again if it died."""

    def __init__(self, python: Path, library: str, variant: str, model: Path):
        self.name, self._known = f"{library} {variant}", {"library": library}
        self._command = [str(python), str(SCRIPT), library, variant, str(model)]
        self._process, self._errors = None, None

    def prepare(self, batch: int, context: int, room: int) -> None:
        """Warm up for prompts of a length, with room for so many tokens per row; PeerFailed if this cannot be had, like all that follow."""
        if self._process is None:
            self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                self._command, stdin=pipe, stdout=pipe, stderr=self._errors, encoding="utf-8", errors="replace"
            )
            self._known |= self._read()
        self._ask("prepare", batch, context, room)

    def prefill(self) -> float:
        """Seconds from the prompts to each row's first token."""
        return self._ask("prefill")

    def decode(self, steps: int) -> list[float]:
        """Seconds of each greedy step, going on where the last ended."""
        return self._ask("decode", steps)

    def about(self) -> dict:
        """What it said of itself: library, versions, formats and bytes of its weights and of its cache as it is now."""
        with contextlib.suppress(PeerFailed):
            self._known["kv_bytes"] = self._ask("kv_bytes")
        return {"cache": self.name} | self._known

    def close(self) -> None:
        """End its process."""
        if self._process is not None:
            assert self._errors is not None
            self._process.kill()
            with contextlib.suppress(BrokenPipeError):
                self._process.__exit__(None, None, None)
            self._errors.close()
            self._process = None

    def _ask(self, *call):
        if self._process is None:
            raise PeerFailed("it ended before")
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it wrote before it ended says why
            print(json.dumps(call), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self):
        assert self._process is not None and self._process.stdout is not None and self._errors is not None
        line = self._process.stdout.readline()
        try:
            found = json.loads(line)
            reason = found["error"] if "value" not in found else None
        except (ValueError, TypeError, KeyError):
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["it said nothing"])[-1]
            reason = f"it answered {line.strip()[:60]!r}" if line else f"it ended: {last}"
            self.close()
            raise PeerFailed(reason) from None
        if reason is not None:
            raise PeerFailed(reason)
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
        found = subprocess.run([str(python), str(SCRIPT)], capture_output=True, encoding="utf-8", errors="replace")
        return json.loads(found.stdout)["value"]
    except OSError as error:
        raise BadInput(f"cannot run the peer's Python {python}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise BadInput(f"{python} does not run {SCRIPT.name} as Python 3 does") from error
