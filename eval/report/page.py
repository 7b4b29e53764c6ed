"""One page, made from records alone."""

import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2
import markupsafe

from kvcascade.cache.errors import BadInput
from kvcascade.eval import stats, suite
from kvcascade.eval.quality import codecs, evaluation, parity, ranking, retrieval, tasks
from kvcascade.eval.records import (
    Board,
    Compared,
    Distortion,
    Evaluation,
    Growth,
    Layer,
    Named,
    Parity,
    Ranking,
    Record,
    Retrieval,
    TaskResult,
    Training,
    Tuned,
    baseline,
    grouped,
    of,
)
from kvcascade.eval.report import costs, figures
from kvcascade.eval.search import leaderboard, tune
from kvcascade.eval.table import CACHE, KV_BYTES, SAVED, Column, Table, brief
from kvcascade.kernels.files import write_whole


def write(path: Path, found: Sequence[Record | dict], command: str, left_out: Sequence[str] = ()) -> None:
    """Write the study's page: self-contained, figures inline; and what was left out of it, a line for each."""
    render("report.html.j2", path, sections(of(found, Record)) | {"command": command, "left_out": left_out})


def render(template: str, path: Path, values: dict) -> None:
    """Write a page from one of the templates beside this file."""
    write_whole(path, _templates().get_template(template).render(values).encode("utf-8", "replace"))


def html(table: Table) -> str:
    """A table as the page has it, under its title."""
    macro = _templates().get_template("table.html.j2").make_module().table  # pyright: ignore[reportAttributeAccessIssue]
    return markupsafe.Markup("<p>{}</p>{}").format(table.title, macro(table))


def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def sections(found: list[Record]) -> dict:
    """What the page shows of what there is: figures, the table behind each, the findings in words, the protocol."""
    trainings, evaluations, retrievals = of(found, Training), of(found, Evaluation), of(found, Retrieval)
    layers, grown, costly, more = of(found, Layer), of(found, Growth), costs.sections(found), others(found)
    if not evaluations and not retrievals and not more and not any(costly.values()):
        raise BadInput("there is nothing to report in these records")
    return {
        "findings": findings(found),
        "trainings": trainings and {"figure": _svg(figures.loss_curves, trainings), "table": models_table(trainings)},
        "quality": [
            {"figure": _svg(figures.quality_against_bytes, mine), "table": quality_table(mine)}
            for mine in comparable(evaluations)
        ],
        "fidelity": [fidelity_table(mine) for mine in comparable(of(evaluations, Compared))],
        "retrieval": [
            {"figure": _svg(figures.found_at, mine), "table": retrieval.table(mine)} for mine in comparable(retrievals)
        ],
        "layers": layers and {"figure": _svg(figures.bytes_by_kind, layers), "table": _layers_table(layers)},
        "growth": grown and {"figure": _svg(figures.growth, grown), "table": _growth_table(grown)},
        "boards": [
            _board(mine[-1], found) for mine in grouped(of(found, Board), lambda r: (r.weights_key, r.rows, r.context))
        ],
        "others": more,
        **costly,
        "protocol": _protocol(found),
    }


def _board(board: Board, found: list[Record]) -> dict:
    """A leaderboard: its figure, a table for each budget, and how it was measured."""
    tables = leaderboard.tables(board, found)
    return {
        "figure": _svg(board_figure, board, found),
        "tables": tables,
        "protocol": board_protocol(board, found, tables),
    }


