"""The best cache of so many bytes for a model and a text: error curves by head, an exact choice, and the true loss of those that look best."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from kvcascade.cache import allocate
from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import CacheSpec
from kvcascade.eval.measure import Job
from kvcascade.eval.memory.arithmetic import full_bytes
from kvcascade.eval.quality import evaluation, retrieval
from kvcascade.eval.quality.evaluation import Protocol
from kvcascade.eval.quality.ranking import spearman
from kvcascade.eval.quality.windows import Windows
from kvcascade.eval.records import Candidate, Curve, Evaluation, Tuned
from kvcascade.eval.search import curves, options
from kvcascade.eval.table import CACHE, KV_BYTES, Column, Table
from kvcascade.model.pretrained import Model

type Objective = Literal["ppl", "kl", "retrieval"]
TRUE: dict[str, str] = {"ppl": "nats a token", "kl": "nats from the full cache", "retrieval": "share not answered"}
"""What the loss of each is."""

CURVES = 4
"""Windows that error curves are of."""
STAGES = (4, 12)
"""Windows of the tuning half that candidates are scored on: all, then the better third of those that are left, and so on."""
BATCH = 16
"""Windows that are scored at once."""
LEFT = 1 / 3
RIVALS = 20
"""Of what is known without a search, those that are scored on the tuning half: of which least is predicted to be lost."""
TASKS = ("single", "passkey")
DEPTHS = (0.25, 0.75)


@dataclasses.dataclass(frozen=True)
class Search:
    """What is asked for."""

    budget: int
    """Bytes of a row."""
    objective: Objective = "ppl"
    slots: bool = True
    """Whether tokens may be let go."""
    bits: bool = True
    """Whether tokens may be stored in less than bf16."""
    calibration: str = ""
    distinct: int = 3
    """Cascades of a layer at most."""


def halves(windows: Windows) -> tuple[Windows, Windows]:
    """The windows of the text's first half, to tune on, and those of the second, held out: no document is in both, unless it is the only one."""
    order = np.argsort(windows.documents_B, kind="stable")
    middle = len(order) // 2
    same = windows.documents_B[order[middle - 1]] == windows.documents_B[order[middle]]
    cut = windows.documents_B[order[middle]]
    left = (
        windows.documents_B < cut
        if same and (windows.documents_B < cut).any()
        else np.isin(np.arange(len(order)), order[:middle])
    )
    pick = lambda chosen: dataclasses.replace(
        windows, rows_BT=windows.rows_BT[chosen], documents_B=windows.documents_B[chosen]
    )
    return pick(left), pick(~left)


def curves_of(
    model: Model, budgets: Sequence[int], search: Search, tuning: Windows
) -> tuple[list[CacheSpec], list[Job[Curve]]]:
    """What each head may get; and the measurements of what it loses by each, and by what is known without a search at these numbers of bytes.

    BadInput where there are too few windows.
    """
    if len(tuning.rows_BT) < STAGES[0]:
        raise BadInput(f"a search needs {STAGES[0]} windows to tune on, and there are {len(tuning.rows_BT)}")
    heads, context = model.config.layer_heads, tuning.rows_BT.shape[1]
    every = options.options(context, search.calibration, search.slots, search.bits)
    known = [spec for budget in budgets for spec in options.rivals(heads, context, budget, search.calibration).values()]
    specs = dict.fromkeys([*every, *known])
    return every, curves.jobs(model, [*specs], tuning.part(0, CURVES))


def jobs(
    model: Model,
    budgets: Sequence[int],
    search: Search,
    tuning: Windows,
    every: Sequence[CacheSpec],
    heard: Sequence[Curve],
    tell: Callable[[str], None] = lambda words: None,
) -> list[Job[Tuned]]:
    """A search for each number of bytes, of some options, by what was measured of each and of what is known."""
    by_text = {each.cache: each for each in heard}
    return [_job(model, dataclasses.replace(search, budget=budget), tuning, every, by_text, tell) for budget in budgets]


