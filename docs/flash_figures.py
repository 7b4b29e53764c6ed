"""The figures of flash_attention.md, from the numbers that flash_attention.py records."""

from typing import Any

import matplotlib
from flash_tables import (
    BLACK,
    BLUE,
    FORMATS,
    LABELS,
    RED,
    flash_bytes,
    floor_bytes,
    intensities,
    naive_bytes,
)
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from kvcascade.eval.kernels.whole_step import Record
from kvcascade.eval.report.figures import SIZE, STYLE, bytes_label, subplots, to_svg


def drawn(found: Record) -> dict[str, str]:
    """SVG texts by name."""
    with matplotlib.rc_context(STYLE):
        return {
            "flash_memory": to_svg(_memory(found["card"])),
            "flash_roofline": to_svg(_roofline(found)),
            "flash_forward": to_svg(_forward(found["forward"])),
            "flash_backward": to_svg(_backward(found["backward"])),
            "flash_decode": to_svg(_decode(found["decode"])),
        }


def _logarithmic(axes: Axes, x: list[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(x, [f"{n:,}" for n in x])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(4, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(bytes_label))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(label)


def _of(records: list[Record], program: str, key: str) -> tuple[list[int], list[int]]:
    mine = [one for one in records if one["program"] == program]
    return [one["tokens"] for one in mine], [one[key] for one in mine]


def _forward(records: list[Record]):
    figure, axes = subplots(figsize=(SIZE[0], 5))
    tokens = sorted({one["tokens"] for one in records})
    lines = {"naive": naive_bytes, "flash64": lambda n: flash_bytes(n, 64), "flash128": lambda n: flash_bytes(n, 128)}
    for name, (label, colour, marker) in LABELS.items():
        axes.plot(*_of(records, name, "moved"), color=colour, marker=marker, linestyle="", markersize=7, label=label)
        if name in lines:
            axes.plot(tokens, [lines[name](n) for n in tokens], color=colour, linewidth=1)
    axes.plot(
        tokens,
        [floor_bytes(n) for n in tokens],
        color="#888",
        linestyle="--",
        linewidth=1.2,
        label="Q, K, V and output once",
    )
    _logarithmic(axes, tokens, "tokens N; lines are formulas, points are counted")
    axes.set_ylabel("bytes moved, one head, forward")
    axes.legend(fontsize=9.5)
    return figure


def _backward(records: list[Record]):
    figure, axes = subplots()
    tokens = sorted({one["tokens"] for one in records})
    for name, label in (("naive", "naive: weights kept"), ("loop", "loop: weights computed again")):
        _, colour, marker = LABELS[name]
        axes.plot(*_of(records, name, "temporaries"), color=colour, marker=marker, label=label)
    axes.plot(
        tokens,
        [floor_bytes(n) // 4 for n in tokens],
        color="#888",
        linestyle="--",
        linewidth=1.2,
        label="one of Q, K, V",
    )
    _logarithmic(axes, tokens, "tokens N")
    axes.set_ylabel("temporary memory, one head,\nforward and backward")
    axes.legend(fontsize=9.5)
    return figure


def _decode(records: list[Record]):
    figure, (above, below) = subplots(2, 1, figsize=(SIZE[0], 7.6), height_ratios=(3, 2))
    slots = sorted({one["slots"] for one in records})
    for codec, colour in FORMATS.items():
        mine = [one for one in records if one["codec"] == codec]
        above.plot(slots, [one["moved"] for one in mine], color=colour, marker="o", linestyle="", markersize=7)
        above.plot(slots, [one["floor"] for one in mine], color=colour, linewidth=1)
        above.plot(
            slots, [one["xla"]["moved"] for one in mine], color=colour, marker="s", linestyle=":", linewidth=1,
            markersize=7, markerfacecolor="none",
        )  # fmt: skip
    _logarithmic(above, slots, "slots of one KV head")
    above.set_ylabel("bytes moved by a step")
    # fp8 lies under int8, whose slots have as many bytes.
    handles = [Patch(color=colour, label=codec) for codec, colour in FORMATS.items() if codec != "fp8"]
    handles[1].set_label("int8, fp8")
    handles += above.plot([], [], color="#555", marker="o", linestyle="", label="our kernel")
    handles += above.plot([], [], color="#555", linewidth=1, label="everything once")
    handles += above.plot([], [], color="#555", marker="s", linestyle=":", markerfacecolor="none", label="XLA")
    above.legend(handles=handles, fontsize=9.5, ncols=2)
    last = [next(one for one in records if (one["codec"], one["slots"]) == (codec, slots[-1])) for codec in FORMATS]
    for offset, colour, label, value in (
        (-0.27, "#bbb", "stored, with its position", lambda one: one["per_slot"]),
        (0, BLUE, "our kernel", lambda one: one["moved"] / one["slots"]),
        (0.27, RED, "XLA", lambda one: one["xla"]["moved"] / one["slots"]),
    ):
        bars = below.bar(
            [i + offset for i in range(len(last))], [value(one) for one in last], 0.25, color=colour, label=label
        )
        below.bar_label(bars, [f"{value(one):,.0f}" for one in last], padding=2, fontsize=9)
    below.set_xticks(range(len(last)), FORMATS)
    below.set_ylabel(f"bytes moved per slot\nat {slots[-1]:,} slots")
    below.set_ylim(0, 3200)
    below.grid(axis="x", visible=False)
    below.legend(fontsize=9.5, loc="upper left", ncols=3, columnspacing=0.8, handlelength=1.2)
    figure.tight_layout()
    return figure


def _roofline(found: Record):
    card = found["card"]
    figure, axes = subplots()
    ridge, peak = card["flops"] / card["bandwidth"], card["flops"] / 1e12
    axes.plot([0.5, ridge, 2000], [0.5 * card["bandwidth"] / 1e12, peak, peak], color=BLACK, linewidth=1.5)
    for x, label, colour, above in intensities(found):
        y = min(peak, x * card["bandwidth"] / 1e12)
        axes.plot([x], [y], color=colour, marker="o", markersize=8, clip_on=False)
        axes.annotate(
            label,
            (x, y),
            (-8, 5) if above else (9, -9),
            textcoords="offset points",
            fontsize=9.5,
            ha="right" if above else "left",
        )
    axes.annotate(f"{peak:,.0f} TFLOP/s", (ridge, peak), (0, 5), textcoords="offset points", color="#555", fontsize=9.5)
    axes.annotate(
        f"{ridge:.0f} FLOP per byte", (ridge, 1.6), (5, 0), textcoords="offset points", color="#555", fontsize=9.5
    )
    axes.axvline(ridge, color="#888", linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(0.5, 2000)
    axes.set_ylim(1, 2500)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xlabel("FLOP per byte moved")
    axes.set_ylabel("TFLOP/s that the card can reach")
    return figure


def _memory(card: Record):
    figure, (left, right) = subplots(1, 2, figsize=(7.6, 4.2), width_ratios=(1, 1))
    each = card["multiprocessors"]
    levels = (
        ("registers", f"{bytes_label(card['registers'])} × {each}", "o, m and l of a block", 0.64, "#cfe3f3"),
        ("shared memory", f"{bytes_label(card['shared_memory'])} × {each}", "its tiles of Q, K and V", 0.76, "#dcebdd"),
        ("L2 cache", bytes_label(card["l2"]), "K and V of some heads", 0.88, "#f7ecd2"),
        ("HBM", bytes_label(card["memory"]), "everything else", 1.0, "#f6dccd"),
    )
    for i, (name, size, holds, width, colour) in enumerate(levels):
        y = 3 - i
        left.add_patch(
            FancyBboxPatch(
                (0.5 - width / 2, y + 0.08),
                width,
                0.76,
                boxstyle="round,pad=0,rounding_size=0.04",
                facecolor=colour,
                edgecolor="#999",
            )
        )
        left.text(0.5, y + 0.6, f"{name}: {size}", ha="center", va="center", fontsize=9.5)
        left.text(0.5, y + 0.3, holds, ha="center", va="center", fontsize=8.5, color="#555")
    left.text(0.5, -0.2, f"HBM reads {card['bandwidth'] / 1e12:.2f} TB/s", ha="center", fontsize=9.5)
    left.set(xlim=(-0.02, 1.02), ylim=(-0.4, 4))
    right.add_patch(Rectangle((1.5, 0), 6, 6, facecolor="#fafafa", edgecolor="#999"))
    for x in range(6):
        done = x < 2
        right.add_patch(Rectangle((1.5 + x, 3), 1, 1, facecolor="#cfe3f3" if done else "#fff", edgecolor="#bbb"))
    right.add_patch(Rectangle((3.5, 3), 1, 1, facecolor=BLUE, edgecolor="#333"))
    right.add_patch(Rectangle((0.5, 3), 0.7, 1, facecolor="#dcebdd", edgecolor="#999"))
    right.add_patch(Rectangle((3.5, 6.3), 1, 0.7, facecolor="#dcebdd", edgecolor="#999"))
    right.add_patch(Rectangle((7.8, 3), 0.7, 1, facecolor="#cfe3f3", edgecolor="#999"))
    right.annotate("", (7.3, 2.7), (1.7, 2.7), arrowprops={"arrowstyle": "->", "color": "#555"})
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 9.5}
    right.text(0.85, 3.5, "Q", **style)
    right.text(4, 6.65, "K, V", **style)
    right.text(8.15, 3.5, "o", **style)
    right.text(4.5, 2.25, "one block: Q stays, K and V pass,", **style)
    right.text(4.5, 1.75, "(m, l, o) goes on from tile to tile", **style)
    right.text(4.5, 5.4, "N × N weights:\nno more than one tile exists", **style)
    right.set(xlim=(0.3, 8.7), ylim=(-0.6, 7.3))
    for axes in (left, right):
        axes.set_axis_off()
    figure.tight_layout()
    return figure
