"""Each method beside kvpress' version of it: the same weights, the same text, as many tokens kept of a prompt, and what follows scored by both."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import CacheSpec, parse
from kvcascade.cache.tier import Tier
from kvcascade.eval import stats
from kvcascade.eval.measure import Job
from kvcascade.eval.quality import evaluation
from kvcascade.eval.quality.evaluation import Protocol
from kvcascade.eval.quality.windows import Windows
from kvcascade.eval.records import Parity, commits
from kvcascade.eval.speed.peers import Peer, PeerFailed
from kvcascade.eval.table import CACHE, Column, Table
from kvcascade.eval.table import markdown as markdown_of
from kvcascade.kernels.files import source_key
from kvcascade.model.pretrained import Model

WINDOW, CHUNK = 64, 20
"""kvpress' defaults: queries that SnapKV observes, and positions of one of ChunkKV's chunks."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A method in both libraries."""

    name: str
    tiers: Callable[[int, int], str]
    """Ours that keeps so many tokens of a prompt of so many."""
    press: str
    why: str = ""
    """Where the two differ, which is found in kvpress' source, and where that differs from the paper."""


def _chunks(kept: int, prefix: int) -> str:
    """As many tokens as kvpress keeps: whole chunks, of which the prompt's last, shorter one is one."""
    count = max(1, -(-prefix // CHUNK) * kept // prefix)
    tokens = count * CHUNK - -prefix % CHUNK
    return f"recent {WINDOW} | chunks[window={WINDOW}] {tokens - WINDOW}"


NEWEST = "†"
FOOTNOTE = "†: one token a head at most, since our last tier never refuses the prompt's newest, which kvpress lets go where it ranks low"
METHODS = {
    each.name: each
    for each in (
        Method("full", lambda n, of: "full", ""),
        Method(
            "random", lambda n, of: f"random {n}", "RandomPress()",
            "other lots; with a seed kvpress would draw the same in every layer",
        ),
        Method(
            "StreamingLLM", lambda n, of: f"sink 4 | recent {n - 4}", "StreamingLLMPress()",
            "the same tokens; neither counts positions within the cache, as the paper does",
        ),
        Method(
            "Knorm", lambda n, of: f"key-norm {n}", "KnormPress()",
            f"{NEWEST}; in the first layer equal tokens have keys of equal norms, and either stays",
        ),
        Method("KeyDiff", lambda n, of: f"keydiff {n}", "KeyDiffPress()", f"{NEWEST}; the paper prunes in blocks of 128, both do it once here"),
        Method(
            "TOVA", lambda n, of: f"tova[together=true] {n}", "TOVAPress()",
            "the same tokens; the newest stays in both, which the paper does not ask for",
        ),
        Method("SnapKV", lambda n, of: f"snap[window=64] {n}", "SnapKVPress()", "the same tokens"),
        Method(
            "observed attention", lambda n, of: f"observed {n}", "ObservedAttentionPress()",
            f"{NEWEST}; H2O, to which kvpress relates it, takes the sum and not the mean",
        ),
        Method("Expected Attention", lambda n, of: f"expected[covariance=true] {n}", "ExpectedAttentionPress()", NEWEST),
        Method(
            "CriticalKV", lambda n, of: f"snap[window=64] {n // 2} | critical[window=64] {n - n // 2}", "CriticalKVPress(SnapKVPress())",
            "kvpress adds 10⁻⁴ to the mean attention of a group's heads, we to their sum",
        ),
        Method(
            "ChunkKV", _chunks, "ChunkKVPress(SnapKVPress())",
            "kvpress pools SnapKV's attention over 5 neighbours, across the ends of chunks, before it takes their means; we do not",
        ),
        Method(
            "LagKV", lambda n, of: f"lag[size=32] {n}", "LagKVPress(lag_size=32)",
            "ranks of different segments tie, of which we keep the newest, kvpress any; the paper keeps as many of each segment",
        ),
        Method(
            "leverage", lambda n, of: f"leverage {n}", "LeverageScorePress()",
            f"another Gaussian sketch: kvpress draws one for each head and prompt, we one for all; {NEWEST}",
        ),
        Method(
            "non-causal attention", lambda n, of: f"non-causal {n}", "NonCausalAttnPress()",
            f"kvpress lets the padding of its last block take part: it masks with -10⁻⁹, which is a logit of nothing; {NEWEST}",
        ),
        Method(
            "Compactor", lambda n, of: f"recent 4 | compactor[blending={1 - n / of}] {n - 4}", "CompactorPress()",
            "as leverage and non-causal attention; kvpress leaves the last four tokens out of both, and standardises over all heads together, we by head; "
            "both blend by the share that goes, where the paper calibrates",
        ),
        Method(
            "CurDKV", lambda n, of: f"sink 4 | curdkv {n - 4}", "CURPress()",
            f"{NEWEST}; in both, norms in stretches of 16 stand for the paper's leverage",
        ),
        Method(
            "CapKV", lambda n, of: f"capkv {n}", "CapPress()",
            f"{NEWEST}; in both, cosines stand for the paper's products, and the mean query is turned to what comes",
        ),
    )
}  # fmt: skip
"""By their names. Of kvpress 0.5.5 those are left out that ours has nothing for (AdaKV's budgets per head, PyramidKV's per layer, …), and KVzip,
which asks in words."""


def spec(method: Method, kept: int, prefix: int, context: int) -> CacheSpec:
    """The cache that keeps so many tokens of a prompt and all that follow it, in float32 as kvpress does."""
    text = method.tiers(kept, prefix)
    exact = " | ".join(f"{tier}@f32" for tier in text.split(" | "))
    return parse(exact if text == "full" else f"{exact} then recent {context - prefix}@f32")


def behind(cache: CacheSpec) -> Sequence[Tier]:
    """The tiers that a prompt enters."""
    cascade = cache.parts[0].cascade
    return cascade.tiers[cascade.front :]


def check(kept: Sequence[int], prefix: int, context: int) -> None:
    """BadInput where the two could not be compared."""
    if not prefix < context - 1:
        raise BadInput(f"a prefix of {prefix} tokens leaves fewer than two to score in a context of {context}")
    for each in kept:
        least = WINDOW + CHUNK
        if not least <= each < prefix:
            raise BadInput(
                f"{each} tokens kept of {prefix}: some methods need at least {least}, and all fewer than there are"
            )


def jobs(
    model: Model, cases: Sequence[tuple[Method, int]], windows: Windows, prefix: int, batch: int, peer: Peer
) -> list[Job[Parity]]:
    """Both libraries' scores of the same windows by each method with so many tokens kept. BadInput if kvpress cannot do it, when they run."""
    context = windows.rows_BT.shape[1]

    @functools.cache  # the prompts are read once for all methods
    def theirs() -> list[list[list]]:
        presses = [(method.press, kept) for method, kept in cases]
        try:
            return [peer.scored(presses, row, prefix, seed) for seed, row in enumerate(windows.rows_BT.tolist())]
        except PeerFailed as failed:
            raise BadInput(f"kvpress: {failed}") from None

    def one(index: int, method: Method, kept: int) -> Job[Parity]:
        cache = spec(method, kept, prefix, context)
        about = {
            "kind": "parity", "model": model.name, "weights_key": model.fingerprint, "method": method.name, "cache": str(cache), "press": method.press,
            "peer": peer.about()["peer"], "peer_code": source_key("eval/speed"), "asked": kept, "data": windows.data, "text": windows.text,
            "rows": windows.key, "windows": windows.how, "windows_seed": windows.seed, "bos": windows.bos, "context": context, "prefix": prefix,
            "sequences": len(windows.rows_BT), "batch": batch,
        }  # fmt: skip

        def run() -> list[Parity]:
            nll, held = zip(*(row[index] for row in theirs()), strict=True)
            ours = evaluation.evaluate(model, cache, windows, Protocol(batch, prefix))
            found = {
                "kept": min(prefix, sum(tier.slots(context) for tier in behind(cache))), "peer_kept": float(np.mean(held)),
                "peer_nll": float(np.mean(nll)), "peer_nll_windows": [round(each, 8) for each in nll],
            }  # fmt: skip
            return [Parity(**about | ours | found)]

        return Job(about, "eval/quality", run, f"{method.name}, {kept} of {prefix} tokens")

    return [one(index, *case) for index, case in enumerate(cases)]


def change(record: Parity) -> str:
    """How much higher our mean nats per token are than kvpress', in per cent, with a paired 95 % interval over windows."""
    difference = np.subtract(record.nll_windows, record.peer_nll_windows)
    low, high = stats.interval(difference, record.document_windows)
    return f"{difference.mean() / record.peer_nll:+.2%} ({low / record.peer_nll:+.2%} … {high / record.peer_nll:+.2%})"


def table(found: Sequence[Parity]) -> Table:
    """A row for each method and number of tokens, and why the two differ."""
    counts = lambda r: f"{r.kept}" if r.kept == r.peer_kept else f"{r.kept}, {r.peer_kept:g}"
    columns = [
        CACHE._replace(value=lambda r: str(r.cache).replace("@f32", "").split(" then ")[0]), Column("kvpress", lambda r: r.press or "no press"),
        Column("kept", counts), Column("NLL", "nll", "{:.4f}"), Column("kvpress' NLL", "peer_nll", "{:.4f}"), Column("Δ (95 %)", change),
        Column("why", lambda r: METHODS[r.method].why if r.method in METHODS else ""),
    ]  # fmt: skip
    first = found[0]
    title = (
        f"{first.name}, {first.sequences} windows of {first.context} tokens of {first.data.removeprefix('file:')}, spread over {first.documents} documents: "
        f"{first.prefix} tokens enter at once and are pruned to so many per head, the {first.context - first.prefix} after them are all kept and scored; "
        f"everything in float32; {first.peer}. {FOOTNOTE}"
    )
    return Table.of(title, columns, found)


def markdown(found: Sequence[Parity]) -> str:
    """The table for the documentation, and what it was measured on."""
    shown = table(found)
    return f"{markdown_of(shown.code)}\n\n{shown.title}. {found[0].device}, measured at {commits(found)}."
