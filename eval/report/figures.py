"""The report's figures, as SVG text."""

import io
import itertools
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kvcascade.eval import suite
from kvcascade.eval.quality import evaluation, retrieval
from kvcascade.eval.records import (
    FILLED,
    Crash,
    Evaluation,
    Fit,
    Growth,
    Layer,
    Profile,
    Retrieval,
    Served,
    Stream,
    Training,
    baseline,
)
from kvcascade.eval.table import brief

# Okabe and Ito's colours: told apart by colour-blind readers as well.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif", "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#e6e6e6", "axes.axisbelow": True, "svg.fonttype": "none", "text.parse_math": False, "svg.hashsalt": "kvcascade", "legend.frameon": False,
}  # fmt: skip
SIZE = (7.2, 4.3)
FARTHEST = 3.0
"""Times the full cache's perplexity that the leaderboard's figure has room for."""


def to_svg(figure: Figure) -> str:
    """A figure as SVG text, without a size and the same from run to run."""
    file = io.StringIO()
    figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*" height="[^"]*"|(<svg[^>]*?) height="[^"]*"',
        r"\1\2",
        svg[svg.index("<svg") :],
        count=1,
    )


def subplots(*shape: int, figsize: tuple[float | int, float | int] = SIZE, **options: Any) -> tuple[Figure, Any]:
    """A figure and its axes. Pyplot does not know it, so whoever draws figures of their own, as in a notebook, keeps their backend."""
    figure = Figure(figsize=figsize)
    FigureCanvasSVG(figure)  # measures texts as they will be written
    return figure, figure.subplots(*shape, **options)


