"""What `make deploy` runs: two servers behind Debian's HAProxy, watched by Debian's Prometheus, by the files in deploy/; faults on purpose."""

import concurrent.futures
import contextlib
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from kvcascade.scripts.arguments import arguments_of
from kvcascade.scripts.serve import Args

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
TOOLS = ("haproxy", "prometheus", "promtool")
needs_tools = pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason=f"no {', '.join(TOOLS)}: Debian has them")
CACHE, BOUNDED = "full@f32 on blocks", "pending 8 | sink 4 | recent 24 | heavy 24@int8"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def get(url: str, timeout: float = 5) -> tuple[int, str]:
    """Status and body; 0 where nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def until(holds, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.1)


class Replica:
    """`kvcascade serve` in a process of its own, on a port that it keeps over restarts."""

    def __init__(self, run: Path, folder: Path, port: int | None = None, *more: str):
        self.port, self.log = port or free_port(), folder / f"server-{port or 'any'}.log"
        self.command = [
            sys.executable, "-c", "from kvcascade.scripts.cli import main; main()", "serve", "--model", str(run), "--cache", CACHE,
            "--cache", BOUNDED, "--speculate", "ngram",
            "--port", str(self.port), "--context", "128", "--blocks", "96", "--rows", "8", "--tokens", "32", "--drain", "20", *more,
        ]  # fmt: skip
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> "Replica":
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self.command, stderr=log, stdout=log)
        return self

    def ready(self) -> None:
        until(lambda: get(f"{self.url}/ready")[0] == 200, 600, f"{self.url} is ready: {self.log.read_text()[-2000:]}")

    def end(self, number: int = signal.SIGTERM, seconds: float = 30) -> int:
        assert self.process
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def figure(self, name: str, **labels: str) -> float:
        families = text_string_to_metric_families(get(f"{self.url}/metrics")[1])
        samples = [sample for family in families for sample in family.samples if sample.name == f"kvcascade:{name}"]
        return sum(each.value for each in samples if labels.items() <= each.labels.items())


@contextlib.contextmanager
def running(command: list[str], log: Path, **more) -> Iterator[subprocess.Popen]:
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, **more)
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A run of a few steps."""
    folder = tmp_path_factory.mktemp("run")
    text = folder / "text.txt"
    text.write_text("the cat sat on the mat and looked at the sea. " * 4000)
    main = "from kvcascade.scripts.cli import main; main()"
    about = [
        "--config",
        "nano",
        "--train.steps",
        "40",
        "--data.tokenizer",
        "bytes",
        "--model.vocab",
        "256",
        "--data.source",
        f"file:{text}",
        "--run",
        str(folder / "toy"),
    ]
    subprocess.run([sys.executable, "-c", main, "train", *about], check=True, capture_output=True)
    return folder / "toy"


@pytest.fixture(scope="module")
def replicas(run: Path, tmp_path_factory) -> Iterator[list[Replica]]:
    folder = tmp_path_factory.mktemp("replicas")
    found = [Replica(run, folder, free_port()).start() for _ in range(2)]
    for each in found:
        each.ready()
    yield found
    for each in found:
        if each.process and each.process.poll() is None:
            each.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def front(replicas: list[Replica], tmp_path_factory) -> Iterator[str]:
    """HAProxy by deploy/haproxy.cfg, but for where servers are found."""
    folder, port = tmp_path_factory.mktemp("haproxy"), free_port()
    content = (DEPLOY / "haproxy.cfg").read_text()
    servers = "\n".join(f"  server replica{i} 127.0.0.1:{each.port} check" for i, each in enumerate(replicas))
    content, count = re.subn(r"^  server-template .*$", servers, content, flags=re.MULTILINE)
    assert count == 1
    (folder / "haproxy.cfg").write_text(content)
    with running(
        ["haproxy", "-f", str(folder / "haproxy.cfg")], folder / "log", env=os.environ | {"LISTEN": f"127.0.0.1:{port}"}
    ):
        url = f"http://127.0.0.1:{port}"
        until(lambda: get(f"{url}/ready")[0] == 200, 30, "HAProxy finds its servers")
        yield url


