"""What a cache still lets a model find: questions about a context, asked after it was compressed.

A context enters in one prefill; then the question comes, one token at a time, followed by its answer as the model is asked to give it.
An answer counts if greedy decoding would give every token of it.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from kvcascade.cache.prompt import Prompt
from kvcascade.cache.spec import CacheSpec
from kvcascade.cache.whole import Cache, nbytes
from kvcascade.eval import stats
from kvcascade.eval.measure import Job
from kvcascade.eval.memory.arithmetic import full_bytes
from kvcascade.eval.quality.puzzles import Sample, sample
from kvcascade.eval.records import Retrieval, grouped
from kvcascade.eval.table import CACHE, KV_BYTES, SAVED, Column, Table
from kvcascade.model import generate
from kvcascade.model.config import ModelConfig
from kvcascade.model.gpt import Params
from kvcascade.model.pretrained import Model
from kvcascade.model.sampling import NOT_A_NUMBER


@dataclasses.dataclass(frozen=True)
class Turn:
    """What came of a question."""

    right: bool
    said: list[int]
    """The likeliest token at each place of the answer, those before it given."""


type Scored = tuple[list[list[Turn]], int]
"""What came of each turn of each sample, turn after turn over one cache, and the bytes of a row's cache."""


def jobs(
    model: Model,
    specs: Sequence[CacheSpec],
    tasks: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int,
    batch: int,
) -> list[Job]:
    """A measurement for each task, length and cache, which gives a record for each depth; every puzzle is another one.

    The first one of a task and length goes over the prompts for all caches from it on.
    """
    made = {
        (task, length): {
            depth: [sample(task, model.encoding, length, depth, seed, n, model.before) for n in range(samples)]
            for depth in depths
        }
        for task in tasks
        for length in lengths
    }
    room = asked(each for by_depth in made.values() for puzzles in by_depth.values() for each in puzzles)
    found = []
    for (task, length), by_depth in made.items():
        scored: dict[CacheSpec, Scored] = {}
        for index in range(len(specs)):
            found.append(_job(model, specs[index:], task, length, by_depth, room, seed, batch, scored))
    return found


