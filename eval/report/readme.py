"""Tables for the README and for docs/, made from records alone and put between their markers."""

import re
from collections.abc import Sequence

from kvcascade.cache.codec import bf16
from kvcascade.cache.errors import BadInput
from kvcascade.eval.quality import codecs, evaluation, retrieval
from kvcascade.eval.records import (
    Bench,
    Board,
    Compared,
    Distortion,
    Evaluation,
    Record,
    Retrieval,
    Training,
    Tuned,
    commits,
    grouped,
    of,
)
from kvcascade.eval.report.page import KEPT, alike, asked, board_protocol, exact, findings, models_table, title
from kvcascade.eval.search import leaderboard, tune
from kvcascade.eval.table import CACHE, SAVED, Column, Table, brief, markdown

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
    """A pretrained model's caches, of all bytes, perplexity, fidelity, and what was found; with the protocol."""
    evaluations, retrievals = of(found, Evaluation), of(found, Retrieval)
    first = evaluations[0]
    every = [CACHE, BYTES_SAVED, evaluation.PPL, evaluation.change(evaluations), *evaluation.fidelity("{:.4f}")]
    every.append(_answers("answered in {} tokens", retrievals))
    protocol = f"PPL, KL(full ‖ cache) and same top-1: {evaluation.protocol(first)}; ≈: not decided, all caches taken together. {_stamp(evaluations)}"
    if retrievals:
        protocol += f" {asked(retrievals, max(r.length for r in retrievals))}"
    return {"pretrained": f"{markdown(Table.of('', every, evaluations).code)}\n\n{protocol}"}


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
    protocol = f"{evaluation.protocol(first)}, weights in {first.weights}; ≈: not decided, all caches taken together. {exact(found)} {_stamp(found)}"
    if retrievals:
        protocol += f" {asked(retrievals, max(r.length for r in retrievals))}"
    return {"ranked": "\n\n".join([*tables, protocol])}


def codecs_tables(records: list[Record]) -> dict[str, str]:
    """What codecs do on the same bytes: a table of each model's, with perplexity and milliseconds where they were measured."""
    first, *others = alike(of(records, Distortion))
    evaluations, speeds = of(records, Evaluation), of(records, Bench)
    change = evaluation.change(evaluations)
    whole = {_codec(r.cache): r for r in evaluations if r.cache.startswith("full")}
    timed = {_codec(r.cache): r for r in speeds if r.cache.startswith("full")}
    over = lambda r: timed[r.codec].step_ms / timed[bf16.name].step_ms if r.codec in timed else None
    share = lambda r: 1 - whole[r.codec].compression if r.codec in whole else None
    columns = [
        Column("codec", "codec"),
        Column("bytes of a key and a value", "vector_bytes", "{:.0f}"),
        Column("error of keys", "key_error", "{:.3f}"),
        Column("of values", "value_error", "{:.3f}"),
        Column("of attention", "output_error", "{:.3f}"),
        Column("a whole cache's bytes", share, "{:.1%}"),
        Column("Δ PPL (95 %)", lambda r: change.cell(whole[r.codec]) if r.codec in whole else None),
        Column("ms a step", lambda r: timed[r.codec].step_ms if r.codec in timed else None, "{:.1f}"),
        Column("of bf16's", over, "{:.2f}"),
    ]
    columns = [each for each in columns if any(each.cell(r) for r in first)]
    ranked = lambda mine: sorted(mine, key=lambda r: (-r.vector_bytes, r.output_error))
    few = [r for r in evaluations if r.cache == "full" or not r.cache.startswith("full")]
    cache = CACHE._replace(value=lambda r: brief(r.cache.split(" with ")[0]))
    held = markdown(Table.of("", [cache, BYTES_SAVED, evaluation.PPL, change], few).code)
    said = f"{evaluation.protocol(evaluations[0])}; ≈: not decided, all caches taken together. {_stamp(evaluations)}"
    if speeds:
        one = speeds[0]
        said += f" Steps of {one.batch} rows behind {one.context} tokens, all in turns."
    tables = [
        f"{codecs.table(mine).title}:\n\n{markdown(Table.of('', columns[:5], ranked(mine)).code)}" for mine in others
    ]
    return {
        "codecs": f"{codecs.table(first).title}:\n\n{markdown(Table.of('', columns, ranked(first)).code)}\n\nPerplexity: {said}",
        "few": held,
        "wide": "\n\n".join(tables),
    }


def _codec(cache: str) -> str:
    """The codec of a cache of one full tier, by its text, without opening its calibration."""
    return cache.split(" with ")[0].removeprefix("full").removeprefix("@") or bf16.name


def board_tables(records: list[Record]) -> dict[str, str]:
    """The leaderboard: a table for each budget; and of each budget the best of each kind."""
    board = of(records, Board)[-1]
    tables = leaderboard.tables(board, records)
    shown = [f"{each.title}:\n\n{markdown(each.code)}" for each in tables]
    found = [each for each in of(records, Evaluation) if each.rows == board.rows]
    best = leaderboard.best_of_each(board, records).coded(CACHE.name)
    return {
        "board": "\n\n".join([f"{board_protocol(board, records, tables)} {_stamp(found)}", *shown]),
        "best": f"{markdown(best)}\n\n{title(found[0])}, "
        f"weights in {board.weights}: of each budget the best of each kind, and random eviction. Commit {commits(found)}.",
    }


def searches_table(records: list[Record]) -> str:
    """What searches found, and how well they foresaw the loss of what they scored."""
    return "\n\n".join(f"{each.title}:\n\n{markdown(each)}" for each in map(tune.table, of(records, Tuned)))


def fill(readme: str, parts: dict[str, str]) -> str:
    """Put each generated part between its markers, `<!-- NAME -->` and `<!-- end NAME -->`; BadInput for a marker without a part."""
    for name in re.findall(r"<!-- end (\w+) -->", readme):
        if name not in parts:
            raise BadInput(f"the README asks for {name!r}, which is not made; there are {', '.join(parts)}")
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        readme = between.sub(lambda match, name=name: match[1] + parts[name] + "\n" + match[2], readme)
    return readme
