"""Every policy in one table: `kvcascade methods`; a second."""

import dataclasses

from kvcascade.eval.memory import methods
from kvcascade.scripts import console
from kvcascade.scripts.arguments import arguments_of
from kvcascade.train import run


@dataclasses.dataclass(frozen=True)
class Args:
    """What each policy keeps, whose it is, what it reads, and the bytes that takes beside keys and values."""

    model: str = "llama3-8b"
    """Whose heads bytes are of: gpt2, llama3-8b, …, a run's folder, smollm2, gguf:FILE, or a Hugging Face directory or name."""


def main(arguments: list[str]) -> None:
    """Print a row for every policy, and one for every preset."""
    args = arguments_of(Args, "methods", arguments)
    console.show(methods.table(run.shape(args.model, None).layer_heads[0]))
    console.show(methods.presets())
