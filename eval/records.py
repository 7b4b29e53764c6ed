"""What was measured, one JSON object per line: a record has its protocol, its bytes, its seed and where it comes from."""

import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NotRequired, TypedDict

from pydantic import BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from pydantic.dataclasses import dataclass

SCHEMA = 2
"""Counted up when the meaning of a key changes."""
LARGEST = 1e18  # beyond any count, size or time that was measured


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise ValueError("is not a number")
    if value is None or not abs(value) <= LARGEST:
        raise ValueError("is not finite")
    return value


def _finite(value: Any) -> Any:
    return value if isinstance(value, float) and abs(value) <= sys.float_info.max else _number(value)


def _text(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError("is not text")
    return value


def _not_null(value: Any) -> Any:
    if value is None:
        raise ValueError("is null")
    return value


# Numbers stay as they are, whole or not, and texts may have halves of letters, such as a path in no encoding has.
Finite = Annotated[float, PlainValidator(_finite)]
Number = Annotated[float, PlainValidator(_number)]
Size = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Part = Annotated[Number, Field(gt=0, le=1)]
Nats = Annotated[Number, Field(ge=0, le=700)]  # e^700 is the largest perplexity that a float can tell
Count = Annotated[int, PlainValidator(_number), Field(ge=1)]
Index = Annotated[int, PlainValidator(_number), Field(ge=0)]
Text = Annotated[str, PlainValidator(_text)]
Name = Annotated[Text, Field(min_length=1)]
Flag = Annotated[bool, Field(strict=True)]
type Some[T] = Annotated[Sequence[T], Field(min_length=1)]
type Maybe[T] = Annotated[T | None, BeforeValidator(_not_null)]
"""What may be missing, but is not null."""

CONFIG = ConfigDict(extra="allow")


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Record:
    """Where a record comes from; keys that no class names are kept."""

    kind: str
    device: Text = ""
    versions: dict = dataclasses.field(default_factory=dict)
    commit: Text = ""
    seconds: Size = 0
    schema: Maybe[Annotated[int, PlainValidator(_number), Field(ge=SCHEMA, le=SCHEMA)]] = None
    key: Maybe[Text] = None
    of: Maybe[Count] = None
    code: Maybe[Text] = None
    date: Maybe[Text] = None
    processor: Maybe[Text] = None
    command: Maybe[Text] = None

    def _wrong(self) -> str | None:
        """What cannot be said of one key alone."""

    @model_validator(mode="after")
    def _right(self):
        if wrong := self._wrong():
            raise ValueError(wrong)
        return self

    @property
    def given(self) -> dict[str, Any]:
        """Its JSON object: all but what is missing."""
        missing = {field.name for field in dataclasses.fields(self) if field.default is None}
        return {key: value for key, value in vars(self).items() if value is not None or key not in missing}


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Named(Record):
    """A cache behind a model."""

    same: ClassVar[Sequence[str]] = ("model",)
    """Keys of records that may be compared with one another."""
    model: Name
    cache: Name

    @property
    def case(self) -> tuple:
        """What it shares with records that it may be compared with."""
        return tuple(repr(getattr(self, key, None)) for key in self.same)

    @property
    def against(self) -> str:
        """The cache that it is compared with."""
        return "full"

    @property
    def name(self) -> str:
        """The model's, without its folder."""
        return Path(self.model).name


# Objects within records; keys that are not named here are kept.
# ruff: noqa: UP013
Shape = TypedDict("Shape", {"heads": Count, "kv_heads": Count})
Puzzle = TypedDict("Puzzle", {"name": Text, "answers": Some[Text], "said": Some[Text], "right": Some[Flag]})
Metric = TypedDict("Metric", {"metric": Text, "filter": Text, "value": Finite, "stderr": Finite | None})
Correlations = TypedDict("Correlations", {"learned": Number, "key_norm": Number, "position": Number})
Candidate = TypedDict(
    "Candidate", {"name": Text, "cache": Text, "kv_bytes": Count, "predicted": Number, "losses": list[Number]}
)
Entry = TypedDict("Entry", {"name": Name, "budget": Part, "cache": Name})
Weights = TypedDict("Weights", {"weights": Size})
Longest = TypedDict("Longest", {"context": Size | None, "explanation": NotRequired[Any]})
Child = TypedDict("Child", {"users": Count, "lived": Flag, "peak": NotRequired[Any]})
Component = TypedDict("Component", {"name": Text, "calls": Size, "ms": Positive, "bytes": Size})
TierPart = TypedDict("TierPart", {"tier": Text, "ms": Size, "bytes": Size})
Buffer = TypedDict("Buffer", {"component": Text, "type": Text, "count": Count, "bytes": Size})
Watched = TypedDict("Watched", {"steps": Size, "arrays": Number, "bytes": Number, "resident": Number})
Buffers = TypedDict(
    "Buffers", {"largest": Some[Buffer], "copies": Size, "cache": Positive, "aliased": Size, "temporaries": Size}
)
StepGrowth = TypedDict("StepGrowth", {
    "contexts": Some[Count], "kv_bytes": Some[Positive], "temporary_bytes": Some[Size], "live_bytes": Some[Size], "output_bytes": Some[Size],
})  # fmt: skip


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Training(Record):
    """How a run learned: its validation curve, its speed, its shape, its best checkpoint."""

    kind: Literal["train"] = "train"
    model: Name
    shape: Shape
    parameters: Size
    kv_bytes_per_token: Positive
    steps: Count
    tokens_per_step: Positive
    seed: Number = 0
    curve: Some[tuple[Size, Positive, Size, Positive]]
    """Step, validation loss, its standard error, bits per byte."""
    validation_loss: Positive
    validation_stderr: Size
    validation_bits_per_byte: Positive
    unigram_bits_per_byte: Size
    tokens_per_second: Size
    train_seconds: Size


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Evaluation(Named):
    """A cache on a text."""

    windows_of: ClassVar = ("data", "context", "sequences", "tokens", "rows", "bos")
    same: ClassVar = ("model", "weights", "weights_key", *windows_of)
    kind: Literal["evaluate"] = "evaluate"
    weights: Maybe[Text] = None
    weights_key: Any = None
    bos: Any = None
    batch: Any = None
    data: Text
    rows: Maybe[Text] = None
    windows: Maybe[Text] = None
    context: Count
    sequences: Count
    seed: Number
    parameter_bytes: Maybe[Size] = None
    documents: Maybe[Count] = None
    document_windows: Maybe[Some[Index]] = None
    draws: Maybe[Count] = None
    tokens: Count
    nll: Nats
    nll_windows: Some[Nats]
    ppl: Positive
    bits_per_byte: Size
    kv_bytes: Positive
    kv_bytes_predicted: Size
    compression: Number
    kept: Size
    tokens_per_second: Size
    traces: Size

    @property
    def scored(self) -> tuple:
        """What tells its windows from others."""
        return tuple(getattr(self, key) for key in self.windows_of)

    def _wrong(self) -> str | None:
        return _unlike(self, ("nll_windows", "document_windows"))


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Compared(Evaluation):
    """An evaluation whose distributions were compared with the full cache's."""

    kl: Size
    kl_windows: Some[Size]
    same_top: Share
    same_top_windows: Some[Share]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Parity(Named):
    """A method on a text, and another library's version of it on the same windows."""

    kind: Literal["parity"] = "parity"
    method: Name
    press: Text
    """The other's version; empty: nothing is pruned."""
    peer: Text
    data: Text
    rows: Text
    context: Count
    prefix: Count
    sequences: Count
    documents: Count
    document_windows: Some[Index]
    tokens: Count
    kept: Count
    """Tokens per head that stay of the prefix."""
    peer_kept: Positive
    nll: Nats
    nll_windows: Some[Nats]
    peer_nll: Nats
    peer_nll_windows: Some[Nats]

    def _wrong(self) -> str | None:
        return _unlike(self, ("nll_windows", "peer_nll_windows", "document_windows"))


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Quantization(Record):
    """A model whose weights were rounded, before and after."""

    kind: Literal["quantize"] = "quantize"
    model: Name
    weights: Text
    method: Text
    group: Count
    calibration: Text
    samples: Count
    data: Text
    context: Count
    sequences: Count
    document_windows: Maybe[Some[Index]] = None
    tokens: Count
    ppl_before: Positive
    ppl_after: Positive
    nll_windows_before: Some[Nats]
    nll_windows_after: Some[Nats]
    parameter_bytes_before: Positive
    parameter_bytes_after: Positive

    def _wrong(self) -> str | None:
        return _unlike(self, ("nll_windows_before", "nll_windows_after", "document_windows"))


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Ranking(Record):
    """A ranker that was trained, and how well it ranks what nothing was learned from."""

    kind: Literal["rank"] = "rank"
    model: Name
    weights: Text
    data: Text
    context: Count
    windows: Count
    held_out: Count
    steps: Count
    seed: Number
    skip: Index
    horizon: Count
    unexplained: Size
    ranker_bytes: Positive
    correlations: Some[Correlations]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Distilled(Record):
    """A small model that was trained to foresee another one, and how well it does in texts that nothing was learned from."""

    kind: Literal["distill"] = "distill"
    model: Name
    weights: Text
    texts: Count
    length: Count
    held_out: Count
    layers: Count
    width: Count
    steps: Count
    batch: Count
    learning_rate: Positive
    seed: Number
    parameters: Count
    divergence: Size
    """Nats."""
    accepted: Share
    """The share of draws at temperature 1 in which both can agree."""
    alike: Share
    """The share of places in which the same token is the likeliest."""
    fingerprint: Text


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class OnWindows(Record):
    """What is of a model, known by its weights, on some windows of a text."""

    model: Name
    weights: Text
    weights_key: Text
    rows: Text
    """A hash of the windows."""
    context: Count


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Tuned(Named, OnWindows):
    """What a search found the best cache of so many bytes to be, and all that it scored."""

    kind: Literal["tune"] = "tune"
    data: Text
    windows: Count
    budget: Count
    objective: Text
    calibration: Any = None
    kv_bytes: Count
    kv_bytes_full: Count
    options: Count
    candidates: Some[Candidate]
    correlation: Number


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Curve(Named, OnWindows):
    """What each KV head of each layer loses behind a cache, by two measures: what a search chooses by."""

    kind: Literal["curve"] = "curve"
    nats: Some[Some[Number]]
    squares: Some[Some[Number]]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Board(OnWindows):
    """What takes part in a leaderboard, at which shares of the full cache's bytes; its places come from the records of these caches."""

    kind: Literal["board"] = "board"
    data: Text
    windows: Count
    calibration: Text
    entries: Some[Entry]

    @property
    def budgets(self) -> list[int | float]:
        """The shares, the largest first."""
        return sorted({each["budget"] for each in self.entries}, reverse=True)

    def at(self, budget: int | float) -> dict[str, str]:
        """The names of caches of so large a share."""
        return {each["cache"]: each["name"] for each in self.entries if each["budget"] == budget}


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Distortion(OnWindows):
    """What a codec does to a model's keys and values, and to what attention makes of them: errors over norms, the mean over layers."""

    kind: Literal["codec"] = "codec"
    codec: Text
    data: Text
    windows: Count
    first: Size
    """So many tokens of a window are in full, and do not count."""
    width: Count
    vector_bytes: Positive
    """Of a key and a value of one head together, scales included."""
    key_error: Size
    value_error: Size
    output_error: Size
    """Of attention with both."""
    keys_alone: Size
    values_alone: Size


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Retrieval(Named):
    """A task at one length and depth behind a cache; bytes are of the context with room for the turns."""

    same: ClassVar = ("model", "weights", "weights_key")
    kind: Literal["retrieve"] = "retrieve"
    weights: Any = None
    weights_key: Any = None
    task: Text
    length: Count
    depth: Share
    samples: Count
    turns: Count
    answered: Size
    puzzles: Maybe[Some[Puzzle]] = None
    kv_bytes: Size
    compression: Number
    seed: Number

    def _wrong(self) -> str | None:
        return "has more answers than turns" if self.answered > self.turns else None


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class TaskResult(Named):
    """A task of lm-evaluation-harness behind a cache, and the bytes of the cache of the longest row."""

    kind: Literal["harness"] = "harness"
    weights: Text
    task: Text
    version: Text
    few_shot: Size | None
    samples: Count
    metrics: Some[Metric]
    chat: Flag
    context: Count
    """The most tokens that a row was let have."""
    longest: Count
    kv_bytes: Positive
    kv_bytes_full: Positive
    compression: Number
    lm_eval: Text
    seed: Number


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Layer(Record):
    """Bytes per token in one layer of a kind."""

    kind: Literal["layer"] = "layer"
    layer: Text
    codec: Text
    bytes_per_token: Size


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Growth(Named):
    """Bytes of one row's cache by context."""

    kind: Literal["growth"] = "growth"
    contexts: Some[Count]
    kv_bytes: Some[Positive]

    def _wrong(self) -> str | None:
        return _uneven(self.given)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class BenchRow(Named):
    """One of ours or a peer at a batch and a context."""

    kind: Literal["bench"] = "bench"
    weights: Maybe[Text] = None
    library: Maybe[Text] = None
    peer: Maybe[Text] = None
    batch: Count
    context: Count
    steps: Count
    repeats: Count
    prefills: Maybe[Count] = None
    steady: Maybe[Flag] = None
    bandwidth: Positive
    bandwidth_range: Maybe[tuple[Positive, Positive]] = None
    kv_bytes: Size | None = None
    step_bytes: Maybe[Size] = None

    @property
    def bits(self) -> int:
        """Of a weight: float32 and f32 are 32, int8 and q8_0 are 8, Q4_1 is 4."""
        digits = re.search(r"\d+", self.weights or "")
        return int(digits[0]) if digits else 0


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class BenchFailed(BenchRow):
    """A peer that cannot do it, in its own words."""

    reason: Text


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Bench(BenchRow):
    """How fast it is; a step in the library's own loop, and alone."""

    first_token_ms: Positive
    prefill_tokens_per_second: Positive
    decode_tokens_per_second: Positive
    step_ms: Positive
    step_ms_mean: Maybe[Positive] = None
    step_ms_5_95: Maybe[Some[Size]] = None
    alone_ms: Maybe[Positive] = None
    alone_ms_5_95: Maybe[Some[Size]] = None
    alone_ms_50_90_99: Maybe[Some[Positive]] = None

    @property
    def alone(self) -> int | float:
        """Milliseconds of a step by itself: older records have three quantiles, of which the median is the first."""
        return self.alone_ms or (self.alone_ms_50_90_99 or [0])[0]

    @property
    def speed(self) -> int | float | None:
        """Bytes per second that a step reads."""
        return None if self.step_bytes is None else self.step_bytes / self.step_ms * 1e3

    def _wrong(self) -> str | None:
        return "lacks alone_ms" if self.alone_ms is None and not self.alone_ms_50_90_99 else None


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Stream(Named):
    """Decoding on and on; a point is tokens so far, milliseconds per token, resident bytes."""

    kind: Literal["stream"] = "stream"
    weights: Text
    tokens: Count
    kv_bytes: Size
    points: Some[tuple[Count, Size, Size]]
    finite: Flag
    traces: Size

    def _wrong(self) -> str | None:
        return "ends before its first 1,024 tokens" if self.points[-1][0] < 1024 else None


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Speculated(Named):
    """Answers to the prompts of one kind of task, with so many tokens foreseen; what is counted is from each answer's first token on."""

    same: ClassVar = ("model", "weights", "task", "processor")
    kind: Literal["speculate"] = "speculate"
    weights: Text
    task: Text
    prompts: Count
    tokens_at_most: Count
    repeats: Count
    proposer: Text
    ahead: Size
    """0: none are foreseen."""
    tokens: Count
    steps: Count
    drafted: Index
    accepted: tuple[Index, ...]
    """Of those, what was drawn, by places in their drafts."""
    seconds_each: Some[Positive]
    """Of all prompts, round by round."""
    tokens_per_second: Positive
    bytes_per_token: Positive
    """Of parameters, and of keys and values, that steps read."""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Served(Named):
    """A trace of requests, served in one way; times in milliseconds, from the least to the most in steps of 5 % of their number."""

    same: ClassVar = (
        "model",
        "weights",
        "trace",
        "trace_key",
        "shorten",
        "seed",
        "clock",
        "clients",
        "processor",
        "costs",
    )
    kind: Literal["simulate"] = "simulate"
    weights: Text
    trace: Text
    trace_key: Text
    """A hash of its requests."""
    shorten: Count
    clock: Text
    clients: Maybe[Count] = None
    way: Text
    requests: Count
    prompt_tokens: Count
    output_tokens: Count
    serving_seconds: Positive
    tokens_per_second: Positive
    first_ms: Some[Size]
    """From a request's arrival to its first token."""
    between_ms: Some[Size]
    """Between two tokens of a request."""
    per_token_ms: Some[Size]
    """From its arrival to its end, by its tokens."""
    useful: Maybe[Share] = None
    """Tokens of requests, each counted once, among all that steps had room for."""
    steps: Maybe[Count] = None
    users: Maybe[Index] = None
    """Rows that ran at once, at most."""
    rows: Maybe[Count] = None
    kv_bytes: Maybe[Size] = None
    warm_seconds: Maybe[Size] = None
    blocks: Maybe[Count] = None
    step_tokens: Maybe[Count] = None
    compiles: Maybe[Index] = None
    found: Maybe[Index] = None
    drafted: Maybe[Index] = None
    """Tokens that were foreseen."""
    accepted: Maybe[Some[Index]] = None
    """Of those, what was drawn, by places in their drafts."""
    stopped: Maybe[Index] = None
    copied: Maybe[Index] = None
    evicted: Maybe[Index] = None
    aside: Maybe[Index] = None
    """Blocks that host memory had room for."""
    put_aside: Maybe[Index] = None
    """Rows that stopped and went to host memory, not to be computed again."""
    waste: Maybe[Share] = None
    """The mean share of the slots of blocks in use that have no token."""
    programs: Maybe[tuple[tuple[Count, Size], ...]] = None
    """What steps took: the tokens of each program, and its seconds without what its tokens attended to."""
    attended: Maybe[Size] = None
    """Seconds for each token that a token attended to."""
    costs: str = ""
    """The machine whose steps' times these are, where nothing was computed."""

    def _wrong(self) -> str | None:
        for name in ("first_ms", "between_ms", "per_token_ms"):
            values = getattr(self, name)
            if len(values) != 21 or [*values] != sorted(values):
                return f"{name} is not 21 times, the least first"
        if self.way != "server" and None in (self.useful, self.steps, self.rows, self.kv_bytes, self.warm_seconds):
            return "only another's server does not say what it did"
        return None


FILLED = ("weights", "cache", "temporaries and logits")


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class FitTask(Named):
    """A cache behind a model that is to fit a card."""

    same: ClassVar = ("model", "weights", "gpu", "share", "context")
    kind: Literal["fit"] = "fit"
    gpu: Text
    context: Count
    weights: Text
    share: Share
    gpu_memory: Positive
    budget: Positive


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class FitFailed(FitTask):
    """A cache that the compiler failed at."""

    failed: Text


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Fit(FitTask):
    """How many users fit, beside what the arithmetic says."""

    baseline: Text
    users: Size
    exact: Flag
    held: Positive
    rows: Size
    kv_bytes: Size
    kv_bytes_full: Positive
    difference: Number
    explanation: Any = None
    expected: Weights
    longest: Longest

    @property
    def against(self) -> str:
        """The cache that it is compared with."""
        return self.baseline

    @property
    def filled(self) -> dict[str, int | float]:
        """Bytes that its rows hold: weights, cache, and all the rest of the step."""
        weights, cache = self.expected["weights"], self.rows * self.kv_bytes
        return dict(zip(FILLED, (weights, cache, self.held - weights - cache), strict=True))


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Crash(Named):
    """The most users that lived and the fewest that did not, peaks of memory, and what the arithmetic said."""

    same: ClassVar = ("model", "context", "limit", "trace")
    kind: Literal["crash"] = "crash"
    context: Count
    limit: Positive
    way: Text
    resolution: Any = None
    steps: Any = None
    users: Count
    died: Size
    peak: Size
    peak_one: Size
    user_bytes: Positive | None
    user_bytes_predicted: Size
    users_predicted: Size
    trace: str = ""
    """The requests whose lengths the users have; empty: the context each."""
    tokens: Maybe[Count] = None
    """All that users have in the layer that has room for most."""
    room: Maybe[Count] = None
    """Tokens that it has room for."""
    children: Some[Child]

    def _wrong(self) -> str | None:
        peaks = [child.get("peak", -1) for child in self.children if child["lived"]]
        sizes = (type(peak) in (int, float) and 0 <= peak <= LARGEST for peak in peaks)
        return None if all(sizes) else "children.peak is not a size"


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Prompting(Named):
    """What a prompt took on its way into a cache: bytes of the cache, of the program's temporaries, and of the process beyond its weights."""

    kind: Literal["prompt"] = "prompt"
    weights: Text
    tokens: Count
    chunk: Index
    batch: Count
    kv_bytes: Positive
    kv_bytes_predicted: Maybe[Size] = None
    temporaries: Maybe[Size] = None
    """None of another library, which does not say."""
    peak: Size
    grown: Size
    prefill_seconds: Positive

    @property
    def same_prompt(self) -> tuple:
        """What tells its prompt and model from others."""
        return self.model, self.weights, self.tokens, self.batch

    @property
    def working(self) -> int | float | None:
        """Bytes of the cache and of the temporaries, where these are known."""
        return None if self.temporaries is None else self.kv_bytes * self.batch + self.temporaries


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Profile(Named):
    """A step's time and bytes by component, its buffers, and whether anything grows from step to step."""

    same: ClassVar = ("model", "weights", "batch", "context")
    kind: Literal["profile"] = "profile"
    weights: Text
    batch: Count
    context: Count
    bandwidth: Positive
    step_ms: Positive
    profiled_ms: Positive
    components: Some[Component]
    between_ms: Size
    around_ms: Size
    tiers: Some[TierPart]
    operations: Size
    buffers: Buffers
    watched: Watched
    growth: StepGrowth

    @property
    def moved(self) -> int | float:
        """Bytes that a step reads and writes."""
        return sum(each["bytes"] for each in self.components)

    @property
    def longest_first(self) -> list[Component]:
        """Its components by their time."""
        return sorted(self.components, key=lambda each: -each["ms"])

    def _wrong(self) -> str | None:
        return _uneven(self.growth)


def commits(found: Iterable[Record]) -> str:
    """The commits that records were measured at, each once."""
    return " and ".join(dict.fromkeys(r.commit for r in found))


def _unlike(record: Evaluation | Parity | Quantization, keys: Iterable[str]) -> str | None:
    lengths = {key: len(getattr(record, key)) for key in keys if getattr(record, key) is not None}
    wrong = [f"{length} {key}" for key, length in lengths.items() if length != record.sequences]
    return f"has {' and '.join(wrong)} for {record.sequences} sequences" if wrong else None


def _uneven(growth: Mapping[str, Any]) -> str | None:
    lengths = {key: len(each) for key, each in growth.items() if key == "contexts" or key.endswith("_bytes")}
    return None if len({*lengths.values()}) == 1 else f"{', '.join(lengths)} are of unequal lengths"


KINDS: dict[str, type[Record]] = {
    "train": Training, "evaluate": Evaluation, "quantize": Quantization, "rank": Ranking, "tune": Tuned, "curve": Curve, "codec": Distortion, "board": Board,
    "retrieve": Retrieval, "harness": TaskResult, "layer": Layer, "growth": Growth, "bench": Bench, "stream": Stream, "fit": Fit, "crash": Crash,
    "prompt": Prompting, "profile": Profile, "parity": Parity, "simulate": Served, "speculate": Speculated, "distill": Distilled,
}  # fmt: skip
OTHERS = {("evaluate", "kl"): Compared, ("bench", "reason"): BenchFailed, ("fit", "failed"): FitFailed}
"""The classes of records that have a certain key."""


def changed[R: Record](record: R, **changes: Any) -> R:
    """The same record with other values of some keys."""
    return type(record)(**record.given | changes)


def of[R: Record](found: Iterable[Record | dict], kind: type[R]) -> list[R]:
    """The records of one kind, in their order."""
    return [record for record in found if isinstance(record, kind)]


def baseline[R: Named](record: R, among: Iterable[R]) -> R | None:
    """What a record is compared with, None where it is not there: what stands for its kind's baseline, in the same case."""
    return next((r for r in among if r.cache == record.against and r.case == record.case), None)


def grouped[R](found: Iterable[R], key: Callable[[R], Any]) -> list[list[R]]:
    """Those that agree in something together, in the order of their first."""
    groups: dict[Any, list[R]] = {}
    for each in found:
        groups.setdefault(key(each), []).append(each)
    return [*groups.values()]
