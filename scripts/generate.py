"""Continue a prompt: `kvcascade generate --model runs/toy --cache "sink 4 | recent 60" --prompt "def " --tokens 64`; seconds."""

import dataclasses
import sys

import tyro

from kvcascade.cache.cascade import nbytes
from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval.records import full_bytes
from kvcascade.model import generate
from kvcascade.scripts import console


@dataclasses.dataclass(frozen=True)
class Args:
    """Continue a prompt through a cache, and say what the cache held."""

    model: str
    """A run's folder, smollm2, gguf:FILE, or a Hugging Face directory or name."""
    prompt: str
    """The text to continue."""
    cache: str = "full"
    """A cache in one line, or a preset's name."""
    tokens: int = 64
    """Tokens to generate."""
    temperature: float = 0.0
    """0 takes the likeliest token; 1 samples as the model says."""
    seed: int = 0
    """Of the sampling."""


def main(arguments: list[str]) -> None:
    """Generate, streaming to stdout, then one line about the cache on stderr."""
    args = tyro.cli(Args, prog="kvcascade generate", args=arguments)
    spec = parse(args.cache)
    if args.tokens < 1 or args.temperature < 0:
        raise BadInput("--tokens must be at least 1 and --temperature at least 0")
    model = console.open_model(args.model)
    prompt = model.encoding.encode(args.prompt, disallowed_special=())
    context = len(prompt) + args.tokens
    if context > model.config.context:
        raise BadInput(
            f"{len(prompt)} tokens of prompt and {args.tokens} new ones are more than the model's context of {model.config.context}"
        )
    cache = generate.empty_cache(model.config, spec, 1, context)
    size = nbytes(cache)
    decoder = model.encoding.decode_single_token_bytes
    sys.stdout.buffer.write(args.prompt.encode())
    stream = generate.generate(model.config, model.params, cache, [prompt], args.tokens, args.temperature, args.seed)
    for token_B, seen in stream:
        cache = seen
        sys.stdout.buffer.write(decoder(int(token_B[0])))
        sys.stdout.buffer.flush()
    held = sum(int((slots.pos_BKS[0, 0] >= 0).sum()) for slots in cache[0].slots)
    print()
    full = full_bytes(model.config, context)
    print(
        f"\n{spec}: holds {held} of {context - 1} tokens in {size:,} bytes; a full bf16 cache takes {full:,}",
        file=sys.stderr,
    )
