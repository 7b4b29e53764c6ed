"""A profile's parts add up, its bytes are those of the arrays, and a decode step changes its cache in place."""

import csv
import dataclasses
import functools
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny_models

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval import record_files, records
from kvcascade.eval.kernels import whole_step
from kvcascade.eval.records import Profile
from kvcascade.eval.report import page
from kvcascade.eval.speed import profile, profile_report
from kvcascade.eval.speed.trace import Event, divide, trace
from kvcascade.kernels import native, traffic
from kvcascade.model import generate, gpt, pretrained
from kvcascade.model.config import ModelConfig
from kvcascade.scripts import readme

pytestmark = pytest.mark.slow

CASCADE = "sink 4 | recent 12 | heavy 16@int8 | heavy 32@int4h"
CONFIG = ModelConfig(layers=1, width=64, heads=4, kv_heads=2, mlp=128, vocab=257, context=256, activation="swiglu")


def event(thread: str, start: float, stop: float, name: str, module: str = "step") -> Event:
    return Event(thread, start, stop, module, name)


def test_a_step_is_divided_without_rest() -> None:
    """Nested instructions count once, those at the same time by halves, gaps inside a program apart from those between programs."""
    found = divide(
        0.0,
        100.0,
        [
            event("a", 10.0, 50.0, "call"),
            event("a", 20.0, 30.0, "inner"),
            event("b", 40.0, 60.0, "fusion"),
            event("a", 64.0, 70.0, "fusion"),
            event("a", 80.0, 95.0, "fusion", "sample"),
        ],
    )
    assert found.instructions == {
        ("step", "call"): 10 + 10 + 5,
        ("step", "inner"): 10,
        ("step", "fusion"): 5 + 10 + 6,
        ("sample", "fusion"): 15,
    }
    assert (found.between, found.around) == (4, 10 + 10 + 5)
    assert found.total == 100
    assert divide(3.0, 10.0, []).around == 7


def test_the_profiler_names_the_instructions_that_ran() -> None:
    """What a trace says ran are instructions of the program, and each call of the function is a step of its own."""
    x = jnp.ones((256, 256))
    double = jax.jit(lambda x: jnp.sin(x @ x))
    launches = {launch.name for launch in traffic.launches(double.lower(x).compile().as_text() or "")}
    jax.block_until_ready(double(x))
    steps = trace(lambda: jax.block_until_ready(double(x)), 3)
    assert len(steps) == 3
    for step in steps:
        assert {name for _, name in step.instructions} == launches
        assert min(step.instructions.values()) > 0 and step.around > 0


@pytest.mark.parametrize(
    ("scope", "name"),
    [
        ("jit(decode_step)/priority/exchange/cond/branch_0_fun/ffi_call", "exchange"),
        ("jit(decode_step)/mlp/activation/mul", "activation"),
        ("jit(decode_step)/priority/concatenate", "priority"),
        ("jit(decode_step)/broadcast_in_dim", "other"),
        ("", "other"),
    ],
)
def test_the_innermost_scope_is_the_component(scope: str, name: str) -> None:
    assert profile.component(scope) == name


@functools.cache
def compiled(spec: str, donate: bool = True) -> tuple[str, list, jax.stages.Compiled]:
    """The program of some decode steps, K and V of its cache, and what it was compiled to."""
    state = generate.start(CONFIG, parse(spec), 2, 128)

    def steps(params, state):
        return generate.decode_steps.__wrapped__(CONFIG, params, state, 4, most=4)  # pyright: ignore

    made = jax.jit(steps, donate_argnums=(1,) if donate else ()).lower(gpt.init(CONFIG, 0), state)
    held = jax.tree.leaves([(slots.k, slots.v) for layer in state.cache.layers for slots in layer.slots])
    made = made.compile()
    return made.as_text() or "", held, made


in_place = pytest.mark.skipif(not native.ready(), reason="XLA's own update of a slot has the shape of the whole buffer")


@in_place
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("spec", ["full", "full@int8", "full@int4h", CASCADE])
def test_no_instruction_writes_a_whole_buffer_of_the_cache(spec: str) -> None:
    """The program of a decode step changes every array of K and V in place, and its whole cache is aliased."""
    program, held, made = compiled(spec)
    analysis = made.memory_analysis()
    assert whole_step.copies(program, held) == 0
    assert analysis and analysis.alias_size_in_bytes >= sum(leaf.nbytes for leaf in held)


@in_place
@pytest.mark.usefixtures("unchecked")
def test_without_donation_every_buffer_is_copied() -> None:
    """The check sees it: a copy for each array of K and V."""
    program, held, _ = compiled(CASCADE, donate=False)
    assert whole_step.copies(program, held) >= len(held)