def client(url: str, retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=retries, timeout=60)


def answer(who: openai.OpenAI, name: str, prompt: str, count: int = 24, cache: str = CACHE) -> str:
    about: dict = {"model": name, "max_tokens": count, "temperature": 0, "extra_body": {"cache": cache}}
    return who.completions.create(prompt=prompt, **about).choices[0].text


def name_of(replica: Replica) -> str:
    return json.loads(get(f"{replica.url}/v1/models")[1])["data"][0]["id"]


PROMPTS = [
    f"the {word} sat on the {other}" for word, other in itertools.product(("cat", "dog", "sea", "mat"), repeat=2)
]


@needs_tools
def test_requests_of_one_beginning_go_to_one_server(replicas: list[Replica], front: str) -> None:
    """The hit rate by deploy/haproxy.cfg against taking turns, on the same requests: conversations that share long beginnings."""
    name = name_of(replicas[0])
    trace = [(f"talk {index % 24:02}", index) for index in range(96)]
    random.Random(0).shuffle(trace)
    sums = lambda: [sum(each.figure(f"prefix_cache_{what}_total") for each in replicas) for what in ("hits", "queries")]
    rates = {}
    for way in ("affine", "turns"):
        before, urls = sums(), itertools.cycle([front] if way == "affine" else [each.url for each in replicas])
        with contextlib.ExitStack() as stack:
            clients = {url: stack.enter_context(client(url)) for url in {front, *(each.url for each in replicas)}}
            for word, index in trace:
                prompt = f"{way} {word} " * 7 + str(index)
                clients[next(urls)].completions.create(model=name, prompt=prompt, max_tokens=1, temperature=0)
        hits, asked = (after - earlier for after, earlier in zip(sums(), before, strict=True))
        rates[way] = hits / asked
    print(f"prefixes found: {rates['affine']:.1%} by the beginning, {rates['turns']:.1%} in turns", file=sys.stderr)
    assert all(each.figure("prompt_tokens_total") for each in replicas), "both servers have served"
    assert rates["affine"] > 1.2 * rates["turns"]


@needs_tools
def test_prometheus_scrapes_and_judges(replicas: list[Replica], front: str, tmp_path) -> None:
    """deploy/prometheus.yml, but for where servers are found; every query of the dashboard and of the alerts is answered, and names what there is."""
    for check in (["check", "rules", "alerts.yml"], ["check", "config", "--syntax-only", "prometheus.yml"]):
        subprocess.run(["promtool", *check], cwd=DEPLOY, check=True, capture_output=True)
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOY / "alerts.yml")]
    config["scrape_configs"] = [
        {
            "job_name": "kvcascade",
            "static_configs": [{"targets": [f"127.0.0.1:{each.port}" for each in replicas] + ["127.0.0.1:9"]}],
        }
    ]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    port, name = free_port(), name_of(replicas[0])
    command = [
        "prometheus", f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}", f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    ask = lambda query: json.loads(get(f"http://127.0.0.1:{port}/api/v1/query?query={urllib.parse.quote(query)}")[1])
    with running(command, tmp_path / "log"), client(front) as who:
        until(lambda: get(f"http://127.0.0.1:{port}/-/ready")[0] == 200, 30, "Prometheus is ready")
        until(lambda: len(ask('up{job="kvcascade"} == 1')["data"]["result"]) == 2, 30, "both are scraped")
        for prompt in PROMPTS[:6]:
            answer(who, name, prompt, 8)
        time.sleep(3)
        served = {
            sample.name
            for each in replicas
            for family in text_string_to_metric_families(get(f"{each.url}/metrics")[1])
            for sample in family.samples
        }
        board = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
        queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
        queries = [query.replace("$__rate_interval", "10s").replace("$model", ".*") for query in queries]
        rules = [
            rule["expr"]
            for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
            for rule in group["rules"]
        ]
        for query in queries + rules:
            assert set(re.findall(r"kvcascade:\w+", query)) <= served, query
            assert ask(query)["status"] == "success", query
        empty = [query for query in queries if not ask(query)["data"]["result"]]
        assert not empty, f"nothing is shown by {empty}"
        alerts = lambda: {
            (each["labels"]["alertname"], each["labels"].get("instance"), each["state"])
            for each in json.loads(get(f"http://127.0.0.1:{port}/api/v1/alerts")[1])["data"]["alerts"]
        }
        until(lambda: ("ServerDown", "127.0.0.1:9", "firing") in alerts(), 40, "the server that is not there is missed")
        assert {alert for alert, instance, _ in alerts() if instance != "127.0.0.1:9"} <= {"NothingFound"}