def board_protocol(board: Board, found: list[Record], tables: list[Table]) -> str:
    """In sentences how what its tables show was measured."""
    scores = [*leaderboard.scores(board, found).values()]
    if not scores:
        return "nothing was scored yet"
    said = (
        f"{board.model} in {board.weights}, {evaluation.protocol(scores[0])}, one token at a time through the cache; places by mean loss, their "
        f"intervals by a bootstrap over {scores[0].documents} documents; ≈: not told apart from the first, all of a table taken together. "
        f"{exact(scores)}"
    )
    if answers := leaderboard.answered(board, found):
        said += f" {asked(answers, board.context)}"
    if any("ms a step" in table.columns for table in tables):
        said += (
            f" A step of {leaderboard.ROWS} rows behind {board.context} tokens, in turns with the full cache's; a prompt of so many rows and "
            f"tokens enters in {leaderboard.PARTS} parts, and the process grows by so much."
        )
    return said


def exact(found: Sequence[Evaluation]) -> str:
    """In a sentence how many measured what was predicted, in one trace."""
    right = sum(r.kv_bytes == r.kv_bytes_predicted and r.traces == 1 for r in found)
    return f"Bytes predicted are those measured, and there is one trace, in {right} of {len(found)} rows."


def asked(found: list[Retrieval], length: int) -> str:
    """In a sentence of which tasks `answered` is the mean, and how often they were asked."""
    return f"Answered: mean of {', '.join(retrieval.measurable(found, length))}; {retrieval.protocol(found)}."


def board_figure(board: Board, found: list[Record]) -> str:
    """A leaderboard's perplexities against bytes, as SVG; nothing where nothing was scored."""
    panels, full = leaderboard.panels(board, found)
    kinds = dict.fromkeys(kind for entries in panels.values() for kind, *_ in entries)
    return figures.leaderboard(sorted(kinds, key=leaderboard.KINDS.index), panels, full) if full else ""


def others(found: list[Record]) -> list[dict]:
    """What is a table for each measurement: its heading, and the tables; none where there are none."""
    tables = {
        "Searches for the best cache of so many bytes": [*map(tune.table, of(found, Tuned))],
        "What codecs do to keys and values": [*map(codecs.table, alike(of(found, Distortion)))],
        "Methods beside kvpress' versions of them": [*map(parity.table, comparable(of(found, Parity)))],
        "Rankers that were trained": [*map(ranking.table, of(found, Ranking))],
        "Standard tasks": [*map(tasks.table, comparable(of(found, TaskResult)))],
    }
    return [{"heading": heading, "tables": some} for heading, some in tables.items() if some]


def alike(found: list[Distortion]) -> list[list[Distortion]]:
    """Codecs of one model on the same windows."""
    return grouped(found, lambda r: (r.model, r.weights_key, r.rows))


def _svg(draw: Callable[..., str], *arguments: object) -> markupsafe.Markup:
    return markupsafe.Markup(draw(*arguments))


def comparable[R: Named](found: list[R]) -> list[list[R]]:
    """Records in groups within which they may be compared, such as evaluations of one model on the same windows of one text."""
    return grouped(found, lambda r: r.case)


def title(first: Evaluation) -> str:
    """A model, and on what text its caches were scored."""
    return f"{first.model}, {evaluation.protocol(first)}"


def _protocol(found: list[Record]) -> dict:
    """By which versions of what it was measured, and how long that took."""
    each = lambda key: ", ".join(dict.fromkeys(str(r.given[key]) for r in found if key in r.given))
    versions = dict.fromkeys(f"{name} {version}" for r in found for name, version in r.versions.items())
    training = sum(r.train_seconds for r in of(found, Training))
    dates = sorted(r.date[:10] for r in found if r.date)
    return {
        "model": each("model"),
        "text": each("data") or "made from the seed",
        "seed": each("seed"),
        "device": each("device"),
        "processor": each("processor"),
        "versions": ", ".join(versions),
        "commit": each("commit"),
        "date": " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "",
        "seconds": f"{training:,.0f} training, {sum(r.seconds for r in found):,.0f} measuring",
    }


