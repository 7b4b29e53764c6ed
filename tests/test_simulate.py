"""Traces, and what serving one is recorded as."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_engine import CONFIG, params

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval import record_files
from kvcascade.eval.measure import measure
from kvcascade.eval.records import Served, of
from kvcascade.eval.speed import serving
from kvcascade.eval.speed.serving import Clock, batches, engine
from kvcascade.model import programs, tokenizer
from kvcascade.model.pretrained import Model
from kvcascade.scripts import simulate
from kvcascade.serve.costs import Costs, Replay
from kvcascade.serve.plan import Limits
from kvcascade.serve.trace import PIECE, Arrival, read, shortened, tokens


@pytest.fixture(autouse=True)
def compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowering puts what is no array into pytrees, which the type checker of these tests refuses."""
    monkeypatch.setattr(serving, "kept", programs.traced)


def test_poisson_is_the_same_for_the_same_seed() -> None:
    text = "poisson:rate=10,requests=400,prompt=50,output=20,spread=0.5,shared=1024"
    found = read(text, seed=1)
    assert found == read(text, seed=1) != read(text, seed=2)
    assert found[0].at == 0 and all(each.pieces == (0, 1) and each.prompt > 1024 for each in found)
    assert abs(found[-1].at / 40 - 1) < 0.2
    assert abs(np.median([each.output for each in found]) - 20) < 3


def test_published_traces_are_read(tmp_path: Path) -> None:
    azure = tmp_path / "azure.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    )
    first, second = read(str(azure))
    assert (first.at, first.prompt, first.output) == (0.0, 374, 44)
    assert second.at == pytest.approx(4.314579, abs=1e-5) and second.output == 109
    mooncake = tmp_path / "mooncake.jsonl"
    lines = [
        {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 48]},
        {"timestamp": 27000, "input_length": 600, "output_length": 5, "hash_ids": [46]},
    ]
    mooncake.write_text("\n".join(map(json.dumps, lines)))
    first, second = read(str(mooncake))
    assert first == Arrival(0.0, 600, 5, (46,)) and second.at == pytest.approx(0.482)
    assert (second.prompt, second.output, second.pieces) == (6955, 52, (46, 47, 48))