def _job(
    model: Model, search: Search, tuning: Windows, every, heard: Mapping[str, Curve], tell: Callable[[str], None]
) -> Job[Tuned]:
    about = {
        "kind": "tune", "model": model.name, "weights": model.config.weights, "weights_key": model.fingerprint,
        "data": tuning.data, "text": tuning.text, "rows": tuning.key, "context": tuning.rows_BT.shape[1], "windows": len(tuning.rows_BT),
    } | dataclasses.asdict(search) | options.content(every)  # fmt: skip
    return Job(
        about,
        "eval/search",
        lambda: [tune(model, search, tuning, every, heard, about, tell)],
        f"search in {search.budget:,} bytes",
        ("eval/quality",),
    )


def tune(
    model: Model,
    search: Search,
    tuning: Windows,
    every: Sequence[CacheSpec],
    heard: Mapping[str, Curve],
    about: dict,
    tell: Callable[[str], None],
) -> Tuned:
    """Choose by what is known, and score by successive halving; BadInput where nothing fits."""
    context, heads = tuning.rows_BT.shape[1], model.config.layer_heads
    found = [heard[str(spec)] for spec in every]
    chosen = _chosen(model, search, every, found, context)
    known = options.rivals(heads, context, search.budget, search.calibration)
    known |= {f"option: {spec}": spec for spec in _whole(every, found, heads, context, search.budget)}
    unique = {
        spec: name for name, spec in reversed([*known.items(), *((name, spec) for name, (spec, _) in chosen.items())])
    }
    nats = {spec: float(np.sum(heard[str(spec)].nats)) for spec in unique if str(spec) in heard}
    nats |= {spec: value for spec, value in chosen.values()}
    searched = {spec for spec, _ in chosen.values()}
    rivals = sorted((spec for spec in unique if spec not in searched), key=nats.__getitem__)[:RIVALS]
    candidates = {
        spec: Candidate(
            name=unique[spec], cache=str(spec), kv_bytes=spec.nbytes(heads, context), predicted=nats[spec], losses=[]
        )
        for spec in [*searched, *rivals]
    }
    left = [*candidates]
    for count in dict.fromkeys(min(each, len(tuning.rows_BT)) for each in STAGES):
        for place, spec in enumerate(left):
            tell(f"{count} windows, candidate {place + 1} of {len(left)}: {candidates[spec]['name']}")
            candidates[spec]["losses"].append(_loss(model, spec, tuning.part(0, count), search.objective))
        left = sorted(left, key=lambda spec: candidates[spec]["losses"][-1])[: max(2, round(len(left) * LEFT))]
    listed = sorted(candidates.values(), key=lambda each: (-len(each["losses"]), each["losses"][-1]))
    pairs = np.array([[each["predicted"], each["losses"][0]] for each in listed], float).T
    return Tuned(
        **about | {"cache": str(left[0]), "kv_bytes": left[0].nbytes(heads, context)},
        kv_bytes_full=full_bytes(model.config, context),
        options=len(every),
        candidates=listed,
        correlation=float(spearman(*pairs)),
    )


def _whole(
    every: Sequence[CacheSpec], found: Sequence[Curve], heads, context: int, budget: int, most: int = 8
) -> list[CacheSpec]:
    """Options that fit as they are for all heads, those of which least is lost."""
    fits = [
        (float(np.sum(errors.nats)), place)
        for place, errors in enumerate(found)
        if every[place].nbytes(heads, context) <= budget
    ]
    return [every[place] for _, place in sorted(fits)[:most]]


