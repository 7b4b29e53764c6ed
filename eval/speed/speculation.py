"""What it gains to compute tokens that are only foreseen: the same answers with and without, in turns."""

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from kvcascade.cache.block_cache import BlockCache
from kvcascade.cache.codec import coarse
from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import CacheSpec
from kvcascade.cache.tier import BLOCK
from kvcascade.cache.whole import Cache
from kvcascade.eval.measure import Job
from kvcascade.eval.records import Speculated
from kvcascade.eval.speed.bench import occupied_bytes
from kvcascade.eval.table import Column, Table
from kvcascade.kernels import processor
from kvcascade.model import chat, generate
from kvcascade.model.pretrained import Model
from kvcascade.model.programs import kept
from kvcascade.serve import propose
from kvcascade.serve.device import Device
from kvcascade.serve.draft import Draft, Follower
from kvcascade.serve.engine import Engine
from kvcascade.serve.plan import Limits
from kvcascade.serve.request import Request
from kvcascade.serve.rows import device_for

TEXTS = (
    "The harbour of Lindholm was built in 1641 by order of the council, who wanted a place where ships from the south could unload "
    "their grain before the ice came. Two piers of oak reached into the bay, and between them a chain was drawn at night. In 1702 a "
    "storm took the longer pier, and it was never built again.",
    "A cell keeps its instructions in long molecules, which are copied before it divides. The copying is exact but not perfect: about "
    "one letter in a billion is wrong. Most of these errors do nothing, some are repaired within minutes, and a few are handed down, "
    "which is where everything that is new comes from.",
    "Glass is made from sand, soda and lime. The soda lets the sand melt at a temperature that a wood fire can reach, and the lime "
    "keeps the glass from dissolving in water. For two thousand years the recipe stayed the same, and only the colours changed: iron "
    "makes it green, cobalt blue, and a little manganese makes it clear.",
)
ITEMS = (
    '[{"name": "oak chair", "price": 120, "stock": 14, "colour": "brown"}, {"name": "oak table", "price": 480, "stock": 3, "colour": '
    '"brown"}, {"name": "pine shelf", "price": 75, "stock": 22, "colour": "white"}]',
    '[{"city": "Oslo", "country": "Norway", "population": 709000, "coast": true}, {"city": "Bern", "country": "Switzerland", '
    '"population": 134000, "coast": false}, {"city": "Riga", "country": "Latvia", "population": 605000, "coast": true}]',
    '[{"id": 1, "user": "ann", "status": "open", "priority": "high"}, {"id": 2, "user": "bob", "status": "open", "priority": "low"}, '
    '{"id": 3, "user": "eve", "status": "closed", "priority": "high"}]',
)
TASKS: dict[str, tuple[str, ...]] = {
    "copying": tuple(f"Repeat this text word for word, and write nothing else:\n\n{text}" for text in TEXTS),
    "JSON": tuple(
        f"Write this JSON again, one object on each line, and write nothing else:\n\n{items}" for items in ITEMS
    ),
    "summary": tuple(f"Summarize this text in three sentences:\n\n{text}" for text in TEXTS),
    "writing": (
        "Write a story about a lighthouse keeper who finds a letter.",
        "Explain to a child why the sea is salty.",
        "Describe a market in a small town on a winter morning.",
    ),
}
"""What is asked, by the kind of task; the prompts are ours."""


@dataclasses.dataclass
class Run:
    """What came of a task's prompts, one after the other."""

    seconds: float = 0.0
    """From each answer's first token to its last."""
    answers: list[list[int]] = dataclasses.field(default_factory=list)
    steps: int = 0
    drafted: int = 0
    accepted: list[int] = dataclasses.field(default_factory=list)
    read: int = 0
    """Bytes of parameters, and of keys and values, that all steps read."""


