"""The training loop: what one step does, what a run writes, and when it stops."""

import dataclasses
import functools
import importlib.machinery
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kvcascade.cache.errors import BadInput
from kvcascade.model import gpt
from kvcascade.model.config import ModelConfig
from kvcascade.train import checkpoint, config, data, flops, loop, tracking
from kvcascade.train.config import RunConfig, TrainConfig

TINY = RunConfig(
    ModelConfig(layers=1, width=32, heads=4, kv_heads=2, mlp=64, vocab=64, context=32),
    train=TrainConfig(
        steps=8,
        batch_size=4,
        warmup=2,
        learning_rate=1e-2,
        evaluate_every=4,
        evaluate_windows=4,
        checkpoint_every=2,
        log_every=1,
    ),
)
LONG = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, steps=300, warmup=10, weight_decay=0.0))
TOKENS = np.random.default_rng(0).integers(0, 64, 2000).astype(np.uint16)
CORPUS = loop.Corpus(TOKENS, TOKENS[:200], np.ones(64, np.int32))
ROWS = TOKENS[: 4 * 33].reshape(4, 33).astype(np.int32)


compiled = functools.cache(loop.make_step)


@pytest.fixture(autouse=True)
def one_compilation_per_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is a pure function, so tests with the same settings share it: seconds each."""
    monkeypatch.setattr(loop, "make_step", compiled)


def tiny(dropout: float = 0.0, dtype: str = "float32", **train) -> RunConfig:
    model = dataclasses.replace(TINY.model, dropout=dropout, dtype=dtype)
    return RunConfig(model, TINY.data, dataclasses.replace(TINY.train, **train))


def fresh(settings: RunConfig) -> checkpoint.State:
    return loop.initial_state(settings, gpt.init(settings.model, settings.train.seed))


def fit(path: Path, settings: RunConfig = TINY, report=lambda step, line: None) -> checkpoint.State:
    return loop.fit(path, settings, CORPUS, fresh(settings), report)


def take_steps(settings: RunConfig, count: int, first: int = 0) -> tuple[checkpoint.State, list[dict[str, float]]]:
    """The state and metrics of a few steps on the same rows."""
    step, state, found = compiled(settings, loop.data_mesh()), fresh(settings), []
    for number in range(first, first + count):
        state, metrics = step(state, number, jnp.asarray(ROWS))
        found.append({name: float(value) for name, value in metrics.items()})
    return state, found


def same(a, b) -> bool:
    """Whether two trees of arrays are equal bit for bit."""
    left, right = jax.tree.leaves(a), jax.tree.leaves(b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(left, right, strict=True)
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, checkpoint.State]:
    """A run of TINY from the first step to the last, and its final state."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    return path, fit(path)


def test_a_batch_is_learnt_by_heart() -> None:
    """Random tokens cannot be predicted, only remembered: the loss falls from ln V to almost nothing."""
    _, found = take_steps(LONG, 300)
    assert abs(found[0]["loss"] - math.log(64)) < 0.1
    assert found[-1]["loss"] < 0.1


def test_bf16_trains_with_float32_parameters() -> None:
    """Mixed precision changes what is computed in, not what is kept."""
    state, found = take_steps(dataclasses.replace(LONG, model=dataclasses.replace(TINY.model, dtype="bfloat16")), 60)
    _, exact = take_steps(LONG, 1)
    assert {x.dtype for x in jax.tree.leaves(state) if x.ndim} == {jnp.dtype("float32")}
    assert found[-1]["loss"] < found[0]["loss"] - 1
    assert found[0]["loss"] != exact[0]["loss"]
    assert found[0]["loss"] == pytest.approx(exact[0]["loss"], abs=0.02)


