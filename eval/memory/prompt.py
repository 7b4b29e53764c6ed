"""What a prompt takes on its way into a cache: at once, or in parts that each enter before the next is read.

Each case is a process of its own (`prompt_child.py`), whose peak is then the case's.
"""

import math
import sys
from collections.abc import Sequence

import numpy as np

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import CacheSpec
from kvcascade.eval.measure import Job
from kvcascade.eval.memory import limits
from kvcascade.eval.records import Evaluation, Prompting
from kvcascade.eval.speed.peers import Peer, PeerFailed
from kvcascade.eval.table import CACHE, Column, Table
from kvcascade.kernels import processor

PROGRAM = [sys.executable, "-m", "kvcascade.eval.memory.prompt_child"]
SECONDS = 3600.0
"""How long a child may take."""


def job(model: str, spec: CacheSpec, tokens: int, chunk: int, batch: int, weights: str | None) -> Job:
    """The measurement of one cache and chunk; a model is known by its name, since only children load it."""
    about = {
        "kind": "prompt", "model": model, "cache": str(spec), "tokens": tokens, "chunk": chunk, "batch": batch, "asked_weights": weights,
        "processor": processor.name(),
    }  # fmt: skip
    wanted = {"model": model, "cache": str(spec), "tokens": tokens, "chunk": chunk, "batch": batch, "weights": weights}

    def run() -> list[Prompting]:
        ended = limits.run(PROGRAM, wanted, None, None, SECONDS)
        if "bad_input" in ended.said:
            raise BadInput(ended.said["bad_input"])
        if ended.failed:
            raise BadInput(f"{spec}, a prompt of {tokens:,} tokens in parts of {chunk or tokens:,}: {ended.failed}")
        return [Prompting(**{**about, **ended.said})]

    return Job(about, "eval/memory", run, f"{spec} in parts of {chunk or tokens:,}")


def peer_job(peer: Peer, model: str, vocab: int, kept: int, tokens: int) -> Job:
    """The same of another library, which prunes to so many tokens a head, in its own process."""
    press = peer.name.split()[1]
    about = {
        "kind": "prompt",
        "model": model,
        "cache": f"kvpress {press} to {kept}",
        "tokens": tokens,
        "chunk": 0,
        "batch": 1,
        "processor": processor.name(),
    }

    def run() -> list[Prompting]:
        row = np.random.default_rng(0).integers(0, vocab, tokens).tolist()
        try:
            found = peer.grown(kept, row)
            return [Prompting(**about, **found, weights=peer.about()["weights"])]
        except PeerFailed as failed:
            raise BadInput(f"{peer.name}: {failed}") from None
        finally:
            peer.close()

    return Job(about, "eval/memory", run, f"kvpress {press} to {kept}")


def sentence(found: Sequence[Prompting], scored: Sequence[Evaluation]) -> str:
    """What parts save of the cache that keeps a part of the prompt and predicts best what follows; nothing where it was not measured so."""
    ppl = perplexities(scored)
    same = lambda r: (r.cache, r.same_prompt)
    pairs = [(r, one) for r in found for one in found if same(r) == same(one) and r.chunk and not one.chunk]
    pairs = [(parts, whole) for parts, whole in pairs if parts.cache != "full" and parts.working and whole.working]
    if not pairs:
        return ""
    parts, whole = min(pairs, key=lambda pair: ppl.get((pair[0].model, pair[0].cache, pair[0].chunk), math.inf))
    working = lambda r: r.working or math.nan
    told = lambda r: (
        f"{working(r) / 1e6:,.0f} MB of cache and temporaries, and a process that grew by {r.grown / 1e6:,.0f} MB"
    )
    theirs = [each for each in found if each.temporaries is None and each.same_prompt == whole.same_prompt]
    by_kvpress = ""
    if theirs:
        low, high = min(r.grown for r in theirs), max(r.grown for r in theirs)
        names = ", ".join(f"`{r.cache}`" for r in theirs)
        by_kvpress = f" At once by {names}: a process that grew by {low / 1e6:,.0f} to {high / 1e6:,.0f} MB."
    followed = [ppl.get((r.model, r.cache, r.chunk)) for r in (whole, parts)]
    others = {
        each.cache: each
        for each in scored
        if each.cache == "full" or each.cache.startswith("random ") and each.given["chunk"]
    }
    after = ""
    if all(followed):
        beside = ", ".join(f"`{name}` {each.ppl:,.2f}" for name, each in others.items())
        one = next(iter(scored))
        after = (
            f"; perplexity of the {one.tokens // one.sequences} tokens after it {followed[0]:.2f} at once and {followed[1]:.2f} in parts "
            f"({beside}; {one.sequences} windows)"
        )
    return (
        f"A prompt of {whole.tokens:,} tokens on its way into `{whole.cache}` takes {told(whole)}; in parts of {parts.chunk} that each enter before the next "
        f"is read, {told(parts)}: {working(parts) / working(whole):.0%} and {parts.grown / whole.grown:.0%}{after}."
        + by_kvpress
    )


def perplexities(scored: Sequence[Evaluation]) -> dict[tuple[str, str, int], float]:
    """Of what follows a prompt, by model, cache and chunk."""
    return {
        (each.model, each.cache, each.given.get("chunk", 0)): each.ppl for each in scored if each.given.get("prefix")
    }


def table(found: Sequence[Prompting], scored: Sequence[Evaluation] = ()) -> Table:
    """A row for each cache and chunk; shares are of the first one of the same model and prompt whose temporaries are known.

    Where such a cache was evaluated behind a prefix in such parts, the perplexity of what follows stands beside it.
    """
    first = lambda r: next((each for each in found if each.same_prompt == r.same_prompt and each.temporaries), r)
    ppl = perplexities(scored)
    columns = [
        CACHE, Column("model", "model"), Column("tokens", "tokens", "{:,}"), Column("at once", lambda r: r.chunk or r.tokens, "{:,}"),
        Column("KV, MB", lambda r: r.kv_bytes * r.batch / 1e6, "{:.2f}"), Column("temporaries, MB", lambda r: r.temporaries and r.temporaries / 1e6, "{:.1f}"),
        Column("of the first", lambda r: r.temporaries and r.temporaries / first(r).temporaries, "{:.1%}"),
        Column("both, MB", lambda r: r.working and r.working / 1e6, "{:.1f}"),
        Column("of the first", lambda r: r.working and r.working / first(r).working, "{:.1%}"),
        Column("process grew by, MB", lambda r: r.grown / 1e6, "{:.1f}"), Column("of the first", lambda r: r.grown / max(1, first(r).grown), "{:.1%}"),
    ]  # fmt: skip
    if ppl:
        columns.append(Column("PPL after it", lambda r: ppl.get((r.model, r.cache, r.chunk)), "{:.2f}"))
    return Table.of("What a prompt takes on its way into a cache, beside the weights", columns, found)
