"""What it gains to foresee tokens: `kvcascade speculate --model smollm2 --weights int8 --cache "full@int8 on blocks" --ahead 3 7`; two minutes."""

import dataclasses
from typing import Literal

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval.speed import speculation
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, Recorded, arguments_of, foreseen


@dataclasses.dataclass(frozen=True)
class Args(Recorded):
    """Let a model that chats copy, write JSON and summarise, token by token and with foreseen tokens computed along; the answers are the same."""

    model: str
    """smollm2, gguf:FILE, or a Hugging Face directory or name."""
    cache: str = "full on blocks"
    """A cache in one line, on blocks or with `pending`; for `self` it is `full@planes on blocks`."""
    proposer: tuple[str, ...] = ("ngram",)
    """What foresees; several take turns: `ngram`, what followed the same tokens before; `self`, the model by half of the bits of its cache;
    `draft:MODEL`, a smaller one."""
    ahead: tuple[Count, ...] = (3,)
    """How many tokens are foreseen, at most; several take turns."""
    task: tuple[Literal["copying", "JSON", "summary", "writing"], ...] = ("copying", "JSON", "summary")
    """What is asked."""
    tokens: Count = 96
    """Tokens of an answer, at most."""
    repeats: Count = 5
    """Rounds, in turns."""
    weights: str = "float32"
    """What a pretrained model's matrices are kept in: float32, bfloat16, int8 or int4."""


def main(arguments: list[str]) -> None:
    """Answer each task in each way, print a table, append the records."""
    args = arguments_of(Args, "speculate", arguments)
    spec = parse(args.cache)
    model = console.open_model(args.model, args.weights, [spec])
    for each in args.proposer:
        if not foreseen(each, 1)[0]:
            raise BadInput("none is what all --proposer are measured against")
    proposers = {each: console.open_draft(each, model) for each in args.proposer}
    jobs = [speculation.job(model, spec, task, proposers, args.ahead, args.tokens, args.repeats) for task in args.task]
    console.show(speculation.table(console.measured("speculate", jobs, args)))
