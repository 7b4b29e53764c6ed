"""Continue prompts: `kvcascade generate --model smollm2 --cache "sink 4 | recent 60" --prompt "The capital of France is" --tokens 64`; seconds."""

import dataclasses
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import tyro

from kvcascade.cache.errors import BadInput
from kvcascade.cache.retention import Hint, hint
from kvcascade.cache.spec import CacheSpec, parse
from kvcascade.cache.tier import BLOCK
from kvcascade.cache.whole import nbytes
from kvcascade.eval.memory.arithmetic import full_bytes
from kvcascade.model import chat, generate, programs
from kvcascade.model.answer import Answer
from kvcascade.model.pretrained import Model
from kvcascade.model.sampling import Sampling
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, CountOrNone, arguments_of, foreseen, text
from kvcascade.serve.draft import Draft
from kvcascade.serve.engine import Engine
from kvcascade.serve.plan import Limits
from kvcascade.serve.propose import Propose
from kvcascade.serve.request import Request, seeded
from kvcascade.serve.rows import device_for


@dataclasses.dataclass(frozen=True)
class Args:
    """Continue a prompt through a cache, streaming, or several side by side; say what the cache held."""

    model: str
    """A run's folder, smollm2, gguf:FILE, or a Hugging Face directory or name."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """The text to continue; given several times, a batch of texts."""
    weights: str = "float32"
    """What a pretrained model's matrices are kept in: float32, bfloat16, int8 or int4."""
    cache: str = "full"
    """A cache in one line, or a preset's name."""
    chunk: CountOrNone | None = None
    """Tokens of a prompt that enter at once, each such part before the next is read; 0: all. By default parts of 256 for a long prompt and a small cache."""
    keep: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A range of positions, how much it deserves to stay in a `hinted` tier, from 0 to 100, and until how many positions after it: 0:200=90@500.

    Positions of which nothing is said have 35; without @ it holds for good. May be given several times."""
    tokens: Count = 64
    """The most tokens to generate."""
    speculate: str = "none"
    """Compute foreseen tokens along with the next: `ngram`, what followed the same tokens before, in blocks and behind `pending`; `self`, what the
    model finds by half of the bits of `full@planes on blocks`; `draft:MODEL`, what a smaller one finds (`distill`). The answer is the same."""
    ahead: Count = 3
    """How many tokens are foreseen, at most."""
    chat: bool = False
    """Take the prompt as a user's message to a model that was taught to chat."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A text to stop after; may be given several times."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling()


def main(arguments: list[str]) -> None:
    """Generate to stdout, then one line about the cache on stderr."""
    args = arguments_of(Args, "generate", arguments)
    spec, hints = parse(args.cache), [*map(hint, args.keep)]
    propose, ahead = foreseen(args.speculate, args.ahead)
    if not args.prompt:
        raise BadInput("there must be a --prompt")
    typed, stops = ([*map(text, some)] for some in (args.prompt, args.stop))
    model = console.open_model(args.model, args.weights, [spec])
    if args.chat:
        prompts = [chat.encode(model, [{"role": "user", "content": prompt}]) for prompt in typed]
    else:
        prompts = [model.encode(prompt) for prompt in typed]
    longest = max(map(len, prompts))
    context = longest + args.tokens
    if context > model.config.context:
        raise BadInput(
            f"{longest} tokens of prompt and {args.tokens} new ones are more than the model's context of {model.config.context}"
        )
    run = (
        _Foreseeing(model, spec, prompts, args, propose, ahead, console.open_draft(args.speculate, model))
        if propose
        else _Plain(model, spec, prompts, args, hints)
    )
    rows = [Answer(model.encoding.decode_single_token_bytes, model.end, tuple(stops)) for _ in prompts]
    alone = len(prompts) == 1
    if alone and not args.chat:
        print(typed[0], end="", flush=True)
    for row, token in run:
        new = rows[row].add(token)
        if alone:
            print(new, end="", flush=True)
        if all(row.done for row in rows):
            break
    print() if alone else console.answers(typed, [row.text for row in rows])
    full = full_bytes(model.config, context)
    print(
        f"\n{spec}: holds {run.held} of {run.seen} tokens in {run.nbytes:,} bytes; a full bf16 cache takes {full:,}{run.more}",
        file=sys.stderr,
    )


class _Plain:
    """The tokens of each row as `generate` brings them, and what its cache is like."""

    more = ""

    def __init__(self, model: Model, spec: CacheSpec, prompts: list[list[int]], args: Args, hints: list[Hint]):
        self.model, self.prompts, self.args, self.drawn = model, prompts, args, 0
        self.longest = max(map(len, prompts))
        self.cache = generate.empty_cache(model.config, spec, len(prompts), self.longest + args.tokens)
        if hints:
            self.cache = self.cache.hinted([hints] * len(prompts))
        self.nbytes = nbytes(self.cache) // len(prompts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        how = self.args.sampling, programs.kept, self.args.chunk
        steps = generate.generate(
            self.model.config, self.model.params, self.cache, self.prompts, self.args.tokens, *how
        )
        for tokens_nB, self.cache in steps:
            self.drawn += len(tokens_nB)
            for token_B in tokens_nB.tolist():
                yield from enumerate(token_B)

    @property
    def seen(self) -> int:
        """Tokens of the longest row that its cache has been given."""
        return self.longest + self.drawn - 1

    @property
    def held(self) -> int:
        """Those that are there."""
        return self.cache.held(self.seen)


class _Foreseeing:
    """The same by an engine that tries what it foresees."""

    def __init__(
        self,
        model: Model,
        spec: CacheSpec,
        prompts: list[list[int]],
        args: Args,
        propose: Propose,
        ahead: dict[str, Any],
        draft: Draft | None,
    ):
        if args.keep or args.chunk is not None:
            raise BadInput("--keep and --chunk do not go with --speculate")
        context = max(map(len, prompts)) + args.tokens
        blocks, limits = 1 + len(prompts) * -(-context // BLOCK), Limits(rows=len(prompts), **ahead)
        device = device_for(
            model.config, model.params, spec, blocks, limits, context, compiled=programs.kept, draft=draft
        )
        self.device, self.engine = device, Engine(device, propose=propose)
        self.nbytes = device.nbytes // len(prompts)
        drawn = [seeded(args.sampling, row) for row in range(len(prompts))]
        asked = [Request(prompt, args.tokens, each) for prompt, each in zip(prompts, drawn, strict=True)]
        self.rows = {self.engine.submit(each)[0]: row for row, each in enumerate(asked)}
        self.lengths = [*map(len, prompts)]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        while self.engine.busy:
            for event in self.engine.run_step():
                if event.token is None:
                    raise BadInput("the model's logits are not numbers")
                row = self.rows[event.id]
                self.lengths[row] += 1
                yield row, event.token

    @property
    def seen(self) -> int:
        """Tokens of the longest row that its cache has been given."""
        return max(self.lengths) - 1

    @property
    def held(self) -> int:
        """Those that are there."""
        return self.device.cache.held(self.seen)

    @property
    def more(self) -> str:
        """What became of what was foreseen."""
        drafted, steps = self.engine.stats["drafted"], self.engine.stats["steps"]
        return f"; of {drafted} tokens that were foreseen {sum(self.engine.accepted)} came, in {steps} steps"
