"""The tables of flash_attention.md, from the numbers that flash_attention.py records, and the formulas beside them."""

from kvcascade.eval.kernels.whole_step import Record
from kvcascade.eval.report.figures import COLOURS, bytes_label
from kvcascade.eval.table import Table, markdown

BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK = COLOURS
H = 128
"""The head's width, that of Llama 3."""
GROUP = 4
"""Query heads to a KV head, as in Llama 3 8B."""
LABELS = {
    "naive": ("naive, as XLA compiles it", RED, "o"),
    "loop": ("a loop over 128 queries, as XLA compiles it", ORANGE, "s"),
    "flash64": ("flash, 64 queries a block", SKY, "^"),
    "flash128": ("flash, 128 queries a block", BLUE, "v"),
}
FORMATS = dict(zip(("bf16", "fp8", "int8", "nvfp4", "int4"), (BLUE, GREEN, RED, ORANGE, PINK), strict=True))


def flash_bytes(tokens: int, queries: int) -> int:
    """Bytes that a flash kernel loads and stores: queries and output once, keys and values once per block of queries, 4 per normaliser."""
    vectors = tokens * H * 2
    return 2 * vectors + 2 * vectors * tokens // queries + 4 * tokens


def naive_bytes(tokens: int) -> int:
    """Bytes with float32 logits and bf16 weights written once and read once."""
    return floor_bytes(tokens) + 2 * (4 + 2) * tokens**2


def floor_bytes(tokens: int) -> int:
    """Bytes of queries, keys, values and output."""
    return 4 * tokens * H * 2


def intensities(found: Record) -> list[tuple[float, str, str, bool]]:
    """FLOP per byte of what was measured, with a label, its colour and whether the label stands above."""
    points = []
    for program, above in (("naive", True), ("flash128", True)):
        one = next(one for one in found["forward"] if (one["program"], one["tokens"]) == (program, 4096))
        name = program.replace("128", "")
        points.append((4 * 4096**2 * H / one["moved"], f"{name}, 4,096 tokens", LABELS[program][1], above))
    for codec in ("bf16", "int8", "int4"):
        one = [one for one in found["decode"] if one["codec"] == codec][-1]
        flops = 4 * GROUP * one["slots"] * H
        points.append((flops / one["moved"], f"decode, {codec}", FORMATS[codec], False))
    return points


def tables(found: Record) -> dict[str, str]:
    """The page's generated parts by name, in Markdown."""
    return {
        "card": _card(found["card"]),
        "intensities": _intensities(found),
        "forward": _forward_table(found["forward"]),
        "backward": _backward_table(found["backward"]),
        "decode": _decode_table(found),
        "stamp": _stamp(found),
    }


def _mib(value: float) -> str:
    return f"{value / 2**20:,.1f}"


def _card(card: Record) -> str:
    each = card["multiprocessors"]
    rows = [
        ["HBM", bytes_label(card["memory"]), "the card", f"{card['bandwidth'] / 1e12:.2f} TB/s"],
        ["L2 cache", bytes_label(card["l2"]), "the card", ""],
        ["shared memory", bytes_label(card["shared_memory"]), f"each of {each} multiprocessors", ""],
        ["registers", bytes_label(card["registers"]), f"each of {each} multiprocessors", ""],
        ["tensor cores, bf16", "", "the card", f"{card['flops'] / 1e12:,.0f} TFLOP/s"],
        ["FLOP per byte at which both are busy", "", "", f"{card['flops'] / card['bandwidth']:.0f}"],
        ["instructions of a thread per byte of HBM", "", "", f"{card['instructions_per_byte']:.1f}"],
    ]
    return markdown(Table("", ["", "size", "of", "rate"], rows))


def _intensities(found: Record) -> str:
    peak = found["card"]["flops"] / found["card"]["bandwidth"]
    rows = [[label, f"{x:.1f}", f"{min(1, x / peak):.1%}"] for x, label, *_ in intensities(found)]
    return markdown(Table("", ["program", "FLOP per byte", "of the card's FLOP/s at best"], rows))


def _forward_table(records: list[Record]) -> str:
    rows = []
    for tokens in sorted({one["tokens"] for one in records}):
        by_name = {one["program"]: one for one in records if one["tokens"] == tokens}
        cells = [_mib(by_name[name]["moved"]) if name in by_name else "" for name in LABELS]
        temporary = [_mib(by_name[name]["temporaries"]) for name in ("naive", "loop")]
        rows.append([f"{tokens:,}", *cells, _mib(floor_bytes(tokens)), *temporary])
    columns = [
        "N",
        "moved, MiB: naive",
        "loop",
        "flash, 64",
        "flash, 128",
        "once each",
        "temporaries, MiB: naive",
        "loop",
    ]
    return markdown(Table("", columns, rows))


def _backward_table(records: list[Record]) -> str:
    rows = []
    for tokens in sorted({one["tokens"] for one in records}):
        naive, loop = (
            next(one for one in records if (one["program"], one["tokens"]) == (name, tokens))
            for name in ("naive", "loop")
        )
        rows.append([f"{tokens:,}", *(_mib(one[key]) for key in ("temporaries", "moved") for one in (naive, loop))])
    return markdown(Table("", ["N", "temporaries, MiB: naive", "loop", "moved, MiB: naive", "loop"], rows))


def _decode_table(found: Record) -> str:
    rows = []
    for codec in FORMATS:
        one = [one for one in found["decode"] if one["codec"] == codec][-1]
        element = (one["per_slot"] - 4) / (2 * H)
        rows.append([
            codec, f"{one['per_slot']}", f"{8 * element:.2f}", f"{found['card']['instructions_per_byte'] * element:.1f}",
            f"{one['own'] / one['floor']:.3f}", f"{one['moved'] / one['floor']:.3f}", f"{one['xla']['moved'] / one['floor']:.2f}",
            bytes_label(one["xla"]["temporaries"]),
        ])  # fmt: skip
    columns = [
        "format",
        "bytes per slot",
        "bits per number",
        "instructions per number",
        "our kernel / floor",
        "with the merge",
        "XLA / floor",
        "XLA's temporaries",
    ]
    return markdown(Table("", columns, rows))


def _stamp(found: Record) -> str:
    return f"One head {H} wide, bf16; {found['card']['name']}, compiled for and not run; jax {found['versions']['jax']}, commit {found['commit']}."
