"""The measurement of a cache on a text: perplexity, bytes and fidelity as one record, and records against one another."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kvcascade.cache.policies import Random
from kvcascade.cache.spec import CacheSpec, parse
from kvcascade.cache.tier import Tier
from kvcascade.eval import stats
from kvcascade.eval.measure import Job
from kvcascade.eval.memory.arithmetic import full_bytes
from kvcascade.eval.quality import perplexity
from kvcascade.eval.quality.windows import Windows
from kvcascade.eval.records import Compared, Evaluation, baseline
from kvcascade.eval.table import CACHE, KV_BYTES, SAVED, Column, Table
from kvcascade.model.pretrained import Model
from kvcascade.model.tokenizer import token_bytes

DRAWS = 4
"""Seeds of a random eviction, one batch of windows each in turn, so that an interval over windows has the spread between them in it."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How windows are scored, besides by which cache."""

    batch: int = 8
    prefix: int = 0
    """Tokens that enter in one prefill and are not scored."""
    chunk: int = 0
    """Tokens of the prefix that enter at once; 0: all."""
    fidelity: bool = False
    """Whether each distribution is compared with the full cache's."""


def job(model: Model, spec: CacheSpec, windows: Windows, protocol: Protocol, known: Evaluation | None = None) -> Job:
    """The measurement of one cache; what an earlier record of the first of these windows says is not measured again."""
    about = {
        "kind": "evaluate", "model": model.name, "weights": model.config.weights, "weights_key": model.fingerprint, "cache": str(spec),
        "data": windows.data, "text": windows.text, "rows": windows.key, "windows": windows.how, "windows_seed": windows.seed,
        "context": windows.rows_BT.shape[1], "sequences": len(windows.rows_BT), "bos": windows.bos, "batch": min(protocol.batch, len(windows.rows_BT)),
        "prefix": protocol.prefix, "chunk": protocol.chunk, "fidelity": protocol.fidelity, "seed": model.seed,
    } | spec.content  # fmt: skip
    kind = Compared if protocol.fidelity else Evaluation
    measured = lambda: [kind(**about | evaluate(model, spec, windows, protocol, known))]
    return Job(about, "eval/quality", measured, f"{model.name}: {spec}")


def evaluate(
    model: Model, spec: CacheSpec, windows: Windows, protocol: Protocol, known: Evaluation | None = None
) -> dict[str, Any]:
    """What is found of one cache on some windows, all of it from figures per window, so that it can be added to."""
    config, context = model.config, windows.rows_BT.shape[1]
    done = len(known.nll_windows) if known else 0
    speed, per_window = _scored(model, spec, windows.rows_BT[done:], done, protocol)
    if known:
        per_window = {name: [*getattr(known, name), *new] for name, new in per_window.items()}
    first = max(protocol.prefix, 1)
    tokens = len(windows.rows_BT) * (context - first)
    nll = float(np.mean(per_window["nll_windows"]))
    error = stats.standard_error(per_window["nll_windows"], windows.documents_B)
    size = int(token_bytes(model.encoding)[windows.rows_BT[:, first:]].sum())
    full = full_bytes(config, context)
    found = {
        "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)),
        "documents": len(np.unique(windows.documents_B)),
        "document_windows": windows.documents_B.tolist(),
        "draws": len(_draws(spec, protocol.batch, len(windows.rows_BT))),
        "tokens": tokens,
        "nll": nll,
        "nll_stderr": None if math.isnan(error) else error,
        "ppl": math.exp(nll) if nll < 700 else math.inf,
        "bits_per_byte": nll * tokens / math.log(2) / size,
        "kv_bytes": speed.kv_bytes,
        "kv_bytes_predicted": spec.nbytes(config.layer_heads, context),
        "kv_bytes_full": full,
        "compression": 1 - speed.kv_bytes / full,
        "kept": spec.slots(config.layer_heads, context),
        "tokens_per_second": round(speed.tokens_per_second, 1),
        "traces": speed.traces,
        "compile_seconds": round(speed.compile_seconds, 2),
    } | per_window
    if protocol.fidelity:
        found |= {name: float(np.mean(per_window[f"{name}_windows"])) for name in ("kl", "same_top")}
    return found