def _job(
    model: Model,
    specs: Sequence[CacheSpec],
    task: str,
    length: int,
    by_depth: dict[float, list[Sample]],
    room: int,
    seed: int,
    batch: int,
    scored: dict[CacheSpec, Scored],
) -> Job:
    """The measurement of the first cache, by what was scored already, or else with the others, whose turn will come."""
    flat, spec = [each for puzzles in by_depth.values() for each in puzzles], specs[0]
    about = {
        "kind": "retrieve", "model": model.name, "weights": model.config.weights, "weights_key": model.fingerprint, "cache": str(spec),
        "task": task, "length": length, "room": room, "seed": seed,
    } | spec.content  # fmt: skip

    def run() -> list[Retrieval]:
        if spec not in scored:
            scored.update(zip(specs, score(model.config, model.params, specs, flat, room, batch), strict=True))
        found, size = scored.pop(spec)
        turns = iter(found)
        return [
            Retrieval(**about, **_found(model, depth, puzzles, [next(turns) for _ in puzzles], size, length + room))
            for depth, puzzles in by_depth.items()
        ]

    more = {"depths": [*by_depth], "samples": len(flat) // len(by_depth), "batch": batch}
    return Job(about | more, "eval/quality", run, f"{spec}: {task} in {length}")


def _found(
    model: Model, depth: float, puzzles: list[Sample], found: list[list[Turn]], size: int, context: int
) -> dict[str, Any]:
    """What is said of one task at one depth behind one cache; bytes are of the context with room for the turns."""
    right = [turn.right for turns in found for turn in turns]
    full = full_bytes(model.config, context)
    text = lambda tokens: b"".join(map(model.encoding.decode_single_token_bytes, tokens)).decode(errors="replace")
    return {
        "depth": depth,
        "samples": len(puzzles),
        "turns": len(right),
        "answered": sum(right),
        "score": sum(right) / len(right),
        "puzzles": [
            {
                "name": puzzle.name,
                "answers": list(puzzle.answers),
                "said": [text(turn.said) for turn in turns],
                "right": [turn.right for turn in turns],
            }
            for puzzle, turns in zip(puzzles, found, strict=True)
        ],
        "kv_bytes": size,
        "kv_bytes_full": full,
        "compression": 1 - size / full,
    }


def asked(samples: Iterable[Sample]) -> int:
    """The most tokens that the turns of a sample have."""
    return max(sum(len(q) + len(a) for q, a in each.turns) for each in samples)


def score(
    config: ModelConfig, params: Params, specs: Sequence[CacheSpec], samples: list[Sample], room: int, batch: int
) -> list[Scored]:
    """What came of the samples behind each cache; their contexts go through the model once for all caches.

    Samples have contexts of one length; `room` is for the turns of any of them, and the same for all tasks, so that each
    length is compiled once. Raises BadInput if context and turns are longer than the model's context, or logits are not numbers.
    """
    length = len(samples[0].context)
    whole = length + room
    generate.check_context(config, whole)
    for spec in specs:
        spec.nbytes(config.layer_heads, whole)
    found: list[list[list[Turn]]] = [[] for _ in specs]
    sizes: list[int] = []
    batch = min(batch, len(samples))
    for first in range(0, len(samples), batch):
        part = samples[first : first + batch]
        rows = part + part[-1:] * (batch - len(part))
        contexts = jnp.asarray([each.context for each in rows], jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(length), contexts.shape)
        rereads = dict.fromkeys(each for spec in specs for each in spec.rereads)
        if rereads:
            generate.check_rereading(config, [*rereads], length)
        prompt = Prompt(config.layer_heads, whole, tuple(rereads))
        _, prompt = generate.prefill_step(config, params, prompt, contexts, positions)
        sizes = []
        for spec, turns in zip(specs, found, strict=True):
            cache = prompt.enter(generate.empty_cache(config, spec, batch, whole), positions)
            sizes.append(nbytes(cache) // batch)
            guessed = _asked(config, params, cache, rows, length, first)
            turns += [_answered(each, guessed[row]) for row, each in enumerate(part)]
    return [*zip(found, sizes, strict=True)]


def _asked(
    config: ModelConfig, params: Params, cache: Cache, rows: list[Sample], length: int, first: int
) -> Int[np.ndarray, "B T"]:
    """The likeliest token after each of the turns' tokens, given the context and all before it; the cache is donated."""
    tokens = [[token for q, a in each.turns for token in (*q, *a)] for each in rows]
    steps = max(map(len, tokens))
    # A row whose turns are over goes on with padding, which nobody sees.
    fed = np.asarray([each + [0] * (steps - len(each)) for each in tokens], np.int32)
    where = np.asarray([[length + t if t < len(each) else -1 for t in range(steps)] for each in tokens], np.int32)
    guesses = []
    for t in range(steps):
        logits_BV, cache = generate.decode_step(config, params, cache, jnp.asarray(fed[:, t]), jnp.asarray(where[:, t]))
        guesses.append(jnp.where(jnp.isfinite(logits_BV.max(-1)), logits_BV.argmax(-1), NOT_A_NUMBER))
    guessed = np.asarray(jnp.stack(guesses, 1))
    generate.check_numbers((guessed == NOT_A_NUMBER) & (where >= 0), np.full(len(rows), length + 1), first)
    return guessed


def _answered(sample: Sample, guessed: Int[np.ndarray, " T"]) -> list[Turn]:
    found, at = [], 0
    for question, answer in sample.turns:
        at += len(question)
        said = guessed[at - 1 : at - 1 + len(answer)].tolist()
        found.append(Turn(said == answer, said))
        at += len(answer)
    return found


@dataclasses.dataclass(frozen=True)
class Share:
    """A share of what was asked, with its 95 % interval."""

    share: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.share:.0%} ({self.low:.0%} … {self.high:.0%})"


def answered(found: list[Retrieval]) -> Share:
    """The share of turns answered, with the Wilson interval of as many puzzles: the turns of one share a context, and count as one."""
    share = sum(r.answered for r in found) / sum(r.turns for r in found)
    puzzles = sum(r.samples for r in found)
    return Share(share, *stats.wilson(share * puzzles, puzzles))


def macro(shares: Sequence[Share]) -> Share:
    """The mean over tasks, each of the same weight; its interval by theirs (MOVER: Zou and Donner 2008)."""
    mean = sum(each.share for each in shares) / len(shares)
    below = math.hypot(*(each.share - each.low for each in shares)) / len(shares)
    above = math.hypot(*(each.high - each.share for each in shares)) / len(shares)
    return Share(mean, max(0.0, mean - below), min(1.0, mean + above))


def chance(found: list[Retrieval]) -> float:
    """The share of turns that the best answer to be given always would answer."""
    answers = Counter(answer for r in found for puzzle in r.puzzles or [] for answer in puzzle["answers"])
    return max(answers.values(), default=0) / max(1, answers.total())


def measurable(found: list[Retrieval], length: int) -> list[str]:
    """The tasks that the full cache does better than chance in contexts of a length; all where there is no full cache."""
    tasks = dict.fromkeys(r.task for r in found if r.length == length)
    full = lambda task: [r for r in found if (r.cache, r.task, r.length) == ("full", task, length)]
    return [task for task in tasks if not (mine := full(task)) or answered(mine).low > chance(mine)]


def average(found: list[Retrieval], cache: str, length: int) -> Share | None:
    """The mean over the tasks that can be measured of what a cache answers in contexts of a length; None where one of them was not asked."""
    parts = [
        [r for r in found if (r.cache, r.task, r.length) == (cache, task, length)] for task in measurable(found, length)
    ]
    return macro([answered(mine) for mine in parts]) if parts and all(parts) else None


def at(found: list[Retrieval], cache: str, length: int, depth: float) -> float:
    """The mean over the tasks that can be measured of what a cache answers at one length and depth; NaN where one of them was not asked."""
    here = [r for r in found if (r.cache, r.length, r.depth) == (cache, length, depth)]
    parts = [[r for r in here if r.task == task] for task in measurable(found, length)]
    return macro([answered(mine) for mine in parts]).share if parts and all(parts) else math.nan


def table(found: list[Retrieval]) -> Table:
    """Of one model: chance first, then a row for each length and cache, a column for each task over all depths."""
    tasks, rows = list(dict.fromkeys(r.task for r in found)), []
    for length in sorted({r.length for r in found}):
        of_length, counted = [r for r in found if r.length == length], measurable(found, length)
        guess = lambda mine, counted=counted: (
            f"{chance(mine):.0%}{'' if mine[0].task in counted else ': not measurable'}"
        )
        rows.append(["chance", f"{length:,}", "", "", *_by_task(of_length, tasks, guess), ""])
        for mine in grouped(of_length, lambda r: r.cache):
            told = [column.cell(mine[0]) for column in (CACHE, Column("context", "length", "{:,}"), KV_BYTES, SAVED)]
            rows.append([*told, *_by_task(mine, tasks, answered), str(average(found, mine[0].cache, length) or "")])
    columns = ["cache", "context", "KV bytes", "saved", *tasks, "mean of tasks"]
    return Table(f"{found[0].model}: {protocol(found)}", columns, rows)


def _by_task(found: list[Retrieval], tasks: list[str], cell: Callable[[list[Retrieval]], object]) -> list[str]:
    by_task = {mine[0].task: str(cell(mine)) for mine in grouped(found, lambda r: r.task)}
    return [by_task.get(task, "") for task in tasks]


def protocol(found: list[Retrieval]) -> str:
    """In a sentence what was asked how often."""
    depths = len({r.depth for r in found})
    puzzles = sum(r.samples for r in found if (r.cache, r.task) == (found[0].cache, found[0].task))
    out = {
        r.task: chance([each for each in found if (each.task, each.length) == (r.task, r.length)])
        for r in found
        if r.task not in measurable(found, r.length)
    }
    told = ", ".join(f"{task} ({guess:.0%})" for task, guess in out.items()) or "none here"
    return (
        f"share of turns answered, 95 % Wilson intervals; {puzzles} puzzles a task, no two alike, at {depths} depths; "
        f"not in the mean are tasks that the full cache does no better than the best constant answer: {told}"
    )