def bytes_label(value: float | int, _=None) -> str:
    """Bytes in the largest unit that leaves at least one, as an axis has them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.3g} {unit}"
        value /= 1024
    return ""


def styled[T](values: Iterable[T]) -> Iterator[tuple[dict[str, Any], T]]:
    """A colour for each of some lines, and where there are more than colours, another kind of line."""
    styles = itertools.product(("-", "--", ":", "-."), COLOURS)
    return (
        (dict(zip(("linestyle", "color"), style, strict=True)), value)
        for style, value in zip(styles, values, strict=False)
    )


def loss_curves(trainings: list[Training]) -> str:
    """Validation loss against tokens seen: of each model the mean over seeds and their range, or with one seed its standard error."""
    with matplotlib.rc_context(STYLE):
        figure, axes = subplots()
        shown = []
        for style, (name, runs) in styled(suite.by_model(trainings).items()):
            points = [
                list(zip(*(run.curve[index] for run in runs), strict=True))
                for index in range(min(len(r.curve) for r in runs))
            ]
            tokens = [steps[0] * runs[0].tokens_per_step / 1e6 for steps, *_ in points]
            losses = [sum(each) / len(each) for _, each, *_ in points]
            low, high = [min(each) for _, each, *_ in points], [max(each) for _, each, *_ in points]
            if len(runs) == 1:
                low, high = (
                    [x + sign * errors[0] for x, (_, _, errors, _) in zip(losses, points, strict=True)]
                    for sign in (-1, 1)
                )
            axes.plot(tokens, losses, label=name, marker="o", markersize=3, **style)
            axes.fill_between(tokens, low, high, color=style["color"], alpha=0.12, linewidth=0)
            shown += losses[len(losses) // 5 :]
        axes.set_ylim(min(shown) - 0.15, max(shown) + 0.25)
        axes.set_xlabel("million tokens trained on by this run (the first points lie above)")
        axes.set_ylabel("validation loss, nats per token")
        axes.legend()
        return to_svg(figure)


def quality_against_bytes(evaluations: list[Evaluation]) -> str:
    """Perplexity against measured bytes of a row's cache; bars are 95 % intervals of the change against the full cache.

    Colour is the group of caches that are compared, hollow is random eviction; caches that none of fewer bytes beats are numbered and named.
    """
    groups = {r.cache: suite.group_of(r.cache, r.context) for r in evaluations}
    with matplotlib.rc_context(STYLE):
        figure, axes = subplots()
        colours = {name: style["color"] for style, name in styled(dict.fromkeys(groups[r.cache] for r in evaluations))}
        front, best = math.inf, []
        for record in sorted(evaluations, key=lambda r: (r.kv_bytes, r.ppl)):
            colour, full = colours[groups[record.cache]], baseline(record, evaluations)
            low, high = evaluation.paired(record, full) if full and full is not record else (math.nan, math.nan)
            bar = None
            if full and math.isfinite(low):
                ends = [full.ppl * math.exp(low), full.ppl * math.exp(high)]
                bar = [[max(0.0, record.ppl - ends[0])], [max(0.0, ends[1] - record.ppl)]]
            lot = record.cache.startswith("random")
            axes.errorbar(
                record.kv_bytes, record.ppl, yerr=bar, color=colour, marker="o", markersize=7, markeredgewidth=1.6, elinewidth=1.2,
                capsize=2.5, markerfacecolor="white" if lot else colour,
            )  # fmt: skip
            if record.ppl < front and not lot:
                front = record.ppl
                best.append(record)
        for name, colour in colours.items():
            axes.plot([], [], color=colour, marker="o", linestyle="", label=name)
        axes.plot(
            [], [], color="#666", marker="o", linestyle="", markerfacecolor="white", label="hollow: random eviction"
        )
        for full in [r for r in evaluations if r.cache == "full"][:1]:
            axes.axhline(full.ppl, color="#888", linewidth=1, linestyle="--")
        perplexities = [r.ppl for r in evaluations]
        if max(perplexities) > 1.5 * min(perplexities):  # in a narrower range a logarithmic axis would have no ticks
            axes.set_yscale("log")
            _tenths(axes.yaxis)
            axes.set_ylim(bottom=0.9 * min(perplexities))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(2))
        axes.xaxis.set_major_formatter(FuncFormatter(bytes_label))
        axes.margins(x=0.12)
        axes.set_xlabel("measured bytes of one row's cache")
        axes.set_ylabel("perplexity (lower is better)")
        axes.legend(fontsize=9)
        _named(axes, [(record.kv_bytes, record.ppl, brief(record.cache)) for record in best])
        return to_svg(figure)


def _named(axes, points: list[tuple[float | int, float, str]]) -> None:
    """Number points, each beside it as far below as those before it leave room, and say below the axes, whose limits must be there, who they are."""
    taken = []
    for number, (x, y, name) in enumerate(points, 1):
        text = axes.annotate(f"{number}", (x, y), (6, -11), textcoords="offset points", fontsize=8, color="#333")
        while any(text.get_window_extent().overlaps(box) for box in taken):
            text.xyann = text.xyann[0], text.xyann[1] - 3
        taken.append(text.get_window_extent())
        place = 0.0, -0.2 - 0.055 * number
        axes.text(*place, f"{number}  {name}", transform=axes.transAxes, fontsize=8, color="#333", family="monospace")


def _tenths(axis) -> None:
    """Ticks of a logarithmic axis of perplexities, which seldom spans a power of ten."""
    axis.set_major_locator(LogLocator(10, subs=(1, 1.5, 2, 3, 4, 6, 8)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.set_minor_formatter(NullFormatter())


type Dot = tuple[str, str, Evaluation]
"""An entry's kind, its name and its score."""


def leaderboard(kinds: Sequence[str], panels: dict[float, list[Dot]], full: Evaluation) -> str:
    """Perplexity of each entry, the best first, in a panel for each budget: the best of a kind is named and has its 95 % interval.

    What loses more than a panel has room for stands at its edge as an arrow.
    """
    size = (3.4 * len(panels) + 0.8, 0.5 * len(kinds) + 1)
    with matplotlib.rc_context(STYLE):
        figure, axes = subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
        for ax, (budget, entries) in zip(axes[0], panels.items(), strict=True):
            for row, kind in enumerate(kinds):
                _dots(ax, row, [each for each in entries if each[0] == kind], full)
            ax.axvline(full.ppl, color="#888", linewidth=1, linestyle="--")
            ax.set_xscale("log")
            _tenths(ax.xaxis)
            ax.set_xlim(0.96 * full.ppl, FARTHEST * full.ppl)
            ax.set_ylim(len(kinds) - 0.5, -0.8)
            ax.set_title(f"at most {budget:.0%} of the bytes", fontsize=10)
            ax.set_xlabel("perplexity (dashed: full cache)", fontsize=9)
        axes[0][0].set_yticks(range(len(kinds)), kinds)
        figure.tight_layout()
        return to_svg(figure)