def findings(records: Sequence[Record]) -> list[str]:
    """What the study found, in sentences made from its figures."""
    trainings, evaluations = of(records, Training), of(records, Evaluation)
    found = []
    mha, gqa, uptrained = (suite.by_model(trainings).get(name, []) for name in ("mha", "gqa", "uptrained"))
    if mha:
        bits = statistics.fmean(r.validation_bits_per_byte for r in mha)
        found.append(
            f"MHA learned the text to {bits:.3f} bits per byte on files it never saw; "
            f"knowing only how often each token occurs gives {mha[0].unigram_bits_per_byte:.3f}."
        )
    if mha and gqa:
        share = gqa[0].kv_bytes_per_token / mha[0].kv_bytes_per_token
        found.append(
            f"GQA from scratch keeps {share:.0%} of MHA's bytes per token and ends {_beside(gqa, mha)} MHA's validation loss."
        )
    if gqa and uptrained:
        reached = next((step for step, loss, *_ in uptrained[0].curve if loss <= gqa[0].validation_loss), None)
        steps = gqa[0].steps
        if reached:
            match = f"matches the loss of GQA from scratch at step {reached}, {reached / steps:.0%} of its steps"
        else:
            match = f"does not reach the loss of GQA from scratch in {uptrained[0].steps / steps:.0%} of its steps"
        end = f"it ends {_beside(uptrained, gqa)} that loss after {uptrained[0].steps} steps"
        found.append(f"GQA uptrained from MHA's mean-pooled heads {match}; {end}.")
    for mine in comparable(evaluations):
        found += [line for saved in (2 / 3, 0.9) if (line := _best_at(mine, saved))]
        found += [line for group in suite.CACHES if (line := _ranked(mine, group))]
    if not evaluations:
        return found
    wrong = [r for r in evaluations if r.kv_bytes != r.kv_bytes_predicted]
    traced = max(r.traces for r in evaluations)
    found.append(
        f"Predicted bytes equal measured bytes in {len(evaluations) - len(wrong)} of {len(evaluations)} evaluations; "
        f"the decode step was traced at most {'once' if traced == 1 else f'{traced} times'} per model shape and cache."
    )
    return found


def _beside(mine: list[Training], others: list[Training]) -> str:
    """How far validation losses are above or below those of another model with the same seeds."""
    loss = {r.seed: r.validation_loss for r in others}
    changes = [r.validation_loss / loss[r.seed] - 1 for r in mine if r.seed in loss]
    mean = statistics.fmean(changes)
    spread = (
        f" ({min(changes):+.1%} … {max(changes):+.1%} over {len(changes)} seeds)"
        if len(changes) > 1
        else ", by one seed,"
    )
    return f"{abs(mean):.1%} {'above' if mean > 0 else 'below'}{spread}"


def _best_at(evaluations: list[Evaluation], saved: float) -> str | None:
    """The cache with the lowest perplexity of those that save so many bytes, beside the best random eviction there."""
    fits = sorted((r for r in evaluations if r.compression >= saved), key=lambda r: r.ppl)
    kept = [r for r in fits if not r.cache.startswith("random")]
    lot = next((r for r in fits if r not in kept), None)
    if not kept or (full := baseline(kept[0], evaluations)) is None:
        return None
    best, count = kept[0], len({r.cache for r in kept})
    against = ""
    if lot:
        told_apart = stats.decided([evaluation.paired(best, lot, stats.p_value)])[0]
        against = f"; random eviction {evaluation.against(lot, full)}{'' if told_apart else ', which is not told apart from it'}"
    return (
        f"{best.model}, at least {saved:.0%} of the bytes saved: `{brief(best.cache)}`, the best of {count}, saves {best.compression:.1%} "
        f"at {evaluation.against(best, full)} perplexity{against}."
    )