@needs_tools
@pytest.mark.parametrize("cache", [CACHE, BOUNDED])
def test_a_server_is_killed_and_nothing_wrong_is_served(cache: str, replicas: list[Replica], front: str) -> None:
    """kill -9 in the middle of streams: clients that try again get the same answers from the other; it comes back and is used again."""
    name = name_of(replicas[0])
    with client(replicas[0].url) as direct:
        want = {prompt: answer(direct, name, prompt, 60, cache) for prompt in PROMPTS}

    def stream(prompt: str) -> str:
        for _ in range(8):
            try:
                with client(front, retries=2) as who:
                    about: dict = {"max_tokens": 60, "temperature": 0, "extra_body": {"cache": cache}}
                    chunks = [*who.completions.create(model=name, prompt=prompt, stream=True, **about)]
                if chunks and chunks[-1].choices[0].finish_reason:
                    return "".join(chunk.choices[0].text for chunk in chunks)
            except (openai.APIError, OSError):
                time.sleep(0.3)
            except Exception as error:  # a connection that ends within a chunk
                if "peer closed" not in str(error) and "incomplete" not in str(error).lower():
                    raise
        raise AssertionError(f"{prompt!r} was never answered")

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = {prompt: pool.submit(stream, prompt) for prompt in PROMPTS * 1}
        until(
            lambda: replicas[1].figure("num_requests_running") > 0 or all(f.done() for f in futures.values()),
            30,
            "it has work",
        )
        assert replicas[1].end(signal.SIGKILL) == -signal.SIGKILL
        for prompt, future in futures.items():
            assert future.result() == want[prompt]
    replicas[1].start().ready()
    until(lambda: get(f"{front}/ready")[0] == 200, 10, "HAProxy has it back")
    time.sleep(2)
    before = replicas[1].figure("generation_tokens_total")
    for prompt in PROMPTS:
        assert stream(prompt) == want[prompt]
    assert replicas[1].figure("generation_tokens_total") > before


SECONDS = float(os.environ.get("KVCASCADE_LOAD_SECONDS", "0"))
"""How long servers are under load; a few seconds without it, and then the toy alone."""