def _dots(ax, row: int, entries: list[Dot], full: Evaluation) -> None:
    """A row of a leaderboard's panel, the best last, so that it lies above the others."""
    colour, most = COLOURS[row % len(COLOURS)], FARTHEST * full.ppl
    marker = lambda record: ">" if record.ppl > most else "o"
    common = {"color": colour, "linestyle": "", "clip_on": False}
    for _, _, record in entries[:0:-1]:
        ax.plot(min(record.ppl, most), row, marker=marker(record), markersize=6, alpha=0.35, **common)
    for _, name, record in entries[:1]:
        ax.plot(min(record.ppl, most), row, marker=marker(record), markersize=8, alpha=1.0, **common)
        low, high = evaluation.paired(record, full)
        if math.isfinite(low) and record.ppl <= most:
            ends = [full.ppl * math.exp(low), min(full.ppl * math.exp(high), most)]
            ax.plot(ends, [row, row], color=colour, linewidth=1.4)
        place = (min(record.ppl, most), row)
        ax.annotate(name, place, (0, 7), textcoords="offset points", fontsize=8, color="#333", ha="left")


def bytes_by_kind(layers: list[Layer]) -> str:
    """Bytes that one token takes in one layer, by kind of attention and codec."""
    with matplotlib.rc_context(STYLE):
        figure, axes = subplots()
        kinds = list(dict.fromkeys(r.layer for r in layers))
        codecs = list(dict.fromkeys(r.codec for r in layers))
        for index, codec in enumerate(codecs):
            sizes = [
                next((r.bytes_per_token for r in layers if r.layer == kind and r.codec == codec), 0) for kind in kinds
            ]
            places = [place + (index - (len(codecs) - 1) / 2) * 0.26 for place in range(len(kinds))]
            bars = axes.bar(places, sizes, 0.24, color=COLOURS[index % len(COLOURS)], label=codec)
            axes.bar_label(bars, [f"{size:.0f}" for size in sizes], padding=2, fontsize=9)
        axes.set_xticks(range(len(kinds)), kinds)
        axes.set_ylabel("bytes per token and layer")
        axes.grid(axis="x", visible=False)
        axes.legend()
        return to_svg(figure)


def growth(records: Sequence[Growth | Profile]) -> str:
    """Bytes of one row's cache against the context; dashed, where they are known, the temporaries of a decode step."""
    with matplotlib.rc_context(STYLE):
        figure, axes = subplots()
        temporaries = False
        for style, record in styled(records):
            grown = (
                record.growth
                if isinstance(record, Profile)
                else {"contexts": record.contexts, "kv_bytes": record.kv_bytes}
            )
            axes.plot(grown["contexts"], grown["kv_bytes"], marker="o", markersize=4, label=record.cache, **style)
            if "temporary_bytes" in grown:
                temporaries = True
                dashed: dict[str, Any] = style | {"linestyle": "--"}
                axes.plot(grown["contexts"], grown["temporary_bytes"], linewidth=1.2, **dashed)
        if temporaries:
            axes.plot(
                [], [], color="#666", linestyle="--", linewidth=1.2, label="dashed: temporaries of a step, all rows"
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(bytes_label))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("context, tokens")
        axes.set_ylabel("measured bytes of one row's cache")
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14)} if temporaries else {}
        axes.legend(fontsize=9, **below)
        return to_svg(figure)