def _scored(
    model: Model, spec: CacheSpec, rows, before: int, protocol: Protocol
) -> tuple[perplexity.Scores, dict[str, list[float]]]:
    """The scores that tell bytes and speed, and figures per window; `before` rows went through earlier."""
    batch = protocol.batch
    exact = parse("full")
    other = exact if protocol.fidelity and spec != exact else None
    score = lambda spec, rows, other=None: perplexity.score(
        model.config, model.params, spec, rows, batch, protocol.prefix, other, protocol.chunk
    )
    drawn = _draws(spec, batch, before + len(rows))
    names = ("nll_windows", *(("kl_windows", "same_top_windows") if protocol.fidelity else ()))
    found = {name: np.zeros(len(rows)) for name in names}
    speed = None
    for index, each in enumerate(drawn):
        mine = (np.arange(before, before + len(rows)) // batch % len(drawn)) == index
        if not mine.any():
            continue
        scores = score(each, rows[mine], other)
        speed = speed or scores
        found["nll_windows"][mine] = scores.nll_BT.mean(-1)
        if scores.kl_BT is not None and scores.same_BT is not None:
            found["kl_windows"][mine], found["same_top_windows"][mine] = scores.kl_BT.mean(-1), scores.same_BT.mean(-1)
        elif protocol.fidelity:
            found["same_top_windows"][mine] = 1.0
    assert speed is not None
    if other is not None:
        speed = score(drawn[0], rows[:batch])  # the cache alone
    return speed, {name: np.round(values, 8).tolist() for name, values in found.items()}


def _draws(spec: CacheSpec, batch: int, windows: int) -> list[CacheSpec]:
    """A spec's random evictions by other seeds, as many as there are batches, at most DRAWS; the spec alone where nothing is random."""
    if not any(isinstance(tier.policy, Random) for cascade in spec.cascades for tier in cascade.tiers):
        return [spec]
    return [_reseeded(spec, by) for by in range(min(DRAWS, -(-windows // batch)))]


def _reseeded(spec: CacheSpec, by: int) -> CacheSpec:
    def other(tier: Tier) -> Tier:
        policy = tier.policy
        new = dataclasses.replace(policy, seed=policy.seed + by) if isinstance(policy, Random) else policy
        return dataclasses.replace(tier, policy=new)

    return spec.mapped(other)


def paired[T](record: Evaluation, other: Evaluation, of: Callable[..., T] = stats.interval) -> T:
    """What a statistic (by default the 95 % interval) says of the difference in mean nats per token between two records of the same windows.

    Comparing window by window takes out the spread between windows, which is far larger than that between caches. NaN for other windows.
    """
    if record.scored != other.scored:
        return of([math.nan])
    return of(np.subtract(record.nll_windows, other.nll_windows), record.document_windows)


def changes(found: list[Evaluation]) -> list[str]:
    """Δ PPL of each record against its full cache with a 95 % interval; `≈` before one that is not decided, all of them taken together."""
    others = [baseline(r, found) for r in found]
    decided = stats.decided(
        [
            math.nan if other is None or other is r else paired(r, other, stats.p_value)
            for r, other in zip(found, others, strict=True)
        ]
    )
    cells = []
    for r, other, sure in zip(found, others, decided, strict=True):
        cells.append("" if other is None or other is r else f"{'' if sure else '≈ '}{against(r, other)}")
    return cells


def against(record: Evaluation, other: Evaluation) -> str:
    """Δ PPL between two records of the same windows, of one model or of two, with a 95 % interval; nothing for one against itself."""
    if other is record:
        return ""
    low, high = (math.expm1(x) for x in paired(record, other))
    return f"{record.ppl / other.ppl - 1:+.2%} ({low:+.2%} … {high:+.2%})"


def width(found: list[Evaluation]) -> float:
    """The widest interval, as a share of the perplexity: of the change against the full cache, and where there is none of a record's own."""
    widths = []
    for r in found:
        other = baseline(r, found)
        alone = other is None or other is r and len(found) == 1
        low, high = stats.interval(r.nll_windows, r.document_windows) if alone else paired(r, other or r)
        widths.append(math.expm1(high - low))
    return max(widths)


def protocol(first: Evaluation) -> str:
    """In a sentence on what text a record's cache was scored, and how."""
    how = {"spread": f", spread over {first.documents} documents", "first": ", the first ones"}
    bos = ", with BOS" if first.bos else ", without BOS"
    chosen = how.get(first.windows or "first", "")
    return f"{first.sequences} windows of {first.context} tokens of {first.data.removeprefix('file:')}{chosen}{bos}"


KEPT = Column("kept", "kept")
PPL = Column("PPL", "ppl", "{:.3f}")
BITS = Column("bits/byte", "bits_per_byte", "{:.4f}")
SPEED = Column("tokens/s", "tokens_per_second", "{:,.0f}")


def change(found: list[Evaluation]) -> Column:
    """The column of `changes`."""
    cells = dict(zip(map(id, found), changes(found), strict=True))
    return Column("Δ PPL (95 %)", lambda r: cells[id(r)])


def fidelity(kl: str = "{:.5f}") -> list[Column]:
    """How far the next-token distributions are from the full cache's."""
    return [Column("KL, nats", "kl", kl), Column("same top-1", "same_top", "{:.1%}")]


def table(found: list[Evaluation]) -> Table:
    """Evaluations of one model on one text, each against the full cache if it is among them."""
    columns = [CACHE, KEPT, PPL, change(found), BITS, KV_BYTES, SAVED, SPEED, Column("traces", "traces")]
    columns += fidelity() if isinstance(found[0], Compared) else []
    return Table.of(f"{found[0].model}: {protocol(found[0])}", columns, found)
