"""Files with faults put in by chance, through the readers, for as long as one has time: `python tests/fuzz.py gguf --minutes 20`.

Each number makes one file. It must be read, or refused in one line, within seconds and without memory beyond what the file has.
Where something else happens the number is printed, and `--only NUMBER` shows it again.
"""

import argparse
import contextlib
import json
import logging
import random
import resource
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_models
from test_pretrained import write_gguf

from kvcascade.cache.errors import BadInput
from kvcascade.model import chat, pretrained

SECONDS, ROOM, MOST = 10, 3 << 30, 256  # MOST: MiB that one of these small files may take more than those before
ODD = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 1e308, float("nan"), float("inf"), 0.5, "", "x", "é" * 50,
    [], {}, [[]], [None], {"": ""}, [1] * 1000, "{{ x }}", "gpt2", "llama", [2**40] * 3, "1e9",
]  # fmt: skip
NUMBERS = [
    0,
    1,
    2**7,
    2**8 - 1,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
]


def bytes_changed(rng: random.Random, content: bytes, head: int) -> bytes:
    """A few of: bits turned over, numbers of 1 to 8 bytes put in, pieces cut out, doubled or moved, the end cut off; mostly near the start."""
    found = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        at = rng.randrange(max(1, min(len(found), head if rng.random() < 0.9 else len(found))))
        kind = rng.randrange(6)
        if kind == 0:
            found[at : at + 1] = bytes([found[at] ^ 1 << rng.randrange(8)]) if found else b"x"
        elif kind == 1:
            size = rng.choice([1, 2, 4, 8])
            found[at : at + size] = (rng.choice(NUMBERS) & (1 << 8 * size) - 1).to_bytes(size, "little")
        elif kind == 2:
            del found[at : at + rng.choice([1, 4, 8, 100])]
        elif kind == 3:
            piece = found[at : at + rng.randrange(1, 64)]
            to = rng.randrange(len(found) + 1)
            found[to:to] = piece
        elif kind == 4:
            found[at : at + 8] = struct.pack("<d", rng.choice([float("nan"), float("inf"), 1e300]))
        elif rng.random() < 0.2:
            del found[at:]
    return bytes(found)


def value_changed(rng: random.Random, value: Any) -> Any:
    """A JSON value of which one somewhere inside became odd, went, or stands under another's name."""
    places: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        each = waiting.pop()
        pairs = each.items() if isinstance(each, dict) else enumerate(each) if isinstance(each, list) else ()
        places += [(each, key) for key, _ in pairs]
        waiting += [inner for _, inner in pairs]
    for _ in range(rng.choice([1, 1, 2, 5])):
        if not places:
            return rng.choice(ODD)
        owner, key = rng.choice(places)
        with contextlib.suppress(KeyError, IndexError):
            kind = rng.randrange(5)
            if kind == 0:
                del owner[key]
            elif kind == 1 and isinstance(owner, dict):
                owner[rng.choice(list(owner))] = owner[key]
            else:
                owner[key] = rng.choice(ODD)
    return value


def json_changed(rng: random.Random, text: str) -> bytes:
    if rng.random() < 0.25:
        return bytes_changed(rng, text.encode(), len(text))
    return json.dumps(value_changed(rng, json.loads(text))).encode("utf-8", "replace")


class Readers:
    """One function per format: (chance, folder) makes a file there and reads it."""

    def __init__(self, base: Path):
        self.names = [
            "llama",
            "llama3",
            "yarn",
            "longrope",
            "qwen2",
            "qwen3",
            "gemma2",
            "gemma3",
            "gpt2",
            "smollm3",
            "phi3",
            "mixtral",
        ]
        self.hub = {name: tiny_models.write(name, base / name) for name in self.names}
        self.ggufs = [
            write_gguf(name, base / f"{name}.gguf").read_bytes() for name in ("llama", "qwen2", "gpt2", "gemma2")
        ]
        golden = json.loads(Path(__file__).with_name("golden_chats.json").read_text("utf-8"))
        self.templates, self.chats, self.special = golden["templates"], golden["chats"], golden["special"]

    def _copy(self, rng: random.Random, folder: Path, changed: str, change: Callable[[bytes], bytes]) -> None:
        source = self.hub[rng.choice(self.names)]
        for path in source.iterdir():
            content = path.read_bytes()
            (folder / path.name).write_bytes(change(content) if path.name == changed else content)
        pretrained.load(str(folder))

    def gguf(self, rng: random.Random, folder: Path) -> None:
        whole = rng.choice(self.ggufs)
        (folder / "m.gguf").write_bytes(bytes_changed(rng, whole, min(len(whole), rng.choice([100, 3000, 20_000]))))
        pretrained.load(f"gguf:{folder / 'm.gguf'}")

    def safetensors(self, rng: random.Random, folder: Path) -> None:
        def change(content: bytes) -> bytes:
            size = struct.unpack("<Q", content[:8])[0]
            if rng.random() < 0.5:
                return bytes_changed(rng, content, 8 + size)
            head = json_changed(rng, content[8 : 8 + size].decode())
            return struct.pack("<Q", len(head)) + head + content[8 + size :]

        self._copy(rng, folder, "model.safetensors", change)

    def config(self, rng: random.Random, folder: Path) -> None:
        self._copy(rng, folder, "config.json", lambda content: json_changed(rng, content.decode()))

    def tokenizer(self, rng: random.Random, folder: Path) -> None:
        self._copy(rng, folder, "tokenizer.json", lambda content: json_changed(rng, content.decode()))

    def template(self, rng: random.Random, folder: Path) -> None:
        source = bytes_changed(rng, self.templates[rng.choice(list(self.templates))].encode(), 10_000).decode(
            "utf-8", "replace"
        )
        chats = value_changed(rng, json.loads(json.dumps(self.chats[rng.choice(list(self.chats))])))
        chat.render(source, chats, self.special)


class Late(BaseException):
    """Not an Exception, which a reader might take for the file's fault."""


def _late(*_: Any) -> None:
    raise Late(f"more than {SECONDS} seconds of work")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader", choices=["gguf", "safetensors", "config", "tokenizer", "template"])
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGPROF, _late)
    with tempfile.TemporaryDirectory() as base:
        readers = Readers(Path(base))
        read = getattr(readers, args.reader)
        seed, wrong, refused = args.first if args.only is None else args.only, 0, 0
        pretrained.load(str(readers.hub["llama"]))  # everything that is imported late
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, resource.RLIM_INFINITY))
        begin, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        while (args.only is not None and seed == args.only) or (
            args.only is None and time.monotonic() < begin + 60 * args.minutes
        ):
            with tempfile.TemporaryDirectory() as folder:
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                try:
                    read(random.Random(seed), Path(folder))
                    signal.setitimer(signal.ITIMER_PROF, 0)
                except BadInput as error:
                    signal.setitimer(signal.ITIMER_PROF, 0)
                    refused += 1
                    if len(str(error)) > 2000 or args.only is not None:
                        print(f"{args.reader} {seed}: {str(error)[:3000]}")
                except (Exception, Late) as error:
                    wrong += 1
                    print(f"{args.reader} {seed}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                    if args.only is not None:
                        raise
                finally:
                    signal.setitimer(signal.ITIMER_PROF, 0)
            before, peak = peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            if peak > before + MOST:
                wrong += 1
                print(f"{args.reader} {seed}: {peak - before} MiB", flush=True)
            seed += 1
        print(
            f"{args.reader}: {seed - args.first:,} files in {time.monotonic() - begin:.0f} s, {refused:,} refused, {wrong} wrong; at most {peak:,.0f} MiB"
        )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
