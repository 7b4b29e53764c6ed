"""What caches cost, on the page and in the README: users that fit, memory until it broke, milliseconds and where they go."""

from collections.abc import Sequence
from typing import Any

import markupsafe

from kvcascade.eval.memory import crash, fit, prompt
from kvcascade.eval.quality import evaluation, retrieval, weights
from kvcascade.eval.records import (
    Bench,
    BenchRow,
    Crash,
    Distilled,
    Evaluation,
    Fit,
    FitTask,
    Profile,
    Prompting,
    Quantization,
    Record,
    Retrieval,
    Served,
    Speculated,
    Stream,
    commits,
    grouped,
    of,
)
from kvcascade.eval.report import figures
from kvcascade.eval.speed import bench, profile_report, serving, speculation, stream
from kvcascade.eval.table import CACHE, Column, Table, brief, markdown

_svg = markupsafe.Markup


def sections(found: list[Record]) -> dict:
    """The page's sections by their names in the template; one without records is empty."""
    streams, crashes = of(found, Stream), of(found, Crash)
    return {
        "speed": [_speed(mine) for mine in grouped(of(found, BenchRow), lambda r: r.model)],
        "streams": streams and {"figure": _svg(figures.stream(streams)), "table": stream.table(streams)},
        "served": [
            {"figure": _svg(figures.first_tokens(mine)), "table": serving.table(mine)}
            for mine in grouped(of(found, Served), lambda r: r.case)
        ],
        "fits": _fits(of(found, FitTask)),
        "crash": crashes
        and {
            "figure": _svg(figures.peak_memory(crashes)),
            "table": crash.table(crashes),
            "sentences": crash.sentences(crashes),
            "limit": f"{crashes[0].limit / 1e9:g} GB",
        },
        "prompts": [
            {"table": prompt.table(mine, of(found, Evaluation))}
            for mine in grouped(of(found, Prompting), lambda r: r.same_prompt)
        ],
        "weights": _weights(found),
        "profiles": [_profile(mine) for mine in grouped(of(found, Profile), lambda r: r.case)],
    }


def _weights(found: list[Record]) -> list[dict]:
    """A table for each model and text that was rounded."""
    measured = [r for r in found if isinstance(r, Quantization | Evaluation)]
    alike = grouped(measured, lambda r: (r.model, r.data, r.context, r.sequences))
    return [{"table": weights.table(mine)} for mine in alike if of(mine, Quantization)]


def _speed(benches: list[BenchRow]) -> dict:
    best = bench.headline(benches)
    return {"best": best if best.rows else None, "table": bench.table(benches), "notes": bench.notes(benches)}


def _profile(profiles: list[Profile]) -> dict:
    each = [
        {"table": profile_report.table(r), "cache": r.cache, "lines": profile_report.sentences(r)} for r in profiles
    ]
    step, memory = _svg(figures.step_shares(profiles)), _svg(figures.growth(profiles))
    return {"table": profile_report.summary(profiles), "step": step, "memory": memory, "each": each}


def _fits(fits: list[FitTask]) -> list[dict]:
    """A figure, a table and notes for each model and card."""
    found = []
    for mine in grouped(fits, lambda r: (r.model, r.gpu)):
        drawn = of(mine, Fit)
        figure = _svg(figures.users(drawn)) if drawn else ""
        found.append({"figure": figure, "table": fit.table(mine), "notes": fit.notes(mine)})
    return found


def readme_tables(found: dict[str, list[Record]]) -> dict[str, str]:
    """The README's tables of costs, each with its protocol, by the names of their files of records."""
    benches, streams, crashes = of(found["speed"], BenchRow), of(found["stream"], Stream), of(found["crash"], Crash)
    rounded = [r for r in found["weights"] if isinstance(r, Quantization | Evaluation)]
    speed, decoded, users = bench.table(benches), stream.table(streams), crash.table(crashes)
    first, prompts = crashes[0], of(found["prompt"], Prompting)
    protocol = (
        f"{users.title}. Each size is a process that holds a cache for so many users, every byte of it written, and decodes {first.steps} tokens of each: "
        f"*users* lived, *died at* was killed, at most {first.resolution:.1%} apart. *MB a user* is the slope between the peaks of one user and of all, "
        f"*predicted* a row's cache by its spec and its share of a step's workspace by the compiled program. "
        f"{_stamp(crashes)}."
    )
    return {
        "speed": f"{markdown(bench.headline(benches))}\n\n{markdown(speed.code)}\n\n{speed.title}; {_stamp(benches)}.",
        "stream": f"{markdown(decoded.code)}\n\n{decoded.title}; {_stamp(streams)}.",
        "heads": _beside_whole(of(found["heads"], Bench)),
        "bits": _beside_whole(of(found["bits"], Bench)),
        "serving": _served_text(of(found["serving"], Served)),
        "users": _users_text(found["users"]),
        "many": _users_sentence(found["users"]),
        "speculation": _speculated_text(found["speculation"]),
        "fit": _fits_text(of(found["fit"], FitTask)),
        "crash": f"{markdown(users.code)}\n\n{protocol}",
        "peak": prompt.sentence(prompts, of(found["prompt"], Evaluation)),
        "prompt": _prompts_text(prompts, of(found["prompt"], Evaluation)),
        "weights": f"{markdown(weights.table(rounded))}\n\n{weights.protocol(rounded)}; {_stamp(rounded)}.",
    }


