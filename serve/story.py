"""A conversation behind a cache as a page: the text as it grows, and where each token is at each moment."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import CacheSpec
from kvcascade.model.pretrained import Model
from kvcascade.model.programs import Compiled, kept
from kvcascade.model.sampling import GREEDY, Sampling
from kvcascade.serve.engine import Engine
from kvcascade.serve.plan import Limits
from kvcascade.serve.request import Request
from kvcascade.serve.rows import RowDevice
from kvcascade.serve.view import View, card

PAGE = Path(__file__).with_name("ui.html")
_NOTHING = '<script id="story" type="application/json">null</script>'


@dataclasses.dataclass(frozen=True)
class Story:
    """What was said, and the steps that a page shows; a notebook shows the page itself."""

    model: str
    cache: dict[str, Any]
    """As `view.card` has it."""
    text: str
    steps: list[dict[str, Any]]

    def page(self) -> str:
        """One HTML file, which loads nothing."""
        told = json.dumps({"model": self.model, "cache": self.cache, "steps": self.steps}, ensure_ascii=False)
        # Nothing of a text may end the script that it stands in.
        filled = _NOTHING.replace("null", told.replace("<", "\\u003c"))
        return PAGE.read_text("utf-8").replace(_NOTHING, filled)

    def _repr_html_(self) -> str:
        content = self.page().replace("&", "&amp;").replace('"', "&quot;")
        return f'<iframe srcdoc="{content}" style="width:100%;height:640px;border:0" title="tokens that sink"></iframe>'


def watch(
    model: Model, spec: CacheSpec, prompt: list[int], count: int, sampling: Sampling = GREEDY, compiled: Compiled = kept
) -> Story:
    """Continue a prompt by so many tokens, and keep where each token was after each of them.

    BadInput for a cache on blocks, in which nothing sinks, for one that must have a prompt whole, and where the model's context ends.
    """
    if spec.on_blocks:
        raise BadInput(f"{spec} is on blocks, where every token stays: watch the same tiers in rows")
    context = min(len(prompt) + count, model.config.context)
    device = RowDevice(model.config, model.params, spec, 2, Limits(rows=1), context, compiled=compiled)
    engine, view = Engine(device), View()
    engine.submit(Request(prompt, count, sampling, stops=model.end, watched=True))
    tokens, steps, token_bytes = list(prompt), [], model.encoding.decode_single_token_bytes
    while engine.busy:
        for event in engine.run_step():
            if event.token is None:
                raise BadInput("the model's logits are not numbers")
            tokens.append(event.token)
            steps.append(view.step(tokens, event.places, token_bytes))
    return Story(model.name, card(model, spec, context), model.encoding.decode(tokens[len(prompt) :]), steps)
