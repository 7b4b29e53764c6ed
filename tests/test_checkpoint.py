"""A run's folder: what is kept, what is found, and what is said when something is damaged or the disk is full."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval.quality import perplexity
from kvcascade.model import tokenizer
from kvcascade.model.config import ModelConfig
from kvcascade.train import checkpoint, loop, run
from kvcascade.train.checkpoint import BEST, LATEST, Checkpoints, Saver
from kvcascade.train.config import DataConfig, RunConfig, TrainConfig

COMMAND = [sys.executable, "-c", "from kvcascade.scripts.cli import main; main()"]
MODEL = ModelConfig(layers=1, width=32, heads=4, kv_heads=2, mlp=64, vocab=256, context=32)
TRAIN = TrainConfig(
    steps=3, batch_size=2, warmup=1, evaluate_every=1, evaluate_windows=2, checkpoint_every=1, log_every=1
)


def state(value: float) -> checkpoint.State:
    return {"params": {"a": jnp.full((3, 5), value), "b": {"c": jnp.full(2, value)}}, "optimizer": {"n": jnp.zeros(())}}


ABSTRACT = jax.tree.map(loop._abstract, state(0.0))


def value(path: Path, step: int) -> float:
    loaded = Checkpoints(path).load(step, ABSTRACT)
    assert loaded.keys() == {"params", "optimizer"}
    return float(loaded["params"]["a"][0, 0])


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, cache_with_kernels) -> Path:
    """A run of three steps with a checkpoint of each; the newest two and the best are kept."""
    folder = tmp_path_factory.mktemp("pristine")
    (folder / "text.txt").write_text("".join(f"slot {i} holds the key of token {i * i}.\n" for i in range(200)))
    path = folder / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVCASCADE_CACHE", str(cache_with_kernels(folder / "cache")))
        run.start(path, RunConfig(MODEL, DataConfig(f"file:{folder / 'text.txt'}", "bytes"), TRAIN))
        run.resume(path, lambda step, line: None)
    return path


@pytest.fixture
def copy(pristine: Path, tmp_path: Path) -> Path:
    """The same run, to be damaged."""
    return Path(shutil.copytree(pristine, tmp_path / "run"))


@pytest.mark.parametrize(
    ("losses", "kept", "best"),
    [
        ([3.0, 1.0, 2.0, 4.0, 5.0], [2, 4, 5], 2),
        ([5.0, 4.0, 3.0, 2.0, 1.0], [4, 5], 5),
        ([None, None, None, None], [3, 4], 4),
        ([2.0, None, 3.0, None, None], [1, 4, 5], 1),
        ([1.0, 1.0, 1.0, 1.0], [1, 3, 4], 1),
    ],
    ids=str,
)
def test_keeps_the_newest_two_and_the_best(tmp_path: Path, losses: list, kept: list[int], best: int) -> None:
    """Whatever the order of the losses, also without any; another process sees the same."""
    with Saver(tmp_path) as saver:
        for step, loss in enumerate(losses, 1):
            saver.save(step, state(step), loss)
        saver.wait()
        assert (saver.steps(), saver.best()) == (kept, best)
    assert (Checkpoints(tmp_path).steps(), Checkpoints(tmp_path).best()) == (kept, best)
    assert [value(tmp_path, step) for step in kept] == kept


def test_losses_on_other_windows_are_not_compared(tmp_path: Path) -> None:
    """A run that goes on with more windows has its best among what was validated on so many."""
    with Saver(tmp_path) as saver:
        for step, (loss, windows) in enumerate([(1.0, 4), (3.0, 8), (2.0, 8), (5.0, 8), (6.0, 8)], 1):
            saver.save(step, state(step), loss, windows)
        saver.wait()
        assert (saver.steps(), saver.best()) == ([3, 4, 5], 3)
    assert Checkpoints(tmp_path).best() == 3


def test_the_best_is_kept_over_several_starts(tmp_path: Path) -> None:
    """A second process knows the losses that the first one wrote."""
    for step, loss in enumerate([2.0, 1.0, 3.0, 4.0, 5.0, 6.0], 1):
        with Saver(tmp_path) as saver:
            saver.save(step, state(step), loss)
    assert Checkpoints(tmp_path).steps() == [2, 5, 6]


def test_saving_takes_the_values_of_its_moment(tmp_path: Path) -> None:
    """What happens to the arrays after `save` has returned, even donation, does not reach the checkpoint."""
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    now = {"params": {"a": jnp.zeros((512, 512)), "b": {"c": jnp.zeros(2)}}, "optimizer": {"n": jnp.zeros(())}}
    abstract = jax.tree.map(loop._abstract, now)
    with Saver(tmp_path) as saver:
        saver.save(1, now, 1.0)
        assert now.keys() == {"params", "optimizer"}
        for _ in range(50):
            now = add(now)
    assert not any(x.any() for x in jax.tree.leaves(Checkpoints(tmp_path).load(1, abstract)))


def test_a_run_is_loaded_by_its_best_or_its_latest(pristine: Path, copy: Path) -> None:
    """The best by validation loss, by default; the other checkpoints by name."""
    losses = {x["step"]: x["validation_loss"] for x in checkpoint.read_log(pristine) if "validation_loss" in x}
    latest, best = checkpoint.load_run(pristine, LATEST), checkpoint.load_run(pristine)
    assert latest.step == 3 and best.step == min(losses, key=lambda step: losses[step])
    assert latest.config.model == MODEL and latest.encoding.name == "bytes"
    metrics = copy / "checkpoints" / "2" / "metrics" / "metrics"
    (copy / "checkpoints" / "2" / checkpoint.SUMS).unlink()
    metrics.write_text(json.dumps({"validation_loss": 0.1}))
    assert checkpoint.load_run(copy, BEST).step == 2


def test_a_loaded_model_is_compiled_once(pristine: Path) -> None:
    """A decode step behind a fresh cache is compiled once for a loaded model, not again for the cache that comes out of it."""
    run, rows = checkpoint.load_run(pristine), np.zeros((2, 8), np.int32)
    perplexity.score(run.config.model, run.params, parse("recent 3"), rows, batch=2)
    step = perplexity._compiled(run.config.model, (parse("recent 3"),), 2, 8)
    assert step.traces == 1 and step.run._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]


def damages(file: Path) -> list[bytes | None]:
    """What may become of a file: gone, empty, cut in half, a bit wrong at its start or in its middle."""
    content = file.read_bytes()
    flipped = lambda at: content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    return [None, b"", content[: len(content) // 2], flipped(0), flipped(len(content) // 2)]


def test_damage_never_goes_unnoticed(copy: Path, capfd: pytest.CaptureFixture) -> None:
    """Any damage to any file of a checkpoint's model: the right parameters or BadInput in one line, and nothing on stderr."""
    folder = copy / "checkpoints" / "3"
    expected = [np.asarray(x) for x in jax.tree.leaves(checkpoint.load_run(copy, LATEST).params)]
    told = []
    files = [file for file in folder.rglob("*") if file.is_file() and "optimizer" not in file.parts]
    for file in files:
        content = file.read_bytes()
        for damaged in damages(file):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            try:
                found = jax.tree.leaves(checkpoint.load_run(copy, LATEST).params)
                assert all((a == b).all() for a, b in zip(found, expected, strict=True)), file
            except BadInput as error:
                told.append(str(error))
            file.write_bytes(content)
    inside = sum("params" in file.parts for file in files)
    assert len(told) >= 5 * inside >= 40
    for line in told:
        assert line.startswith(f"the checkpoint {folder} cannot be read: ") and "\n" not in line and len(line) < 400
        assert line.endswith("is missing or damaged; other checkpoints there: 2") or checkpoint.SUMS in line
    assert capfd.readouterr().err == ""


