"""Tables for the README and for docs/, made from records alone and put between their markers."""

import re
from collections.abc import Sequence

from kvcascade.cache.errors import BadInput
from kvcascade.eval import suite
from kvcascade.eval.quality import evaluation, retrieval
from kvcascade.eval.records import Compared, Evaluation, Record, Retrieval, Training, commits, grouped, of
from kvcascade.eval.report.page import KEPT, findings, models_table, title
from kvcascade.eval.table import CACHE, SAVED, Column, Table, markdown

BYTES_SAVED = SAVED._replace(name="bytes saved")


def _answers(name: str, found: list[Retrieval]) -> Column:
    longest = max((r.length for r in found), default=0)
    answer = lambda r: (found and retrieval.average(found, r.cache, longest)) or None
    return Column(name.format(longest), answer)


def _stamp(found: Sequence[Evaluation]) -> str:
    at = commits(found)
    return f"Seed {found[0].seed}, {found[0].device}, commit{'s' if ' ' in at else ''} {at}."


def readme_tables(found: list[Record]) -> dict[str, str]:
    """The README's generated parts by the name in their markers."""
    evaluations = of(found, Evaluation)
    by_model = grouped(evaluations, lambda r: r.model)
    columns, ppl = [CACHE, KEPT, BYTES_SAVED], evaluation.PPL._replace(form="{:.2f}")
    for mine in by_model:
        by_cache, change = {r.cache: r for r in mine}, evaluation.change(mine)
        both = lambda r, change=change: f"{ppl.cell(r)} {change.cell(r)}".strip()
        cell = lambda r, by_cache=by_cache, both=both: both(by_cache[r.cache]) if r.cache in by_cache else None
        columns.append(Column(f"PPL {mine[0].model}, Δ (95 %)", cell))
    first = evaluations[0]
    protocol = (
        f"{evaluation.protocol(first)}, of files that no model was trained on, one token at a time through the cache; ≈: not decided, all "
        f"caches taken together. {_stamp(evaluations)}"
    )
    return {
        "models": markdown(models_table(of(found, Training))),
        "caches": f"{markdown(Table.of('', columns, by_model[0]).code)}\n\n{protocol}",
        "findings": "\n".join(f"- {line}" for line in findings(found)),
    }


def pretrained_tables(found: list[Record]) -> dict[str, str]:
    """A pretrained model's caches, of all bytes, perplexity, fidelity, and what was found; and a summary of a few; each with the protocol."""
    evaluations, retrievals = of(found, Evaluation), of(found, Retrieval)
    few = [r for r in evaluations if r.cache in suite.SUMMARY]
    first, columns = evaluations[0], lambda mine, ppl: [CACHE, BYTES_SAVED, ppl, evaluation.change(mine)]
    every = (
        columns(evaluations, evaluation.PPL)
        + evaluation.fidelity("{:.4f}")
        + [_answers("answered in {} tokens", retrievals)]
    )
    summary = [*columns(few, evaluation.PPL._replace(form="{:.2f}")), _answers("answered", retrievals)]
    longest = max((r.length for r in retrievals), default=0)
    protocol = f"PPL, KL(full ‖ cache) and same top-1: {evaluation.protocol(first)}; ≈: not decided, all caches taken together. {_stamp(evaluations)}"
    if retrievals:
        tasks = ", ".join(retrieval.measurable(retrievals, longest))
        protocol += f" Answered: mean of {tasks}; {retrieval.protocol(retrievals)}."
    brief = f"{title(few[0])}; ≈: not decided. *Answered*: mean over retrieval tasks in {longest} tokens. Commit {few[0].commit}."
    return {
        "pretrained": f"{markdown(Table.of('', every, evaluations).code)}\n\n{protocol}",
        "summary": f"{markdown(Table.of('', summary, few).code)}\n\n{brief}",
    }


def methods_tables(records: list[Record]) -> dict[str, str]:
    """Each policy behind the same sinks and window, at equal bytes: a table for each budget, the best first; fidelity and answers of some."""
    found, retrievals = of(records, Evaluation), of(records, Retrieval)
    first, change, full = found[0], evaluation.change(found), [r for r in found if r.cache == "full"]
    share = Column("bytes", lambda r: 1 - r.compression, "{:.1%}")
    columns = [CACHE, KEPT, share, evaluation.PPL, change]
    columns += evaluation.fidelity("{:.4f}") if any(isinstance(r, Compared) for r in found) else []
    columns += [_answers("answered in {} tokens", retrievals)] if retrievals else []
    tables = []
    for mine in grouped([r for r in found if r not in full], lambda r: round(1 - r.compression, 2)):
        ranked = sorted(mine, key=lambda r: r.ppl)
        budget = f"At most {max(1 - r.compression for r in mine):.0%} of the bytes:"
        tables.append(f"{budget}\n\n{markdown(Table.of('', columns, full + ranked).code)}")
    true = sum(r.kv_bytes == r.kv_bytes_predicted and r.traces == 1 for r in found)
    protocol = (
        f"{evaluation.protocol(first)}, weights in {first.weights}; ≈: not decided, all caches taken together. Bytes predicted are those "
        f"measured, and there is one trace, in {true} of {len(found)} rows. {_stamp(found)}"
    )
    if retrievals:
        tasks = ", ".join(retrieval.measurable(retrievals, max(r.length for r in retrievals)))
        protocol += f" Answered: mean of {tasks}; {retrieval.protocol(retrievals)}."
    return {"ranked": "\n\n".join([*tables, protocol])}


def fill(readme: str, parts: dict[str, str]) -> str:
    """Put each generated part between its markers, `<!-- NAME -->` and `<!-- end NAME -->`; BadInput for a marker without a part."""
    for name in re.findall(r"<!-- end (\w+) -->", readme):
        if name not in parts:
            raise BadInput(f"the README asks for {name!r}, which is not made; there are {', '.join(parts)}")
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        readme = between.sub(lambda match, name=name: match[1] + parts[name] + "\n" + match[2], readme)
    return readme
