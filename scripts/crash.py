"""How many users fit: `kvcascade crash --model smollm2 --cache full --cache neurokv`; a minute per cache, a hard limit of memory around each child."""

import dataclasses
import os
from typing import Annotated

import tyro

from kvcascade.cache.spec import parse
from kvcascade.eval.memory import crash, limits
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, CountOrNone, Recorded, Seconds, Share, arguments_of
from kvcascade.serve import trace


@dataclasses.dataclass(frozen=True)
class Args(Recorded):
    """Decode with full caches for more and more users, in child processes under a hard limit of memory, until one is killed by it."""

    model: str
    """A run's folder, smollm2, gguf:FILE, a Hugging Face directory or name, or a model known by its shape, such as llama3-8b."""
    cache: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """A cache in one line, or a preset's name; give it several times: the first is what the others are compared with."""
    context: CountOrNone = 0
    """Tokens in each user's cache; 0: the model's context, at most 2,048."""
    trace: str = ""
    """A trace as `simulate` takes it: users have the tokens of its requests that fit into the context, and not the context's."""
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


def main(arguments: list[str]) -> None:
    """Test every cache, print a table and the sentence that it comes to, append the records."""
    args = arguments_of(Args, "crash", arguments)
    specs, limit = [parse(text) for text in args.cache or ("full",)], limits.parse_bytes(args.limit)
    # Of an open GPU's memory this process is to take nothing that the children could have.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    requests = [each.tokens for each in trace.read(args.trace)] if args.trace else None
    size = (args.context, limit, args.resolution, args.steps, args.weights, args.seconds, args.trace, requests)
    found = console.measured("crash", [crash.job(args.model, spec, *size) for spec in specs], args)
    console.show(crash.table(found))
    print("\n".join(crash.sentences(found)))