def test_a_damaged_optimizer_stops_training_but_not_evaluation(copy: Path) -> None:
    """The model can still be used; going on from it would not be the same training."""
    weights = max((copy / "checkpoints" / "3" / "optimizer").rglob("d/*"), key=lambda file: file.stat().st_size)
    weights.write_bytes(damages(weights)[-1] or b"")
    assert checkpoint.load_run(copy, LATEST).step == 3
    with pytest.raises(BadInput, match="checkpoints/3 cannot be read: optimizer/.* other checkpoints there: 2"):
        run.resume(copy, lambda step, line: None)
    shutil.rmtree(copy / "checkpoints" / "3")
    run.resume(copy, lambda step, line: None)
    assert Checkpoints(copy).steps()[-1] == 3


def test_a_damaged_loss_is_told_before_training(copy: Path) -> None:
    """Which checkpoint is the best cannot be known any more; a checkpoint half deleted has none and does not matter."""
    metrics = copy / "checkpoints" / "2" / "metrics" / "metrics"
    metrics.unlink()
    assert checkpoint.load_run(copy).step == 3
    metrics.write_text('{"validation_loss": 9')
    for use in (lambda: checkpoint.load_run(copy), lambda: run.resume(copy, lambda step, line: None)):
        with pytest.raises(BadInput, match="checkpoints/2 cannot be read: metrics/metrics is missing or damaged"):
            use()


