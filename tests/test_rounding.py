"""Weights rounded to four bits: GPTQ as it is written down column by column, scales of AWQ that cancel, and directories that read back."""

import dataclasses
import json
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st

from kvcascade.cache.errors import BadInput
from kvcascade.kernels import linear
from kvcascade.model import gpt, pretrained, rounding, written
from kvcascade.scripts import cli

pytestmark = pytest.mark.usefixtures("optimised")

forward = jax.jit(gpt.forward, static_argnums=0)
ROWS = np.random.default_rng(3).integers(0, 256, (4, 32))
KINDS = ["llama", "qwen2", "qwen3", "mistral"]


def correlated(rng, N: int, I: int) -> np.ndarray:
    return (rng.normal(size=(N, I // 4)) @ rng.normal(size=(I // 4, I)) + 0.3 * rng.normal(size=(N, I))).astype(
        np.float32
    )


@given(st.integers(0, 20), st.sampled_from([1e-4, 1.0, 1e3]), st.floats(-3, 3))
def test_the_nearest_code_is_half_a_step_away(seed, size, middle):
    weight = (size * (np.random.default_rng(seed).normal(size=(6, 64)) + middle)).astype(np.float32)
    found = rounding.rtn(weight, 32)
    step = found.scale_OG.repeat(32, 1)
    # Zero is rounded to a whole step, and lies among the codes.
    assert (np.abs(found.dense() - weight) <= 1.01 * step).all()
    assert found.codes_OI.max() <= 15 and (found.zero_OG >= 1).all() and (found.zero_OG <= 15).all()
    assert (found.scale_OG == found.scale_OG.astype(np.float16)).all()


def slowly(weight, hessian, group):
    """GPTQ with the errors of every column spread at once, the inverse Hessian of the columns left updated by elimination (eq. 2 and 3)."""
    weight, O, I = weight.astype(np.float64).copy(), *weight.shape
    hessian = hessian.astype(np.float64) + rounding.DAMPING * np.diag(hessian).mean() * np.eye(I)
    inverse, found, scale, zero = np.linalg.inv(hessian), np.zeros((O, I)), np.zeros(O), np.zeros(O)
    for i in range(I):
        if i % group == 0:
            scale, zero = rounding.steps(weight[:, i : i + group].astype(np.float32))
        found[:, i] = scale * (np.clip(np.round(weight[:, i] / scale) + zero, 0, 15) - zero)
        error = (weight[:, i] - found[:, i]) / inverse[i, i]
        weight[:, i + 1 :] -= np.outer(error, inverse[i, i + 1 :])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return found


@pytest.mark.parametrize(("I", "group"), [(64, 32), (192, 64), (288, 96), (256, 256)])
def test_gptq_is_that_of_one_column_at_a_time(I, group):
    """Also where a group begins in one block of columns and ends in the next."""
    rng = np.random.default_rng(I)
    x = correlated(rng, 4 * I, I)
    weight, hessian = rng.normal(size=(16, I)).astype(np.float32), x.T @ x
    found, wanted = rounding.gptq(weight, hessian, group).dense(), slowly(weight, hessian, group)
    assert (np.abs(found - wanted) < 1e-4).mean() > 0.97  # a tie may fall otherwise, and its row then goes on otherwise
    error = lambda dense: np.square(x @ (dense - weight).T).sum()
    assert error(found) < 0.6 * error(rounding.rtn(weight, group).dense())
    assert error(found) < 1.05 * error(wanted)
    assert np.isclose(rounding.loss(found - weight, hessian), error(found), rtol=1e-3)


def test_gptq_where_an_input_is_never_used():
    rng = np.random.default_rng(0)
    x = correlated(rng, 100, 64)
    x[:, 5] = 0
    assert np.isfinite(rounding.gptq(rng.normal(size=(8, 64)).astype(np.float32), x.T @ x, 32).dense()).all()


def test_awq_looks_where_inputs_are_large():
    """A few inputs of a hundred times the size: their columns err less than to the nearest, and the products too."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 64)).astype(np.float32)
    x[:, [3, 40]] *= 100
    weight, hessian = rng.normal(size=(16, 64)).astype(np.float32), x.T @ x
    scale = rounding.awq_scale([weight], hessian, np.abs(x).mean(0), 32)
    assert scale[[3, 40]].min() > 2 * np.delete(scale, [3, 40]).max()
    clip = rounding.awq_clip(weight * scale, hessian / np.outer(scale, scale), 32)
    assert 0.5 < clip.min() < clip.max() == 1
    error = lambda dense: np.square(x @ (dense - weight).T).sum()
    plain, scaled = rounding.rtn(weight, 32), rounding.rtn(weight * scale, 32)
    clipped = rounding.rtn(weight * scale, 32, clip)
    assert error(scaled.dense() / scale) < 0.5 * error(plain.dense())
    assert error(clipped.dense() / scale) < error(scaled.dense() / scale)


@pytest.fixture
def folder(request, tmp_path, monkeypatch):
    """A tiny model whose matrices have whole groups of 32."""
    monkeypatch.setattr(tiny_models, "MLP", 64)
    monkeypatch.setitem(
        tiny_models.CONFIGS, request.param, tiny_models.CONFIGS[request.param] | {"intermediate_size": 64}
    )
    return tiny_models.write(request.param, tmp_path / "plain")


class Exactly(rounding.Rounded):
    """Codes that lose nothing."""

    def __init__(self, weight, group, clip=1.0):
        self.weight, self.scale_OG = weight, np.ones((len(weight), 1))

    def dense(self):
        return self.weight * self.scale_OG


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_scales_of_awq_cancel(folder, monkeypatch):
    """With codes that lose nothing, the model says what it said, though its norms and matrices have changed."""
    model = pretrained.load(str(folder))
    monkeypatch.setattr(rounding, "rtn", Exactly)
    monkeypatch.setattr(rounding, "awq_scale", lambda weights, hessian, mean, group: 0.5 + mean / mean.max())
    monkeypatch.setattr(rounding, "awq_clip", lambda *_: 1.0)
    params, _ = rounding.quantize(model.config, model.params, ROWS, "awq", 32)
    changed = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, model.params)
    layer = changed["layers"][1]
    assert (
        min(
            layer["attention_norm"]["scale"], layer["mlp_norm"]["scale"], layer["down"]["weight"], layer["up"]["weight"]
        )
        > 0.01
    )
    assert changed["embed"]["weight"] == 0
    want = forward(model.config, model.params, jnp.asarray(ROWS))
    got = forward(model.config, params, jnp.asarray(ROWS))
    np.testing.assert_allclose(got, want, atol=0.01 * float(jnp.std(want)))  # scales of 16 bits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "method"),
    [*zip(KINDS, ["awq", "gptq", "awq", "gptq"], strict=True), ("llama", "rtn")],
    indirect=["folder"],
)
def test_what_is_written_reads_back(folder, method, tmp_path):
    """The codes to the last bit, as int4 too; norms and the embedding in 16 bits; the tokeniser and where texts end; the same model."""
    model = pretrained.load(str(folder))
    told = []
    params, codes = rounding.quantize(model.config, model.params, ROWS, method, 32, lambda *counts: told.append(counts))
    assert told[-1] == (len(codes), len(codes)) == (7 * model.config.layers,) * 2
    # The first layer's products see the calibration text as it is; later ones see what rounding did.
    to = tmp_path / "small"
    size = written.write(to, dataclasses.replace(model, params=params), codes, 32)
    assert size == (to / "model.safetensors").stat().st_size
    exact, small = pretrained.load(str(to)), pretrained.load(str(to), weights="int4")
    for path, rounded in codes.items():
        _, layer, *parts = path.split(".")
        np.testing.assert_array_equal(_walk(exact.params["layers"][int(layer)], parts)["weight"], rounded.dense())
        matrix = {name: array for name, array in _walk(small.params["layers"][int(layer)], parts).items() if array.size}
        matrix.pop("bias", None)
        np.testing.assert_array_equal(linear.rows(matrix, inputs=rounded.codes_OI.shape[1]), rounded.dense())
    assert exact.config == model.config
    assert exact.end == model.end and exact.before == model.before
    assert exact.encode("def f(x): é") == model.encode("def f(x): é")
    want, got = (forward(model.config, each, jnp.asarray(ROWS)) for each in (params, exact.params))
    np.testing.assert_allclose(got, want, atol=0.02 * float(jnp.std(want)))


def _walk(tree, parts):
    for part in parts:
        tree = tree[part]
    return tree


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_later_matrices_see_what_earlier_ones_lost(folder, monkeypatch):
    """GPTQ's inputs of the second layer are those behind the rounded first one."""
    model, seen = pretrained.load(str(folder)), []
    real = rounding.gptq
    monkeypatch.setattr(
        rounding, "gptq", lambda weight, hessian, group: seen.append(hessian) or real(weight, hessian, group)
    )
    params, _ = rounding.quantize(model.config, model.params, ROWS, "gptq", 32)
    after: list = []
    monkeypatch.setattr(
        rounding, "gptq", lambda weight, hessian, group: after.append(hessian) or Exactly(weight, group)
    )
    rounding.quantize(model.config, params, ROWS, "gptq", 32)  # the rounded model's own inputs
    for got, want in zip(seen, after, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_command(folder, tmp_path, monkeypatch, capsys):
    """It writes a directory that `evaluate` reads, and a record with the perplexity that `evaluate` gives."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("calibration", "other"):
        (tmp_path / f"{name}.txt").write_text(" ".join(rng.choice(["def", "return", "lambda", "if", "else"], 2000)))
    common = "--data file:calibration.txt --held-out file:other.txt --context 32 --samples 16 --sequences 8 --out records.jsonl"
    for method in ("rtn", "gptq"):
        cli.main(shlex.split(f"quantize plain --to {method} --method {method} {common}"))
    out = capsys.readouterr().out
    rtn, gptq = map(json.loads, (tmp_path / "records.jsonl").read_text().splitlines())
    assert rtn["kind"] == "quantize" and rtn["ppl_before"] == gptq["ppl_before"]
    assert (
        gptq["parameter_bytes_after"] < gptq["parameter_bytes_before"]
        and gptq["file_bytes"] == (tmp_path / "gptq/model.safetensors").stat().st_size
    )
    assert f"{gptq['ppl_after']:.3f}" in out
    cli.main(
        shlex.split(
            "evaluate --model gptq --weights int4 --data file:other.txt --context 32 --sequences 8 --cache full --out again.jsonl"
        )
    )
    assert json.loads((tmp_path / "again.jsonl").read_text().splitlines()[0])["ppl"] == pytest.approx(
        gptq["ppl_after"], rel=1e-6
    )


@pytest.mark.parametrize("folder", ["llama", "gpt2", "phi4", "mixtral"], indirect=True)
def test_refused(folder, tmp_path, monkeypatch, capsys):
    """Everything that is wrong is said before the work, and nothing is left half-written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("def " * 3000)
    common = "quantize plain --data file:text.txt --context 32 --samples 16 --sequences 2"
    (tmp_path / "there").mkdir()
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    faults = {
        f"{common} --to there --held-out file:other.txt": "there already",
        f"{common} --to new": "--held-out",
        f"{common} --to new --held-out file:text.txt": "--held-out",
        f"{common} --to new --held-out file:missing.txt": "missing.txt",
        f"{common} --to new --held-out file:other.txt --group 40": "multiple of 32",
        f"{common} --to new --held-out file:other.txt --group 64": "groups of 64 do not fit",
        f"{common} --to new --held-out file:other.txt --samples 4000": "fewer than --samples",
    }
    if kind != "llama":
        faults = {f"{common} --to new --held-out file:other.txt": "cannot be written"}
    (tmp_path / "other.txt").write_text("return " * 300)
    before = sorted(path.name for path in tmp_path.iterdir())
    for typed, words in faults.items():
        with pytest.raises(SystemExit) as stopped:
            cli.main(shlex.split(typed))
        assert stopped.value.code == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert words in said[-1], said
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    with pytest.raises(BadInput, match="no method"):
        rounding.quantize(pretrained.load("plain").config, {}, ROWS, "best", 32)


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch):
    model = pretrained.load(str(folder))
    params, codes = rounding.quantize(model.config, model.params, ROWS, "rtn", 32)

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(written, "_texts", full)
    with pytest.raises(OSError, match="no space"):
        written.write(tmp_path / "small", dataclasses.replace(model, params=params), codes, 32)
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]
