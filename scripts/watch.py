"""Watch tokens sink: `kvcascade watch --model smollm2 --cache "sink 4 | recent 28 | heavy 32@int8" --prompt TEXT --page watch.html`; half a minute."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.kernels.files import write_whole
from kvcascade.model import chat
from kvcascade.model.sampling import Sampling
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, arguments_of, text


@dataclasses.dataclass(frozen=True)
class Args:
    """Continue a prompt and write a page that shows, token by token, which tier holds what; it needs no server and no network."""

    model: str
    """A run's folder, smollm2, gguf:FILE, or a Hugging Face directory or name."""
    prompt: str
    """The text to continue."""
    page: Path
    """The HTML file to write."""
    cache: str = "sink 4 | recent 28 | heavy 32@int8"
    """A cache in one line, or a preset's name."""
    tokens: Count = 64
    """The most tokens to generate."""
    chat: bool = False
    """Take the prompt as a user's message to a model that was taught to chat."""
    weights: str = "float32"
    """What a pretrained model's matrices are kept in: float32, bfloat16, int8 or int4."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling()


def main(arguments: list[str]) -> None:
    """Write the page, print the answer."""
    args = arguments_of(Args, "watch", arguments)
    spec, typed = parse(args.cache), text(args.prompt)
    if not args.page.resolve().parent.is_dir():
        raise BadInput(f"{args.page.parent} is not a folder")
    from kvcascade.serve import story

    model = console.open_model(args.model, args.weights, [spec])
    prompt = chat.encode(model, [{"role": "user", "content": typed}]) if args.chat else model.encode(typed)
    told = story.watch(model, spec, prompt, args.tokens, args.sampling)
    write_whole(args.page, told.page().encode())
    print(told.text)
    console.say(f"{args.page} has {len(told.steps)} steps")