def test_another_shape_is_not_taken_for_damage(copy: Path) -> None:
    """config.json edited to a wider model: told as that."""
    file = copy / "config.json"
    content = json.loads(file.read_text())
    content["model"]["mlp"] = 128
    file.write_text(json.dumps(content))
    with pytest.raises(
        BadInput, match="checkpoints/3 cannot be read: it is not of the model that config.json describes"
    ):
        checkpoint.load_run(copy, LATEST)


def test_half_written_checkpoints_are_ignored_and_cleared(copy: Path) -> None:
    """Reading leaves alone what a training run may be writing this moment; the next training run clears it away."""
    half = copy / "checkpoints" / "4.orbax-checkpoint-tmp"
    shutil.copytree(copy / "checkpoints" / "3", half)
    assert checkpoint.load_run(copy, LATEST).step == 3
    assert half.is_dir()
    with Saver(copy):
        pass
    assert not half.exists()
    assert Checkpoints(copy).steps() == [2, 3]


HOLDER = """
import sys, time
from pathlib import Path
from kvcascade.train import checkpoint

with checkpoint.writing(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_has_one_writer(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another process trains it, training, starting and converting are refused, and what that one is writing stays; killed, it is free."""
    half = copy / "checkpoints" / "4.orbax-checkpoint-tmp"
    half.mkdir()
    (copy / "config.json").rename(copy / "aside")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(copy)], stdin=-1, stdout=-1, text=True)
    assert holder.stdout and holder.stdout.readline() == "held\n"
    with pytest.raises(BadInput, match="run is being trained by another process; wait for it, or name another --run"):
        Saver(copy)
    with pytest.raises(BadInput, match="is being trained by another process"):
        checkpoint.create(copy, RunConfig(MODEL), tokenizer.bytes_encoding(), None)
    (copy / "aside").rename(copy / "config.json")
    monkeypatch.setattr(run, "load_corpus", None)  # told before the text is read
    with pytest.raises(BadInput, match="is being trained by another process"):
        run.resume(copy, lambda step, line: None)
    assert half.is_dir() and Checkpoints(copy).steps() == [2, 3]
    assert checkpoint.load_run(copy, LATEST).step == 3, "whoever reads is not held up"
    holder.kill()
    holder.communicate()
    with Saver(copy), Saver(copy):
        assert not half.exists()