@pytest.mark.usefixtures("unchecked")
def test_each_component_of_a_step_is_found() -> None:
    """Every scope is in the program of a step, and what is in none moves next to nothing."""
    launches = traffic.launches(compiled(CASCADE)[0])
    moved = dict.fromkeys(profile.COMPONENTS, 0)
    for launch in launches:
        moved[profile.component(launch.scope)] += launch.moved
    assert {name for name, size in moved.items() if not size} <= {"embedding", "other"}
    assert moved["other"] < 0.01 * sum(moved.values())


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory, shapes_alone) -> list[Profile]:
    """Profiles of a model of one layer behind two caches."""
    model = pretrained.load(str(tiny_models.write("llama", tmp_path_factory.mktemp("model") / "llama")))
    model = dataclasses.replace(model, config=CONFIG, params=gpt.init(CONFIG, 0))
    found = []
    with shapes_alone():
        for spec in map(parse, ("full", "sink 4 | heavy 12@int8")):
            (record,) = profile.job(model, spec, 2, 256).run()
            found.append(record)
    return found


def test_the_parts_add_up_and_nothing_grows(profiled: list[Profile]) -> None:
    """Times add up to the step under the profiler; nothing is copied, the cache is aliased, live arrays stay as they are."""
    for record in profiled:
        parts = sum(each["ms"] for each in record.components) + record.between_ms + record.around_ms
        assert parts == pytest.approx(record.profiled_ms)
        assert {"qkv", "mlp", "head", "attention", "exchange", "sampling"} <= {e["name"] for e in record.components}
        assert (record.watched["arrays"], record.watched["bytes"]) == (0, 0)
        assert record.buffers["aliased"] >= record.buffers["cache"] == 2 * record.given["kv_bytes"]
        assert record.buffers["copies"] == 0 or not native.ready()
        assert sum(tier["ms"] for tier in record.tiers) == pytest.approx(
            next(each["ms"] for each in record.components if each["name"] == "attention")
        )


def test_bytes_are_those_that_a_step_reads(profiled: list[Profile]) -> None:
    """Of weights each once; of the slots those with a token, of which attention has about what its tiers hold."""
    for record in profiled:
        moved = {each["name"]: each["bytes"] for each in record.components}
        tiers = sum(tier["bytes"] for tier in record.tiers)
        assert tiers <= moved["attention"] < tiers + 20_000 or not native.ready()
    full, cascade = ({each["name"]: each["bytes"] for each in record.components} for record in profiled)
    assert full["mlp"] == cascade["mlp"] and full["attention"] > 8 * cascade["attention"]


def test_memory_is_that_of_live_buffers(profiled: list[Profile]) -> None:
    """A full cache doubles with the context, a cascade does not grow; there is nothing live beside the cache and the logits."""
    full, cascade = (record.growth for record in profiled)
    assert full["contexts"] == [64, 128, 256]
    assert [size / full["kv_bytes"][0] for size in full["kv_bytes"]] == [1, 2, 4]
    assert len(set(cascade["kv_bytes"])) == 1
    for growth in (full, cascade):
        for row, live, output in zip(growth["kv_bytes"], growth["live_bytes"], growth["output_bytes"], strict=True):
            assert live == 2 * row + output
    assert dict[str, Any](full)["held_bytes"][-1] == 2 * full["kv_bytes"][-1]


def test_what_is_written_is_made_from_the_records(profiled: list[Profile], tmp_path: Path) -> None:
    """A row of step.csv for each part and of memory.csv for each context; both figures are well-formed; the page has the section."""
    profile_report.write(tmp_path, profiled, "text")
    step = list(csv.DictReader((tmp_path / "step.csv").read_text().splitlines()))
    assert len(step) == sum(len(record.components) + 2 for record in profiled)
    assert sum(float(row["share"]) for row in step) == pytest.approx(2)
    assert len(list(csv.DictReader((tmp_path / "memory.csv").read_text().splitlines()))) == 2 * 3
    for name in ("step.svg", "memory.svg"):
        ElementTree.parse(tmp_path / name)
    for title, columns, rows in (
        *map(profile_report.table, profiled),
        profile_report.summary(profiled),
        profile_report.memory_table(profiled),
    ):
        assert title and {len(row) for row in rows} == {len(columns)}
    assert "no instruction writes a whole" in " ".join(profile_report.sentences(profiled[0])) or not native.ready()
    first = profiled[0]
    faulty = records.changed(first, buffers=first.buffers | {"copies": 3}, step_ms=2 * first.profiled_ms)
    told = " ".join(profile_report.sentences(faulty))
    assert "3 INSTRUCTIONS WRITE A WHOLE" in told and "NOT within" in told
    recorded = record_files.read(readme.RESULTS / "toy.jsonl")
    page.write(tmp_path / "report.html", [*recorded, *profiled], "kvcascade report")
    html = (tmp_path / "report.html").read_text()
    assert "<h2>Where a decode step goes" in html and "heavy 12@int8" in html


def test_a_context_without_room_is_refused() -> None:
    with pytest.raises(BadInput, match="at least 256 tokens, not 255"):
        profile.check(CONFIG, [parse("full")], 255)
    with pytest.raises(BadInput, match="longer than the model's 256"):
        profile.check(CONFIG, [parse("full")], 257)
