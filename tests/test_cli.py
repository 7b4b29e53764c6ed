"""The command as a user meets it: help, bad input in one line with status 2, and nothing left behind."""

import asyncio
import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tensorstore
import yaml

from kvcascade.eval.search import options
from kvcascade.scripts import cli

SETTINGS = {
    "model": {"layers": 1, "width": 32, "heads": 4, "kv_heads": 2, "mlp": 64, "vocab": 256, "context": 32},
    "data": {"source": "file:text.txt", "tokenizer": "bytes"},
    "train": {"steps": 2, "batch_size": 2, "warmup": 1, "evaluate_every": 2, "evaluate_windows": 2,
              "checkpoint_every": 2, "log_every": 1},
}  # fmt: skip


def changed(**sections: dict) -> str:
    """A YAML file's text: the settings above with some replaced."""
    return yaml.safe_dump({name: part | sections.get(name, {}) for name, part in SETTINGS.items()})


def run(*arguments: str) -> int:
    """The command's exit status."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache_with_kernels) -> Path:
    """A folder with a text, settings and a trained run."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text("".join(f"the query {i} meets {i * i} keys.\n" for i in range(200)))
    (folder / "tiny.yaml").write_text(changed())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("KVCASCADE_CACHE", str(cache_with_kernels(folder / "cache")))
        cli.main(["train", "--config", "tiny.yaml", "--run", "run"])
    shutil.rmtree(folder / "cache")
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_with_kernels) -> Path:
    """A copy of that folder to work in, with some bad files beside."""
    folder = tmp_path / "here"
    shutil.copytree(trained, folder)
    bad = {
        "empty.txt": "",
        "blank.txt": " \n\n \n",
        "short.txt": "Too short to train on.\n",
        "latin.txt": "Größe\n".encode("latin-1"),
        "list.yaml": "[1, 2]",
        "syntax.yaml": "model: {layers: 1",
        "section.yaml": "modle: {layers: 1}",
        "setting.yaml": "model: {layer: 1}",
        "type.yaml": "model: {layers: two}",
        "heads.yaml": changed(model={"kv_heads": 3}),
        "vocab.yaml": changed(model={"vocab": 300}),
        "batch.yaml": changed(train={"accumulation": 4}),
        "long.yaml": changed(model={"context": 5000}),
        "windows.yaml": changed(train={"evaluate_windows": 500}),
        "tokenizer.yaml": changed(data={"tokenizer": "byts"}),
    }
    for name, source in {
        "missing": "none.txt",
        "empty": "empty.txt",
        "blank": "blank.txt",
        "short": "short.txt",
    }.items():
        bad[f"data-{name}.yaml"] = changed(data={"source": f"file:{source}"})
    bad["data-latin.yaml"] = changed(data={"source": "file:latin.txt"})
    for name, content in bad.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.chdir(folder)
    monkeypatch.setenv("KVCASCADE_CACHE", str(cache_with_kernels(tmp_path / "cache")))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