@pytest.mark.parametrize(
    "model, clients", [("toy", 64), pytest.param("smollm2", 16, marks=pytest.mark.skipif(not SECONDS, reason="long"))]
)
def test_every_answer_under_load_is_the_one_alone(model: str, clients: int, run: Path, tmp_path) -> None:
    """So many clients at once, in float32: no error, and each answer is what the same request got when nobody else was there."""
    more = ("--rows", str(clients), "--queue", str(2 * clients), "--per-key", str(2 * clients))
    replica = Replica(run if model == "toy" else Path(model), tmp_path, free_port(), *more, "--blocks", "640").start()
    replica.ready()
    name, errors = name_of(replica), []
    with client(replica.url) as who:
        want = {f"{prompt} {index}": "" for index, prompt in enumerate(PROMPTS * 2)}
        want = {prompt: answer(who, name, prompt, 20) for prompt in want}
        end, waits = time.monotonic() + (SECONDS or 8), []

        def ask(seed: int) -> None:
            draw = random.Random(seed)
            while time.monotonic() < end:
                prompt, start = draw.choice([*want]), time.monotonic()
                if (got := answer(who, name, prompt, 20)) != want[prompt]:
                    errors.append((prompt, got, want[prompt]))
                waits.append(time.monotonic() - start)

        with concurrent.futures.ThreadPoolExecutor(clients) as pool:
            for each in [pool.submit(ask, seed) for seed in range(clients)]:
                each.result()
    shares = " ".join(f"p{share}={1e3 * sorted(waits)[len(waits) * share // 100]:.0f}ms" for share in (50, 90, 95, 99))
    print(f"{model}: {clients} clients, {len(waits)} answers of up to 20 tokens, {shares}", file=sys.stderr)
    assert not errors, errors[:3]
    assert replica.figure("jit_compiles_total") == 0 and replica.end() == 0


def test_ten_times_too_many_are_refused_and_it_recovers(run: Path, tmp_path) -> None:
    replica = Replica(run, tmp_path, free_port(), "--queue", "16", "--per-key", "16").start()
    replica.ready()
    name, answered, refused = name_of(replica), [], []
    with client(replica.url) as who:
        want = answer(who, name, "the cat", 90)

        def ask(index: int) -> None:
            try:
                answered.append(answer(who, name, "the cat", 90))
            except openai.RateLimitError as error:
                refused.append(error.response.headers["retry-after"])

        with concurrent.futures.ThreadPoolExecutor(160) as pool:
            for each in [pool.submit(ask, index) for index in range(480)]:
                each.result()
        assert {*refused} == {"1"} and {*answered} == {want} and len(answered) >= 16
        assert replica.figure("refusals_total", reason="queue") + replica.figure(
            "refusals_total", reason="per_key"
        ) == len(refused)
        assert answer(who, name, "the cat", 90) == want
    assert replica.end() == 0


def test_what_runs_may_end_after_sigterm(run: Path, tmp_path) -> None:
    """Under load: every answer that has begun is whole, who comes after is refused, and the status is 0."""
    replica = Replica(run, tmp_path, free_port()).start()
    replica.ready()
    name = name_of(replica)
    prompts = [f"{prompt} {index}" for index, prompt in enumerate(PROMPTS * 8)]
    with client(replica.url) as who, concurrent.futures.ThreadPoolExecutor(32) as pool:
        futures = {prompt: pool.submit(answer, who, name, prompt, 90) for prompt in prompts}
        until(lambda: sum(future.done() for future in futures.values()) >= 8, 30, "it has answered some")
        before = replica.figure("request_success_total", finished_reason="length") + replica.figure(
            "num_requests_running"
        )
        assert replica.end(signal.SIGTERM) == 0
        done = {prompt: future.result() for prompt, future in futures.items() if not future.exception()}
        failed = [error for future in futures.values() if (error := future.exception())]
    assert before <= len(done) < len(prompts) and all(isinstance(error, openai.APIError) for error in failed)
    replica.start().ready()
    with client(replica.url) as who:
        assert all(answer(who, name, prompt, 90) == text for prompt, text in [*done.items()][::7])
    assert replica.end() == 0
    assert get(f"{replica.url}/health")[0] == 0


def test_a_disk_that_is_full_takes_lines_and_nothing_else(run: Path, tmp_path) -> None:
    replica = Replica(run, tmp_path, free_port(), "--log", "/dev/full").start()
    replica.ready()
    with client(replica.url) as who:
        assert answer(who, name_of(replica), "the cat") == answer(who, name_of(replica), "the cat")
    assert replica.end() == 0