@pytest.fixture
def moved(copy: Path, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That copy with a text of its own beside it, named without a folder when it was started."""
    monkeypatch.setenv("KVCASCADE_CACHE", str(tmp_path / "cache"))
    shutil.copy(pristine.parent / "text.txt", tmp_path / "text.txt")
    content = json.loads((copy / "config.json").read_text())
    content["data"]["source"] = f"file:{tmp_path}/text.txt"
    (copy / "config.json").write_text(json.dumps(content))
    return copy


def test_a_changed_text_is_refused(moved: Path) -> None:
    """Neither trained on nor evaluated on in silence; a run that noted no fingerprint is read as ever."""
    text, report = moved.parent / "text.txt", lambda step, line: None
    original = text.read_text()
    text.write_text(original.replace("slot 150 ", "slot 151 "))
    model, before = run.open_model(str(moved)), (moved / "log.jsonl").read_bytes()
    for use in (lambda: run.resume(moved, report), lambda: run.evaluation_text(model, None)):
        with pytest.raises(
            BadInput, match=f"file:{text} is not the text any more that {moved} was started on; put that back"
        ):
            use()
    assert (moved / "log.jsonl").read_bytes() == before
    with pytest.raises(BadInput, match="is not the text any more"):
        run.evaluation_text(model, f"file:{text.parent}/run/../text.txt")
    content = json.loads((moved / "config.json").read_text())
    del content["text"]
    (moved / "config.json").write_text(json.dumps(content))
    run.resume(moved, report)
    assert len(run.evaluation_text(run.open_model(str(moved)), None)[0]) > 0
    text.write_text(original)


def test_the_standard_library_of_another_python_is_refused(moved: Path) -> None:
    """The text that `stdlib` names is not the same everywhere; what it names there may well be, and is then fine."""
    content = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(content | {"data": {"source": "stdlib", "tokenizer": "bytes"}}))
    with pytest.raises(BadInput, match="stdlib is not the text any more that .* was started on; use that Python"):
        run.load_corpus(moved)


def test_what_a_run_was_trained_on_is_known_by_content(moved: Path, monkeypatch, caplog) -> None:
    """Its text under any name gives the validation split, with a word; a text that holds parts of it is told loudly, another is not."""
    caplog.set_level("INFO", "kvcascade")
    folder, model = moved.parent, run.open_model(str(moved))
    own, _ = run.evaluation_text(model, None)
    monkeypatch.chdir(folder)
    assert not caplog.records
    original = (folder / "text.txt").read_text()
    (folder / "other name.txt").write_text(original)
    for name in ("text.txt", "./text.txt", f"{folder}/text.txt", "other name.txt"):
        np.testing.assert_array_equal(run.evaluation_text(model, f"file:{name}")[0], own)
        (told,) = caplog.messages
        assert told == f"file:{name} is the text that {moved} was trained on: of it, the validation split is taken"
        caplog.clear()
    unlike = "".join(f"{i * 7919 % 1000} heavy hitters, {i * 104729 % 977} sinks\n" for i in range(200))
    (folder / "longer.txt").write_text(unlike + original[: len(unlike)])
    assert len(run.evaluation_text(model, "file:longer.txt")[0]) > 1.9 * len(unlike)
    (told,) = caplog.messages
    assert told == f"WARNING: {moved} was trained on 50% of file:longer.txt, word for word"
    caplog.clear()
    (folder / "unlike.txt").write_text(unlike)
    assert len(run.evaluation_text(model, "file:unlike.txt")[0]) > 0.9 * len(unlike)
    assert not caplog.records
    (folder / "text.txt").unlink()
    np.testing.assert_array_equal(run.evaluation_text(model, "file:other name.txt")[0], own)
    (told,) = caplog.messages
    assert "of it, the validation split is taken" in told
    caplog.clear()
    run.evaluation_text(model, "file:longer.txt")
    assert "cannot be told" in caplog.messages[0] and "there is no such file" in caplog.messages[0]


def test_a_swapped_tokenizer_is_detected(copy: Path) -> None:
    """Another tokenizer.json of the same size gives other tokens their names: told, not generated from."""
    shuffled = {bytes([255 - byte]): byte for byte in range(256)}
    other = tokenizer.tiktoken.Encoding("bytes", pat_str="(?s:.)", mergeable_ranks=shuffled, special_tokens={})
    tokenizer.save(other, copy / "tokenizer.json")
    with pytest.raises(BadInput, match="was trained with another tokenizer than the one in its tokenizer.json"):
        checkpoint.load_run(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match="cannot read the tokenizer"):
        checkpoint.load_run(copy)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"tokenizer": "x", "model": 3}', "\x00\x00"], ids=repr)
def test_a_damaged_configuration_is_one_line(copy: Path, content: str) -> None:
    """Whatever is in config.json."""
    (copy / "config.json").write_text(content)
    with pytest.raises(BadInput):
        checkpoint.open_run(copy)


def test_folders_that_hold_no_run(tmp_path: Path, pristine: Path) -> None:
    """Nothing there, a file, a run without checkpoints: each told as what it is."""
    file = tmp_path / "file"
    file.write_text("")
    for path in (tmp_path / "none", tmp_path, file):
        with pytest.raises(BadInput, match="holds no run: there is no config.json in it"):
            checkpoint.load_run(path)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(pristine / name, tmp_path / name)
    with pytest.raises(BadInput, match="holds no complete checkpoint yet"):
        checkpoint.load_run(tmp_path)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["config.json", "file", "tokenizer.json"]


def test_no_run_is_written_over(copy: Path) -> None:
    """A folder with a run, or with checkpoints that have lost their config.json, is not free."""
    for reason in ("holds a run already", "holds checkpoints, but no config.json"):
        with pytest.raises(BadInput, match=reason):
            checkpoint.check_free(copy)
        (copy / "config.json").unlink(missing_ok=True)
    checkpoint.check_free(copy.parent)


def test_a_run_that_cannot_be_made_leaves_nothing(pristine: Path, tmp_path: Path, monkeypatch) -> None:
    """The configuration comes last: a conversion that fails before is not half a run that would train from nothing."""
    trained = checkpoint.load_run(pristine)

    def full(path, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, "write_whole", full)
        with pytest.raises(BadInput, match="cannot make the run .*: No space left on device"):
            run.convert(pristine, tmp_path / "pooled", 1, "mean", 0.5)
    assert not (tmp_path / "pooled").exists()
    steps = run.convert(pristine, tmp_path / "pooled", 1, "mean", 0.5)
    pooled = checkpoint.load_run(tmp_path / "pooled")
    assert steps == pooled.config.train.steps == 2 and pooled.step == 0
    assert pooled.config.model.kv_heads == 1 and trained.config.model.kv_heads == 2
    np.testing.assert_array_equal(
        pooled.params["embed"]["weight"], checkpoint.load_run(pristine, LATEST).params["embed"]["weight"]
    )
    losses = []
    monkeypatch.setenv("KVCASCADE_CACHE", str(tmp_path / "cache"))
    run.resume(tmp_path / "pooled", lambda step, line: losses.append(line.get("loss")))
    assert Checkpoints(tmp_path / "pooled").steps()[-1] == 2
    assert losses[0] < np.log(256) - 0.05, "uptraining starts from the trained model"


def test_a_log_with_broken_lines_is_read(tmp_path: Path) -> None:
    """A line cut short, one that is not a line of ours, bytes that are no text: left out."""
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n{"st\n[]\n3\n{"loss": 1}\n\xff\x00\n{"step": 2}\n{"step"')
    assert [line["step"] for line in checkpoint.read_log(tmp_path)] == [1, 2]
    assert checkpoint.read_log(tmp_path / "none") == []


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 600 kB, room for two or three checkpoints of the tiny model."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if not mounted or mounted.returncode:
        pytest.skip(
            f"a small tmpfs cannot be mounted here: {mounted.stderr.strip() if mounted else 'no mount command'}"
        )
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_loses_nothing(small_disk: Path, pristine: Path, tmp_path: Path, cache_with_kernels) -> None:
    """Training stops with one line and status 2 that names the last good checkpoint; with room again, it goes on."""
    settings = {
        "model": {"layers": 1, "width": 32, "heads": 4, "kv_heads": 2, "mlp": 64, "vocab": 256, "context": 32},
        "data": {"source": f"file:{pristine.parent / 'text.txt'}", "tokenizer": "bytes"},
        "train": {"steps": 12, "batch_size": 2, "warmup": 1, "evaluate_every": 2, "evaluate_windows": 2,
                  "checkpoint_every": 2, "log_every": 1},
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(json.dumps(settings))
    path = small_disk / "run"
    environment = os.environ | {"KVCASCADE_CACHE": str(cache_with_kernels(tmp_path / "cache"))}
    first = [*COMMAND, "train", "--config", str(tmp_path / "tiny.yaml"), "--run", str(path)]
    (small_disk / "ballast").write_bytes(bytes(150_000))
    full = subprocess.run(first, env=environment, capture_output=True, text=True)
    kept = Checkpoints(path).steps()
    assert full.returncode == 2 and kept
    *_, told = full.stderr.strip().splitlines()
    safe = f"the last good checkpoint is of step {kept[-1]}"
    assert told == f"kvcascade: cannot write to {path}: the disk is full; {safe}"
    assert "Traceback" not in full.stderr and "Error" not in full.stderr
    assert checkpoint.load_run(path, LATEST).step == kept[-1]
    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=2000k", str(small_disk)], check=True)
    again = subprocess.run([*COMMAND, "train", "--run", str(path), "--resume"], env=environment, capture_output=True)
    assert again.returncode == 0, again.stderr
    steps = [line["step"] for line in checkpoint.read_log(path) if "loss" in line]
    assert steps == list(range(1, 13))