def _beside_whole(found: list[Bench]) -> str:
    """Caches beside the whole one: a table for each model and size, ours over our full cache, a library's over the first that is there of it."""
    parts = []
    for mine in grouped(found, lambda r: (r.model, r.batch, r.context)):
        whole = lambda r, mine=mine: next(each for each in mine if bool(each.library) == bool(r.library))
        columns = [
            CACHE, Column("weights", "weights"), Column("KV, MB a row", lambda r: r.kv_bytes / 1e6, "{:.2f}"),
            Column("bytes of the whole", lambda r, whole=whole: r.kv_bytes / whole(r).kv_bytes, "{:.1%}"),
            Column("ms a step, loop", "step_ms", "{:.1f}"), Column("alone", "alone", "{:.1f}"),
            Column("of the whole, loop", lambda r, whole=whole: r.step_ms / whole(r).step_ms, "{:.2f}"),
            Column("alone", lambda r, whole=whole: r.alone / whole(r).alone, "{:.2f}"),
        ]  # fmt: skip
        first = mine[0]
        said = f"{first.model}, {first.batch} × {first.context:,}, {first.steps} steps × {first.repeats} rounds, all in turns"
        parts += [markdown(Table.of("", columns, mine).code), f"{said}; {_stamp(mine)}."]
    return "\n\n".join(parts)


def _speculated_text(found: list[Record]) -> str:
    """What it gains to foresee tokens, of each cache, and how the small models were trained that foresaw them."""
    measured = of(found, Speculated)
    tables = [speculation.table(mine) for mine in grouped(measured, lambda r: (r.model, r.weights, r.cache))]
    trained = [
        f"The draft, of {r.parameters / 1e6:.1f} million parameters in {r.layers} layers {r.width} wide, learned in {r.steps:,} steps of {r.batch} from "
        f"{r.texts - r.held_out} texts of {r.length} tokens that {r.model} in {r.weights} wrote, {(r.seconds or 0) / 60:.0f} minutes with the writing; in "
        f"{r.held_out} others it is {r.divergence:.2f} nats from the model, holds the same token for likeliest in {r.alike:.0%} of the places, and at "
        f"temperature 1 can agree in {r.accepted:.0%} of the draws ({r.device})."
        for r in of(found, Distilled)
    ]
    parts = [f"{each.title}:\n\n{markdown(each.code)}" for each in tables]
    for mine in grouped(of(found, Served), lambda r: r.case):
        columns = [
            Column("way", "way"), CACHE, Column("KV, MB", lambda r: r.kv_bytes / 1e6, "{:.0f}"), Column("users at once", "users"),
            Column("tok/s", "tokens_per_second", "{:.0f}"), Column("ms per token (50 %)", lambda r: r.per_token_ms[10], "{:.0f}"),
            Column("accepted, by place", lambda r: ", ".join(f"{each:,}" for each in r.accepted or ()) or None), Column("steps", "steps", "{:,}"),
        ]  # fmt: skip
        one = mine[0]
        about = f"{one.name} in {one.weights}, {one.requests} requests of {one.trace}"
        parts.append(f"{about}:\n\n{markdown(Table.of('', columns, mine).coded('cache'))}")
    return "\n\n".join([*parts, *trained, f"{_stamp(found)}."])


def _kept(record: Any) -> str:
    """A cache, wherever its tokens lie."""
    return record.cache.replace(" on blocks", "")


def _lost(found: list[Record]) -> list[Column]:
    """What each cache loses, and still answers."""
    scored, asked = of(found, Evaluation), of(found, Retrieval)
    scores, change, length = {r.cache: r for r in scored}, evaluation.change(scored), asked[0].length
    return [
        Column("PPL", lambda r: evaluation.PPL.cell(scores[_kept(r)])),
        change._replace(value=lambda r: change.cell(scores[_kept(r)])),
        Column("answered", lambda r: f"{retrieval.average(asked, _kept(r), length)}"),
    ]