# Products with weights in blues, the cache in warm colours, the rest in greys.
PARTS = {
    "mlp": ("#0072B2", ("mlp", "activation")),
    "head": ("#56B4E9", ("head",)),
    "qkv, output": ("#9BD0F0", ("qkv", "output")),
    "attention": ("#D55E00", ("attention",)),
    "eviction": ("#E69F00", ("priority", "exchange", "scores")),
    "norms, RoPE, embedding, others": ("#009E73", ("norm", "rope", "embedding", "other")),
    "sampling": ("#CC79A7", ("sampling",)),
    "nothing runs": ("#d0d0d0", ("between", "around")),
}


def step_shares(records: list[Profile]) -> str:
    """Time of a decode step by component, a bar for each cache."""
    with matplotlib.rc_context(STYLE):
        figure, axes = subplots(figsize=(SIZE[0], 1.3 + 0.5 * len(records)))
        widest = max(record.profiled_ms for record in records)
        for place, record in enumerate(reversed(records)):
            ms = {each["name"]: each["ms"] for each in record.components}
            ms |= {"between": record.between_ms, "around": record.around_ms}
            left = 0.0
            for colour, names in PARTS.values():
                width = sum(ms.get(name, 0.0) for name in names)
                bar = axes.barh(place, width, 0.62, left, color=colour, edgecolor="white", linewidth=0.6)
                if width > 0.06 * widest:
                    share = f"{width / record.profiled_ms:.0%}"
                    axes.bar_label(
                        bar,
                        [share],
                        label_type="center",
                        fontsize=9,
                        color="white" if colour in COLOURS[:3] else "black",
                    )
                left += width
            axes.annotate(f"{left:.2f}", (left, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
        models = {record.model for record in records}
        names = [f"{r.model}: {brief(r.cache)}" if len(models) > 1 else brief(r.cache) for r in reversed(records)]
        axes.set_yticks(range(len(records)), ["\n".join(textwrap.wrap(name, 34)) for name in names])
        axes.set_xlabel("milliseconds of a decode step")
        handles = [Patch(color=colour) for colour, _ in PARTS.values()]
        axes.legend(
            handles, PARTS, loc="upper right", bbox_to_anchor=(1.0, -0.55 / len(records) - 0.1), ncols=4, fontsize=9
        )
        axes.grid(axis="y", visible=False)
        return to_svg(figure)


def found_at(records: list[Retrieval]) -> str:
    """A heat map per cache: what is answered by depth and length, the mean over the tasks that can be measured; grey was not measured."""
    caches = list(dict.fromkeys(r.cache for r in records))
    lengths, depths = sorted({r.length for r in records}), sorted({r.depth for r in records})
    columns = min(4, len(caches))
    rows = -(-len(caches) // columns)
    style: dict[Any, Any] = STYLE | {"axes.grid": False, "font.size": 9}
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#d0d0d0")
    with matplotlib.rc_context(style):
        figure, panels = subplots(
            rows, columns, figsize=(2.1 * columns + 0.6, 2.1 * rows + 0.3), squeeze=False, sharex=True, sharey=True
        )
        for index, panel in enumerate(panels.flat):
            if index >= len(caches):
                panel.set_axis_off()
                continue
            share = [[retrieval.at(records, caches[index], length, depth) for length in lengths] for depth in depths]
            panel.imshow(share, vmin=0, vmax=1, cmap=colours, aspect="auto")
            for y, line in enumerate(share):
                for x, value in enumerate(line):
                    if not math.isnan(value):
                        colour = "black" if value > 0.6 else "white"
                        panel.text(x, y, f"{value:.0%}", ha="center", va="center", color=colour)
            panel.set_title("\n".join(textwrap.wrap(caches[index], 26)), fontsize=8, family="monospace")
            panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        figure.supxlabel("tokens of context", fontsize=10)
        figure.supylabel("depth of the answer", fontsize=10)
        figure.tight_layout()
        return to_svg(figure)


def stream(records: list[Stream]) -> str:
    """Milliseconds per token against tokens generated, a line per cache."""
    with matplotlib.rc_context(STYLE):
        figure, axes = subplots()
        for style, record in styled(records):
            done, ms, _ = zip(*record.points, strict=True)
            axes.plot(
                done,
                ms,
                **style,
                marker="o",
                markersize=3,
                label=f"{record.name}: {brief(record.cache)}",
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens generated")
        axes.set_ylabel("milliseconds per token")
        axes.legend(fontsize=9)
        return to_svg(figure)


def first_tokens(records: list[Served]) -> str:
    """How many of a trace's requests have their first token within how long, a line for each way to serve it."""
    with matplotlib.rc_context(STYLE):
        figure, axes = subplots(figsize=(SIZE[0], 0.8 * SIZE[1]))
        for style, record in styled(records):
            seconds = [ms / 1e3 for ms in record.first_ms]
            shares = [100 * index / (len(seconds) - 1) for index in range(len(seconds))]
            axes.plot(seconds, shares, **style, label=f"{record.way}: {record.cache}")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())  # within a decade the usual one writes on all of them
        axes.set_xlabel("seconds from arrival to the first token")
        axes.set_ylabel("% of requests")
        axes.legend(fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        return to_svg(figure)


def users(records: list[Fit]) -> str:
    """Users that fit on a card, a bar per cache and context; beside it the bytes that fill the card, against what a program may have of it."""
    with matplotlib.rc_context(STYLE):
        figure, (left, right) = subplots(
            1, 2, figsize=(1.3 * SIZE[0], 1.3 + 0.5 * len(records)), sharey=True, gridspec_kw={"wspace": 0.06}
        )
        places = range(len(records))[::-1]
        bars = left.barh(places, [r.users for r in records], 0.6, color=COLOURS[0])
        left.bar_label(bars, [f"{r.users:,}" for r in records], padding=3, fontsize=9)
        left.margins(x=0.15)
        names = [
            "\n".join(textwrap.wrap(r.cache, 34)) + (f", {r.context:,}" if len(records) > 1 else "") for r in records
        ]
        left.set_yticks(places, names, fontsize=9)
        left.set_xlabel("users that fit")
        start = [0.0] * len(records)
        for colour, what in zip(("#999999", COLOURS[5], COLOURS[1]), FILLED, strict=True):
            sizes = [each.filled[what] / 2**30 for each in records]
            right.barh(places, sizes, 0.6, left=start, color=colour, label=what)
            start = [before + size for before, size in zip(start, sizes, strict=True)]
        right.axvline(records[0].budget / 2**30, color="#333", linewidth=1, linestyle="--")
        right.set_xlabel("GiB held; dashed: what a program may have")
        right.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=9)
        for axes in (left, right):
            axes.grid(axis="y", visible=False)
        return to_svg(figure)


def peak_memory(records: list[Crash]) -> str:
    """Peak memory against users, a panel per model: a point lived, a cross died at the limit, a line is the arithmetic."""
    models = list(dict.fromkeys(r.model for r in records))
    with matplotlib.rc_context(STYLE):
        figure, panels = subplots(
            1, len(models), figsize=(SIZE[0] * max(1, 0.75 * len(models)), SIZE[1]), squeeze=False
        )
        for panel, model in zip(panels.flat, models, strict=True):
            mine = [r for r in records if r.model == model]
            for style, record in styled(mine):
                colour = style["color"]
                limit, last = record.limit / 1e9, record.users_predicted
                line = [record.peak_one / 1e9 + n * record.user_bytes_predicted / 1e9 for n in (0, last - 1)]
                panel.plot([1, last], line, linewidth=1, **style)
                lived = [(c["users"], c.get("peak", 0) / 1e9) for c in record.children if c["lived"]]
                died = [(c["users"], limit) for c in record.children if not c["lived"]]
                panel.plot(*zip(*lived, strict=True), color=colour, marker="o", linestyle="", label=record.cache)
                panel.plot(*zip(*died, strict=True), color=colour, marker="x", linestyle="", markersize=8)
            panel.axhline(mine[0].limit / 1e9, color="#888", linewidth=1, linestyle="--")
            panel.set_title(f"{model}, {mine[0].context:,} tokens each", fontsize=10)
            panel.set_xlabel("users")
            panel.set_ylim(bottom=0)
            panel.legend(fontsize=8, loc="lower right")
        panels[0][0].set_ylabel("peak memory, GB")
        figure.tight_layout()
        return to_svg(figure)
