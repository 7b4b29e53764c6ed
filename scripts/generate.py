"""Continue prompts: `kvcascade generate --model smollm2 --cache "sink 4 | recent 60" --prompt "The capital of France is" --tokens 64`; seconds."""

import dataclasses
import sys
from typing import Annotated

import tyro

from kvcascade.cache.errors import BadInput
from kvcascade.cache.retention import hint
from kvcascade.cache.spec import parse
from kvcascade.cache.whole import nbytes
from kvcascade.eval.memory.arithmetic import full_bytes
from kvcascade.model import chat, generate, programs
from kvcascade.model.answer import Answer
from kvcascade.model.sampling import Sampling
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, CountOrNone, arguments_of, text


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
    chat: bool = False
    """Take the prompt as a user's message to a model that was taught to chat."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A text to stop after; may be given several times."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling()


def main(arguments: list[str]) -> None:
    """Generate to stdout, then one line about the cache on stderr."""
    args = arguments_of(Args, "generate", arguments)
    spec, hints = parse(args.cache), [*map(hint, args.keep)]
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
    cache = generate.empty_cache(model.config, spec, len(prompts), context)
    if hints:
        cache = cache.hinted([hints] * len(prompts))
    size = nbytes(cache) // len(prompts)
    rows = [Answer(model.encoding.decode_single_token_bytes, model.end, tuple(stops)) for _ in prompts]
    alone = len(prompts) == 1
    if alone and not args.chat:
        print(typed[0], end="", flush=True)
    how = args.sampling, programs.kept, args.chunk
    steps = generate.generate(model.config, model.params, cache, prompts, args.tokens, *how)
    drawn = 0
    for tokens_nB, seen in steps:
        cache, drawn = seen, drawn + len(tokens_nB)
        for token_B in tokens_nB.tolist():
            texts = [row.add(token) for row, token in zip(rows, token_B, strict=True)]
            if alone:
                print(texts[0], end="", flush=True)
        if all(row.done for row in rows):
            break
    print() if alone else console.answers(typed, [row.text for row in rows])
    full = full_bytes(model.config, context)
    print(
        f"\n{spec}: holds {cache.held(longest + drawn - 1)} of {longest + drawn - 1} tokens in {size:,} bytes; a full bf16 cache takes {full:,}",
        file=sys.stderr,
    )
