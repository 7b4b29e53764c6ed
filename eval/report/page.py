"""One page and the README's tables, made from records alone."""

import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2
import markupsafe

from kvcascade.cache.errors import BadInput
from kvcascade.eval import stats, suite
from kvcascade.eval.quality import evaluation, retrieval
from kvcascade.eval.record_keys import KEYS
from kvcascade.eval.records import Record, Table, markdown, of_kind
from kvcascade.eval.report import costs, figures
from kvcascade.kernels.files import write_whole


def write(path: Path, records: list[Record], command: str, left_out: Sequence[str] = ()) -> None:
    """Write the study's page: self-contained, figures inline; and what was left out of it, a line for each."""
    render("report.html.j2", path, sections(records) | {"command": command, "left_out": left_out})


def render(template: str, path: Path, values: dict) -> None:
    """Write a page from one of the templates beside this file."""
    write_whole(path, _templates().get_template(template).render(values).encode("utf-8", "replace"))


def html_table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    """A table as the page has it, under its title."""
    macro = _templates().get_template("table.html.j2").make_module().table  # pyright: ignore[reportAttributeAccessIssue]
    return markupsafe.Markup("<p>{}</p>{}").format(title, macro((columns, rows)))


def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def sections(records: list[Record]) -> dict:
    """What the page shows of what there is: figures, the table behind each, the findings in words, the protocol."""
    kinds = ("train", "evaluate", "retrieve", "layer", "growth")
    trainings, evaluations, retrievals, layers, grown = (of_kind(records, kind) for kind in kinds)
    costly = costs.sections(records)
    if not evaluations and not retrievals and not any(costly.values()):
        raise BadInput("there is nothing to report in these records")
    return {
        "findings": findings(records),
        "trainings": trainings and {"figure": _svg(figures.loss_curves, trainings), "table": models_table(trainings)},
        "quality": [_quality(mine) for mine in comparable(evaluations)],
        "fidelity": [
            {"title": _title(mine[0]), "table": fidelity_table(mine)}
            for mine in comparable(evaluations)
            if "kl" in mine[0]
        ],
        "retrieval": [
            {"figure": _svg(figures.found_at, mine), "title": title, "table": table}
            for mine in grouped(retrievals, "model", "weights", "weights_key")
            for title, *table in (retrieval.table(mine),)
        ],
        "layers": layers and {"figure": _svg(figures.bytes_by_kind, layers), "table": _layers_table(layers)},
        "growth": grown
        and {"figure": _svg(figures.growth, grown), "table": _growth_table(grown), "model": grown[0]["model"]},
        **costly,
        "protocol": _protocol(records),
    }


def _svg(draw: Callable[..., str], *arguments: object) -> markupsafe.Markup:
    return markupsafe.Markup(draw(*arguments))


def grouped(records: list[Record], *keys: str) -> list[list[Record]]:
    """The records in groups that agree in some keys, in the order of their first."""
    found: dict[tuple, list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record.get(key) for key in keys), []).append(record)
    return [*found.values()]


def comparable(evaluations: list[Record]) -> list[list[Record]]:
    """Evaluations in groups within which they may be compared: of one model, on the same windows of one text."""
    return grouped(
        evaluations, "model", "weights", "weights_key", "data", "context", "sequences", "rows", "bos", "prefix"
    )


def _title(first: Record) -> str:
    return f"{first['model']}, {evaluation.protocol(first)}"


def _quality(mine: list[Record]) -> dict:
    figure = _svg(figures.quality_against_bytes, mine)
    return {"title": _title(mine[0]), "figure": figure, "table": quality_table(mine)}


