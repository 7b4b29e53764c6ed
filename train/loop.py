"""The training loop: AdamW over batches that are a function of (seed, step)."""

import contextlib
import dataclasses
import functools
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Integer

from kvcascade.cache.errors import BadInput
from kvcascade.model import gpt
from kvcascade.train import data, flops, tracking
from kvcascade.train.checkpoint import Saver, State
from kvcascade.train.config import RunConfig, TrainConfig
from kvcascade.train.errors import Diverged, Interrupted


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokens to learn from and to validate on, and the bytes that each token stands for."""

    train: Integer[np.ndarray, " T"]
    validation: Integer[np.ndarray, " U"]
    token_bytes: Integer[np.ndarray, " V"]


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (Loshchilov & Hutter 2019) with warm-up, cosine decay, and weight decay on matrices only."""
    schedule = learning_rate(config)
    matrices = lambda params: jax.tree.map(lambda x: x.ndim >= 2, params)
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=config.weight_decay, mask=matrices),
    )


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """From 0 linearly to the full rate in `warmup` steps, then by a cosine to `final` of it at the last step.

    A run that is given more steps goes on by the schedule of its new length: the rate jumps up from where it had fallen to, and so
    the run is not the one that had as many steps from the start.
    """
    warmup = min(config.warmup, config.steps - 1)
    rate = config.learning_rate
    return optax.warmup_cosine_decay_schedule(0.0, rate, warmup, config.steps, rate * config.final)


def initial_state(config: RunConfig, params: gpt.Params) -> State:
    """A fresh optimiser around parameters."""
    return {"params": params, "optimizer": optimizer(config.train).init(params)}


def data_mesh() -> jax.sharding.Mesh:
    """All local devices in a row, each with a share of the batch."""
    return jax.make_mesh((jax.local_device_count(),), ("data",), axis_types=(AxisType.Auto,))


def make_step(config: RunConfig, mesh: jax.sharding.Mesh) -> Callable[..., tuple[State, dict[str, Array]]]:
    """Compile one step: `(state, step, rows_BT) -> (state, metrics)`, state donated, the batch split over the mesh.

    The metrics are loss, gradient_norm before clipping, learning_rate, and parameter_norm after the step.
    """
    transform, schedule = optimizer(config.train), learning_rate(config.train)
    replicated, by_row = PartitionSpec(), PartitionSpec("data")

    def loss(params, rows_BT, ids_B, key):
        # The ids are the rows' places in the whole batch, so each microbatch of each device drops out differently.
        key = jax.random.fold_in(key, ids_B[0]) if config.model.dropout else None
        return gpt.nll(config.model, params, rows_BT, key).mean()

    microbatch_size = config.train.batch_size // mesh.size // config.train.accumulation
    gradient = optax.microbatch(
        jax.value_and_grad(loss), argnums=(1, 2), microbatch_size=microbatch_size if config.train.accumulation > 1 else None,
        accumulator=optax.microbatching.AccumulationType.MEAN,
    )  # fmt: skip

    def local(params, rows_BT, ids_B, key):
        return jax.lax.pmean(gradient(params, rows_BT, ids_B, key), "data")

    # check_vma off: gradients stay local until the one pmean above.
    shared = jax.shard_map(
        local, mesh=mesh, in_specs=(replicated, by_row, by_row, replicated), out_specs=replicated, check_vma=False
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: State, number, rows_BT) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(config.train.seed), number)
        value, gradients = shared(state["params"], rows_BT, jnp.arange(rows_BT.shape[0]), key)
        updates, optimizer_state = transform.update(gradients, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "optimizer": optimizer_state}, {
            "loss": value,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(schedule(number)),
            "parameter_norm": optax.tree.norm(params),
        }

    return step


def check(config: RunConfig, corpus: Corpus, mesh: jax.sharding.Mesh) -> None:
    """BadInput for what would stop training later: experts, a text too short for its windows, a batch that the devices cannot share."""
    train, context = config.train, config.model.context
    if config.model.experts:
        raise BadInput("a model with model.experts cannot be trained, only read")
    if train.batch_size % (mesh.size * train.accumulation):
        raise BadInput(
            f"train.batch-size {train.batch_size} must be a multiple of {mesh.size} devices x {train.accumulation} microbatches"
        )
    data.batch(corpus.train, train.seed, 0, 1, context)
    _validation_rows(config, corpus)


def validate(config: RunConfig, corpus: Corpus, compiled, params: gpt.Params) -> dict[str, float]:
    """Loss on the first windows of the validation text: mean in nats per token, its standard error over windows, bits per byte."""
    size, rows = config.train.batch_size // config.train.accumulation, _validation_rows(config, corpus)
    per_row = np.concatenate([np.asarray(compiled(params, rows[i : i + size])) for i in range(0, len(rows), size)])
    spread = per_row.std(ddof=1) / math.sqrt(len(per_row)) if len(per_row) > 1 else 0.0
    bits = per_row.mean() * rows[:, 1:].size / math.log(2)
    return {
        "validation_loss": float(per_row.mean()),
        "validation_stderr": float(spread),
        "validation_bits_per_byte": float(bits / corpus.token_bytes[rows[:, 1:]].sum()),
    }


def _validation_rows(config: RunConfig, corpus: Corpus):
    return data.windows(corpus.validation, config.model.context + 1, config.train.evaluate_windows)


