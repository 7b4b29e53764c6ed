"""What caches cost, on the page and in the README: users that fit, memory until it broke, milliseconds and where they go."""

import markupsafe

from kvcascade.eval.memory import crash, fit
from kvcascade.eval.quality import weights
from kvcascade.eval.records import Record, markdown, of_kind
from kvcascade.eval.report import figures
from kvcascade.eval.speed import bench, profile_report, stream


def sections(records: list[Record]) -> dict:
    """The page's sections by their names in the template; one without records is empty."""
    benches, fits, crashes, streams = (of_kind(records, kind) for kind in ("bench", "fit", "crash", "stream"))
    return {
        "speed": [
            _speed([r for r in benches if r["model"] == name]) for name in dict.fromkeys(r["model"] for r in benches)
        ],
        "streams": streams and {"figure": _svg(figures.stream(streams)), "table": stream.table(streams)[1:]},
        "fits": _fits(fits),
        "crash": crashes
        and {
            "figure": _svg(figures.peak_memory(crashes)),
            "table": crash.table(crashes)[1:],
            "sentences": crash.sentences(crashes),
            "limit": f"{crashes[0]['limit'] / 1e9:g} GB",
        },
        "weights": _weights(records),
        "profiles": [_profile(mine) for mine in profile_report.groups(of_kind(records, "profile"))],
    }


_svg = markupsafe.Markup


def _weights(records: list[Record]) -> list[dict]:
    """A table for each model and text that was rounded."""
    found = []
    kinds = ("model", "data", "context", "sequences")
    for alike in dict.fromkeys(tuple(r[key] for key in kinds) for r in of_kind(records, "quantize")):
        mine = [r for r in records if r["kind"] in ("quantize", "evaluate") and tuple(r[key] for key in kinds) == alike]
        found.append({"title": weights.protocol(mine), "table": weights.table(mine)})
    return found


def weights_table(records: list[Record]) -> str:
    """The README's weights in fewer bits of one model, and the protocol."""
    return f"{markdown(weights.table(records))}\n\n{weights.protocol(records)}; {_stamp(records)}."


def _speed(benches: list[Record]) -> dict:
    title, columns, rows = bench.table(benches)
    best = bench.headline(benches)
    return {"title": title, "best": best if best[1] else None, "table": (columns, rows)}


def _profile(profiles: list[Record]) -> dict:
    title, *summary = profile_report.summary(profiles)
    each = [
        {"table": profile_report.table(r)[1:], "cache": r["cache"], "lines": profile_report.sentences(r)}
        for r in profiles
    ]
    grown = _svg(figures.growth([r["growth"] for r in profiles]))
    return {
        "title": title,
        "table": summary,
        "step": _svg(figures.step_shares(profiles)),
        "memory": grown,
        "each": each,
    }


def _fits(fits: list[Record]) -> list[dict]:
    """A figure, a table and notes for each model and card."""
    found = []
    for model, gpu in dict.fromkeys((r["model"], r["gpu"]) for r in fits):
        mine = [r for r in fits if (r["model"], r["gpu"]) == (model, gpu)]
        title, columns, rows = fit.table(mine)
        drawn = [r for r in mine if "failed" not in r]
        figure = _svg(figures.users(drawn, [*map(fit.filled, drawn)])) if drawn else ""
        found.append({"title": title, "figure": figure, "table": (columns, rows), "notes": fit.notes(mine)})
    return found


def speed_table(records: list[Record]) -> str:
    """The README's prefill and decode speed of one model, and the protocol."""
    found = of_kind(records, "bench")
    title, columns, rows = bench.table(found)
    return f"{markdown(bench.headline(found))}\n\n{_marked(columns, rows)}\n\n{title}; {_stamp(found)}."


def stream_table(records: list[Record]) -> str:
    """The README's decoding on and on."""
    found = of_kind(records, "stream")
    title, columns, rows = stream.table(found)
    return f"{_marked(columns, rows)}\n\n{title}; {_stamp(found)}."


def fits_table(records: list[Record]) -> str:
    """The README's users that fit, for each model and card a table, with what has to be said of them and the versions that say so."""
    fits, parts = of_kind(records, "fit"), []
    for each in _fits(fits):
        parts.append(
            "\n\n".join([f"{each['title'][0].upper()}{each['title'][1:]}:", _marked(*each["table"]), *each["notes"]])
        )
    versions = ", ".join(f"{name} {version}" for name, version in fits[0]["versions"].items())
    return "\n\n".join([*parts, f"Commit {fits[0]['commit']}; {versions}."])


def crash_table(records: list[Record]) -> str:
    """The README's crash tests, and the protocol."""
    title, columns, rows = crash.table(records)
    first = records[0]
    protocol = (
        f"{title}. Each size is a process that holds a cache for so many users, every byte of it written, and decodes {first['steps']} tokens of each: "
        f"*users* lived, *died at* was killed, at most {first['resolution']:.1%} apart. *MB a user* is the slope between the peaks of one user and of all, "
        f"*predicted* a row's cache by its spec and its share of a step's workspace by the compiled program. {_stamp(records)}."
    )
    return f"{_marked(columns, rows)}\n\n{protocol}"


def _marked(columns: list[str], rows: list[list[str]]) -> str:
    return markdown((columns, [[f"`{cache}`", *cells] for cache, *cells in rows]))


def _stamp(found: list[Record]) -> str:
    return f"{found[0]['device']}, commit {found[0]['commit']}"