def _protocol(records: list[Record]) -> dict:
    """By which versions of what it was measured, and how long that took."""
    told = [r for r in records if r["kind"] in KEYS]
    each = lambda key: ", ".join(dict.fromkeys(str(r[key]) for r in told if key in r))
    versions = dict.fromkeys(f"{name} {version}" for r in told for name, version in r["versions"].items())
    training = sum(r["train_seconds"] for r in of_kind(records, "train"))
    dates = sorted(r["date"][:10] for r in told if "date" in r)
    return {
        "model": each("model"),
        "text": each("data") or "made from the seed",
        "seed": each("seed"),
        "device": each("device"),
        "processor": each("processor"),
        "versions": ", ".join(versions),
        "commit": each("commit"),
        "date": " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "",
        "seconds": f"{training:,.0f} training, {sum(r['seconds'] for r in told):,.0f} measuring",
    }


def findings(records: list[Record]) -> list[str]:
    """What the study found, in sentences made from its figures."""
    trainings, evaluations = of_kind(records, "train"), of_kind(records, "evaluate")
    found = []
    mha, gqa, uptrained = (suite.by_model(trainings).get(name, []) for name in ("mha", "gqa", "uptrained"))
    if mha:
        bits = statistics.fmean(r["validation_bits_per_byte"] for r in mha)
        found.append(
            f"MHA learned the text to {bits:.3f} bits per byte on files it never saw; "
            f"knowing only how often each token occurs gives {mha[0]['unigram_bits_per_byte']:.3f}."
        )
    if mha and gqa:
        share = gqa[0]["kv_bytes_per_token"] / mha[0]["kv_bytes_per_token"]
        found.append(
            f"GQA from scratch keeps {share:.0%} of MHA's bytes per token and ends {_beside(gqa, mha)} MHA's validation loss."
        )
    if gqa and uptrained:
        reached = next((step for step, loss, *_ in uptrained[0]["curve"] if loss <= gqa[0]["validation_loss"]), None)
        steps = gqa[0]["steps"]
        if reached:
            match = f"matches the loss of GQA from scratch at step {reached}, {reached / steps:.0%} of its steps"
        else:
            match = f"does not reach the loss of GQA from scratch in {uptrained[0]['steps'] / steps:.0%} of its steps"
        end = f"it ends {_beside(uptrained, gqa)} that loss after {uptrained[0]['steps']} steps"
        found.append(f"GQA uptrained from MHA's mean-pooled heads {match}; {end}.")
    for mine in comparable(evaluations):
        found += [line for saved in (2 / 3, 0.9) if (line := _best_at(mine, saved))]
    if not evaluations:
        return found
    wrong = [r for r in evaluations if r["kv_bytes"] != r["kv_bytes_predicted"]]
    traced = max(r["traces"] for r in evaluations)
    found.append(
        f"Predicted bytes equal measured bytes in {len(evaluations) - len(wrong)} of {len(evaluations)} evaluations; "
        f"the decode step was traced at most {'once' if traced == 1 else f'{traced} times'} per model shape and cache."
    )
    return found


def _beside(mine: list[Record], others: list[Record]) -> str:
    """How far validation losses are above or below those of another model with the same seeds."""
    loss = {r["seed"]: r["validation_loss"] for r in others}
    changes = [r["validation_loss"] / loss[r["seed"]] - 1 for r in mine if r["seed"] in loss]
    mean = statistics.fmean(changes)
    spread = (
        f" ({min(changes):+.1%} … {max(changes):+.1%} over {len(changes)} seeds)"
        if len(changes) > 1
        else ", by one seed,"
    )
    return f"{abs(mean):.1%} {'above' if mean > 0 else 'below'}{spread}"


def _best_at(evaluations: list[Record], saved: float) -> str | None:
    """The cache with the lowest perplexity of those that save so many bytes, beside the best random eviction there."""
    fits = sorted((r for r in evaluations if r["compression"] >= saved), key=lambda r: r["ppl"])
    kept = [r for r in fits if not r["cache"].startswith("random")]
    lot = next((r for r in fits if r not in kept), None)
    if not kept or (full := evaluation.baseline(kept[0], evaluations)) is None:
        return None
    best = kept[0]
    against = ""
    if lot:
        told_apart = stats.decided([evaluation.paired(best, lot, stats.p_value)])[0]
        against = f"; random eviction {evaluation.against(lot, full)}{'' if told_apart else ', which is not told apart from it'}"
    return (
        f"{best['model']}, at least {saved:.0%} of the bytes saved: `{best['cache']}`, the best of {len(kept)}, saves {best['compression']:.1%} "
        f"at {evaluation.against(best, full)} perplexity{against}."
    )