EVALUATE = "evaluate --model run --context 16 --sequences 2 --cache"
BAD = {
    # what is typed: a part of the one line that is said
    "trian": "no command 'trian'; did you mean 'train'?",
    "frobnicate": "no command 'frobnicate'; there are study, train",
    "--model run": "no command '--model'",
    "train --config toyy": "no preset 'toyy'; did you mean 'toy'?",
    "train --config none.yaml": "none.yaml: No such file or directory",
    "train --config run": "no preset 'run'; there are nano, toy, small, or FILE.yaml",
    "train --config list.yaml": "list.yaml: a configuration has the sections model, data, train",
    "train --config syntax.yaml": "syntax.yaml is not YAML:",
    "train --config section.yaml": "section.yaml: unknown section 'modle'",
    "train --config setting.yaml": "setting.yaml: unknown setting model.layer; there are layers, width",
    "train --config type.yaml": "type.yaml: model.layers must be int, not 'two'",
    "train --config heads.yaml": "model.kv-heads 3 must divide model.heads 4",
    "train --config batch.yaml": "train.accumulation 4 must divide train.batch-size 2",
    "train --config tiny.yaml --run new --model.kv-heads 3": "model.kv-heads 3 must divide model.heads 4",
    "train --config tiny.yaml --run new --model.weights int8": "model.weights is int8; a model is trained in float32",
    "train --config vocab.yaml --run new": "model.vocab is 300, but the tokenizer bytes has 256 tokens",
    "train --config tokenizer.yaml --run new": "unknown tokenizer 'byts'",
    "train --config data-missing.yaml --run new": "none.txt: there is no such file",
    "train --config data-empty.yaml --run new": "empty.txt: the file is empty",
    "train --config data-blank.yaml --run new": "blank.txt: there is no text in it",
    "train --config data-short.yaml --run new": "the text has 21 tokens, and one window takes 33",
    "train --config data-latin.yaml --run new": "latin.txt: not a text in UTF-8",
    "train --config long.yaml --run new": "2 windows of 5001 tokens were asked for, but the text has 0",
    "train --config windows.yaml --run new": "500 windows of 33 tokens were asked for, but the text has",
    "train --config tiny.yaml --run run": "run holds a run already; go on with it by --resume",
    "train --run none --resume": "none holds no run to resume; start one without --resume",
    "train --run run --resume --train.steps 1": "run was started with other settings: train.steps: 2 and 1; --resume takes",
    "train --run run --resume --train.seed 1": "run was started with other settings: train.seed: 0 and 1",
    "train --run run --resume --train.steps 9 --train.evaluate-windows 500": "500 windows of 33 tokens were asked for",
    "train --run run --resume --train.steps -2x": "--train.steps",
    "train --config tiny.yaml --run new --track tensorbored": "--track",
    "train --config nano --run run --resume": "run was started with other settings: model.layers: 1 and 2",
    "convert none --kv-heads 1 --run new": "none holds no run",
    "convert run --kv-heads 3 --run new": "2 KV heads cannot be pooled to 3",
    "convert run --kv-heads 0 --run new": "--kv-heads is 0; it must be at least 1",
    "convert run --kv-heads 1 --run run": "run holds a run already",
    "convert run --kv-heads 1 --run new --share 1.5": "it must be above 0 and at most 1",
    f"{EVALUATE} 'sink 4 | recnt 60'": "character 10: no policy 'recnt'; did you mean 'recent'?, in 'sink 4 | →recnt← 60'",
    f"{EVALUATE} 'sink 4 | recent 12@int5'": "character 20: no codec 'int5'; did you mean 'int8'?",
    f"{EVALUATE} sink": "cache spec, character 1",
    "evaluate --model none --cache full": "none holds no run",
    "evaluate --model text.txt --cache full": "text.txt holds no run",
    "evaluate --model run --context 64 --cache full": "a context of 64 tokens is longer than the model's 32",
    f"{EVALUATE} full --prefix 16": "a prefix of 16 tokens leaves nothing to score in a context of 16",
    f"{EVALUATE} full --data file:none.txt": "none.txt: there is no such file",
    f"{EVALUATE} full --data file:empty.txt": "empty.txt: the file is empty",
    f"{EVALUATE} full --data file:short.txt": "2 windows of 16 tokens were asked for, but the text has 1",
    f"{EVALUATE} full --out text.txt/records.jsonl": "text.txt",
    "generate --model none --prompt a": "none holds no run",
    "generate --model run --prompt a --tokens 40": "more than the model's context of 32",
    "generate --model run --prompt a --tokens 0": "--tokens is 0; it must be at least 1",
    "generate --model run --prompt a --temperature -1": "temperature must be at least 0",
    "generate --model run --prompt a --tokens 8 --cache sink": "cache spec, character 1",
    "generate --model run --prompt '' --tokens 8": "the prompt is empty",
    "generate --model run --prompt a --tokens 8 --cache 'hinted 8' --keep 0:4=900": "a priority is from 0 to 100, not 900",
    "generate --model run --prompt a --tokens 8 --keep 0:4=90": "no tier of the cache reads hints",
    "compare run none": "none holds no run",
    f"{EVALUATE} full --sequences 0": "--sequences is 0; it must be at least 1",
    f"{EVALUATE} full --batch -3": "--batch is -3; it must be at least 1",
    f"{EVALUATE} full --context 1": "--context is 1; it must be at least 2",
    f"{EVALUATE} full --context two": "Error parsing --context: invalid literal for int() with base 10: 'two'",
    f"{EVALUATE} full --batch 99999999999999999999": "it must be at least 1 and at most 2147483647",
    f"{EVALUATE} 'recent 99999999999999999999'": "for 2 rows takes 14,400,000,000,000,000,001,904 bytes, and there are",
    f"{EVALUATE} 'recent 3000000000000'": "recent 3000000000000 for 2 rows takes",
    "compare run --sequences 0": "--sequences is 0",
    "convert run --kv-heads 1 --run new --share nan": "--share is nan; it must be above 0 and at most 1",
    "generate --model run --prompt a --seed 99999999999999999999": "it must be at least 0 and below 2^32",
    "retrieve --model run --depth 0 inf": "--depth is inf; it must be at least 0 and at most 1",
    "evaluate --modl run --cache full": "Missing from kvcascade evaluate: --model",
    "stream --model run --cache full --tokens 5": "--tokens is 5; it must be at least 1024",
}


