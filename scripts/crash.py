"""How many users fit: `kvcascade crash --model smollm2 --cache full --cache neurokv`; a minute per cache, a hard limit of memory around each child."""

import dataclasses
import signal
import sys
from pathlib import Path
from typing import Annotated

import tyro

from kvcascade.cache.spec import parse
from kvcascade.eval import record_files, records
from kvcascade.eval.memory import crash, limits
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, CountOrNone, Seconds, Share, arguments_of


@dataclasses.dataclass(frozen=True)
class Args:
    """Decode with full caches for more and more users, in child processes under a hard limit of memory, until one is killed by it."""

    model: str
    """A run's folder, smollm2, gguf:FILE, a Hugging Face directory or name, or a model known by its shape, such as llama3-8b."""
    cache: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """A cache in one line, or a preset's name; give it several times: the first is what the others are compared with."""
    context: CountOrNone = 0
    """Tokens in each user's cache; 0: the model's context, at most 2,048."""
    limit: str = "6GB"
    """Memory of a child, such as 6GB or 700MiB. On a GPU it is what JAX may take of the card's (XLA_PYTHON_CLIENT_MEM_FRACTION, by default 75 %)."""
    resolution: Share = 0.01
    """How far apart the last that lived and the first that died may be, as a share of the users; 0: neighbours."""
    steps: Count = 3
    """Decode steps at full occupancy that a child must live through."""
    weights: str | None = None
    """What matrices are kept in: float32, bfloat16, int8 or int4; by default float32, and bfloat16 for a model known by its shape."""
    seconds: Seconds = 300.0
    """How long a child may take."""
    out: Path | None = None
    """File that one JSON object per cache is appended to."""


def main(arguments: list[str]) -> None:
    """Test every cache, print a table and the sentence that it comes to, append the records."""
    args = arguments_of(Args, "crash", arguments)
    specs, limit = [parse(text) for text in args.cache or ("full",)], limits.parse_bytes(args.limit)
    record_files.check_writable(args.out)
    # Ctrl-C unwinds as it is; SIGTERM would leave the child's cgroup.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    found = []
    with console.progress("crash", len(specs)) as show:
        for done, spec in enumerate(specs):
            words = lambda users, done=done, spec=spec: show(done, f"{spec}: {users}")
            size = (args.context, limit, args.resolution, args.steps)
            found.append(crash.crash(args.model, spec, *size, args.weights, args.seconds, words))
        show(len(specs), "")
    # Only now: naming the device opens it, and an open GPU's memory is taken from the children.
    found = [records.stamp(one, one["seconds"]) for one in found]
    if args.out:
        record_files.append(args.out, found)
    console.table(*crash.table(found))
    print("\n".join(crash.sentences(found)))