def models_table(trainings: list[Record]) -> Table:
    """The trained models: shape, bytes per token, loss over seeds, speed."""
    columns = [
        "model",
        "KV heads",
        "parameters",
        "KV bytes/token",
        "steps",
        "seeds",
        "validation loss",
        "bits/byte",
        "tokens/s",
    ]
    rows = []
    for name, runs in suite.by_model(trainings).items():
        first = runs[0]
        losses, bits, speeds = (
            [run[key] for run in runs] for key in ("validation_loss", "validation_bits_per_byte", "tokens_per_second")
        )
        spread = (
            f" ({min(losses):.4f} … {max(losses):.4f})" if len(runs) > 1 else f" ± {first['validation_stderr']:.4f}"
        )
        rows.append([
            name, f"{first['shape']['kv_heads']} of {first['shape']['heads']}", f"{first['parameters'] / 1e6:.2f} M",
            f"{first['kv_bytes_per_token']:,}", f"{first['steps']:,}", str(len(runs)), f"{statistics.fmean(losses):.4f}{spread}",
            f"{statistics.fmean(bits):.4f}", f"{statistics.median(speeds):,.0f}",
        ])  # fmt: skip
    return columns, rows


def quality_table(evaluations: list[Record]) -> Table:
    """The caches of one model on the same windows: tokens kept, bytes, perplexity against the full cache with a paired interval, speed."""
    columns = [
        "cache",
        "compared within",
        "tokens kept",
        "KV bytes",
        "saved",
        "PPL",
        "Δ PPL (95 %)",
        "bits/byte",
        "tokens/s",
    ]
    rows = [
        [
            r["cache"], suite.group_of(r["cache"], r["context"]), str(r["kept"]), f"{r['kv_bytes']:,}", f"{r['compression']:.1%}", f"{r['ppl']:.3f}", change,
            f"{r['bits_per_byte']:.4f}", f"{r['tokens_per_second']:,.0f}",
        ]
        for r, change in zip(evaluations, evaluation.changes(evaluations), strict=True)
    ]  # fmt: skip
    return columns, rows


def fidelity_table(evaluations: list[Record]) -> Table:
    """How far each cache's next-token distributions are from the full cache's, with 95 % intervals over windows."""
    columns = ["cache", "saved", "PPL", "KL, nats", "95 % of KL", "same top-1", "95 % of same"]
    rows = []
    for r in evaluations:
        kl, same = (stats.interval(r[f"{key}_windows"], r.get("document_windows")) for key in ("kl", "same_top"))
        rows.append([
            r["cache"], f"{r['compression']:.1%}", f"{r['ppl']:.3f}", f"{r['kl']:.5f}", f"{kl[0]:.5f} … {kl[1]:.5f}",
            f"{r['same_top']:.2%}", f"{same[0]:.2%} … {same[1]:.2%}",
        ])  # fmt: skip
    return columns, rows


def _layers_table(layers: list[Record]) -> Table:
    return ["layer", "codec", "bytes per token"], [
        [r["layer"], r["codec"], f"{r['bytes_per_token']:.1f}"] for r in layers
    ]


def _growth_table(records: list[Record]) -> Table:
    rows = [[r["cache"], *(f"{size:,}" for size in r["kv_bytes"])] for r in records]
    return ["cache", *(f"{context:,} tokens" for context in records[0]["contexts"])], rows


