"""What the GPU kernels cost: `kvcascade kernels check --gpu h100 --gpu a100`, about three minutes; `kvcascade kernels bench` on a GPU."""

import dataclasses
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import tyro

from kvcascade.cache.errors import BadInput
from kvcascade.eval import record_files
from kvcascade.eval.kernels import bench, cases, check, tables, whole_step
from kvcascade.eval.kernels.cases import Case
from kvcascade.eval.origin import origin
from kvcascade.kernels import aot
from kvcascade.scripts import console
from kvcascade.scripts.arguments import parse_command


@dataclasses.dataclass(frozen=True)
class Check:
    """Compile every kernel for cards that need not be there; status 1 if one spills, does not fit, moves too much or got worse."""

    gpu: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A card: h100, a100, rtx4090, …; give it several times. By default h100 and a100."""
    case: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Only kernels that have these words in their name."""
    baseline: Path = tables.BASELINE
    """Records of an earlier check; no figure may be worse."""
    out: Path | None = None
    """File that one JSON object per kernel and card is appended to."""
    page: Path | None = None
    """A page to write."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """Time every kernel on the GPU at hand, in turns with XLA's own, against its copy bandwidth."""

    case: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Only kernels that have these words in their name."""
    out: Path | None = None
    """File that one JSON object per kernel is appended to."""


def main(arguments: list[str]) -> None:
    """Check or time the kernels, print a table, append the records."""
    commands = {"check": Check, "bench": Bench}
    args = parse_command(commands, "kernels", arguments)
    try:
        chosen = [one for name, one in cases.cases().items() if all(words in name for words in args.case)]
        cards = [] if isinstance(args, Bench) else check.cards(args.gpu or ("h100", "a100"))
    except aot.NotInstalled as error:
        raise BadInput(str(error)) from error
    steps = [one for name, one in whole_step.STEPS.items() if all(words in name for words in args.case)]
    if not chosen and (isinstance(args, Bench) or not steps):
        raise BadInput(f"no kernel has {', '.join(map(repr, args.case))} in its name")
    record_files.check_writable(args.out)
    if isinstance(args, Bench):
        found, wrong = bench.bench(chosen), []
        console.show(bench.table(found))
    else:
        found, wrong = _check(args, chosen, steps, cards, shlex.join(["kvcascade", "kernels", *arguments]))
    if args.out:
        record_files.append(args.out, found)
    if wrong:
        sys.exit(1)


def _check(args: Check, chosen: list[Case], steps: list[whole_step.Step], cards: list[aot.GPU], command: str):
    start, names = time.monotonic(), {one.name for one in (*chosen, *steps)}
    with console.progress("check", len(chosen) + len(names) * len(cards)) as show:
        found = check.check(chosen, cards, lambda count: show(count, ""), steps)
    found = [one | origin(time.monotonic() - start) for one in found]
    before: list[Any] = record_files.read(args.baseline) if args.baseline.exists() else []
    wrong = tables.regressions(found, [one for one in before if one["case"] in names or not args.case])
    if args.page:
        tables.write(args.page, found, wrong, command)
    kernels, whole = (tables.of_kind(found, kind) for kind in ("kernel", "step"))
    if kernels:
        console.show(tables.table(kernels, f"{len(kernels)} kernels on cards, {len(before)} records in the baseline"))
    if whole:
        console.show(whole_step.table(whole))
    print(*(f"kvcascade: {line}" for line in wrong), sep="\n", end="\n" * bool(wrong), file=sys.stderr)
    return found, wrong