@pytest.mark.parametrize(
    "text, reason",
    [
        ("poisson:rat=4", "a trace is written poisson:rate=4"),
        ("poisson:rate=x", "a trace is written poisson:rate=4"),
        ("poisson:requests=0", "a request at least"),
        ("poisson:shared=100", "so many times 512"),
        ("poisson:spread=1000", "spread by 3 at most"),
        ("nowhere.csv", "no trace nowhere.csv"),
    ],
)
def test_wrong_traces_are_told(text: str, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        read(text)


@pytest.mark.parametrize(
    "name, line",
    [
        ("a.csv", "a,b\n1,2"),
        ("a.jsonl", '{"timestamp": 1}'),
        ("b.jsonl", "[1]"),
        ("c.csv", ""),
        ("d.jsonl", '{"timestamp": 0, "input_length": 1e999, "output_length": 1}'),
        ("e.jsonl", '{"timestamp": NaN, "input_length": 3, "output_length": 1}'),
        ("f.jsonl", '{"timestamp": 0, "input_length": 0, "output_length": 1}'),
        ("g.jsonl", '{"timestamp": 0, "input_length": 3, "output_length": 1, "hash_ids": [-1]}'),
        ("h.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,-5,3"),
    ],
)
def test_wrong_lines_are_told(tmp_path: Path, name: str, line: str) -> None:
    (tmp_path / name).write_text(line)
    with pytest.raises(BadInput, match=r"line \d: no |has no requests"):
        read(str(tmp_path / name))


def test_equal_pieces_are_equal_tokens() -> None:
    arrivals = [Arrival(0.0, 1200, 2, (7, 8)), Arrival(0.0, 700, 2, (7,)), Arrival(0.0, 300, 2, (7,))]
    one, other, part = tokens(arrivals, 1, 50_000, 0)
    assert [len(one), len(other), len(part)] == [1200, 700, 300]
    assert one[:PIECE] == other[:PIECE] and one[PIECE:700] != other[PIECE:] and part == one[:300]
    short = shortened(arrivals, 8, 200)
    assert [each.prompt for each in short] == [150, 87, 37]
    one, other, _ = tokens(short, 8, 50_000, 0)
    assert one[:64] == other[:64] and one[64:87] != other[64:]
    with pytest.raises(BadInput, match="has 1202 tokens, and the context 200: shorten them, --shorten 8"):
        shortened(arrivals, 1, 200)


def test_a_clock_does_not_wait() -> None:
    ticks = iter([10.0, 11.0, 11.0, 12.0, 12.0])
    clock = Clock(lambda: next(ticks))
    assert clock() == 1.0
    clock.skip_to(5.0)
    assert clock() == 6.0
    clock.skip_to(3.0)  # has been


def test_costs_are_found_again() -> None:
    """From steps with some noise and a few that were far too slow."""
    draw = np.random.default_rng(0)
    true = Costs({1: 0.01, 8: 0.02, 32: 0.05}, 1e-5)
    steps = []
    for _ in range(300):
        size, read = int(draw.choice([1, 8, 32])), int(draw.integers(1, 4000))
        slow = 5.0 if draw.random() < 0.02 else 1.0
        steps.append((size, read, (true.seconds(size) + true.attended * read) * slow * draw.uniform(0.98, 1.02)))
    found = Costs.of(steps)
    assert found.attended == pytest.approx(1e-5, rel=0.05)
    assert {size: pytest.approx(seconds, rel=0.05) for size, seconds in true.programs.items()} == dict(found.programs)
    assert true.seconds(20) == pytest.approx(0.035) and true.seconds(64) == 0.05
    assert Costs.of([(8, 100, 0.3)]) == Costs({8: 0.3}, 0.0)
    few = [
        (1, 1000 + index % 3, 0.02 + 0.004 * draw.random()) for index in range(60)
    ]  # a prompt, and many steps that are alike
    few += [(128, 128 * start + 8256, 0.17 + 3e-6 * (128 * start + 8256)) for start in range(0, 1024, 128)]
    assert Costs.of(few).attended == pytest.approx(3e-6, rel=0.01)


def replayed(text: str, limits: Limits, blocks: int, costs: Costs) -> tuple[dict, list[Arrival]]:
    arrivals = read(text)
    device = Replay(costs, blocks, 16, 1000, 10_000, limits)
    return serving.serve(device, arrivals, tokens(arrivals, 1, 1000, 0), device.clock), arrivals


def test_without_a_model_time_is_what_steps_take() -> None:
    """One request alone: its first token after the steps of its prompt, and each other after one more."""
    costs = Costs({1: 0.01, 128: 0.1}, 1e-6)
    found, (each,) = replayed("poisson:requests=1,prompt=200,output=9,spread=0", Limits(), 100, costs)
    prompt = 2 * 0.1 + 1e-6 * sum(range(1, each.prompt + 1)) - (0.1 - costs.seconds(96)) * (each.prompt - 128 <= 96)
    assert found["first_ms"][10] == pytest.approx(prompt * 1e3)
    assert found["steps"] == 2 + each.output - 1
    rest = (each.output - 1) * 0.01 + 1e-6 * sum(range(each.prompt + 1, each.prompt + each.output))
    assert found["serving_seconds"] == pytest.approx(prompt + rest)


def test_hardly_a_slot_is_wasted() -> None:
    """At a mean length of 500 tokens: less than half a block of each row is empty."""
    text = "poisson:rate=1000,requests=120,prompt=420,output=100,spread=0.4"
    found, arrivals = replayed(text, Limits(), 2000, Costs({1: 0.01}, 0.0))
    assert 450 < np.mean([each.prompt + each.output for each in arrivals]) < 650
    assert 0 < found["waste"] < 0.04 and found["output_tokens"] == sum(each.output for each in arrivals)


@pytest.mark.slow
def test_a_record_says_what_steps_take(tmp_path: Path) -> None:
    """What was recorded with a model serves other traces without it, and both are measured once."""
    model = Model("toy", CONFIG, params(), tokenizer.bytes_encoding())
    arrivals = shortened(read("poisson:rate=200,requests=9,prompt=20,output=6,spread=0.4", 3), 1, 96)
    trace = serving.Trace("poisson:", arrivals, 1, 0)
    job = serving.job(model, parse("full@int8 on blocks"), trace, 60, Limits(16, 8), 0, "wall")
    (served,) = measure([job], tmp_path / "records.jsonl").records
    assert measure([job], tmp_path / "records.jsonl").before == 1
    assert served.programs and {size for size, _ in served.programs} <= {*Limits(16, 8).buckets}
    later = serving.Trace("poisson:", [dataclasses.replace(each, at=2 * each.at) for each in arrivals], 1, 0)
    assert serving.job(model, parse("full@int8 on blocks"), later, 60, Limits(16, 8), 0, "wall").key != job.key
    (again,) = serving.replay_job(served, trace, 30, Limits(8, 4)).run()
    assert again.output_tokens == served.output_tokens and again.kv_bytes * 2 == served.kv_bytes
    with pytest.raises(BadInput, match="up to 16 tokens take, not of 32"):
        serving.replay_job(served, trace, 30, Limits(32, 4)).run()
    command = "--trace poisson:requests=20 --rows 4 --tokens 8 --blocks 40".split()
    files = ["--costs", str(tmp_path / "records.jsonl"), "--out", str(tmp_path / "records.jsonl")]
    simulate.main([*command, *files])
    last = of(record_files.read(tmp_path / "records.jsonl"), Served)[-1]
    assert (last.way, last.model, last.requests) == ("costs", "toy", 20) and "threads" in last.costs
    assert last.case != served.case  # the machine is another's
    with pytest.raises(BadInput, match="blocks of 16, and the pool has 2"):
        simulate.main([*command[:-1], "3", *files])


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ("", "a --model, or by the --costs"),
        ("--model x --costs y", "a --model, or by the --costs"),
        ("--costs y --batches 4", "go with a model"),
        ("--model x --server y", "NAME=URL"),
        ("--model x --server y=http://z --clock cpu", "by the wall's clock alone"),
        ("--costs {}", "has no record of a trace"),
    ],
)
def test_what_does_not_go_together(arguments: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text("")
    with pytest.raises(BadInput, match=reason):
        simulate.main(arguments.format(tmp_path / "records.jsonl").split())


def test_times_that_are_none_are_no_record() -> None:
    found, arrivals = replayed("poisson:requests=3", Limits(), 100, Costs({1: 0.01}, 0.0))
    about = serving.Trace("poisson:", arrivals, 1, 0).about | {
        "model": "m",
        "weights": "float32",
        "cache": "full",
        "clock": "wall",
    }
    whole: dict[str, Any] = about | found | {"way": "engine", "kv_bytes": 1, "warm_seconds": 0.0}
    assert Served(**whole).requests == 3
    with pytest.raises(ValueError, match="does not say what it did"):
        Served(**{name: value for name, value in whole.items() if name != "rows"})
    for wrong in (found["first_ms"][:5], found["first_ms"][::-1]):
        with pytest.raises(ValueError, match="first_ms is not 21 times"):
            Served(**whole | {"first_ms": wrong})


@pytest.mark.slow
def test_both_ways_serve_every_token() -> None:
    model = Model("toy", CONFIG, params(), tokenizer.bytes_encoding())
    arrivals = shortened(read("poisson:rate=200,requests=9,prompt=20,output=6,spread=0.4", 3), 1, 96)
    prompts = [*tokens(arrivals, 1, CONFIG.vocab, 0)]
    spec, made = parse("full@int8 on blocks"), sum(each.output for each in arrivals)
    about = {
        "model": "toy", "weights": "float32", "cache": str(spec), "clock": "wall", **serving.Trace("poisson:", arrivals, 1, 0).about,
    }  # fmt: skip
    ours = Served(
        **about, way="engine", **engine(model, spec, arrivals, prompts, 60, Limits(32, 8), serving.CLOCKS["wall"])
    )
    theirs = Served(
        **about, way="batches", **batches(model, parse("full"), arrivals, prompts, 4, serving.CLOCKS["wall"])
    )
    assert ours.output_tokens == theirs.output_tokens == made
    assert ours.useful and theirs.useful
    assert ours.compiles == 0 and 0 < theirs.useful < ours.useful <= 1
    assert len(serving.table([ours, theirs]).rows) == 2
