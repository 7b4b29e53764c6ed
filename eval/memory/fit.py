"""How many users fit on a card that need not be there: a decode step is compiled for it, and XLA says what the step holds."""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from kvcascade.cache.spec import CacheSpec, parse
from kvcascade.eval import worker
from kvcascade.eval.kernels import whole_step
from kvcascade.eval.measure import Job
from kvcascade.eval.memory import arithmetic
from kvcascade.eval.records import FILLED, Fit, FitFailed, FitTask, baseline, of
from kvcascade.eval.table import CACHE, CONTEXT, Column, Table
from kvcascade.kernels import aot
from kvcascade.model.config import ModelConfig, built

CHILD = (sys.executable, "-m", "kvcascade.eval.memory.fit")
GRAIN = 256
"""Tokens to which the longest context is found."""
COMPILES = 10
"""At most so many compilations for one answer."""
CLOSE = 0.02
"""Difference between XLA and the arithmetic that needs no explanation."""
PUBLISHED = {
    (
        "gpt2",
        "rtx3060",
        512,
        "sink 1 | recent 256 | heavy 32 | heavy 64@int8",
    ): "NeuroKV reports 592 → 632 users (+6.8 %) "
    "for this model, context and pair of caches; theirs is found by filling a 12 GB card until it fails.",
}
"""What others say of a model, card, context and cache against the full one."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A cache behind a model, given by its shape, to be fitted into so many bytes of a card at some contexts."""

    gpu: str
    model: ModelConfig
    cache: str
    contexts: tuple[int, ...]
    budget: int


type Plan = dict[str, int]
"""Bytes of a step's arguments, outputs and temporaries, and of all that it holds."""


@dataclasses.dataclass(frozen=True)
class Found:
    """The largest number that fits; `exact` if the next one was compiled too and does not, or there is no next one."""

    most: int
    exact: bool
    compiles: int
    next_held: int | None
    """Bytes that the next one would hold, where it was compiled."""