def fit(
    path: Path,
    config: RunConfig,
    corpus: Corpus,
    state: State,
    report: Callable[[int, dict], None],
    mesh: jax.sharding.Mesh | None = None,
    track: Sequence[str] = (),
) -> State:
    """Train from the run's newest checkpoint, or from `state` at step 0, to the last step, saving into `path` on the way.

    Takes over `state`: its arrays are donated. Calls `report(step, line)` with each line of log.jsonl, which the trackers called `track`
    take as well, and at first, where a run goes on, with what it has come to. While a step runs, the batch of the next is made and the
    numbers of the one before are looked at; nothing is validated or saved before its own were. Raises Interrupted after SIGINT or SIGTERM
    with the step saved, KeyboardInterrupt at once after a second SIGINT, Diverged if the loss is no number, BadInput if a checkpoint
    cannot be written or read.
    """
    mesh = mesh or data_mesh()
    check(config, corpus, mesh)
    train, by_row = config.train, NamedSharding(mesh, PartitionSpec("data"))
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    step = make_step(config, mesh)
    row_nll = jax.jit(lambda params, rows: gpt.nll(config.model, params, rows).mean(-1))

    def batch(number: int) -> Array:
        rows = data.batch(corpus.train, train.seed, number, train.batch_size, config.model.context)
        return jax.device_put(rows, by_row)

    with _stop_requests() as stop, Saver(path) as saver, contextlib.ExitStack() as open_trackers:
        done = 0
        if steps := saver.steps():
            done = steps[-1]
            state = saver.load(done, jax.tree.map(_abstract, state))
        trackers = tracking.begin(track, path, config, done)
        for tracker in trackers:
            open_trackers.callback(tracker.close)
        log = _Log(config, mesh, saver, tracking.JsonLines(path, done), trackers, report)
        rows = batch(done)
        saved = time.monotonic()
        for number in range(done, train.steps):
            now, last = number + 1, number + 1 == train.steps
            state, metrics = step(state, number, rows)
            rows = batch(now)  # while the step runs
            log.began(now, metrics)
            ending = bool(stop)
            validating = last or now % train.evaluate_every == 0
            waited = time.monotonic() - saved > 60 * train.checkpoint_minutes > 0
            saving = last or ending or waited or now % train.checkpoint_every == 0
            if not validating and not saving:
                continue
            log.settle()  # before anything is made of the state
            validation = {}
            if validating:
                validation = validate(config, corpus, row_nll, state["params"])
                log.write(now, validation)
            if saving:
                saver.save(now, state, validation.get("validation_loss"), train.evaluate_windows)
                saved = time.monotonic()
            if ending and not last:
                saver.wait()
                raise Interrupted(stop[0], now, path)
            log.mark = time.monotonic()
    return state


def _abstract(x: Array) -> jax.ShapeDtypeStruct:
    """The shape, type and placement that a checkpoint is read into."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


class _Log:
    """What is said of each step: to log.jsonl and the other trackers, and to `report`.

    The numbers of a step are looked at when the next one has begun, so that the device never waits for that; or when `settle` asks for them.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: jax.sharding.Mesh,
        saver: Saver,
        lines: tracking.JsonLines,
        trackers: list[tracking.Tracker],
        report: Callable[[int, dict], None],
    ):
        self.train, self.saver, self.report = config.train, saver, report
        self.trackers = [lines, *trackers]
        self.tokens = config.train.batch_size * config.model.context  # per step
        self.flops, self.peak = (
            flops.per_token(config.model),
            flops.peak([device.device_kind for device in mesh.devices.flat]),
        )
        self.pending: tuple[int, dict[str, Array]] | None = None
        self.last, self.busy = max(saver.steps(), default=0), 0.0  # step of the last line, seconds of training since
        self.mark = time.monotonic()  # since when the device has been training
        self.start = self.mark - (lines.kept[-1].get("seconds", 0.0) if lines.kept else 0.0)
        if self.last:  # what the run has come to
            known = {name: value for line in lines.kept for name, value in line.items()}
            report(self.last, known | {"step": self.last})

    def began(self, step: int, metrics: dict[str, Array]) -> None:
        """Take the numbers of a step that is only just running, and look at those of the one before."""
        self.settle()
        self.pending = step, metrics

    def settle(self) -> None:
        """Wait for the last step, and look at its numbers; Diverged if the loss or the parameters after it are no numbers."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.monotonic()
        self.busy, self.mark = self.busy + now - self.mark, now
        if not (math.isfinite(values["loss"]) and math.isfinite(values["parameter_norm"])):
            self.saver.wait()
            raise Diverged(
                f"the loss is {values['loss']} and the norm of the parameters {values['parameter_norm']} at step {step}; "
                f"{self.saver.safe()} in {self.saver.path}; try a lower --train.learning-rate"
            )
        if step % self.train.log_every == 0 or step == self.train.steps:
            self._trained(step, values)

    def _trained(self, step: int, values: dict[str, float]) -> None:
        """Write what a step said, and how fast the steps since the last such line were; validating and saving do not count."""
        rate = (step - self.last) * self.tokens / self.busy
        self.last, self.busy = step, 0.0
        line = {name: values[name] for name in ("loss", "gradient_norm", "learning_rate")}
        line |= {"tokens": step * self.tokens, "tokens_per_second": round(rate, 1)}
        line["model_tflops_per_second"] = round(rate * self.flops / 1e12, 6)
        if self.peak:
            line["mfu"] = round(rate * self.flops / self.peak, 4)
        self.write(step, line)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Give a line to every tracker and report it."""
        line = {**values, "seconds": round(time.monotonic() - self.start, 2)}
        for tracker in self.trackers:
            tracker.write(step, line)
        self.report(step, {"step": step, **line})


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM put their number into while this runs; a second SIGINT is a KeyboardInterrupt."""
    asked: list[int] = []

    def ask(number: int, _: object) -> None:
        if number == signal.SIGINT and number in asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: whoever started it deals with signals
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