def job(
    model: Model,
    spec: CacheSpec,
    task: str,
    proposers: Mapping[str, Draft | None],
    ahead: Sequence[int],
    tokens: int,
    repeats: int,
) -> Job:
    """One kind of task: greedy decoding, and the same with so many tokens foreseen in each of these ways, all in turns; a way may need a draft."""
    prompts = [chat.encode(model, [{"role": "user", "content": each}]) for each in TASKS[task]]
    context = max(map(len, prompts)) + tokens
    generate.check_context(model.config, context)
    about = {
        "kind": "speculate", "model": model.name, "weights": model.config.weights, "weights_key": model.fingerprint, "cache": str(spec),
        "task": task, "prompts": len(prompts), "tokens_at_most": tokens, "repeats": repeats, "processor": processor.name(), "threads": processor.count(),
    }  # fmt: skip

    def run() -> list[Speculated]:
        ways = [("none", 0), *((name, each) for name in proposers for each in ahead)]
        devices = []
        for name, count in ways:
            limits = Limits(tokens=64, rows=1, ahead=count, itself=name == "self")
            named = {"fingerprint": model.fingerprint, "compiled": kept}
            about_pool = 1 + -(-context // BLOCK), limits, context
            named |= {"draft": proposers.get(name)}
            devices.append(device_for(model.config, model.params, spec, *about_pool, **named))
            devices[-1].warm()
        found: list[list[Run]] = [[] for _ in ways]
        for index in range(repeats):
            order = range(len(ways)) if index % 2 else range(len(ways))[::-1]
            for place in order:
                found[place].append(_answered(model, devices[place], ways[place][0], prompts, tokens))
        plain = found[0][0]
        made = []
        for (proposer, count), runs in zip(ways, found, strict=True):
            if any(each.answers != plain.answers for each in runs):
                raise BadInput(f"{task}: {proposer} {count} has answered otherwise than decoding one token at a time")
            one, drawn = runs[0], sum(map(len, plain.answers)) - len(prompts)
            seconds = statistics.median(each.seconds for each in runs)
            made.append(
                Speculated(
                    **about, proposer=proposer, ahead=count, tokens=drawn, seconds_each=tuple(each.seconds for each in runs),
                    tokens_per_second=drawn / seconds, steps=one.steps, drafted=one.drafted, accepted=tuple(one.accepted),
                    bytes_per_token=one.read / drawn,
                )
            )  # fmt: skip
        return made

    return Job(
        about
        | {"proposers": [(name, draft and draft.fingerprint) for name, draft in proposers.items()], "ahead": [*ahead]},
        "eval/speed",
        run,
        f"{spec}, {task}",
        also=("serve",),
    )


def _answered(model: Model, device: Device, proposer: str, prompts: Sequence[list[int]], tokens: int) -> Run:
    """Each prompt by itself; what is timed are its steps after the one that brought the first token."""
    found = Run(accepted=[0] * device.limits.ahead)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    for prompt in prompts:
        engine = Engine(device, reuse=False, propose=propose.proposer(proposer))
        (number,) = engine.submit(Request(prompt, tokens, stops=model.end))
        row, answer, begun, held = engine.live[number].row, [], 0.0, []
        passes, longest = _passes(device), 0
        while engine.busy:
            computed, asked = row.held.computed if row.held else 0, engine.stats["asked"]
            events = engine.run_step()
            if answer:
                held.append((computed, engine.stats["asked"] - asked))
            elif events:
                begun = time.perf_counter()
                passes = _passes(device)
            answer += [event.token for event in events if event.token is not None]
            longest = computed
        found.seconds += time.perf_counter() - begun
        found.answers.append(answer)
        found.steps += len(held)
        for computed, asked in held:
            # What a row has in slots of its own as it is in the end: a prompt has filled them.
            cache = occupied_bytes(device.cache, computed)
            found.read += weights + cache
            if proposer == "self":
                found.read += asked * device.limits.ahead * int(weights + cache * _coarse(device.cache))
        if device.follower:
            small = sum(leaf.nbytes for leaf in jax.tree.leaves(device.follower.params))
            found.read += (_passes(device) - passes) * (small + occupied_bytes(device.follower.cache, longest))
        found.drafted += engine.stats["drafted"]
        found.accepted = [a + b for a, b in zip(found.accepted, engine.accepted, strict=True)]
    return found


def _passes(device: Device) -> int:
    """How often the smaller model beside a device has been read."""
    return device.follower.passes if isinstance(device.follower, Follower) else 0


def _coarse(cache: Cache) -> float:
    """The share of the bytes in blocks that the high plane is."""
    assert isinstance(cache, BlockCache)
    size = lambda stored: sum(x.nbytes for x in stored.values())
    pairs = [
        (codec, stored)
        for each in cache.shared
        if each
        for codec, stored in zip(each.codecs, cache.pools[each.pool], strict=True)
    ]
    return sum(size(coarse(*pair)[1]) for pair in pairs) / sum(size(stored) for _, stored in pairs)


def table(found: Sequence[Speculated]) -> Table:
    """Ways to answer, by tasks."""
    plain = {r.task: r for r in found if not r.ahead}
    places = lambda r: ", ".join(f"{each / max(1, r.steps):.0%}" for each in r.accepted)
    columns: list[Any] = [
        Column("task", "task"),
        Column("foreseen", lambda r: f"{r.proposer} {r.ahead}" if r.ahead else "nothing"),
        Column("tokens", "tokens", "{:,}"),
        Column("steps", "steps", "{:,}"),
        Column("tokens a step", lambda r: r.tokens / r.steps, "{:.2f}"),
        Column(
            "accepted, of what was foreseen", lambda r: sum(r.accepted) / r.drafted if r.drafted else None, "{:.0%}"
        ),
        Column("by place, of all steps", lambda r: places(r) or None),
        Column("MB read a token", lambda r: r.bytes_per_token / 1e6, "{:.0f}"),
        Column("tok/s", "tokens_per_second", "{:.1f}"),
        Column("×", lambda r: r.tokens_per_second / plain[r.task].tokens_per_second if r.ahead else None, "{:.2f}"),
    ]
    first = found[0]
    title = (
        f"{first.name} in {first.weights}, {first.cache}: {first.prompts} prompts of each task one after the other, greedy, "
        f"up to {first.tokens_at_most} tokens each, {first.repeats} rounds in turns, the median"
    )
    return Table.of(title, columns, found)
