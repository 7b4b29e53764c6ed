"""What the check of the kernels found: what is wrong, a table, a page."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from kvcascade.eval.kernels import whole_step
from kvcascade.eval.kernels.check import OWN
from kvcascade.eval.records import Record, markdown, of_kind
from kvcascade.eval.report import page
from kvcascade.kernels import aot

BASELINE = Path(__file__).parent.parent / "results" / "kernels.jsonl"
"""What the figures are compared with; it is not in a wheel."""


def faults(found: Record, baseline: Record | None) -> list[str]:
    """What is wrong with a record by itself, and worse than in the baseline."""
    if "refused" in found:
        return [found["refused"]] if baseline and "refused" not in baseline else []
    if "failed" in found:
        return [found["failed"]]
    wrong = []
    for kernel in found["kernels"]:
        if kernel["compiler"] in OWN and kernel["spilled"]:
            wrong.append(f"{kernel['name']} spills {kernel['spilled']} bytes of registers")
        if kernel["shared_memory"] > found["shared_memory_limit"]:
            limit = found["shared_memory_limit"]
            wrong.append(
                f"{kernel['name']} asks for {kernel['shared_memory']} bytes of shared memory; a block has {limit}"
            )
    if found["most"] and found["own"] > found["most"]:
        wrong.append(f"moves {found['own']:.3f} times the floor; at most {found['most']} is allowed")
    if found["races"]:
        wrong.append("has a race")
    if baseline and not {"refused", "failed"} & baseline.keys():
        for what, slack in (("own", 1.01), ("ratio", 1.01), ("instructions", 1.05), ("launches", 1.0)):
            if found[what] > baseline[what] * slack:
                wrong.append(f"{what} {found[what]:.4g}, where it was {baseline[what]:.4g}")
        most = lambda one, what: max((kernel[what] for kernel in one["kernels"]), default=0)
        for what, slack in (("registers", 1.05), ("shared_memory", 1.01)):
            if most(found, what) > most(baseline, what) * slack:
                wrong.append(f"{what} {most(found, what)}, where it was {most(baseline, what)}")
    return wrong


def regressions(found: Sequence[Record], baseline: Sequence[Record]) -> list[str]:
    """One line for everything that is wrong; a case of the baseline that is missing is."""
    before = {(one["case"], one["gpu"]): one for one in baseline}
    cards = {one["gpu"] for one in found}
    judge = {"kernel": faults, "step": whole_step.faults}
    lines = [
        f"{one['case']} on {one['gpu']}: {line}"
        for one in found
        for line in judge[one["kind"]](one, before.pop((one["case"], one["gpu"]), None))
    ]
    return lines + [f"{case} on {gpu}: is not there any more" for case, gpu in before if gpu in cards]


def table(found: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, a row per case and card; of several kernels the one that most is asked for."""
    columns = [
        "kernel", "GPU", "registers", "spilled", "shared, KiB", "blocks/SM", "waves", "moved / floor", "with XLA's", "instr./unit",
        "budget", "launches",
    ]  # fmt: skip
    rows = []
    for one in found:
        if reason := {"refused", "failed"} & one.keys():
            (key,) = reason
            rows.append([one["case"], one["gpu"], key, *[""] * (len(columns) - 3)])
            continue
        ours = [kernel for kernel in one["kernels"] if kernel["compiler"] in OWN] or one["kernels"]
        waves = [kernel["waves"] for kernel in ours if kernel["waves"]]
        most = lambda key, ours=ours: max(kernel[key] for kernel in ours)
        rows.append([
            one["case"], one["gpu"], str(most("registers")), str(most("spilled")), f"{most('shared_memory') / 1024:.1f}",
            str(min(kernel["per_multiprocessor"] for kernel in ours)), f"{max(waves):.2f}" if waves else "",
            f"{one['own']:.3f}" if one["own"] else "", f"{one['ratio']:.3f}", f"{one['instructions']:.2f}", f"{one['budget']:.2f}",
            str(one["launches"]),
        ])  # fmt: skip
    return columns, rows


def readme_tables(found: Sequence[Record]) -> dict[str, str]:
    """The README's tables: the worst figures of every operation and implementation, and the whole steps."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for one in of_kind(list(found), "kernel"):
        operation, *_, implementation = one["case"].split(", ")
        if not {"refused", "failed"} & one.keys() and implementation in OWN:
            groups.setdefault((operation, implementation), []).append(one)
    rows = []
    for (operation, implementation), some in groups.items():
        cards = dict.fromkeys(one["gpu"] for one in some)
        ours = {
            name: [k for one in some if one["gpu"] == name for k in one["kernels"] if k["compiler"] in OWN]
            for name in cards
        }
        worst = max(some, key=lambda one: one["instructions"] / one["budget"])
        bars = {one["most"] for one in some if one["most"]}
        rows.append([
            operation, implementation, str(len({one["case"] for one in some})),
            ", ".join(f"{name} {max(k['registers'] for k in kernels)}" for name, kernels in ours.items()),
            str(max(k["spilled"] for kernels in ours.values() for k in kernels)),
            f"{max(one['own'] for one in some):.3f}", ", ".join(f"{bar:g}" for bar in sorted(bars)),
            f"{worst['instructions'] / worst['budget']:.2f} ({worst['case'].split(', ', 1)[1].rsplit(', ', 1)[0]} on {worst['gpu']})",
        ])  # fmt: skip
    head = [
        "operation",
        "by",
        "shapes",
        "registers, at most",
        "bytes spilled",
        "moved / floor, at most",
        "bar",
        "instructions / budget, at worst",
    ]
    steps = whole_step.table(of_kind(list(found), "step"))
    stamp = f"Commit {found[0]['commit']}; {', '.join(f'{name} {version}' for name, version in found[0]['versions'].items())}."
    return {"kernels": markdown((head, rows)), "steps": f"{markdown(steps)}\n\n{stamp}"}


def write(path: Path, found: Sequence[Record], wrong: Sequence[str], command: str) -> None:
    """Write a page: a table for every card, and the instructions of every kernel."""
    sections = []
    for name in dict.fromkeys(one["gpu"] for one in found):
        card = aot.gpu(name)
        mine, steps = (of_kind([one for one in found if one["gpu"] == name], kind) for kind in ("kernel", "step"))
        columns, rows = table(mine)
        sections.append({
            "name": card.full_name, "card": card, "table": (columns[:1] + columns[2:], [row[:1] + row[2:] for row in rows]),
            "instructions": _instructions(mine), "steps": whole_step.table(steps) if steps else None,
        })  # fmt: skip
    page.render("kernels.html.j2", path, {"sections": sections, "wrong": wrong, "command": command, "first": found[0]})


def _instructions(found: Sequence[Record]) -> page.Table:
    """The ten most frequent machine instructions of each kernel, of its loop where it has one."""
    rows = []
    for one in found:
        for kernel in one.get("kernels", []):
            mix = Counter(kernel["loop"] or kernel["rest"])
            turns = f"{kernel['turns']:.0f} × {mix.total()}" if kernel["loop"] else str(mix.total())
            rows.append(
                [f"{one['case']}: {kernel['name']}", turns, ", ".join(f"{n} {name}" for name, n in mix.most_common(10))]
            )
    return ["kernel", "instructions", "of these"], rows
