"""The windows of a text that a command scores caches on."""

from typing import Literal

from kvcascade.eval.quality.windows import How, Windows, choose
from kvcascade.model.pretrained import Model
from kvcascade.train import run

type Bos = Literal["auto", "yes", "no"]


def windows(
    model: Model, data: str | None, context: int, count: int, how: How = "spread", seed: int = 0, bos: Bos = "auto"
) -> Windows:
    """Windows of the text named, by default the model's own; BadInput where it has too few."""
    tokens, starts = run.evaluation_text(model, data)
    begin = model.bos if model.begins_with_bos(bos) else None
    return choose(tokens, starts, data or model.data, context, count, how, seed, begin)