def readme_tables(records: list[Record]) -> dict[str, str]:
    """The README's generated parts by the name in their markers."""
    trainings, evaluations = of_kind(records, "train"), of_kind(records, "evaluate")
    models = list(dict.fromkeys(r["model"] for r in evaluations))
    columns = ["cache", "tokens kept", "bytes saved", *(f"PPL {m}, Δ (95 %)" for m in models)]
    cells = {
        (r["model"], r["cache"]): f"{r['ppl']:.2f} {change}".strip()
        for m in models
        for mine in [[r for r in evaluations if r["model"] == m]]
        for r, change in zip(mine, evaluation.changes(mine), strict=True)
    }
    rows = [
        [
            f"`{r['cache']}`",
            str(r["kept"]),
            f"{r['compression']:.1%}",
            *(cells.get((m, r["cache"]), "") for m in models),
        ]
        for r in evaluations
        if r["model"] == models[0]
    ]
    first = evaluations[0]
    protocol = (
        f"{evaluation.protocol(first)}, of files that no model was trained on, one token at a time through the cache; ≈: not decided, all "
        f"caches taken together. Seed {first['seed']}, {first['device']}, commit {first['commit']}."
    )
    return {
        "models": markdown(models_table(trainings)),
        "caches": markdown((columns, rows)) + f"\n\n{protocol}",
        "findings": "\n".join(f"- {line}" for line in findings(records)),
    }


def pretrained_table(records: list[Record]) -> str:
    """A pretrained model's caches in one table: bytes, perplexity, fidelity, and what was found; and the protocol."""
    evaluations, retrievals = of_kind(records, "evaluate"), of_kind(records, "retrieve")
    longest = max((r["length"] for r in retrievals), default=0)
    columns = ["cache", "bytes saved", "PPL", "Δ PPL (95 %)", "KL, nats", "same top-1", f"answered in {longest} tokens"]
    rows = []
    for r, change in zip(evaluations, evaluation.changes(evaluations), strict=True):
        found = retrieval.average(retrievals, r["cache"], longest) if retrievals else None
        kl = [f"{r['kl']:.4f}", f"{r['same_top']:.1%}"] if "kl" in r else ["", ""]
        rows.append([f"`{r['cache']}`", f"{r['compression']:.1%}", f"{r['ppl']:.3f}", change, *kl, str(found or "")])
    first = evaluations[0]
    protocol = (
        f"PPL, KL(full ‖ cache) and same top-1: {evaluation.protocol(first)}; ≈: not decided, all caches taken together. "
        f"Seed {first['seed']}, {first['device']}, commit {first['commit']}."
    )
    if retrievals:
        tasks = ", ".join(retrieval.measurable(retrievals, longest))
        protocol += f" Answered: mean of {tasks}; {retrieval.protocol(retrievals)}."
    return markdown((columns, rows)) + f"\n\n{protocol}"


def summary_table(records: list[Record]) -> str:
    """The README's few caches of a pretrained model, each beside random eviction of as many bytes, and the protocol."""
    shown = [r for r in of_kind(records, "evaluate") if r["cache"] in suite.SUMMARY]
    columns, rows = ["cache", "bytes saved", "PPL", "Δ PPL (95 %)", "answered"], []
    retrievals = of_kind(records, "retrieve")
    longest = max((r["length"] for r in retrievals), default=0)
    changes = dict(zip([r["cache"] for r in shown], evaluation.changes(shown), strict=True))
    for r in shown:
        found = retrieval.average(retrievals, r["cache"], longest) if retrievals else None
        rows.append(
            [f"`{r['cache']}`", f"{r['compression']:.1%}", f"{r['ppl']:.2f}", changes[r["cache"]], str(found or "")]
        )
    return (
        f"{markdown((columns, rows))}\n\n{_title(shown[0])}; ≈: not decided. *Answered*: mean over retrieval tasks in {longest} tokens. "
        f"Commit {shown[0]['commit']}."
    )


def fill(readme: str, parts: dict[str, str]) -> str:
    """Put each generated part between its markers, `<!-- NAME -->` and `<!-- end NAME -->`; BadInput for a marker without a part."""
    for name in re.findall(r"<!-- end (\w+) -->", readme):
        if name not in parts:
            raise BadInput(f"the README asks for {name!r}, which is not made; there are {', '.join(parts)}")
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        readme = between.sub(lambda match, name=name: match[1] + parts[name] + "\n" + match[2], readme)
    return readme