def test_accumulation_gives_the_same_gradient() -> None:
    """One microbatch or four: the same loss and, through the first moments, the same gradients."""
    whole, (first,) = take_steps(tiny(), 1)
    parts, (found,) = take_steps(tiny(accumulation=4), 1)
    assert found["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert found["gradient_norm"] == pytest.approx(first["gradient_norm"], rel=1e-4)
    for a, b in zip(jax.tree.leaves(parts["optimizer"]), jax.tree.leaves(whole["optimizer"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_weight_decay_leaves_vectors_alone() -> None:
    """Without a gradient, a matrix shrinks by rate times decay, and a vector stays."""
    settings = TrainConfig(steps=10, warmup=1, learning_rate=0.5, weight_decay=0.1)
    params = {"matrix": jnp.ones((3, 3)), "vector": jnp.ones(3)}
    transform = loop.optimizer(settings)
    zero, state = jax.tree.map(jnp.zeros_like, params), transform.init(params)
    _, state = transform.update(zero, state, params)  # the first step's rate is 0
    updates, _ = transform.update(zero, state, params)
    matrix, vector = jax.tree.leaves(updates)
    np.testing.assert_allclose(matrix, -0.05 * np.ones((3, 3)), rtol=1e-6)
    assert not vector.any()


def test_gradients_are_clipped_to_their_global_norm() -> None:
    """A gradient of norm 10 enters the moments with norm `clip`, and a small one as it is."""
    transform = loop.optimizer(TrainConfig(clip=2.0))
    params = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(2)}
    for norm, expected in ((10.0, 2.0), (0.5, 0.5)):
        gradients = {"a": jnp.zeros((2, 2)).at[0, 0].set(0.6 * norm), "b": jnp.array([0.0, 0.8 * norm])}
        _, state = transform.update(gradients, transform.init(params), params)
        moments = optax.tree.get(state, "mu")
        assert float(optax.tree.norm(moments)) == pytest.approx(0.1 * expected, rel=1e-5)


def test_the_learning_rate_warms_up_and_decays() -> None:
    """0 at first, linear to the full rate, a cosine to `final` of it at the last step; also for very short runs."""
    rate = loop.learning_rate(TrainConfig(steps=110, warmup=10, learning_rate=2e-3, final=0.1))
    expected = {0: 0.0, 5: 1e-3, 10: 2e-3, 35: 2e-4 + 1.8e-3 * (1 + math.sqrt(0.5)) / 2, 60: 1.1e-3, 110: 2e-4}
    for step, value in expected.items():
        assert float(jnp.asarray(rate(step))) == pytest.approx(value, rel=1e-5, abs=1e-12)
    assert float(jnp.asarray(loop.learning_rate(TrainConfig(steps=1, warmup=50))(0))) > 0


def test_dropout_is_a_function_of_the_step() -> None:
    """The same step drops the same activations, another step others, and without dropout the step does not matter."""
    loss = lambda settings, step: take_steps(settings, 1, first=step)[1][0]["loss"]
    dropping = tiny(dropout=0.3)
    assert loss(dropping, 3) == loss(dropping, 3)
    assert loss(dropping, 3) != loss(dropping, 4)
    assert loss(tiny(), 3) == loss(tiny(), 4)


def test_microbatches_drop_different_activations() -> None:
    """By the key of seed, step and place in the batch: four equal rows in four microbatches have four losses."""
    settings = tiny(dropout=0.5, accumulation=4, seed=5)
    equal = jnp.asarray(np.repeat(ROWS[:1], 4, 0))
    together = compiled(settings, loop.data_mesh())(fresh(settings), 2, equal)[1]["loss"]
    params, key = gpt.init(settings.model, 5), jax.random.fold_in(jax.random.key(5), 2)
    row_nll = jax.jit(lambda row: gpt.nll(settings.model, params, equal[:1], jax.random.fold_in(key, row)).mean())
    each = [float(row_nll(row)) for row in range(4)]
    assert len(set(each)) == 4
    assert float(together) == pytest.approx(np.mean(each), rel=1e-5)


def test_validation_has_a_standard_error() -> None:
    """The mean over windows, its standard error, and bits per byte, by hand; the last batch may be short."""
    settings = tiny(evaluate_windows=6)
    corpus = dataclasses.replace(CORPUS, validation=TOKENS[:400], token_bytes=np.full(64, 2, np.int32))
    seen = []

    def windows_nll(params, rows):
        seen.append(len(rows))
        return rows[:, 0] / 10

    found = loop.validate(settings, corpus, windows_nll, {})
    nll = TOKENS[: 6 * 33 : 33] / 10
    assert seen == [4, 2]
    assert found["validation_loss"] == pytest.approx(nll.mean())
    assert found["validation_stderr"] == pytest.approx(nll.std(ddof=1) / math.sqrt(6))
    assert found["validation_bits_per_byte"] == pytest.approx(nll.mean() / math.log(2) / 2)
    one = loop.validate(tiny(evaluate_windows=1), corpus, windows_nll, {})
    assert one["validation_stderr"] == 0


def test_the_log_has_a_line_per_step_and_per_validation(trained) -> None:
    """log.jsonl: loss, gradient norm, rate, tokens and speed of each step, validation with its error, and what was reported."""
    path, _ = trained
    lines = checkpoint.read_log(path)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert [line["tokens"] for line in steps] == [128 * step for step in range(1, 9)]
    assert all(line["tokens_per_second"] > 0 and line["gradient_norm"] > 0 for line in steps)
    assert steps[0]["learning_rate"] == 0 and steps[2]["learning_rate"] == pytest.approx(1e-2)
    validations = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in validations] == [4, 8]
    assert all(line["validation_stderr"] > 0 for line in validations)
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)


def test_a_run_keeps_the_newest_checkpoints_and_the_best(trained) -> None:
    """Random tokens are learnt by heart, so what was validated last, at step 8, is the best one."""
    saved = checkpoint.Checkpoints(trained[0])
    assert saved.steps() == [6, 8] or saved.steps() == [4, 6, 8]
    losses = {
        line["step"]: line["validation_loss"] for line in checkpoint.read_log(trained[0]) if "validation_loss" in line
    }
    assert saved.best() == min(losses, key=lambda step: losses[step])


def test_a_finished_run_stays_as_it_is(trained) -> None:
    """Going on with it trains no step, writes no line, and gives back its last state."""
    path, state = trained
    before = (path / "log.jsonl").read_bytes()
    assert same(fit(path), state)
    assert (path / "log.jsonl").read_bytes() == before


class Crash(Exception):
    pass


class Watched:
    """A number of a step that notes when it is looked at."""

    def __init__(self, events: list[str], what: str):
        self.events, self.what = events, what

    def __array__(self, dtype=None, copy=None):
        self.events.append(self.what)
        return np.float32(1)


def test_a_step_is_looked_at_while_the_next_one_runs(tmp_path: Path, monkeypatch, unchecked) -> None:
    """So the device never waits for Python; but before a state is validated or saved, the numbers of its own step were seen."""
    events = []

    def make_step(settings, mesh):
        def step(state, number, rows):
            np.testing.assert_array_equal(rows, data.batch(TOKENS, 0, number, 4, 32))
            events.append(f"step {number + 1}")
            watched = Watched(events, f"look {number + 1}")
            return state, {"loss": watched, "gradient_norm": 1, "learning_rate": 1, "parameter_norm": 1}

        return step

    monkeypatch.setattr(loop, "make_step", make_step)
    monkeypatch.setattr(loop, "validate", lambda *_: events.append("validate") or {"validation_loss": 1.0})
    save = checkpoint.Saver.save
    monkeypatch.setattr(checkpoint.Saver, "save", lambda *given: events.append("save") or save(*given))
    fit(tmp_path, tiny(steps=7, evaluate_every=3, checkpoint_every=5))
    assert ", ".join(events) == (
        "step 1, step 2, look 1, step 3, look 2, look 3, validate, "
        "step 4, step 5, look 4, look 5, save, step 6, look 6, validate, step 7, look 7, validate, save"
    )


@pytest.mark.slow
def test_checkpoints_are_written_by_the_clock_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 20 seconds and a minute between checkpoints: at the first step after a minute, and again a minute after that."""
    clock = [0.0]
    saved = []
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(checkpoint.Saver, "save", lambda self, step, *rest: saved.append(step))

    monkeypatch.setattr(loop._Log, "_trained", lambda self, step, values: clock.append(clock.pop() + 20))
    for minutes, expected in ((1.0, [5, 8]), (0.0, [8])):
        saved.clear()
        clock[0] = 0.0
        path = tmp_path / str(minutes)
        fit(path, tiny(checkpoint_every=100, evaluate_every=100, checkpoint_minutes=minutes))
        assert saved == expected


def test_a_second_interrupt_is_one(tmp_path: Path) -> None:
    """The first lets the step end and saves it; the second is a KeyboardInterrupt there and then, and saves nothing."""

    def report(step, line):
        if step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "twice", tiny(checkpoint_every=100), report)
    assert checkpoint.Checkpoints(tmp_path / "twice").steps() == []

    def once(step, line):
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(loop.Interrupted):
        fit(tmp_path / "once", tiny(checkpoint_every=100), once)
    (step,) = checkpoint.Checkpoints(tmp_path / "once").steps()
    assert 3 <= step <= 4


@pytest.mark.slow
def test_a_run_is_extended_from_its_checkpoint(tmp_path: Path) -> None:
    """More steps: from where it was, with the same moments and the next batches, by the schedule of the new length; two ways to get there agree."""
    fit(tmp_path / "run", tiny(steps=4))
    shutil.copytree(tmp_path / "run", tmp_path / "by hand")
    longer, told = tiny(steps=8), []
    state = fit(tmp_path / "run", longer, lambda step, line: told.append((step, line)))
    assert told[0][0] == 4 and {"loss", "validation_loss"} <= told[0][1].keys(), "first, what it has come to"
    rates = {line["step"]: line["learning_rate"] for line in checkpoint.read_log(tmp_path / "run") if "loss" in line}
    short, long = loop.learning_rate(tiny(steps=4).train), loop.learning_rate(longer.train)
    for step, rate in rates.items():
        assert rate == pytest.approx(float(jnp.asarray((short if step <= 4 else long)(step - 1))), rel=1e-5, abs=1e-9)
    assert rates[5] > 1.3 * rates[4], "it jumps up"
    step = compiled(longer, loop.data_mesh())
    abstract = jax.tree.map(loop._abstract, fresh(longer))
    by_hand = checkpoint.Checkpoints(tmp_path / "by hand").load(4, abstract)
    for number in range(4, 8):
        by_hand, _ = step(by_hand, number, jnp.asarray(data.batch(TOKENS, 0, number, 4, 32)))
    assert same(by_hand, state)


def test_more_steps_and_other_intervals_may_be_asked_for() -> None:
    """Nothing that the steps taken so far depended on, and no fewer steps."""
    allowed: list[dict] = [
        {},
        {"steps": 9},
        {"checkpoint_every": 1},
        {"evaluate_windows": 2, "checkpoint_minutes": 0.0},
    ]
    refused: list[dict] = [{"steps": 7}, {"steps": 9, "learning_rate": 0.1}, {"seed": 1}, {"batch_size": 8}]
    for changes in allowed:
        assert config.may_become(TINY, tiny(**changes))
    assert config.may_become(TINY, dataclasses.replace(TINY, data=config.DataConfig("file:elsewhere.txt")))
    for changes in refused:
        assert not config.may_become(TINY, tiny(**changes))
    assert not config.may_become(TINY, tiny(dropout=0.1))


def test_operations_are_counted_by_hand() -> None:
    """Per token: 6 a weight (the tied embedding once, as the head), and 12 · 32 channels · 32 tokens of attention."""
    weights = 64 * 32 + 32 * (32 + 16 + 16 + 32) + 2 * 32 * 64
    assert flops.per_token(TINY.model) == 6 * weights + 12 * 32 * 32
    untied = dataclasses.replace(TINY.model, tied=False, positions="learned", window=8)
    assert flops.per_token(untied) == 6 * weights + 12 * 32 * 8, (
        "what is looked up costs nothing, a window limits what is seen"
    )


def test_use_of_the_card_is_told_where_it_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU there is no share; on a card whose peak is known, it is what the model takes at this speed, over that."""
    assert flops.peak(["cpu"]) is None and flops.peak(["NVIDIA L4", "cpu"]) is None
    assert flops.peak(["NVIDIA L4"] * 2) == 242e12
    fit(tmp_path / "cpu")
    assert not any("mfu" in line for line in checkpoint.read_log(tmp_path / "cpu"))
    monkeypatch.setitem(flops.PEAK, jax.devices()[0].device_kind, 1e9)
    fit(tmp_path / "card")
    lines = [line for line in checkpoint.read_log(tmp_path / "card") if "loss" in line]
    for line in lines:
        rate = line["tokens_per_second"] * flops.per_token(TINY.model)
        assert line["mfu"] == pytest.approx(rate / 1e9, rel=1e-3, abs=1e-4)
        assert line["model_tflops_per_second"] == pytest.approx(rate / 1e12, rel=1e-3, abs=1e-6)


def test_log_lines_go_to_tensorboard(tmp_path: Path, monkeypatch) -> None:
    """The same numbers at the same steps, also after a crash and a new start in the same second, into files that others read."""
    pytest.importorskip("tensorboardX", reason="the extra [tensorboard] is not installed")
    files = importlib.import_module("tensorboardX.event_file_writer")
    monkeypatch.setattr(files, "time", types.SimpleNamespace(time=lambda: 1.8e9))
    event_of = importlib.import_module("tensorboardX.proto.event_pb2").Event.FromString

    def crash(step, line):
        if step == 5:
            raise Crash

    with pytest.raises(Crash):
        loop.fit(tmp_path, TINY, CORPUS, fresh(TINY), crash, track=("tensorboard",))
    loop.fit(tmp_path, TINY, CORPUS, fresh(TINY), lambda step, line: None, track=("tensorboard", "tensorboard"))
    found = {}
    for file in sorted((tmp_path / "tensorboard").iterdir()):
        content = file.read_bytes()
        while content:  # length in 8 bytes, its sum in 4, the event, its sum in 4
            length = int.from_bytes(content[:8], "little")
            event = event_of(content[12 : 12 + length])
            found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
            content = content[16 + length :]
    wanted = {(x["step"], name): x[name] for x in checkpoint.read_log(tmp_path) for name in x if name != "step"}
    assert found == {key: pytest.approx(value, rel=1e-6) for key, value in wanted.items()}


def test_log_lines_go_to_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run of theirs for one of ours, also when it is resumed; closed also when training fails."""
    said = []
    theirs = types.SimpleNamespace(
        log=lambda values, step: said.append((step, values)), finish=lambda: said.append("finish")
    )
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setattr(wandb, "init", lambda **given: said.append(given) or theirs, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    loop.fit(tmp_path, TINY, CORPUS, fresh(TINY), lambda step, line: None, track=("wandb",))
    begun, *lines, ended = said
    assert begun["id"] and begun["resume"] == "allow" and begun["config"]["train"]["steps"] == 8
    assert [{"step": step, **values} for step, values in lines] == checkpoint.read_log(tmp_path)
    assert ended == "finish"
    longer = tiny(steps=9)

    def crash(step, line):
        if step == 9:
            raise Crash

    with pytest.raises(Crash):
        loop.fit(tmp_path, longer, CORPUS, fresh(longer), crash, track=("wandb",))
    again = said[len(lines) + 2]
    assert again["id"] == begun["id"] and said[-1] == "finish"


def test_a_tracker_that_is_not_installed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to install, before anything is made."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = r"--track tensorboard takes the package tensorboardX: pip install 'kvcascade\[tensorboard\]'"
    with pytest.raises(BadInput, match=message):
        tracking.check(["tensorboard"])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_crash_and_a_new_start_change_nothing(tmp_path: Path, trained, dropout: float) -> None:
    """From a checkpoint written in the background while training went on: parameters, moments and losses bit for bit."""
    path, state = trained
    settings = tiny(dropout=dropout)
    if dropout:
        path = tmp_path / "whole"
        state = fit(path, settings)

    def crash(step, line):
        if step == 7:
            raise Crash

    with pytest.raises(Crash):
        fit(tmp_path / "cut", settings, crash)
    assert checkpoint.Checkpoints(tmp_path / "cut").steps()[-1] == 6
    with (tmp_path / "cut" / "log.jsonl").open("a") as log:
        log.write('{"step": 8, "loss": 1.0, "seconds": 9}\n{"step": 9, "lo')  # what a crash may leave
    assert same(fit(tmp_path / "cut", settings), state)
    clock = ("seconds", "tokens_per_second", "model_tflops_per_second")
    timeless = lambda lines: [{k: v for k, v in x.items() if k not in clock} for x in lines]
    assert timeless(checkpoint.read_log(tmp_path / "cut")) == timeless(checkpoint.read_log(path))


def test_saving_leaves_the_state_alone(trained) -> None:
    """The state has what the step returned and nothing of the checkpoint's, so the step is compiled once."""
    assert set(trained[1]) == {"params", "optimizer"}


def test_a_step_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving, validating and resuming in between change neither shapes nor structure."""
    traces = []
    original = gpt.nll

    def counting(settings, params, rows, dropout_key=None):
        traces.append(rows.shape)
        return original(settings, params, rows, dropout_key)

    monkeypatch.setattr(gpt, "nll", counting)
    monkeypatch.setattr(loop, "make_step", compiled.__wrapped__)
    fit(tmp_path / "run")
    assert len(traces) == 2, "once for the step, once for validation"


def test_a_nan_names_the_step_and_the_last_good_checkpoint(tmp_path: Path) -> None:
    """An absurd rate: the checkpoints from before stay, all finite, and the message says where to go on."""
    settings = tiny(learning_rate=1e25, warmup=4, steps=50, checkpoint_every=1, weight_decay=0.0)
    with pytest.raises(loop.Diverged) as stopped:
        fit(tmp_path, settings)
    steps = checkpoint.Checkpoints(tmp_path).steps()
    assert steps and f"at step {steps[-1] + 1};" in str(stopped.value)
    assert f"the last good checkpoint is of step {steps[-1]} in {tmp_path / 'checkpoints'}" in str(stopped.value)
    abstract = jax.tree.map(loop._abstract, fresh(settings))
    for step in steps:
        state = checkpoint.Checkpoints(tmp_path).load(step, abstract)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_a_poisoned_parameter_is_told_at_the_first_step(tmp_path: Path) -> None:
    """Nothing is saved, and the message says that there is no checkpoint."""
    state = fresh(TINY)
    state["params"]["embed"]["weight"] = state["params"]["embed"]["weight"].at[0, 0].set(jnp.nan)
    with pytest.raises(loop.Diverged, match="the loss is nan .* at step 1; there is no checkpoint yet"):
        loop.fit(tmp_path, tiny(checkpoint_every=1), CORPUS, state, lambda step, line: None)
    assert checkpoint.Checkpoints(tmp_path).steps() == []


def test_a_finite_loss_with_a_nan_gradient_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss says nothing yet, but the parameters after the step are lost."""
    original = gpt.nll

    def kinked(settings, params, rows, dropout_key=None):
        return original(settings, params, rows, dropout_key) + jnp.sqrt(0 * params["norm"]["scale"].sum())

    monkeypatch.setattr(gpt, "nll", kinked)
    monkeypatch.setattr(loop, "make_step", compiled.__wrapped__)
    with pytest.raises(loop.Diverged, match="norm of the parameters nan at step 1; there is no checkpoint yet"):
        fit(tmp_path, tiny(checkpoint_every=1))
    assert checkpoint.Checkpoints(tmp_path).steps() == []


def test_what_does_not_fit_is_told_before_training(tmp_path: Path) -> None:
    """A batch that the devices and microbatches cannot share, and texts too short for their windows."""
    mesh = loop.data_mesh()
    loop.check(TINY, CORPUS, mesh)
    short = dataclasses.replace(CORPUS, validation=TOKENS[:100])
    with pytest.raises(BadInput, match="4 windows of 33 tokens were asked for, but the text has 3"):
        loop.fit(tmp_path, TINY, short, fresh(TINY), lambda step, line: None)
    with pytest.raises(BadInput, match="the text has 20 tokens, and one window takes 33"):
        loop.check(TINY, dataclasses.replace(CORPUS, train=TOKENS[:20]), mesh)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"accumulation": 3},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"clip": -1.0},
        {"warmup": -1},
        {"weight_decay": -0.1},
        {"final": math.inf},
        {"seed": -1},
        {"seed": 2**40},
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(changes: dict) -> None:
    """BadInput naming the setting."""
    with pytest.raises(BadInput, match=f"train.{next(iter(changes))}"):
        dataclasses.replace(TINY.train, **changes)