@pytest.mark.parametrize("typed", BAD)
def test_bad_input_is_one_line_and_status_2(here: Path, capfd: pytest.CaptureFixture, typed: str) -> None:
    """One line on stderr that starts with the command's name, nothing on stdout, and no file made or changed."""
    before = files(here)
    assert run(*shlex.split(typed)) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("kvcascade: ") and err.count("\n") == 1, err
    assert BAD[typed] in err
    assert files(here) == before
    assert not (here / "new").exists()


def test_a_corrupt_checkpoint_is_one_line(here: Path, capfd: pytest.CaptureFixture) -> None:
    """Through the command as well: which file, and status 2."""
    weights = max((here / "run" / "checkpoints" / "2" / "params").rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    for typed in (
        "generate --model run --prompt a --tokens 4",
        f"{EVALUATE} full",
        "convert run --kv-heads 1 --run new",
    ):
        assert run(*typed.split()) == 2
        err = capfd.readouterr().err
        assert (
            err.startswith("kvcascade: the checkpoint run/checkpoints/2 cannot be read: params/")
            and err.count("\n") == 1
        )
    assert not (here / "new").exists()


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_everywhere(capfd: pytest.CaptureFixture, command: str) -> None:
    """`kvcascade`, and each command with --help, print on stdout and exit with 0."""
    for flag in ("-h", "--help"):
        assert run(*command.split(), flag) == 0
        out, err = capfd.readouterr()
        assert "usage: kvcascade" in out and err == ""


def test_no_command_is_a_request_for_help(capfd: pytest.CaptureFixture) -> None:
    """A bare `kvcascade` lists the commands."""
    assert run() == 0
    out = capfd.readouterr().out
    assert all(f"  {command} " in out for command in cli.COMMANDS)


@pytest.mark.parametrize(
    ("typed", "suggestion"),
    [
        ("train --resum", "--resume"),
        ("train --model.kv-hads 2", "--model.kv-heads"),
        ("train --confg nano", "--config"),
        ("evaluate --modl run --cache full", "--model"),
        ("convert run --kv-head 2 --run new", "--kv-heads"),
    ],
)
def test_a_wrong_flag_gets_a_suggestion(capfd: pytest.CaptureFixture, typed: str, suggestion: str) -> None:
    """Status 2, the flag that was meant on stderr, and nothing on stdout."""
    assert run(*typed.split()) == 2
    out, err = capfd.readouterr()
    assert suggestion in err.replace("--run new", "") and out == ""


@pytest.mark.parametrize("typed", ["train --config", "train --run", "train --model.layers two", "train --resume=1"])
def test_a_flag_without_its_value(capfd: pytest.CaptureFixture, typed: str) -> None:
    """Status 2, and no traceback."""
    assert run(*typed.split()) == 2
    assert "Traceback" not in capfd.readouterr().err


def test_without_lm_eval_the_extra_is_named(monkeypatch, tmp_path, capfd: pytest.CaptureFixture) -> None:
    """Status 2 and one line; the file of records is not made."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    ours = {"kvcascade.eval.quality.harness", "kvcascade.scripts.harness"}
    for name in [name for name in sys.modules if name.startswith("lm_eval.") or name in ours]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("kvcascade.eval.quality.harness", raising=False)
    monkeypatch.chdir(tmp_path)
    assert run("harness", "--model", "run", "--tasks", "wikitext", "--out", "records.jsonl") == 2
    assert capfd.readouterr().err == "kvcascade: lm-eval is not installed: pip install 'kvcascade[harness]'\n"
    assert not [*tmp_path.iterdir()]


def test_a_finished_run_can_be_resumed(here: Path, capfd: pytest.CaptureFixture) -> None:
    """It says that it is done, also with the settings that it was started with."""
    for typed in ("train --run run --resume", "train --config tiny.yaml --run run --resume --train.steps 2"):
        cli.main(shlex.split(typed))
        assert "trained 2 steps; the run is in run" in capfd.readouterr().out


def test_a_finished_run_shows_that_it_is(here: Path, capfd: pytest.CaptureFixture) -> None:
    """Not a task of which nothing is done, and what it came to."""
    cli.main(shlex.split("train --run run --resume"))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("run: 2/2 (100%)  loss ") and "validation" in line


@pytest.mark.parametrize("wanted", ["4", "2x"])
def test_a_run_is_given_more_steps(here: Path, capfd: pytest.CaptureFixture, wanted: str) -> None:
    """By a number or as a multiple; config.json has the new ones, and from where on; another stop and start keeps them."""
    typed = f"train --run run --resume --train.steps {wanted} --train.checkpoint-every 1"
    cli.main(shlex.split(typed))
    assert "trained 4 steps" in capfd.readouterr().out
    content = json.loads((here / "run" / "config.json").read_text())
    (before,) = content["earlier"]
    assert (before["until_step"], before["train"]["steps"], before["train"]["checkpoint_every"]) == (2, 2, 2)
    assert (content["train"]["steps"], content["train"]["checkpoint_every"]) == (4, 1)
    lines = [json.loads(line) for line in (here / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    cli.main(shlex.split("train --run run --resume"))
    assert "trained 4 steps" in capfd.readouterr().out
    assert json.loads((here / "run" / "config.json").read_text()) == content
    cli.main(shlex.split("evaluate --model run --context 16 --sequences 2 --cache full"))


STUCK = """
import ctypes, signal, time
from kvcascade.scripts import cli, train

def main(arguments):
    signal.signal(signal.SIGINT, lambda *_: None)  # as if Python never got to it
    print("in", flush=True)
    ctypes.CDLL(None).usleep(60_000_000)  # a compilation: no Python runs, and it starts again after a signal
    ctypes.CDLL(None).usleep(60_000_000)
    ctypes.CDLL(None).usleep(60_000_000)

train.main = main
signal.signal(signal.SIGINT, signal.default_int_handler)
cli.main(["train"])
"""


@pytest.mark.slow
def test_a_second_ctrl_c_ends_whatever_runs(here: Path) -> None:
    """Also within native code, where Python learns of no signal: status 130, in about a second."""
    child = subprocess.Popen([sys.executable, "-c", STUCK], stdout=-1, stderr=-1, text=True)
    assert child.stdout and child.stdout.readline() == "in\n"
    for _ in range(2):
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=20)
    assert (child.returncode, err) == (130, "kvcascade: stopped\n")


def test_a_run_finds_its_text_from_every_folder(here: Path, monkeypatch, capfd: pytest.CaptureFixture) -> None:
    """It was started on `file:text.txt`; elsewhere it is trained and evaluated all the same, and it is told where a text is that was moved."""
    elsewhere = here / "else" / "where"
    elsewhere.mkdir(parents=True)
    cli.main(shlex.split("train --config tiny.yaml --run new --train.steps 1"))
    monkeypatch.chdir(elsewhere)
    cli.main(shlex.split("train --run ../../new --resume"))
    assert "trained 1 steps" in capfd.readouterr().out
    (here / "text.txt").rename(elsewhere / "text.txt")
    assert run(*shlex.split("train --run ../../new --resume")) == 2
    cli.main(shlex.split("train --run ../../new --resume --data.source file:text.txt"))
    monkeypatch.chdir(here)
    cli.main(shlex.split("evaluate --model new --context 16 --sequences 2 --cache full"))


def test_a_run_without_a_checkpoint_starts_again(here: Path, capfd: pytest.CaptureFixture) -> None:
    """A start that was killed early leaves a configuration: --resume trains from the first step, to the same end."""
    log = here / "run" / "log.jsonl"
    losses = lambda: [json.loads(line).get("loss") for line in log.read_text().splitlines()]
    before = losses()
    shutil.rmtree(here / "run" / "checkpoints")
    cli.main(["train", "--run", "run", "--resume"])
    assert "trained 2 steps" in capfd.readouterr().out
    assert losses() == before and (here / "run" / "checkpoints" / "2").is_dir()


def test_converting_makes_a_run_that_trains(here: Path, capfd: pytest.CaptureFixture) -> None:
    """The command says how to go on; that works, and the result can be evaluated into a file of records."""
    cli.main(shlex.split("convert run --kv-heads 1 --run new --share 0.5"))
    out = capfd.readouterr().out
    assert "new has 1 KV heads" in out and "(1 steps)" in out
    cli.main(shlex.split(out.split("with: kvcascade ")[1]))
    cli.main(shlex.split("evaluate --model new --context 16 --sequences 2 --cache full --out records.jsonl"))
    (record,) = (json.loads(line) for line in (here / "records.jsonl").read_text().splitlines())
    assert record["model"] == "new" and record["tokens"] == 30


@pytest.mark.slow
def test_as_a_program_it_says_one_line(here: Path) -> None:
    """The installed command: imports are quiet, bad input is one line, and a divergence has a status of its own."""
    program = [sys.executable, "-W", "error", "-c", "from kvcascade.scripts.cli import main; main()"]
    bad = subprocess.run([*program, "generate", "--model", "none", "--prompt", "a"], capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "kvcascade: none holds no run: there is no config.json in it\n"
    absurd = "train --config tiny.yaml --run new --train.learning-rate 1e38 --train.steps 20 --train.warmup 0"
    diverged = subprocess.run([*program, *absurd.split()], capture_output=True, text=True)
    assert diverged.returncode == 1
    *_, told = diverged.stderr.strip().splitlines()
    assert told.startswith("kvcascade: the loss is ") and "checkpoint" in told
    assert "Traceback" not in diverged.stderr


def test_ctrl_c_while_importing_is_one_line(here: Path) -> None:
    """Before there is anything to save, the command just stops: status 130."""
    program = "import os, signal, importlib; from kvcascade.scripts import cli\n" + (
        "signal.signal(signal.SIGINT, signal.default_int_handler);"  # ignored in the background of a shell
        "importlib.import_module = lambda *names: signal.raise_signal(signal.SIGINT); cli.main(['train'])"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ)
    assert (child.returncode, child.stderr) == (128 + signal.SIGINT, "kvcascade: stopped\n")


def test_only_late_writes_of_a_failed_checkpoint_are_silent(monkeypatch, capfd: pytest.CaptureFixture) -> None:
    """A tensorstore write that ends after orbax closed its event loop is not told on stderr; another lost exception is."""
    told = functools.partial(cli._unraisable, others=sys.__unraisablehook__)
    for hook, seen in ((sys.__unraisablehook__, True), (told, False)):
        monkeypatch.setattr(sys, "unraisablehook", hook)
        promise, write = tensorstore.Promise.new()
        loop = asyncio.new_event_loop()

        async def begin(write: tensorstore.Future = write) -> None:
            next(write.__await__())

        loop.run_until_complete(begin())
        loop.close()
        promise.set_result(1)
        assert ("Event loop is closed" in capfd.readouterr().err) == seen

    class Lost:
        def __del__(self) -> None:
            raise ValueError("lost")

    Lost()
    assert "ValueError: lost" in capfd.readouterr().err


@pytest.mark.slow
def test_compiled_programs_are_kept_for_the_next_time(here: Path, cache_with_kernels) -> None:
    """The second run finds what the first one compiled, and keeps nothing new; nothing is kept where compiling is timed."""
    cache = cache_with_kernels(here / "kept")
    command = [
        sys.executable,
        "-c",
        "from kvcascade.scripts.cli import main; main()",
        "generate",
        "--model",
        "run",
        "--prompt",
        "the",
    ]
    quick = {"KVCASCADE_CACHE": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMP")} | quick
    programs = []
    for _ in range(2):
        done = subprocess.run([*command, "--tokens", "4"], cwd=here, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = [*(cache / "programs").glob("jit_*-cache"), *(cache / "executables").iterdir()]
        programs.append({(path.name, path.stat().st_size) for path in found})
    assert programs[0] == programs[1] and any(name.startswith("decode_steps") for name, _ in programs[0])
    assert {"bench", "study", "compare"} <= set(cli.COLD) <= set(cli.COMMANDS)


def test_a_run_is_known_by_its_shape(here: Path, capsys):
    """A layer, two KV heads of width 8: keys, values and positions of a token; none of its weights is read."""
    shutil.rmtree(here / "run" / "checkpoints")
    cli.main(["memory", "--model", "run", "--cache", "full", "--context", "32", "--weights", "bfloat16"])
    assert f" {2 * (2 * 8 * 2 + 4)} " in capsys.readouterr().out


CALIBRATE = [
    *("calibrate", "--model", "run", "--data", "file:text.txt", "--windows", "4", "--context", "16"),
    *("--to", "run.safetensors"),
]


@pytest.mark.slow
def test_a_search_ends_with_a_cache_that_fits_and_is_scored_on_what_was_held_out(
    here: Path, capsys, monkeypatch
) -> None:
    """A winner within the budget, at least as good as every rival where it was tuned; what is recorded is not done again."""
    monkeypatch.setattr(options, "SHARES", (0.25,))
    monkeypatch.setattr(options, "POLICIES", ("observed", "recent"))
    monkeypatch.setattr(options, "CALIBRATED", ("int8", "int4m", "lloyd3m/lloyd2m"))
    monkeypatch.setattr(options, "METHODS", ("random", "heavy"))
    cli.main(CALIBRATE)
    arguments = [
        "tune",
        "--model",
        "run",
        "--data",
        "file:text.txt",
        "--budget",
        "40%",
        "--context",
        "16",
        "--windows",
        "8",
    ]
    arguments += ["--calibration", "run.safetensors", "--out", "tune.jsonl"]
    cli.main(arguments)
    lines = [*map(json.loads, Path("tune.jsonl").read_text().splitlines())]
    tuned, *held = (each for each in lines if each["kind"] != "curve")
    assert tuned["kind"] == "tune" and tuned["kv_bytes"] <= 0.4 * tuned["kv_bytes_full"]
    assert {tuned["cache"], "full"} <= {each["cache"] for each in held}
    assert all(each["kv_bytes"] == each["kv_bytes_predicted"] and each["traces"] == 1 for each in held)
    deepest = max(len(each["losses"]) for each in tuned["candidates"])
    best = min(each["losses"][-1] for each in tuned["candidates"] if len(each["losses"]) == deepest)
    assert next(each for each in tuned["candidates"] if each["cache"] == tuned["cache"])["losses"][-1] == best
    cli.main(arguments)
    assert len(Path("tune.jsonl").read_text().splitlines()) == len(lines)
    assert tuned["cache"] in capsys.readouterr().out
    cli.main(["report", "tune.jsonl", "--page", "tune.html"])
    assert "Searches for the best cache" in Path("tune.html").read_text("utf-8")


@pytest.mark.slow
def test_codecs_are_measured_where_a_cache_uses_them(here: Path, capsys) -> None:
    """What more bits and a model's own basis do; a codec that needs to know the model says so."""
    cli.main(CALIBRATE)
    names = ["f32", "bf16", "int8", "int4", "int4m", "int2", "int8/int2"]
    arguments = ["codecs", "--model", "run", "--data", "file:text.txt", "--context", "16", "--out", "codecs.jsonl"]
    cli.main([*arguments, "--calibration", "run.safetensors", "--codec", *names])
    found = {each["codec"]: each for each in map(json.loads, Path("codecs.jsonl").read_text().splitlines())}
    assert [*found] == names
    output = [found[name]["output_error"] for name in ("f32", "bf16", "int8", "int4", "int2")]
    assert output == sorted(output) and output[0] < 1e-6
    assert found["int4m"]["key_error"] < found["int4"]["key_error"]
    mixed = found["int8/int2"]
    assert mixed["key_error"] == found["int8"]["key_error"] and mixed["value_error"] == found["int2"]["value_error"]
    assert mixed["values_alone"] == pytest.approx(found["int2"]["values_alone"])
    assert found["int4"]["vector_bytes"] == 2 * (8 // 2 + 4)
    cli.main(["report", "codecs.jsonl", "--page", "codecs.html"])
    assert "What codecs do" in Path("codecs.html").read_text("utf-8")
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--codec", "int4s"])
    assert "int4s needs a --calibration" in capsys.readouterr().err


@pytest.mark.slow
def test_a_leaderboard_ranks_what_is_there_at_so_many_bytes(here: Path, capsys, monkeypatch) -> None:
    """Two processes score what takes part, a search's winner with it; the finalists are measured more; what is recorded is not done again."""
    monkeypatch.setattr(options, "METHODS", ("random", "heavy"))
    monkeypatch.setattr(options, "PRESETS", {"streaming": "sink 4 | recent 124"})
    common = ["--model", "run", "--data", "file:text.txt", "--context", "16", "--windows", "8", "--out", "board.jsonl"]
    monkeypatch.setattr(options, "SHARES", (0.25,))
    monkeypatch.setattr(options, "POLICIES", ("recent",))
    monkeypatch.setattr(options, "PLAIN", ("int8", "lloyd2h"))
    cli.main(["tune", *common, "--budget", "60%"])
    arguments = ["leaderboard", *common, "--budget", "70%", "60%", "--finalists", "1", "--page", "board.html"]
    arguments += ["--measure", "fidelity", "prompt"]
    cli.main([*arguments, "--processes", "2"])
    lines = Path("board.jsonl").read_text().splitlines()
    found = [*map(json.loads, lines)]
    (board,) = (each for each in found if each["kind"] == "board")
    names = {(each["name"], each["budget"]) for each in board["entries"]}
    assert {("tuned", 0.6), ("method: random", 0.6), ("method: heavy", 0.7)} <= names
    entries = {each["cache"] for each in board["entries"]} | {"full"}
    assert entries <= {each["cache"] for each in found if each["kind"] == "evaluate"}
    assert "full" in {each["cache"] for each in found if each["kind"] == "prompt"}
    said = capsys.readouterr().out
    assert "At most 60% of the bytes" in said and "method: heavy" in said
    cli.main(arguments)
    assert Path("board.jsonl").read_text().splitlines() == lines
    page = Path("board.html").read_text("utf-8")
    assert "<h2>Leaderboard</h2>" in page and "same top-1" in page
