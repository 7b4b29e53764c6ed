"""The engines of a server: one for each cache, over a pool of blocks or with a cache for each row."""

import dataclasses
import logging
from collections.abc import Callable, Sequence

from kvcascade.cache.spec import CacheSpec
from kvcascade.model.pretrained import Model
from kvcascade.model.programs import Compiled, kept
from kvcascade.serve.alone import Alone
from kvcascade.serve.device import Device
from kvcascade.serve.engine import Engine
from kvcascade.serve.metrics import Metrics
from kvcascade.serve.plan import Limits

log = logging.getLogger("kvcascade.serve")


@dataclasses.dataclass(frozen=True)
class Room:
    """How much an engine has room for."""

    context: int
    """Tokens of a prompt and its answer."""
    blocks: int
    limits: Limits


def starting(
    model: Model, specs: Sequence[CacheSpec], room: Room, metrics: Metrics, compiled: Compiled = kept
) -> Callable[[], dict[str, Engine | Alone]]:
    """What makes the engines by their caches' texts, warm; the metrics hear of each. BadInput for a cache that is on blocks in part."""

    def start() -> dict[str, Engine | Alone]:
        engines: dict[str, Engine | Alone] = {}
        for spec in specs:
            engine, device = _made(model, spec, room, compiled)
            seconds = device.warm()
            about = {
                "weights": model.config.weights,
                "context": str(room.context),
                "block_size": str(getattr(device, "size", 0)),
            }
            metrics.serving(str(spec), engine, _sizes(model, spec, room.context), about)
            engines[str(spec)] = engine
            fields = {"cache": str(spec), "seconds": round(seconds, 1), "programs": device.compiled()}
            log.info("warm", extra={"fields": fields})
        metrics.warm(engines)
        return engines

    return start


def _made(model: Model, spec: CacheSpec, room: Room, compiled: Compiled) -> tuple[Engine | Alone, Device | Alone]:
    """An engine, and what it runs on."""
    spec.groups(model.config.layer_heads)
    if not spec.on_blocks:
        alone = Alone(model.config, model.params, spec, room.limits.rows, room.context, compiled)
        return alone, alone
    about = room.limits, room.context
    device = Device(
        model.config, model.params, spec, room.blocks, *about, fingerprint=model.fingerprint, compiled=compiled
    )
    return Engine(device), device


def _sizes(model: Model, spec: CacheSpec, context: int) -> dict[str, int]:
    """Bytes of a row's tiers, all layers together, by what they are called."""
    found: dict[str, int] = {}
    for _, chosen, cascade, heads in spec.groups(model.config.layer_heads):
        for index, tier in enumerate(cascade.tiers):
            size = len(chosen) * tier.nbytes(context, heads, len(cascade.numbers(index)))
            found[str(tier)] = found.get(str(tier), 0) + size
    return found