def test_bad_input_of_the_command_is_one_line(run: Path, tmp_path) -> None:
    (tmp_path / "keys").write_text("just-one-word\n")
    for more, words in (
        (["--cache", "sink 4 | recent 8", "--speculate", "ngram"], "tried where it can be taken back"),
        (["--cache", "kvzip 9 then recent 8"], "twice"),
        (["--keys", str(tmp_path / "keys")], "line 1"),
        (["--blocks", "1"], "2 blocks"),
        (["--records", str(tmp_path / "nothing.jsonl")], "nothing.jsonl"),
    ):
        command = Replica(run, tmp_path, free_port()).command
        found = subprocess.run(
            [*command[:8], *command[10:], *more] if "--cache" in more else [*command, *more],
            capture_output=True,
            text=True,
            timeout=120,
        )
        lines = [line for line in found.stderr.splitlines() if not line.startswith(("{", "kvcascade: http", "load "))]
        assert found.returncode == 2 and len(lines) == 1 and words in lines[0], (more, found.stderr)


def test_the_image_is_as_it_should_be(tmp_path) -> None:
    """Hadolint finds nothing; the build stage's own lines make an environment that serves without a compiler."""
    subprocess.run([Path(sys.executable).with_name("hadolint"), str(DEPLOY / "Dockerfile")], check=True)
    content = (DEPLOY / "Dockerfile").read_text()
    _, build, final = content.split("\nFROM ")
    assert "g++" not in final and "USER 10001" in final
    steps = [step.replace("\\\n", " ") for step in re.findall(r"^RUN ((?:.*\\\n)*.*)$", build, re.MULTILINE)]
    assert len(steps) == 2 and "apt-get install -y --no-install-recommends g++" in steps[0]
    source, opt = tmp_path / "src", tmp_path / "opt"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    script = steps[1].replace("/opt/kvcascade", str(opt)).replace("/tmp/constraints", str(tmp_path / "constraints"))
    subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=source, check=True)
    assert len([*(opt / "native").glob("*.so")]) == 2
    environment = {
        "PATH": f"{opt}/bin:/usr/bin:/bin",
        "KVCASCADE_NATIVE": f"{opt}/native",
        "KVCASCADE_CACHE": str(tmp_path / "cache"),
        "CXX": "false",
        "HOME": str(tmp_path),
    }
    said = subprocess.run(
        [opt / "bin" / "python", "-c", "from kvcascade.kernels.native import ready; print(ready())"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert said.stdout.strip() == "True", said.stderr
    assert (
        subprocess.run([opt / "bin" / "kvcascade", "serve", "--help"], env=environment, capture_output=True).returncode
        == 0
    )


def test_the_other_files_say_what_there_is() -> None:
    """Each command line in deploy/ is one that `kvcascade serve` takes."""
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    objects = [*yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())]
    unit = re.search(r"^ExecStart=\S+ serve (.*)$", (DEPLOY / "kvcascade.service").read_text(), re.MULTILINE)
    slurm = re.search(r"serve (--host.*\n.*)$", (DEPLOY / "slurm.sh").read_text(), re.MULTILINE)
    assert unit and slurm
    lines = [
        compose["services"]["kvcascade"]["command"],
        objects[0]["spec"]["template"]["spec"]["containers"][0]["args"],
        shlex.split(unit[1]),
        shlex.split(slurm[1].replace("\\\n", " ").replace("$port", "8000")),
    ]
    for line in lines:
        assert arguments_of(Args, "serve", line).drain < 60
    assert objects[1]["spec"]["ports"][0]["targetPort"] == 8000
    for file in ("haproxy.cfg", "prometheus.yml", "alerts.yml"):
        assert any(
            file in mount for service in ("haproxy", "prometheus") for mount in compose["services"][service]["volumes"]
        )
    subprocess.run(["bash", "-n", str(DEPLOY / "slurm.sh")], check=True)
