# pyright: reportMissingImports=false
"""What `make ray` runs: a toy measured by tasks on Ray; two replicas of it on Ray Serve, the answers of one process, and one replica that dies."""

import concurrent.futures
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

ray = pytest.importorskip("ray")
from ray import serve  # noqa: E402

from kvcascade.cache.spec import parse  # noqa: E402
from kvcascade.eval import record_files  # noqa: E402
from kvcascade.eval.records import Evaluation  # noqa: E402
from kvcascade.eval.search import options  # noqa: E402
from kvcascade.model import generate  # noqa: E402
from kvcascade.scripts import cli  # noqa: E402
from kvcascade.scripts.replicas import application  # noqa: E402
from kvcascade.train.run import open_model  # noqa: E402

PROMPTS = [
    f"the {word} sat on the {other}" for word in ("cat", "dog", "sea", "mat") for other in ("cat", "dog", "sea", "mat")
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("the cat sat on the mat and looked at the sea. " * 4000)
    about = ["--config", "nano", "--train.steps", "40", "--data.tokenizer", "bytes", "--model.vocab", "256"]
    cli.main(["train", *about, "--data.source", f"file:{folder / 'text.txt'}", "--run", str(folder / "toy")])
    return folder / "toy"


@pytest.fixture(scope="module")
def client(run: Path) -> Iterator[openai.OpenAI]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    about = {
        "model": str(run),
        "cache": "full@f32 on blocks",
        "context": "128",
        "blocks": "96",
        "rows": "8",
        "tokens": "32",
        "replicas": "2",
    }
    serve.run(application(about), name="default", route_prefix="/")
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=4)
    serve.shutdown()
    ray.shutdown()


def test_measurements_on_ray_are_those_of_one_process(run: Path, tmp_path: Path, monkeypatch) -> None:
    """The leaderboard's scores, each by a task of the cluster, written down by the one that asked."""
    monkeypatch.setattr(options, "METHODS", ("random", "heavy"))
    monkeypatch.setattr(options, "PRESETS", {"streaming": "sink 4 | recent 124"})
    text, found = run.parent / "text.txt", {}
    common = ["--model", str(run), "--data", f"file:{text}", "--context", "32", "--windows", "4", "--budget", "50%"]
    for place in ("processes", "ray"):
        out = tmp_path / f"{place}.jsonl"
        cli.main(
            ["leaderboard", *common, "--measure", "fidelity", "--finalists", "0", "--on", place, "--out", str(out)]
        )
        scores = [each for each in record_files.read(out) if isinstance(each, Evaluation)]
        found[place] = {(each.cache, each.kind): each.nll_windows for each in scores}
    assert found["ray"] == found["processes"] and len(found["ray"]) > 5


def answer(client: openai.OpenAI, name: str, prompt: str, stream: bool = False) -> str:
    create: Any = client.completions.create
    found = create(model=name, prompt=prompt, max_tokens=40, temperature=0, stream=stream)
    return "".join(chunk.choices[0].text for chunk in found) if stream else found.choices[0].text


def replicas() -> list[str]:
    states = serve.status().applications["default"].deployments["replica"].replica_states
    return [str(state) for state, count in states.items() for _ in range(count)]


def workers() -> list[int]:
    found = subprocess.run(["pgrep", "-f", "ray::ServeReplica:default:replica"], capture_output=True, text=True).stdout
    return [int(number) for number in found.split()]


def test_answers_are_those_of_one_process_and_a_replica_that_dies_is_replaced(run: Path, client: openai.OpenAI) -> None:
    model = open_model(str(run))
    name = client.models.list().data[0].id
    want = {}
    for prompt in PROMPTS:
        empty = generate.empty_cache(model.config, parse("full@f32"), 1, 128)
        steps = generate.generate(model.config, model.params, empty, [model.encode(prompt)], 40)
        want[prompt] = model.encoding.decode([token for new, _ in steps for token in new[:, 0].tolist()][:40])
    assert len(workers()) == 2
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for stream in (False, True):
            assert (
                dict(
                    zip(
                        PROMPTS,
                        pool.map(lambda prompt, s=stream: answer(client, name, prompt, s), PROMPTS),
                        strict=True,
                    )
                )
                == want
            )
        # Of 16 prompts each went to the one of two replicas that had it.
        create: Any = client.completions.create
        again = [create(model=name, prompt=prompt, max_tokens=1) for prompt in PROMPTS]
        assert {each.usage.prompt_tokens_details.cached_tokens for each in again} == {16}
        with pytest.raises(openai.BadRequestError, match="context"):
            answer(client, name, "x" * 500)
        first, _ = before = workers()
        os.kill(first, signal.SIGKILL)
        assert dict(zip(PROMPTS, pool.map(lambda prompt: answer(client, name, prompt), PROMPTS), strict=True)) == want
    end = time.monotonic() + 120
    while not (len(workers()) == 2 and {*workers()} != {*before} and replicas().count("RUNNING") == 2):
        assert time.monotonic() < end, (workers(), before, replicas())
        time.sleep(0.5)
    assert answer(client, name, PROMPTS[0]) == want[PROMPTS[0]]
