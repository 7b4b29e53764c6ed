"""The training loop: what one step does, what a run writes, and when it stops."""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kvcascade.cache.errors import BadInput
from kvcascade.model import gpt
from kvcascade.model.config import ModelConfig
from kvcascade.train import checkpoint, config, loop
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
    timeless = lambda lines: [{k: v for k, v in x.items() if k not in ("seconds", "tokens_per_second")} for x in lines]
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