def test_settings_come_back_from_json() -> None:
    """As config.json keeps them; and every preset is whole."""
    for settings in (*config.PRESETS.values(), TINY):
        content = json.loads(json.dumps(config.as_dict(settings)))
        assert config.from_dict(content, "here") == settings
        assert config.differences(settings, settings) == []
    assert config.differences(TINY, tiny(steps=9)) == ["train.steps: 8 and 9"]


def test_yaml_numbers_without_a_dot_are_numbers(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-3 as a string; a learning rate is written so all the same."""
    file = tmp_path / "a.yaml"
    file.write_text("train: {learning_rate: 1e-3, clip: 2}\nmodel: {rope_base: 5000}\n")
    settings = config.load(str(file))
    assert (settings.train.learning_rate, settings.train.clip, settings.model.rope_base) == (1e-3, 2.0, 5000.0)


TWO_DEVICES = """
import sys
from pathlib import Path
import jax

sys.path.append(sys.argv[1])
from test_train import fit, tiny

assert jax.local_device_count() == 2
for accumulation in (1, 2):
    fit(Path(sys.argv[2]) / str(accumulation), tiny(accumulation=accumulation))
"""


@pytest.mark.slow
def test_two_devices_train_as_one(tmp_path: Path, trained) -> None:
    """Each of two CPU devices takes half of every batch, in one or two microbatches, and the losses are those of one device."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-W", "error", "-c", TWO_DEVICES, str(Path(__file__).parent), str(tmp_path)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    for kind, count in (("loss", 8), ("validation_loss", 2)):
        one, *others = (
            [line[kind] for line in checkpoint.read_log(path) if kind in line]
            for path in (trained[0], tmp_path / "1", tmp_path / "2")
        )
        assert len(one) == count
        for two in others:
            np.testing.assert_allclose(two, one, atol=1e-5)
