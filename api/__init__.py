"""Which keys and values should a transformer keep, how precisely, and where? The laboratory in a few calls.

import kvcascade as kvc

model = kvc.load("smollm2")
print(kvc.evaluate(model, ["full", "sink 4 | recent 124", "random 128"], context=256))
print(kvc.generate(model, "What is a cache?", "sink 4 | recent 60 | heavy 64@int8", chat=True))
"""

import dataclasses
import importlib.metadata
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from kvcascade.eval.quality.windows import Windows
    from kvcascade.eval.records import Evaluation
    from kvcascade.model.pretrained import Model
    from kvcascade.model.sampling import Sampling
    from kvcascade.serve.story import Story

__version__ = importlib.metadata.version("kvcascade")
__all__ = ["Evaluations", "evaluate", "generate", "load", "watch", "windows"]

# Everything is imported where it is used: `import kvcascade.cache.policy` comes through here and must stay cheap.


def load(name: str, weights: str = "float32") -> "Model":
    """Load a model: a run's folder, `smollm2`, `gguf:FILE`, or a Hugging Face directory or name.

    `weights` says what a pretrained model's matrices are kept in: float32, bfloat16, int8 or int4. Raises BadInput where there is no such model.
    """
    from kvcascade.train import run

    return run.open_model(name, weights=weights)


@dataclasses.dataclass(frozen=True, repr=False)
class Evaluations:
    """What caches cost and save on a text; prints as a table, and shows itself in a console and in a notebook."""

    records: list["Evaluation"]
    """One per cache, as `kvcascade evaluate --out` appends them."""

    def __str__(self) -> str:
        from rich.console import Console

        from kvcascade.eval.quality import evaluation
        from kvcascade.eval.table import on_terminal

        text, table = io.StringIO(), evaluation.table(self.records)
        # In a notebook's kernel rich would show the table itself, and colour what is only text here.
        Console(file=text, width=160, force_jupyter=False, color_system=None).print(on_terminal(table))
        return text.getvalue().rstrip()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from kvcascade.eval.quality import evaluation
        from kvcascade.eval.report.page import html

        return html(evaluation.table(self.records))


def windows(
    model: "Model",
    data: str | None = None,
    context: int = 512,
    sequences: int = 8,
    how: Literal["spread", "first"] = "spread",
    seed: int = 0,
    bos: Literal["auto", "yes", "no"] = "auto",
) -> "Windows":
    """Choose windows of `context` tokens of a text, by default the model's own; BadInput where it has too few."""
    from kvcascade.eval.quality import windows as chosen
    from kvcascade.train import run

    tokens, starts = run.evaluation_text(model, data)
    begin = model.bos if model.begins_with_bos(bos) else None
    return chosen.choose(tokens, starts, data or model.data, context, sequences, how, seed, begin)


def evaluate(
    model: "Model",
    caches: Sequence[str],
    data: str | None = None,
    context: int = 512,
    sequences: int = 8,
    fidelity: bool = False,
    out: Path | None = None,
) -> Evaluations:
    """Score windows of a text through each cache, teacher-forced, one token at a time, so that an eviction is felt by every later token.

    `data` is `stdlib`, `file:PATH` or a hub data set, by default the model's own. `fidelity` compares each distribution with the full
    cache's. Records are appended to `out` as they come, and those that it has are not measured again. Raises BadInput for what cannot be.
    """
    from kvcascade.cache.spec import parse
    from kvcascade.eval.measure import measure
    from kvcascade.eval.quality import evaluation, perplexity

    specs = [parse(text) for text in caches]
    for spec in specs:
        model.check(spec)
    protocol = evaluation.Protocol(batch=min(8, sequences), fidelity=fidelity)
    perplexity.check(model.config, specs, context, 0, protocol.batch)
    rows = windows(model, data, context, sequences)
    return Evaluations(measure([evaluation.job(model, spec, rows, protocol) for spec in specs], out).records)


def generate(
    model: "Model",
    prompt: str,
    cache: str = "full",
    tokens: int = 64,
    chat: bool = False,
    stop: Sequence[str] = (),
    sampling: "Sampling | None" = None,
    keep: Sequence[str] = (),
) -> str:
    """Continue a prompt through a cache by at most so many tokens; with `chat` it is a user's message. Greedy unless `sampling` says otherwise.

    `keep` says what ranges of the prompt's positions deserve in a `hinted` tier, such as `0:200=90@500` (`cache/hints.py`).
    Raises BadInput where prompt and tokens are more than the model's context.
    """
    from kvcascade.cache.retention import hint
    from kvcascade.cache.spec import parse
    from kvcascade.model import chat as templates
    from kvcascade.model import generate as generation
    from kvcascade.model.answer import Answer
    from kvcascade.model.sampling import GREEDY

    model.check(spec := parse(cache))
    ids = templates.encode(model, [{"role": "user", "content": prompt}]) if chat else model.encode(prompt)
    kv = generation.empty_cache(model.config, spec, 1, len(ids) + tokens)
    if keep:
        kv = kv.hinted([[*map(hint, keep)]])
    answer = Answer(model.encoding.decode_single_token_bytes, model.end, tuple(stop))
    for new_nB, _ in generation.generate(model.config, model.params, kv, [ids], tokens, sampling or GREEDY):
        for token in new_nB[:, 0].tolist():
            answer.add(token)
        if answer.done:
            break
    return answer.text


def watch(model: "Model", prompt: str, cache: str, tokens: int = 64, chat: bool = False) -> "Story":
    """Continue a prompt greedily and keep where each token was after each step; a notebook shows it, `page()` is a file that does.

    Raises BadInput for a cache in which nothing sinks, and where prompt and tokens are more than the model's context.
    """
    from kvcascade.cache.spec import parse
    from kvcascade.model import chat as templates
    from kvcascade.model.programs import traced
    from kvcascade.serve import story

    ids = templates.encode(model, [{"role": "user", "content": prompt}]) if chat else model.encode(prompt)
    model.check(spec := parse(cache))
    return story.watch(model, spec, ids, tokens, compiled=traced)
