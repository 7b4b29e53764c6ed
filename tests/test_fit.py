"""The search for what still fits, what a fit's record and table say, and with the compilers a real one."""

import dataclasses
import importlib.util
import json
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcascade.cache.spec import parse
from kvcascade.eval.memory import arithmetic, fit
from kvcascade.eval.records import Fit, FitTask, changed, of
from kvcascade.eval.report import figures, page
from kvcascade.kernels import aot
from kvcascade.model.config import ModelConfig
from kvcascade.scripts import cli

needs_compilers = pytest.mark.skipif(not importlib.util.find_spec("jax_plugins"), reason="the extra [aot] is missing")
TINY = ModelConfig(layers=2, width=64, heads=4, kv_heads=2, mlp=128, vocab=256, context=512, weights="bfloat16")
CARD = aot.GPU("rtx3060", "device_memory_size: 12884901888\n")


@given(
    fixed=st.integers(0, 1000),
    row=st.integers(1, 50),
    leaps=st.dictionaries(st.integers(1, 60), st.integers(0, 400), max_size=4),
    guess=st.integers(1, 300),
    slope=st.floats(0.5, 100),
    limit=st.none() | st.integers(1, 80),
)
def test_what_is_found_fits_and_the_next_does_not(fixed, row, leaps, guess, slope, limit):
    """Whatever the first guess and slope are, and where what is held grows by leaps."""
    asked = []

    def held(n: int) -> int:
        asked.append(n)
        return fixed + row * n + sum(leap for at, leap in leaps.items() if n >= at)

    found = fit.largest(held, 3000, guess, slope, limit, compiles=40)
    assert found.exact and found.compiles == len(asked) == len(set(asked))
    assert found.most == 0 or held(found.most) <= 3000
    if found.most == limit:
        assert max(asked[: found.compiles]) == limit and found.next_held is None
    else:
        assert found.next_held == held(found.most + 1) > 3000
    assert limit is None or max(asked[: found.compiles]) <= limit


def test_a_good_guess_takes_two_compilations_and_a_fair_one_three():
    held = lambda n: 500 + 7 * n
    assert fit.largest(held, 5000, 642, 7.0) == fit.Found(642, True, 2, held(643))
    assert fit.largest(held, 5000, 630, 7.2) == fit.Found(642, True, 3, held(643))
    assert fit.largest(held, 5000, 700, 6.5).compiles <= 4


def test_a_search_that_runs_out_of_compilations_says_so():
    found = fit.largest(lambda n: n * n, 10**9, 1, 1e9, compiles=3)
    assert not found.exact and found.compiles == 3 and found.most**2 <= 10**9


def plan(task: fit.Task, batch: int, context: int, extra: float = 0.0) -> dict:
    """What a compiler would say that does as the arithmetic says, with so much more of every row in temporaries."""
    one = arithmetic.decode_step(task.model, parse(task.cache), context)
    parts = {
        "arguments": one.weights + batch * (one.cache + one.inputs),
        "outputs": batch * one.logits,
        "temporaries": one.work(batch) + int(batch * one.row * extra),
    }
    return parts | {"held": sum(parts.values())}


def task(cache: str, budget: int = 50_000_000) -> fit.Task:
    return fit.Task("rtx3060", TINY, cache, (128, 512), budget)


def test_a_compiler_that_agrees_with_the_arithmetic_finds_its_users_and_its_longest_context():
    for cache in ("full", "sink 1 | heavy 25%@int8"):
        spec = parse(cache)
        for one in fit.solve(task(cache), plan):
            expected = arithmetic.decode_step(TINY, spec, one["context"])
            assert one["users"] == one["expected_users"] == expected.users(50_000_000) == one["rows"]
            assert one["exact"] and one["compiles"] == 2 and one["difference"] == 0 and one["explanation"] is None
            assert one["held"] <= 50_000_000 < one["next_held"]
            longest = arithmetic.longest(TINY, spec, 50_000_000)
            assert longest is not None and one["longest"]["context"] == longest // fit.GRAIN * fit.GRAIN
    assert fit.solve(task("sink 4 | recent 60"), plan)[0]["longest"]["context"] is None


def test_learned_positions_and_weights_that_do_not_fit_are_limits():
    learned = dataclasses.replace(task("full"), model=dataclasses.replace(TINY, positions="learned"))
    longest = fit.solve(learned, plan)[0]["longest"]
    assert (longest["context"], longest["exact"], longest["compiles"], longest["difference"]) == (512, True, 1, 0)
    none = fit.solve(task("full", budget=1000), plan)[0]
    assert none["users"] == 0 and none["rows"] == 1 and none["next_held"] == none["held"] > 1000
    assert none["longest"]["context"] == 0


def test_a_difference_is_explained_by_the_part_that_it_is_in():
    found = fit.solve(task("full"), lambda *arguments: plan(*arguments, extra=0.05))[0]
    assert 0.045 < found["difference"] < 0.05 and "MiB of temporaries" in found["explanation"]
    padded = lambda *arguments: (
        (one := plan(*arguments)) | {"arguments": 2 * one["arguments"], "held": one["held"] + one["arguments"]}
    )
    assert "MiB of arguments" in fit.solve(task("full"), padded)[0]["explanation"]
    assert fit.solve(task("full"), lambda *arguments: plan(*arguments, extra=0.015))[0]["explanation"] is None


