"""What a search may choose from, and what it is compared with: cascades of every size and codec, and methods as they stand, at so many bytes."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from kvcascade.cache import allocate, calibration
from kvcascade.cache.cascade import Cascade
from kvcascade.cache.policies import POLICIES as EVERY
from kvcascade.cache.policies import Sink
from kvcascade.cache.spec import PRESETS, CacheSpec, parse
from kvcascade.cache.tier import Tier, full, recent, sink
from kvcascade.kernels.heads import Heads

SHARES = (0.03, 0.05, 0.08, 0.12, 0.18, 0.25, 0.35, 0.5, 0.7)
"""Of the context, how much of it a tier keeps that chooses."""
POLICIES = ("observed", "expected", "recent")
"""That choose: by the attention that tokens got, by what they are expected to get, by age."""
PLAIN = ("int8", "int4h", "int8/int4h", "int4h/lloyd3h", "lloyd3h", "lloyd3h/lloyd2h", "lloyd2h")
CALIBRATED = ("int8", "int4m", "int8/int4m", "int4m/lloyd3m", "lloyd3m", "lloyd3m/lloyd2m", "lloyd2m")
SINKS, NEAR = 4, 12
"""Tokens that are kept in full whatever else is: the first, which are unlike all others, and the newest."""

METHODS = tuple(
    name for name in EVERY if name not in ("full", "sink", "hinted", "learned") and not parse(f"{name} 64").rereads
)
"""Policies that choose by themselves: each is a rival as soon as it is in `POLICIES`, behind the same sinks and window."""
MIXTURES = (
    "sink 2 | recent 62 | heavy 256@int4h",
    "sink 1 | recent 256 | heavy 32 | heavy 64@int8",
    "recent 64 | heavy 64",
)
"""Made by hand, for a context of 512."""


def options(context: int, known: str, slots: bool = True, bits: bool = True) -> list[CacheSpec]:
    """What each head may get: with `slots` alone all in bf16, with `bits` alone every token."""
    codecs = (CALIBRATED if known else PLAIN) if bits else ("bf16",)
    near = min(NEAR, max(1, context // 16))
    found = [parse("full"), *([parse(f"sink {SINKS} | recent {near}")] if slots else [])]
    for codec in codecs:
        found.append(_in(f"sink {SINKS} | full@", codec, known))
        for count in sorted({max(1, round(share * context)) for share in SHARES if slots}):
            for policy in POLICIES:
                front = f"sink {SINKS} | " + ("" if policy == "recent" else f"recent {near} | ")
                found.append(_in(f"{front}{policy} {count}@", codec, known))
    return found


def content(specs: Iterable[CacheSpec]) -> dict:
    """What tells the calibration that some of these need from others, for a record; nothing where none does."""
    return next((spec.content for spec in specs if spec.calibration), {})


def _in(text: str, codec: str, known: str) -> CacheSpec:
    """A text with a codec at its end, and with the calibration if that needs one."""
    return parse(f"{text}{codec}" + f" with {known}" * calibration.needed(codec))


def fitted(spec: CacheSpec, heads: Sequence[Heads], context: int, budget: int) -> CacheSpec | None:
    """The spec with as many slots as fit into so many bytes a row, all tiers but the sinks by one factor; None where it cannot be made to fit."""

    def scaled(factor: float) -> CacheSpec:
        def other(tier: Tier) -> Tier:
            if isinstance(tier.policy, Sink) or tier.count == "100%":
                return tier
            return dataclasses.replace(tier, count=max(1, round(tier.slots(context) * factor)))

        return spec.mapped(other)

    fits = lambda factor: scaled(factor).nbytes(heads, context) <= budget
    low, high = 0.0, 2.0 * context
    if not fits(low):
        return None
    if fits(high):
        return scaled(high) if all(tier.count == "100%" for each in spec.cascades for tier in each.tiers) else None
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return scaled(low)


def largest(
    made: Callable[[int], CacheSpec], most: int, heads: Sequence[Heads], context: int, budget: int
) -> CacheSpec | None:
    """What is made of the largest number up to `most` that fits into so many bytes a row; None where none does."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if made(middle).nbytes(heads, context) <= budget else (low, middle)
    return made(low) if low else None


def allocations(heads: Sequence[Heads], context: int, budget: int, known: str) -> dict[str, CacheSpec]:
    """Published ways of dividing bytes among layers and heads; those by heads are of a calibration."""
    kept = lambda count: Cascade(sink(SINKS), recent(NEAR), Tier(EVERY["observed"](), count))
    fit = lambda made, most: largest(made, most, heads, context, budget)
    found = {"allocation: pyramid": fit(lambda count: allocate.pyramid(kept, count + 8, len(heads)), context)}
    if known and len({each.kv for each in heads}) == 1:
        about = calibration.read(known)
        gates, shares = np.stack(about.gates), np.stack(about.shares)
        stream = Cascade(sink(SINKS), recent(max(1, context // 16)))
        found["allocation: duo"] = fit(
            lambda count: allocate.duo(gates, count / gates.size, Cascade(full), stream), gates.size
        )
        found["allocation: Ada-KV"] = fit(lambda count: allocate.shared(kept, shares, count), context)
    return {name: spec for name, spec in found.items() if spec}


def rivals(heads: Sequence[Heads], context: int, budget: int, known: str) -> dict[str, CacheSpec]:
    """What is known without a search, at so many bytes: every preset, every single method, mixtures made by hand, every codec that fits."""
    front = f"sink {SINKS} | recent {min(28, max(1, context // 16))}"
    found = {f"method: {each}": parse(f"{front} | {each} 64") for each in METHODS}
    found |= {f"mixture: {each}": parse(each) for each in MIXTURES}
    found |= {f"codec: {each}": _in("full@", each, known) for each in (CALIBRATED if known else PLAIN)}
    found |= {f"preset: {each}": parse(PRESETS[each]) for each in PRESETS}
    alone = lambda spec: not spec.rereads and not any(each.front for each in spec.cascades)  # from the first token on
    fits = {name: fitted(spec, heads, context, budget) for name, spec in found.items() if alone(spec)}
    return {name: fit for name, fit in fits.items() if fit} | allocations(heads, context, budget, known)
