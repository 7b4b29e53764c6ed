"""What every kernel costs on every card, without one: registers, spills, shared memory, bytes moved, instructions, occupancy."""

import itertools
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from kvcascade.cache.errors import BadInput
from kvcascade.eval import worker
from kvcascade.eval.kernels import whole_step
from kvcascade.eval.kernels.cases import Case, cases
from kvcascade.eval.kernels.whole_step import Record, Step
from kvcascade.kernels import aot, resources, traffic

OWN = ("triton", "mosaic")
CHILD = (sys.executable, "-m", "kvcascade.eval.kernels.check")


def cards(names: Sequence[str]) -> list[aot.GPU]:
    """Cards by their names. Raises BadInput for one that is not known, `aot.NotInstalled` without the compiler."""
    for name in names:
        if name not in aot.MEMORY:
            raise BadInput(f"no GPU {name!r}; there are {', '.join(aot.MEMORY)}")
    return [aot.gpu(name) for name in dict.fromkeys(names)]


def check(
    some: Sequence[Case],
    on: Sequence[aot.GPU],
    done: Callable[[int], None] = lambda count: None,
    steps: Sequence[Step] = (),
) -> list[Record]:
    """A record per case and card, then one per whole step and card.

    In processes of their own: a compiler that ends its process fails one case, not the check.
    """
    # This process only adds up; with the compilers installed, JAX would look for a GPU.
    jax.config.update("jax_platforms", "cpu")
    count = itertools.count(1)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        told = lambda: done(next(count))
        names, whole = [case.name for case in some], [step.name for step in steps]
        run = lambda what: _in_a_process(what, names + whole * (what != "traffic"), Path(folder, what), told)
        moved, *by_card = pool.map(run, ["traffic", *(card.name for card in on)])
    every = list(zip(on, by_card, strict=True))
    of_steps = [
        {"kind": "step", "case": name, "gpu": card.name} | found[name] for card, found in every for name in whole
    ]
    return [record(case, card, moved[case.name], found[case.name]) for card, found in every for case in some] + of_steps


def _in_a_process(what: str, names: list[str], folder: Path, told: Callable[[], None]) -> dict[str, Record]:
    """What a child finds out of each case. One that ends before its time has failed at the case that it was at."""
    folder.mkdir()
    environment = {"JAX_PLATFORMS": "cpu"} if what == "traffic" else resources.environment(folder)
    return worker.results([*CHILD, what, str(folder)], names, environment, told)


def main(what: str, folder: str) -> None:
    """A worker: say of each case what it moves (`traffic`) or what it asks of a card."""
    for name in worker.attend():
        try:
            if name in whole_step.STEPS:
                found = whole_step.measure(whole_step.STEPS[name], aot.gpu(what))
            elif what == "traffic":
                found = of_traffic(cases()[name])
            else:
                found = of_card(cases()[name], aot.gpu(what), Path(folder))
        except NotImplementedError as error:
            found = {"refused": str(error)}
        except Exception as error:  # whatever a compiler raises is the case's result
            told = f"{type(error).__name__}: {error}"
            found = {"failed": " ".join(told[max(0, told.find("RACE DETECTED")) :].split())[:300]}
        worker.say(**found)


def of_traffic(case: Case) -> Record:
    """The bytes that a case's kernels load and store, interpreted."""
    program = case.build(False)
    with traffic.counting() as counted:
        jax.block_until_ready(jax.jit(program.call)(*program.arguments()))
    return {
        "moved": counted.read.total() + counted.written.total(),
        "floor": program.floor,
        "units": program.units,
        "races": counted.races,
    }


def of_card(case: Case, card: aot.GPU, folder: Path) -> Record:
    """What a case's kernels ask of a card, and what else the compiled program launches."""
    program, in_use = case.build(False), case.build(True)
    compiled, kernels = resources.compile_for(program.call, program.shapes, card, folder, program.donated)
    blocks = resources.grids(in_use.call, in_use.shapes, card)
    launches = traffic.launches(compiled.as_text() or "")
    ours = [launch for launch in launches if re.search("triton|mosaic", launch.target)]
    return {
        "launches": len(launches),
        "around": sum(launch.moved for launch in launches) - sum(launch.moved for launch in ours),
        "kernels": [
            vars(kernel)
            | {"code": kernel.code._asdict()}
            | {"per_multiprocessor": kernel.per_multiprocessor(card), "blocks_in_use": blocks[kernel.name]}
            for kernel in kernels
        ],
    }


def record(case: Case, card: aot.GPU, moved: Record, found: Record) -> Record:
    """The two findings as one record; `failed` or `refused` in place of figures where there are none."""
    start = {
        "kind": "kernel",
        "case": case.name,
        "gpu": card.name,
        "unit": case.unit,
        "most": None if case.most == math.inf else case.most,
    }
    for finding in (found, moved):
        if reason := {"refused", "failed"} & finding.keys():
            return start | {key: finding[key] for key in reason}
    instructions = 0.0
    kernels = []
    for kernel in found["kernels"]:
        loop, rest = (sum(kernel["code"][part].values()) for part in ("loop", "rest"))
        ours = kernel["compiler"] in OWN and case.turn
        turns = moved["units"] / (kernel["blocks"] * case.turn) if ours else 1
        executed = (rest + loop * turns) * kernel["threads"] * kernel["blocks"]
        instructions += executed
        at_once = kernel["per_multiprocessor"] * card.multiprocessors
        kernels.append(
            {key: kernel[key] for key in ("name", "compiler", "registers", "spilled", "shared_memory", "threads")}
            | {
                "per_multiprocessor": kernel["per_multiprocessor"],
                "waves": kernel["blocks_in_use"] / at_once if at_once else None,
                "turns": turns,
                "loop": kernel["code"]["loop"],
                "rest": kernel["code"]["rest"],
            }
        )
    total = moved["moved"] + found["around"]
    return start | {
        "launches": found["launches"],
        "moved": total,
        "floor": moved["floor"],
        "own": moved["moved"] / moved["floor"],
        "ratio": total / moved["floor"],
        "instructions": instructions / moved["units"],
        "budget": budget(card, moved["floor"] / moved["units"]),
        "races": moved["races"],
        "shared_memory_limit": card.shared_memory,
        "kernels": kernels,
    }


def budget(card: aot.GPU, bytes_per_unit: float) -> float:
    """Instructions per unit that a card issues while its memory moves the unit's bytes."""
    return card.multiprocessors * 128 * card.clock / (card.bandwidth / bytes_per_unit)


if __name__ == "__main__":
    main(*sys.argv[1:])
