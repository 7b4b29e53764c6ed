"""Standard tasks behind caches: `kvcascade harness --model smollm2 --tasks lambada_openai --limit 100 --cache "sink 4 | recent 60"`; minutes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import CacheSpec, parse
from kvcascade.eval.quality import tasks
from kvcascade.model import generate
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Count, CountOrNone, Recorded, Window, arguments_of


@dataclasses.dataclass(frozen=True)
class Args(Recorded):
    """Give a model behind each cache tasks of lm-evaluation-harness; the full cache and random eviction are always among the caches."""

    model: str
    """A run's folder, smollm2, gguf:FILE, or a Hugging Face directory or name."""
    tasks: str
    """Names of tasks or groups of tasks with commas between, such as wikitext,lambada_openai."""
    cache: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A cache in one line, or a preset's name; may be given several times."""
    include: Path | None = None
    """A folder of tasks of one's own, as lm-eval's YAML files."""
    limit: Count | None = None
    """The first so many samples of each task alone."""
    num_fewshot: CountOrNone | None = None
    """Examples before each question; by default as the task says."""
    chat: bool = False
    """Ask by the chat template of a model that was taught to chat."""
    context: Window | None = None
    """The most tokens of a row, also of a window of a long text; by default the model's context."""
    batch: Count = 8
    """Rows at once."""
    weights: str = "float32"
    """What a pretrained model's matrices are kept in: float32, bfloat16, int8 or int4."""


def main(arguments: list[str]) -> None:
    """Run each task behind each cache, append its records, print a table of all."""
    args = arguments_of(Args, "harness", arguments)
    try:
        from kvcascade.eval.quality import harness
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        raise BadInput("lm-eval is not installed: pip install 'kvcascade[harness]'") from None
    specs = [parse(text) for text in args.cache]
    names = list(dict.fromkeys(name for name in map(str.strip, args.tasks.split(",")) if name))
    if not names:
        raise BadInput("harness needs at least one task")
    known = harness.tasks(args.include)
    harness.check(known, names)
    model = console.open_model(args.model, args.weights, specs)
    heads, context = model.config.layer_heads, args.context or model.config.context
    generate.check_context(model.config, context)
    caches: dict[str, Callable[[int], CacheSpec]] = {
        str(spec): lambda size, spec=spec: spec for spec in (parse("full"), *specs)
    }
    fewest = lambda size: min((spec.slots(heads, size) for spec in specs), default=-(-size // 4))
    caches["random"] = lambda size: parse(f"random {fewest(size)}")
    settings = (context, args.batch, args.num_fewshot, args.limit, args.chat)
    jobs = [
        harness.job(model, label, cache, known, name, *settings) for label, cache in caches.items() for name in names
    ]
    console.show(tasks.table(console.measured("harness", jobs, args)))
