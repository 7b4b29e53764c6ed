"""What the check of the kernels found: what is wrong, a table, a page."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from kvcascade.eval.kernels import whole_step
from kvcascade.eval.kernels.check import OWN
from kvcascade.eval.kernels.whole_step import Record
from kvcascade.eval.records import grouped
from kvcascade.eval.report import page
from kvcascade.eval.table import Column, Table, markdown
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


def of_kind(found: Sequence[Record], kind: str) -> list[Record]:
    """The records of one kind, in their order."""
    return [one for one in found if one["kind"] == kind]


def table(found: Sequence[Record], title: str, left_out: str | None = None) -> Table:
    """A row per case and card; of several kernels the one that most is asked for."""
    ours = lambda one: [kernel for kernel in one["kernels"] if kernel["compiler"] in OWN] or one["kernels"]
    compiled = lambda value: lambda one: value(one) if "kernels" in one else None
    most = lambda key: compiled(lambda one: max(kernel[key] for kernel in ours(one)))
    waves = lambda one: max((kernel["waves"] for kernel in ours(one) if kernel["waves"]), default=None)
    registers = lambda one: next((key for key in ("refused", "failed") if key in one), None) or most("registers")(one)
    columns = [
        Column("kernel", "case"), Column("GPU", "gpu"), Column("registers", registers), Column("spilled", most("spilled")),
        Column("shared, KiB", compiled(lambda one: max(kernel["shared_memory"] for kernel in ours(one)) / 1024), "{:.1f}"),
        Column("blocks/SM", compiled(lambda one: min(kernel["per_multiprocessor"] for kernel in ours(one)))),
        Column("waves", compiled(waves), "{:.2f}"), Column("moved / floor", lambda one: one.get("own") or None, "{:.3f}"),
        Column("with XLA's", "ratio", "{:.3f}"), Column("instr./unit", "instructions", "{:.2f}"), Column("budget", "budget", "{:.2f}"),
        Column("launches", "launches"),
    ]  # fmt: skip
    return Table.of(title, [column for column in columns if column.name != left_out], found)


def readme_tables(found: Sequence[Record]) -> dict[str, str]:
    """The README's tables: the worst figures of every operation and implementation, and the whole steps."""
    measured = [one for one in of_kind(found, "kernel") if "kernels" in one and one["case"].split(", ")[-1] in OWN]
    groups = grouped(measured, lambda one: (one["case"].split(", ")[0], one["case"].split(", ")[-1]))
    kernels = lambda some: [kernel for one in some for kernel in one["kernels"] if kernel["compiler"] in OWN]

    def registers(some: list[Record]) -> str:
        by_card = grouped(some, lambda one: one["gpu"])
        return ", ".join(f"{mine[0]['gpu']} {max(k['registers'] for k in kernels(mine))}" for mine in by_card)

    def worst(some: list[Record]) -> str:
        one = max(some, key=lambda one: one["instructions"] / one["budget"])
        shape = one["case"].split(", ", 1)[1].rsplit(", ", 1)[0]
        return f"{one['instructions'] / one['budget']:.2f} ({shape} on {one['gpu']})"

    columns = [
        Column("operation", lambda some: some[0]["case"].split(", ")[0]), Column("by", lambda some: some[0]["case"].split(", ")[-1]),
        Column("shapes", lambda some: len({one["case"] for one in some})), Column("registers, at most", registers),
        Column("bytes spilled", lambda some: max(kernel["spilled"] for kernel in kernels(some))),
        Column("moved / floor, at most", lambda some: max(one["own"] for one in some), "{:.3f}"),
        Column("bar", lambda some: ", ".join(f"{bar:g}" for bar in sorted({one["most"] for one in some if one["most"]}))),
        Column("instructions / budget, at worst", worst),
    ]  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in found[0]["versions"].items())
    steps = markdown(whole_step.table(of_kind(found, "step")))
    return {
        "kernels": markdown(Table.of("", columns, groups)),
        "steps": f"{steps}\n\nCommit {found[0]['commit']}; {versions}.",
    }


def write(path: Path, found: Sequence[Record], wrong: Sequence[str], command: str) -> None:
    """Write a page: a table for every card, and the instructions of every kernel."""
    sections = []
    for name in dict.fromkeys(one["gpu"] for one in found):
        card = aot.gpu(name)
        mine, steps = (of_kind([one for one in found if one["gpu"] == name], kind) for kind in ("kernel", "step"))
        sections.append({
            "name": card.full_name, "card": card, "table": table(mine, name, left_out="GPU"),
            "instructions": _instructions(mine), "steps": whole_step.table(steps) if steps else None,
        })  # fmt: skip
    page.render("kernels.html.j2", path, {"sections": sections, "wrong": wrong, "command": command, "first": found[0]})


def _instructions(found: Sequence[Record]) -> Table:
    """The ten most frequent machine instructions of each kernel, of its loop where it has one."""
    mix = lambda row: Counter(row[1]["loop"] or row[1]["rest"])
    turns = lambda row: f"{row[1]['turns']:.0f} × " if row[1]["loop"] else ""
    columns = [
        Column("kernel", lambda row: f"{row[0]['case']}: {row[1]['name']}"),
        Column("instructions", lambda row: f"{turns(row)}{mix(row).total()}"),
        Column("of these", lambda row: ", ".join(f"{n} {name}" for name, n in mix(row).most_common(10))),
    ]
    return Table.of("", columns, [(one, kernel) for one in found for kernel in one.get("kernels", [])])