def largest(
    held: Callable[[int], int],
    budget: int,
    guess: int,
    slope: int | float,
    limit: int | None = None,
    compiles: int = COMPILES,
) -> Found:
    """The largest n up to `limit` of which `held(n)` is within the budget, 0 if not even 1 is.

    What is held grows almost evenly with n: from the guess it goes along the slope, the first one given, then that between the last
    two. It ends with an n that fits and an n + 1 that does not. Where a compiler's choices make it grow by leaps, it halves what is left.
    """
    low, high, seen = 0, None if limit is None else limit + 1, {}
    while (high is None or high - low > 1) and len(seen) < compiles:
        if len(seen) >= compiles // 2 and high is not None:
            guess = (low + high) // 2
        n = max(low + 1, guess if high is None else min(guess, high - 1))
        seen[n] = held(n)
        if len(seen) > 1:
            last = list(seen)[-2]
            slope = (seen[n] - seen[last]) / (n - last) or slope
        low, high = (n, high) if seen[n] <= budget else (low, n)
        guess = n + int((budget - seen[n]) // max(slope, 1))
    return Found(low, high is not None and high - low == 1, len(seen), seen.get(low + 1))


def measure(task: Task, batch: int, context: int) -> Plan:
    """Bytes that a decode step of so many rows holds on a card, as XLA plans them: arguments, outputs that are none of these, temporaries.

    Its program ends with the logits: what draws from them is held beside it, and counted among the arguments.
    """
    _, plan, _ = whole_step.compile_step(task.model, parse(task.cache), batch, context, aot.gpu(task.gpu))
    arguments = plan.argument_size_in_bytes + batch * arithmetic.drawing(task.model)
    outputs = plan.output_size_in_bytes - plan.alias_size_in_bytes
    return {
        "arguments": arguments,
        "outputs": outputs,
        "temporaries": plan.temp_size_in_bytes,
        "held": arguments + outputs + plan.temp_size_in_bytes,
    }


def solve(task: Task, measure: Callable[[Task, int, int], Plan] = measure) -> list[dict[str, Any]]:
    """For every context how many users fit, next to what the arithmetic says, and the longest context that one user may have."""
    config, spec = task.model, parse(task.cache)
    longest = one_user(task, spec, measure)
    found = []
    for context in task.contexts:
        expected = arithmetic.decode_step(config, spec, context)
        plans: dict[int, Plan] = {}

        def held(batch: int, context=context, plans=plans) -> int:
            plans[batch] = measure(task, batch, context)
            return plans[batch]["held"]

        most = largest(held, task.budget, max(1, expected.users(task.budget)), expected.row)
        shown = max(1, most.most)
        plan = plans[shown] if shown in plans else measure(task, shown, context)
        found.append(
            {
                "context": context,
                "users": most.most,
                "exact": most.exact,
                "compiles": most.compiles,
                "next_held": most.next_held,
                **compare(expected, shown, plan),
                "expected_users": expected.users(task.budget),
                "kv_bytes": expected.cache,
                "kv_bytes_full": arithmetic.full_bytes(config, context),
                "longest": longest,
            }
        )
    return found


def one_user(task: Task, spec: CacheSpec, measure: Callable[[Task, int, int], Plan]) -> dict[str, Any]:
    """The longest context of one user, in whole `GRAIN`s of tokens; none where the cache does not grow with the context."""
    guess = arithmetic.longest(task.model, spec, task.budget)
    if guess is None:
        return {"context": None, "exact": True, "compiles": 0}
    limit = task.model.context // GRAIN if task.model.positions == "learned" else None
    expected = lambda grains: arithmetic.decode_step(task.model, spec, grains * GRAIN)
    plans: dict[int, Plan] = {}

    def held(grains: int) -> int:
        plans[grains] = measure(task, 1, grains * GRAIN)
        return plans[grains]["held"]

    grains = max(1, guess // GRAIN)
    slope = expected(grains + 1).total(1) - expected(grains).total(1)
    found = largest(held, task.budget, grains, slope, limit)
    compared = compare(expected(found.most), 1, plans[found.most]) if found.most else {}
    return {"context": found.most * GRAIN, "exact": found.exact, "compiles": found.compiles} | compared


def compare(expected: arithmetic.Memory, rows: int, plan: Plan) -> dict[str, Any]:
    """What so many rows hold by XLA's plan and by the arithmetic; where they are further apart than `CLOSE`, a sentence says in what."""
    difference = plan["held"] / expected.total(rows) - 1
    parts = {
        "arguments (XLA keeps the weights or the cache in another layout)": plan["arguments"]
        - expected.weights
        - rows * (expected.cache + expected.inputs),
        "results that are no arguments (part of the cache is not changed in place)": plan["outputs"]
        - rows * expected.logits,
        "temporaries (copies, or results of several layers that live at once)": plan["temporaries"]
        - expected.work(rows),
    }
    what, extra = max(parts.items(), key=lambda part: abs(part[1]))
    sentence = f"{difference:+.1%}, most of it {extra / 2**20:+,.1f} MiB of {what}"
    return {
        "rows": rows,
        **plan,
        "expected": dataclasses.asdict(expected),
        "difference": difference,
        "explanation": sentence if abs(difference) > CLOSE else None,
    }


def job(
    name: str,
    config: ModelConfig,
    card: aot.GPU,
    spec: CacheSpec,
    baseline: CacheSpec,
    contexts: Sequence[int],
    share: float = arithmetic.SHARE,
) -> Job:
    """A record per context of one cache, which is compared with another; it is compiled in a process of its own."""
    budget = arithmetic.budget(card.name, share)
    task = Task(card.name, config, str(spec), tuple(contexts), budget)
    case = json.dumps(dataclasses.asdict(task))
    common = {
        "kind": "fit", "model": name, "weights": config.weights, "gpu": card.name, "gpu_memory": card.memory, "share": share, "budget": budget,
        "cache": str(spec), "baseline": str(baseline),
    }  # fmt: skip

    def run() -> list[FitTask]:
        jax.config.update(
            "jax_platforms", "cpu"
        )  # this process only adds up; with the compilers, JAX would look for a GPU
        answer = worker.results(CHILD, [case], aot.ENVIRONMENT, lambda: None)[case]
        if "failed" in answer:
            return [FitFailed(**common, context=context, **answer) for context in contexts]
        return [Fit(**common, **each) for each in answer["found"]]

    return Job(common | {"task": json.loads(case)}, "eval/memory", run, str(spec))


def main(cases: list[str]) -> None:
    """A worker: for each task, given as JSON, say what was found."""
    for case in cases:
        given = json.loads(case)
        model = built(ModelConfig, given["model"], "a task", "model")
        task = Task(**given | {"model": model, "contexts": tuple(given["contexts"])})
        try:
            found: Mapping = {"found": solve(task)}
        except Exception as error:  # whatever a compiler raises is the case's result
            found = {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        worker.say(**found)


def table(found: Sequence[FitTask]) -> Table:
    """The fits of one model on one card: users against the first cache's, what fills the card, the cross-check."""
    fits, first = of(found, Fit), found[0]
    for_fits = lambda value: lambda one: value(one) if isinstance(one, Fit) else None
    longest = lambda one: "any" if (tokens := one.longest["context"]) is None else f"{tokens:,}"
    of_bf16 = lambda one: (
        f"{one.kv_bytes / one.kv_bytes_full:.1%}" if isinstance(one, Fit) else f"failed: {one.failed}"[:60]
    )

    def gain(one: Fit) -> int | float | None:
        base = baseline(one, fits)
        return None if base is None or base is one or not base.users else one.users / base.users - 1

    columns = [
        CACHE, CONTEXT, Column("of bf16 K and V", of_bf16), Column("users", for_fits(lambda one: ("" if one.exact else "≥ ") + f"{one.users:,}")),
        Column("against the first", for_fits(gain), "{:+.1%}"),
        *(Column(what, for_fits(lambda one, what=what: one.filled[what] / one.held), "{:.1%}") for what in FILLED),
        Column("one user's context", for_fits(longest)), Column("XLA / arithmetic", "difference", "{:+.2%}"),
    ]  # fmt: skip
    title = f"users of {first.model} that fit on {first.gpu}, in {first.share:.0%} of its {first.gpu_memory / 2**30:.1f} GiB"
    return Table.of(title, columns, sorted(found, key=lambda one: one.context))


def notes(found: Sequence[FitTask]) -> list[str]:
    """What has to be said with a table: differences from the arithmetic, answers that are not exact, what others have published."""
    fits = of(found, Fit)
    lines = [
        f"{one.cache}, {what}: XLA against the arithmetic {explanation}."
        for one in fits
        for what, explanation in (
            (f"{one.context:,} tokens", one.explanation),
            ("one user's context", one.longest.get("explanation")),
        )
        if explanation
    ]
    lines += [
        f"{one.cache} at {one.context:,} tokens: at least so many; the compilations did not find the next one that does not fit."
        for one in fits
        if not one.exact
    ]
    same = [(one.model, one.gpu, one.context, one.cache) for one in found]
    lines = list(dict.fromkeys(lines))  # one user's context is the same in all records of a cache
    return lines + [PUBLISHED[one] for one in dict.fromkeys(same) if one in PUBLISHED]


if __name__ == "__main__":
    main(worker.attend())