def _users_sentence(found: list[Record]) -> str:
    """Users that are served at once in as much memory as the first way to serve them takes, and what they get."""
    served = of(found, Served)
    first, (ppl, change, answered) = served[0], _lost(found)
    alike = [r for r in served if abs((r.kv_bytes or 0) / (first.kv_bytes or 1) - 1) < 0.1]
    lost = lambda r: f"{ppl.cell(r)} ({change.cell(r)})" if change.cell(r) else ppl.cell(r)
    each = "; ".join(
        f"`{brief(r.cache)}` {r.users} users, {r.tokens_per_second:.0f} tokens/s, perplexity {lost(r)}, {answered.cell(r).split(' ')[0]} answered"
        for r in alike
    )
    return (
        f"[Users in the same memory](docs/serving.md#users-in-the-same-memory), {(first.kv_bytes or 0) / 1e6:.0f} MB of keys and values for {first.name}, "
        f"{first.requests} requests of {first.prompt_tokens // first.requests:,} tokens that are answered by {first.output_tokens // first.requests:,}: {each}."
    )


def _users_text(found: list[Record]) -> str:
    """What a trace comes to behind caches of as much memory, and of as many rows; what each loses, and still answers."""
    served, scored, asked = of(found, Served), of(found, Evaluation), of(found, Retrieval)
    first, one, length, lost = served[0], scored[0], asked[0].length, _lost(found)
    pair = lambda values: f"{values[10]:,.0f}, {values[19]:,.0f}"
    columns = [
        CACHE, Column("KV, MB", lambda r: r.kv_bytes / 1e6, "{:.0f}"), Column("rows at most", "rows"), Column("users at once", "users"),
        Column("tok/s", "tokens_per_second", "{:.0f}"), Column("first token, ms (50, 95 %)", lambda r: pair(r.first_ms)),
        Column("ms per token (50, 95 %)", lambda r: pair(r.per_token_ms)), *lost,
    ]  # fmt: skip
    others = [r for r in scored if r.cache not in {*map(_kept, served)}]
    beside = Table.of("", [CACHE, *lost], others)
    return "\n\n".join(
        [
            f"{first.name} in {first.weights}, {first.requests} requests of the trace `{first.trace}`, {first.prompt_tokens:,} tokens of prompts and "
            f"{first.output_tokens:,} generated, each way by itself:",
            markdown(Table.of("", columns, served).code),
            "With what random eviction leaves, in as many bytes as the bounded one:",
            markdown(beside.code),
            f"PPL: {evaluation.protocol(one)}; answered: {', '.join(dict.fromkeys(r.task for r in asked))} in {length} tokens. {_stamp(found)}.",
        ]
    )


def _served_text(found: list[Served]) -> str:
    """A table for each trace."""
    parts = []
    for mine in grouped(found, lambda r: r.case):
        made = serving.table(mine)
        parts += [f"{made.title}:", markdown(made), f"{_stamp(mine)}, {mine[0].given['threads']} threads."]
    return "\n\n".join(parts)


def _prompts_text(prompts: list[Prompting], scored: list[Evaluation]) -> str:
    """The table of prompts and its protocol."""
    taken = prompt.table(prompts, scored)
    about = (
        "*Temporaries*: what the compiled program takes beside its arguments, by XLA's analysis, activations included; *both*: with the cache; "
        "*process grew by*: the peak of a process that did nothing else, beyond weights and what was there before. Shares are of the first row."
    )
    windows = [each for each in scored if each.given.get("prefix")]
    if windows:
        one = windows[0]
        about += (
            f" *PPL after it*: of the {one.context - one.given['prefix']} tokens after a prompt of {one.given['prefix']:,}, {one.sequences} windows of "
            f"{one.data.rsplit('/', 1)[-1]}; beside it random eviction, "
            + ", ".join(
                f"`{r.cache}` {r.ppl:,.2f} {'in parts' if r.given['chunk'] else 'at once'}"
                for r in windows
                if r.cache.startswith("random ")
            )
            + "."
        )
    return f"{markdown(taken.code)}\n\n{taken.title}. {about} {_stamp(prompts)}."


def _fits_text(fits: list[FitTask]) -> str:
    """For each model and card a table, with what has to be said of them and the versions that say so."""
    parts = []
    for each in _fits(fits):
        title = each["table"].title
        parts += [f"{title[0].upper()}{title[1:]}:", markdown(each["table"].code), *each["notes"]]
    versions = ", ".join(f"{name} {version}" for name, version in fits[0].versions.items())
    return "\n\n".join([*parts, f"Commit {fits[0].commit}; {versions}."])


def _stamp(found: Sequence[Record]) -> str:
    """The device and the commits of records."""
    several = "s" if len({each.commit for each in found}) > 1 else ""
    return f"{found[0].device}, commit{several} {commits(found)}"