@pytest.fixture
def found(monkeypatch) -> list[FitTask]:
    """Fits of two caches at two contexts, and one that failed, with the arithmetic for a compiler."""

    def results(command, cases, environment, told):
        answers = {}
        for case in cases:
            given = json.loads(case)
            answers[case] = {"found": fit.solve(task(given["cache"], given["budget"]), plan)}
            if "heavy" in given["cache"]:
                answers[case] = {"failed": "ended with status -6: abort"}
        return answers

    monkeypatch.setattr(fit.worker, "results", results)
    specs = [parse("full"), parse("full@int8"), parse("heavy 8")]
    by_cache = [fit.job("gpt2", TINY, CARD, spec, specs[0], (128, 512), 0.01).run() for spec in specs]
    return [one for context in zip(*by_cache, strict=True) for one in context]


def test_the_table_compares_with_the_first_cache_at_the_same_context(found):
    title, columns, rows = fit.table(found)
    assert "gpt2" in title and "1% of its 12.0 GiB" in title and len(rows) == 6
    assert all(len(row) == len(columns) for row in rows)
    assert [row[0] for row in rows] == ["full", "full@int8", "heavy 8"] * 2 and rows[2][2].startswith("failed: ended")
    full, small = (one.users for one in found[3:5])
    assert [row[4] for row in rows[3:5]] == ["", f"{small / full - 1:+.1%}"] and rows[3][3] == f"{full:,}"
    assert rows[3][9] == "+0.00%"
    assert fit.notes(found) == []
    hybrid = str(parse("neurokv"))
    assert fit.notes([found[3], changed(found[4], cache=hybrid)]) == [fit.PUBLISHED["gpt2", "rtx3060", 512, hybrid]]
    assert "at least so many" in fit.notes([changed(found[0], exact=False)])[0]
    assert fit.table([changed(found[0], exact=False)])[2][0][3].startswith("≥ ")


def test_the_figure_shows_users_and_where_the_bytes_go(found):
    drawing = figures.users(of(found, Fit))
    ElementTree.fromstring(drawing)
    assert all(sum(one.filled.values()) == one.held for one in of(found, Fit))
    assert f"{found[0].users:,}" in drawing and "temporaries and logits" in drawing


def test_the_page_has_a_section_of_fits_alone(found, tmp_path):
    page.write(tmp_path / "page.html", found, "kvcascade report")
    html = (tmp_path / "page.html").read_text()
    assert "<h2>Users that fit</h2>" in html and html.count("<svg") == 1 and f"<td>{found[4].users:,}</td>" in html


def test_a_child_answers_each_task_and_a_compiler_that_raises_fails_one(monkeypatch, capsys):
    tasks = [task("full"), task("heavy 8")]
    monkeypatch.setattr(fit, "solve", lambda one: [{"users": 3}] if one == tasks[0] else [][1])
    cases = [json.dumps(dataclasses.asdict(one)) for one in tasks]
    fit.main(cases)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"found": [{"users": 3}]} and second["failed"].startswith("IndexError")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--gpu", "h101"], "no GPU 'h101'; there are h100"),
        (["--share", "1.5"], "--share is 1.5; it must be above 0 and at most 1"),
        (["--context", "0"], "--context is 0; it must be at least 1"),
        (["--context", "2000"], "1024 learned positions"),
        (["--cache", "layers[0:99]: full"], "the model has 12 layers"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, line, capsys, tmp_path):
    given = {"--gpu": "rtx3060", "--model": "gpt2", "--out": str(tmp_path / "out.jsonl")}
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    with pytest.raises(SystemExit, match="2"):
        cli.main(["fit", *(word for pair in given.items() for word in pair)])
    out, err = capsys.readouterr()
    assert line in err and err.count("\n") == 1 and not out and not list(tmp_path.iterdir())


def test_without_the_compilers_one_line_says_what_to_install(monkeypatch, capfd):
    def missing(name):
        raise aot.NotInstalled(aot.MISSING)

    monkeypatch.setattr(aot, "gpu", missing)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["fit", "--gpu", "h100", "--model", "gpt2", "--context", "64"])
    assert capfd.readouterr().err == f"kvcascade: {aot.MISSING}\n"


@needs_compilers
def test_the_bytes_of_cards_are_those_of_their_descriptions():
    assert {name: aot.gpu(name).memory for name in aot.MEMORY} == aot.MEMORY


@needs_compilers
def test_users_of_a_small_model_on_a_card():
    """XLA's arguments are the weights, the cache and the inputs to the byte, the cache is changed in place, and int8 leaves room for more."""
    config = dataclasses.replace(TINY, positions="learned")  # so that one user's context is compiled once
    specs = [parse("full"), parse("full@int8")]
    jobs = [fit.job("tiny", config, aot.gpu("rtx3060"), spec, specs[0], [512], 0.01) for spec in specs]
    (full,), (small,) = (job.run() for job in jobs)
    for one in (full, small):
        assert isinstance(one, Fit) and one.exact, one
        expected = arithmetic.decode_step(config, parse(one.cache), 512)
        assert one.given["arguments"] == expected.weights + one.users * (expected.cache + expected.inputs)
        assert one.held <= one.budget < one.given["next_held"]
        assert 0 <= one.given["outputs"] - one.users * expected.logits < 1000  # and the addresses of the results
        assert abs(one.difference) < fit.CLOSE or one.explanation
    assert small.users > 1.5 * full.users
