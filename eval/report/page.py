"""One page and the README's tables, made from records alone."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import jinja2
import markupsafe

from kvcascade.cache.errors import BadInput
from kvcascade.eval import stats, suite
from kvcascade.eval.record_keys import KEYS
from kvcascade.eval.records import Record, Table, alike, markdown, of_kind, paired, retrieval_table
from kvcascade.eval.report import costs, figures
from kvcascade.kernels.files import write_whole


def write(path: Path, records: list[Record], command: str, left_out: Sequence[str] = ()) -> None:
    """Write the study's page: self-contained, figures inline; and what was left out of it, a line for each."""
    render("report.html.j2", path, sections(records) | {"command": command, "left_out": left_out})


def render(template: str, path: Path, values: dict) -> None:
    """Write a page from one of the templates beside this file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    write_whole(path, environment.get_template(template).render(values).encode("utf-8", "replace"))


def sections(records: list[Record]) -> dict:
    """What the page shows of what there is: figures, the table behind each, the findings in words, the protocol."""
    kinds = ("train", "evaluate", "retrieve", "layer", "growth", "latency")
    trainings, evaluations, retrievals, layers, grown, latencies = (of_kind(records, kind) for kind in kinds)
    costly = costs.sections(records)
    if not evaluations and not retrievals and not any(costly.values()):
        raise BadInput("there is nothing to report in these records")
    groups = {r["cache"]: suite.group_of(r["cache"], r["context"]) for r in evaluations}
    figure = lambda draw, *arguments: markupsafe.Markup(draw(*arguments))
    quality = []
    for name in dict.fromkeys(r["model"] for r in evaluations):
        mine = [r for r in evaluations if r["model"] == name]
        quality.append({
            "model": name, "figure": figure(figures.quality_against_bytes, mine, groups), "table": quality_table(mine, groups),
        })  # fmt: skip
    return {
        "findings": findings(records),
        "trainings": trainings and {"figure": figure(figures.loss_curves, trainings), "table": models_table(trainings)},
        "quality": quality,
        "fidelity": [
            {"model": each["model"], "table": fidelity_table(mine)}
            for each in quality
            if (mine := [r for r in evaluations if r["model"] == each["model"] and "kl" in r])
        ],
        "retrieval": retrievals
        and {"figure": figure(figures.retrieval, retrievals), "table": retrieval_table(retrievals)[1:]},
        "layers": layers and {"figure": figure(figures.bytes_by_kind, layers), "table": _layers_table(layers)},
        "growth": grown
        and {"figure": figure(figures.growth, grown), "table": _growth_table(grown), "model": grown[0]["model"]},
        "latency": latencies
        and {
            "figure": figure(figures.latency, latencies),
            "table": latency_table(latencies),
            "batch": latencies[0]["batch"],
        },
        **costly,
        "protocol": _protocol(records),
    }


def _protocol(records: list[Record]) -> dict:
    """What was measured on what, by which versions; of costs alone there is neither a text nor a seed."""
    trainings, evaluations, retrievals = (of_kind(records, kind) for kind in ("train", "evaluate", "retrieve"))
    told = [*evaluations, *retrievals] or [r for r in records if r["kind"] in KEYS]
    first = told[0]
    own = bool(trainings) and trainings[0]["model"] == first["model"]
    seconds = sum(t["train_seconds"] for t in trainings), sum(r["seconds"] for r in told)
    return _text(evaluations, retrievals, own) | {
        "model": ", ".join(dict.fromkeys(r["model"] for r in told if "model" in r)),
        "device": first["device"],
        "versions": ", ".join(f"{name} {version}" for name, version in first["versions"].items()),
        "commit": first["commit"],
        "seconds": f"{seconds[0]:,.0f} training, {seconds[1]:,.0f} measuring",
    }


def _text(evaluations: list[Record], retrievals: list[Record], own: bool) -> dict:
    """What the protocol says of the text that caches were scored on."""
    if evaluations:
        first = evaluations[0]
        windows = f"{first['sequences']} consecutive windows of {first['context']} tokens, {first['tokens']:,} tokens scored per cache"
        data = f"{first['data']}{', validation files only' if own else ''}"
        return {"text": data, "windows": windows, "seed": first["seed"]}
    if retrievals:
        first = retrievals[0]
        windows = f"{first['samples']} samples per task, length and depth"
        return {"text": "made from the seed", "windows": windows, "seed": first["seed"]}
    return {}


def findings(records: list[Record]) -> list[str]:
    """What the study found, in sentences made from its figures."""
    trainings, evaluations = of_kind(records, "train"), of_kind(records, "evaluate")
    found = []
    by_name = {run["model"]: run for run in trainings}
    mha, gqa, uptrained = (by_name.get(name) for name in ("mha", "gqa", "uptrained"))
    if mha:
        found.append(
            f"MHA learned the text to {mha['validation_bits_per_byte']:.3f} bits per byte on files it never saw; "
            f"knowing only how often each token occurs gives {mha['unigram_bits_per_byte']:.3f}."
        )
    if mha and gqa:
        share = gqa["kv_bytes_per_token"] / mha["kv_bytes_per_token"]
        found.append(
            f"GQA from scratch keeps {share:.0%} of MHA's bytes per token and ends at {_change(gqa, mha, 'validation_loss')} of its validation loss."
        )
    if gqa and uptrained:
        reached = next((step for step, loss, *_ in uptrained["curve"] if loss <= gqa["validation_loss"]), None)
        if reached:
            match = f"matches the loss of GQA from scratch at step {reached}, {reached / gqa['steps']:.0%} of its steps"
        else:
            match = (
                f"does not reach the loss of GQA from scratch in {uptrained['steps'] / gqa['steps']:.0%} of its steps"
            )
        end = f"it ends at {_change(uptrained, gqa, 'validation_loss')} of that loss after {uptrained['steps']} steps"
        found.append(f"GQA uptrained from MHA's mean-pooled heads {match}; {end}.")
    for model in dict.fromkeys(r["model"] for r in evaluations):
        mine = [r for r in evaluations if r["model"] == model]
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


def _change(record: Record, baseline: Record, key: str) -> str:
    return f"{record[key] / baseline[key] - 1:+.1%}"


def _best_at(evaluations: list[Record], saved: float) -> str | None:
    """The cache with the lowest perplexity of those that save so many bytes, next to the best random eviction there."""
    full = next((r for r in evaluations if r["cache"] == "full"), evaluations[0])
    fits = sorted((r for r in evaluations if r["compression"] >= saved), key=lambda r: r["ppl"])
    if not fits:
        return None
    best = fits[0]
    lot = next((r for r in fits if r["cache"].startswith("random")), None)
    against = f" (random eviction: {_change(lot, full, 'ppl')})" if lot else ""
    return (
        f"{best['model']}, at least {saved:.0%} of the bytes saved: `{best['cache']}` saves {best['compression']:.1%} "
        f"at {_change(best, full, 'ppl')} perplexity{against}."
    )


def models_table(trainings: list[Record]) -> Table:
    """The trained models: shape, bytes per token, loss with its standard error, speed."""
    columns = ["model", "KV heads", "parameters", "KV bytes/token", "steps", "validation loss", "bits/byte", "tokens/s"]
    rows = [
        [
            run["model"],
            f"{run['shape']['kv_heads']} of {run['shape']['heads']}",
            f"{run['parameters'] / 1e6:.2f} M",
            f"{run['kv_bytes_per_token']:,}",
            f"{run['steps']:,}",
            f"{run['validation_loss']:.4f} ± {run['validation_stderr']:.4f}",
            f"{run['validation_bits_per_byte']:.4f}",
            f"{run['tokens_per_second']:,.0f}",
        ]
        for run in trainings
    ]
    return columns, rows


def quality_table(evaluations: list[Record], groups: dict[str, str]) -> Table:
    """The caches of one model: tokens kept, bytes, perplexity against the full cache with a paired interval, speed."""
    columns = [
        "cache",
        "compared within",
        "tokens kept",
        "KV bytes",
        "saved",
        "PPL",
        "Δ PPL",
        "95 % of Δ",
        "bits/byte",
        "tokens/s",
    ]
    rows = []
    for r in evaluations:
        full = next((each for each in evaluations if each["cache"] == "full" and alike(each, r)), r)
        low, high = (math.expm1(x) for x in paired(r, full))
        change = ["", ""] if r is full else [f"{r['ppl'] / full['ppl'] - 1:+.2%}", f"{low:+.2%} … {high:+.2%}"]
        rows.append([
            r["cache"], groups[r["cache"]], str(r["kept"]), f"{r['kv_bytes']:,}", f"{r['compression']:.1%}", f"{r['ppl']:.3f}",
            *change, f"{r['bits_per_byte']:.4f}", f"{r['tokens_per_second']:,.0f}",
        ])  # fmt: skip
    return columns, rows


def fidelity_table(evaluations: list[Record]) -> Table:
    """How far each cache's next-token distributions are from the full cache's, with 95 % intervals over windows."""
    columns = ["cache", "saved", "PPL", "KL, nats", "95 % of KL", "same top-1", "95 % of same"]
    rows = []
    for r in evaluations:
        kl, same = stats.interval(r["kl_windows"]), stats.interval(r["same_top_windows"])
        rows.append([
            r["cache"], f"{r['compression']:.1%}", f"{r['ppl']:.3f}", f"{r['kl']:.5f}", f"{kl[0]:.5f} … {kl[1]:.5f}",
            f"{r['same_top']:.2%}", f"{same[0]:.2%} … {same[1]:.2%}",
        ])  # fmt: skip
    return columns, rows


def latency_table(latencies: list[Record]) -> Table:
    """Decode steps in milliseconds next to their matrix products alone."""
    columns = [
        "model",
        "cache",
        "first third, ms",
        "last third, ms",
        "median, ms",
        "products, ms",
        "step / products",
        "compile, s",
    ]
    rows = [
        [
            r["model"],
            r["cache"],
            *(f"{r[key]:.2f}" for key in ("first_ms", "last_ms", "step_ms", "products_ms", "ratio")),
            f"{r['compile_seconds']:.1f}",
        ]
        for r in latencies
    ]
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
    groups = {r["cache"]: suite.group_of(r["cache"], r["context"]) for r in evaluations}
    models = [run["model"] for run in trainings]
    columns = ["cache", "tokens kept", "bytes saved", *(f"PPL {m} (Δ)" for m in models)]
    rows = []
    full = {m: next(r["ppl"] for r in evaluations if r["model"] == m and r["cache"] == "full") for m in models}
    for cache in groups:
        mine = {r["model"]: r for r in evaluations if r["cache"] == cache}
        one = mine[models[0]]
        cells = [
            f"{mine[m]['ppl']:.2f}" + (f" ({mine[m]['ppl'] / full[m] - 1:+.1%})" if cache != "full" else "")
            for m in models
        ]
        rows.append([f"`{cache}`", str(one["kept"]), f"{one['compression']:.1%}", *cells])
    first = evaluations[0]
    protocol = (
        f"{first['sequences']} windows of {first['context']} tokens of {first['data']}'s validation files, one token at a time through the cache; "
        f"seed {first['seed']}, {first['device']}, commit {first['commit']}."
    )
    return {
        "models": markdown(models_table(trainings)),
        "caches": markdown((columns, rows)) + f"\n\n{protocol}",
        "latency": markdown(latency_table(of_kind(records, "latency"))),
        "findings": "\n".join(f"- {line}" for line in findings(records)),
    }


def pretrained_table(records: list[Record]) -> str:
    """A pretrained model's caches in one table: bytes, perplexity, fidelity, and what was found; and the protocol."""
    evaluations, retrievals = of_kind(records, "evaluate"), of_kind(records, "retrieve")
    full = next(r for r in evaluations if r["cache"] == "full")
    columns = ["cache", "bytes saved", "PPL", "Δ PPL (95 %)", "KL, nats", "same top-1", "answered (95 %)"]
    rows = []
    for r in evaluations:
        low, high = (math.expm1(x) for x in paired(r, full))
        change = "" if r is full else f"{r['ppl'] / full['ppl'] - 1:+.2%} ({low:+.2%} … {high:+.2%})"
        mine = [one for one in retrievals if one["cache"] == r["cache"]]
        hits, turns = sum(one["answered"] for one in mine), sum(one["turns"] for one in mine)
        found = "{:.0%} ({:.0%} … {:.0%})".format(hits / turns, *stats.wilson(hits, turns)) if turns else ""
        kl = [f"{r['kl']:.4f}", f"{r['same_top']:.1%}"] if "kl" in r else ["", ""]
        rows.append([f"`{r['cache']}`", f"{r['compression']:.1%}", f"{r['ppl']:.3f}", change, *kl, found])
    first, asked = full, retrievals[0]
    tasks, lengths = (", ".join(map(str, dict.fromkeys(r[key] for r in retrievals))) for key in ("task", "length"))
    depths = len({r["depth"] for r in retrievals})
    protocol = (
        f"PPL, KL(full ‖ cache) and same top-1: {first['sequences']} windows of {first['context']} tokens of "
        f"{first['data'].removeprefix('file:')}; 95 % intervals over windows. "
        f"Answered: {tasks} in contexts of {lengths} tokens, {asked['samples']} samples at each of {depths} depths; Wilson intervals. "
        f"Seed {first['seed']}, {first['device']}, commit {first['commit']}."
    )
    return markdown((columns, rows)) + f"\n\n{protocol}"


def fill(readme: str, parts: dict[str, str]) -> str:
    """Put each generated part between its markers, `<!-- NAME -->` and `<!-- end NAME -->`; BadInput for a marker without a part."""
    for name in re.findall(r"<!-- end (\w+) -->", readme):
        if name not in parts:
            raise BadInput(f"the README asks for {name!r}, which is not made; there are {', '.join(parts)}")
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        readme = between.sub(lambda match, name=name: match[1] + parts[name] + "\n" + match[2], readme)
    return readme