def _chosen(
    model: Model, search: Search, every, found: Sequence[Curve], context: int
) -> dict[str, tuple[CacheSpec, float]]:
    """What the curves choose: by each measure of error, for each head by itself and for a layer's heads together; with what the nats of it
    are predicted to be."""
    groups = [spec.groups(model.config.layer_heads) for spec in every]
    kv = [each.kv for each in model.config.layer_heads]
    if len({*kv}) > 1:
        raise BadInput("layers have unlike numbers of KV heads, which the search does not divide bytes among")
    sizes_LKO = np.array(
        [[[group.nbytes(context) // group.of.kv] * group.of.kv for group in each] for each in groups]
    ).transpose(1, 2, 0)
    nats_LKO = np.stack([errors.nats for errors in found], -1)
    measures = {"nats": nats_LKO, "squares": np.stack([errors.squares for errors in found], -1)}
    cascades, made = [spec.parts[0].cascade for spec in every], {}
    for measure, errors_LKO in measures.items():
        for what, split in (("heads", True), ("layers", False)):
            together = lambda x, split=split: x if split else x.sum(1, keepdims=True)
            place_LK = allocate.by_curves(
                together(errors_LKO), together(sizes_LKO), search.budget, distinct=search.distinct
            )
            place_LK = np.broadcast_to(place_LK, nats_LKO.shape[:2])
            calibration = search.calibration if any(every[place].calibration for place in place_LK.ravel()) else ""
            spec = allocate.by_heads([[cascades[place] for place in row] for row in place_LK], calibration)
            made[f"search: {what} by {measure}"] = (
                spec,
                float(np.take_along_axis(nats_LKO, place_LK[..., None], -1).sum()),
            )
    return made


def _loss(model: Model, spec: CacheSpec, windows: Windows, objective: Objective) -> float:
    """Of a candidate: nats per token, the divergence from the full cache, or the share of puzzles that it does not answer."""
    if objective == "retrieval":
        jobs = retrieval.jobs(model, [spec], TASKS, [windows.rows_BT.shape[1]], DEPTHS, len(windows.rows_BT), 0, 8)
        found = [record for each in jobs for record in each.run()]
        return 1 - sum(record.answered for record in found) / sum(record.turns for record in found)
    fidelity = objective == "kl"
    found = evaluation.evaluate(model, spec, windows, protocol(windows, fidelity))
    return float(found["kl" if fidelity else "nll"])


def protocol(windows: Windows, fidelity: bool) -> Protocol:
    """How windows are scored, here and on the leaderboard, so that neither scores again what the other has."""
    return Protocol(min(BATCH, len(windows.rows_BT)), fidelity=fidelity)


def table(found: Tuned) -> Table:
    """The candidates that were scored on most windows."""
    columns = [
        Column("candidate", lambda each: each["name"]),
        Column("bytes", lambda each: each["kv_bytes"] / found.kv_bytes_full, "{:.1%}"),
        Column("predicted, nats", lambda each: each["predicted"], "{:.4f}"),
        Column(f"true, {TRUE[found.objective]}", lambda each: each["losses"][-1], "{:.4f}"),
    ]
    title = (
        f"{found.model}: {found.options} options for each head, {len(found.candidates)} candidates scored; rank correlation of predicted and true "
        f"loss {found.correlation:.2f}"
    )
    return Table.of(title, columns, last(found))


def last(found: Tuned) -> list[Candidate]:
    """Those that were scored on most windows."""
    most = max(len(each["losses"]) for each in found.candidates)
    return [each for each in found.candidates if len(each["losses"]) == most]


def held_out(winner: Evaluation, others: Sequence[Evaluation]) -> Table:
    """The winner beside what was known, on text that nothing was tuned on: the difference of perplexity, paired by window."""

    def beside(record: Evaluation) -> str:
        if record is winner:
            return ""
        low, high = np.expm1(evaluation.paired(record, winner)) if record.scored == winner.scored else (np.nan, np.nan)
        change = record.ppl / winner.ppl - 1
        decided = "" if low > 0 or high < 0 else "≈ "
        return f"{decided}{change:+.2%} ({low:+.2%} … {high:+.2%})"

    columns = [
        CACHE,
        KV_BYTES,
        Column("bytes", lambda r: 1 - r.compression, "{:.1%}"),
        evaluation.PPL,
        Column("beside the tuned one (95 %)", beside),
    ]
    ranked = sorted([winner, *others], key=lambda r: r.ppl)
    return Table.of(f"held out: {evaluation.protocol(winner)}", columns, ranked)