def _ranked(evaluations: list[Evaluation], group: str) -> str | None:
    """The caches of a group of the study that keep equally many tokens, the best first, and which of them are told apart from the one before."""
    mine = sorted((r for r in evaluations if suite.group_of(r.cache, r.context) == group), key=lambda r: r.ppl)
    if len(mine) < 3 or len({r.kept for r in mine}) > 1 or (full := baseline(mine[0], evaluations)) in (None, *mine):
        return None
    told_apart = stats.decided([evaluation.paired(b, a, stats.p_value) for a, b in itertools.pairwise(mine)])
    words = [("" if index == 0 else "then " if told_apart[index - 1] else "≈ ") for index in range(len(mine))]
    ranked = (f"{word}`{r.cache}` {r.ppl / full.ppl - 1:+.1%}" for word, r in zip(words, mine, strict=True))
    return f"{mine[0].model}, {mine[0].kept} of {mine[0].context} tokens, best first: {', '.join(ranked)} perplexity; ≈: not told apart from the one before."


def models_table(trainings: list[Training]) -> Table:
    """The trained models: shape, bytes per token, loss over seeds, speed."""

    def loss(runs: list[Training]) -> str:
        losses = [run.validation_loss for run in runs]
        spread = f" ({min(losses):.4f} … {max(losses):.4f})" if len(runs) > 1 else f" ± {runs[0].validation_stderr:.4f}"
        return f"{statistics.fmean(losses):.4f}{spread}"

    first = lambda get: lambda row: get(row[1][0])
    columns = [
        Column("model", lambda row: row[0]), Column("KV heads", first(lambda r: f"{r.shape['kv_heads']} of {r.shape['heads']}")),
        Column("parameters", first(lambda r: r.parameters / 1e6), "{:.2f} M"), Column("KV bytes/token", first(lambda r: r.kv_bytes_per_token), "{:,}"),
        Column("steps", first(lambda r: r.steps), "{:,}"), Column("seeds", lambda row: len(row[1])), Column("validation loss", lambda row: loss(row[1])),
        Column("bits/byte", lambda row: statistics.fmean(r.validation_bits_per_byte for r in row[1]), "{:.4f}"),
        Column("tokens/s", lambda row: statistics.median(r.tokens_per_second for r in row[1]), "{:,.0f}"),
    ]  # fmt: skip
    return Table.of("", columns, suite.by_model(trainings).items())


def quality_table(found: list[Evaluation]) -> Table:
    """The caches of one model on the same windows: tokens kept, bytes, perplexity against the full cache with a paired interval, speed."""
    group = Column("compared within", lambda r: suite.group_of(r.cache, r.context))
    change = evaluation.change(found)
    columns = [CACHE, group, KEPT, KV_BYTES, SAVED, evaluation.PPL, change, evaluation.BITS, evaluation.SPEED]
    return Table.of(title(found[0]), columns, found)


def fidelity_table(found: list[Compared]) -> Table:
    """How far each cache's next-token distributions are from the full cache's, with 95 % intervals over windows."""
    ends = lambda key: lambda r: stats.interval(getattr(r, f"{key}_windows"), r.document_windows)
    columns = [
        CACHE, SAVED, evaluation.PPL, Column("KL, nats", "kl", "{:.5f}"), Column("95 % of KL", ends("kl"), "{0[0]:.5f} … {0[1]:.5f}"),
        Column("same top-1", "same_top", "{:.2%}"), Column("95 % of same", ends("same_top"), "{0[0]:.2%} … {0[1]:.2%}"),
    ]  # fmt: skip
    return Table.of(title(found[0]), columns, found)


def _layers_table(layers: list[Layer]) -> Table:
    columns = [
        Column("layer", "layer"),
        Column("codec", "codec"),
        Column("bytes per token", "bytes_per_token", "{:.1f}"),
    ]
    return Table.of("", columns, layers)


def _growth_table(found: list[Growth]) -> Table:
    at = lambda index: lambda r: r.kv_bytes[index]
    sizes = [Column(f"{context:,} tokens", at(index), "{:,}") for index, context in enumerate(found[0].contexts)]
    return Table.of(found[0].model, [CACHE, *sizes], found)


KEPT = evaluation.KEPT._replace(name="tokens kept")
