"""The engines of a server: one for each cache, over a pool of blocks, or with slots of each row's own behind one."""

import dataclasses
import logging
from collections.abc import Callable, Sequence

from kvcascade.cache.spec import CacheSpec
from kvcascade.model.pretrained import Model
from kvcascade.model.programs import Compiled, kept
from kvcascade.serve.draft import Draft
from kvcascade.serve.engine import Engine
from kvcascade.serve.metrics import Metrics
from kvcascade.serve.plan import Limits
from kvcascade.serve.propose import Propose
from kvcascade.serve.rows import device_for

log = logging.getLogger("kvcascade.serve")


@dataclasses.dataclass(frozen=True)
class Room:
    """How much an engine has room for."""

    context: int
    """Tokens of a prompt and its answer."""
    blocks: int
    limits: Limits


def starting(
    model: Model,
    specs: Sequence[CacheSpec],
    room: Room,
    metrics: Metrics,
    compiled: Compiled = kept,
    propose: Propose | None = None,
    draft: Draft | None = None,
) -> Callable[[], dict[str, Engine]]:
    """What makes the engines by their caches' texts, warm; the metrics hear of each. BadInput for a cache that must have a prompt whole.

    A `draft` foresees beside each of them, with a cache of its own.
    """

    def start() -> dict[str, Engine]:
        shape = room.blocks, room.limits, room.context
        named = {"fingerprint": model.fingerprint, "compiled": compiled, "draft": draft}
        devices = [device_for(model.config, model.params, spec, *shape, **named) for spec in specs]
        # What cannot be is told before anything is compiled.
        engines = {str(spec): Engine(device, propose=propose) for spec, device in zip(specs, devices, strict=True)}
        for spec, device in zip(specs, devices, strict=True):
            engine, seconds = engines[str(spec)], device.warm()
            about = {
                "weights": model.config.weights,
                "context": str(room.context),
                "block_size": str(device.size if engine.blocks.limit else 0),
            }
            metrics.serving(str(spec), engine, _sizes(model, spec, room.context), about)
            fields = {"cache": str(spec), "seconds": round(seconds, 1), "programs": device.compiled()}
            log.info("warm", extra={"fields": fields})
        metrics.warm(engines)
        return engines

    return start


def _sizes(model: Model, spec: CacheSpec, context: int) -> dict[str, int]:
    """Bytes of a row's tiers, all layers together, by what they are called."""
    found: dict[str, int] = {}
    for _, chosen, cascade, heads in spec.groups(model.config.layer_heads):
        for index, tier in enumerate(cascade.tiers):
            size = len(chosen) * tier.nbytes(context, heads, len(cascade.numbers(index)))
            found[str(tier)] = found.get(str(tier), 0) + size
    return found
