"""The page and the README's tables are made from records alone."""

import io
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from rich.console import Console

from kvcascade.cache.errors import BadInput
from kvcascade.eval import record_files, suite
from kvcascade.eval.records import Compared, Evaluation, Retrieval, changed, of
from kvcascade.eval.report import page
from kvcascade.eval.report import readme as tables_of
from kvcascade.eval.table import Table, markdown, on_terminal
from kvcascade.scripts import readme


@pytest.fixture(scope="module")
def recorded():
    return record_files.read(readme.RESULTS / "toy.jsonl")


@pytest.mark.slow
def test_the_page_is_self_contained_and_complete(recorded, tmp_path):
    """The page loads nothing, shows every cache and every figure, and its figures are well-formed SVG."""
    page.write(tmp_path / "report.html", recorded, "kvcascade study")
    html = (tmp_path / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!#)|url\(http|@import', html.split("<svg")[0])
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    models = {one.model for one in of(recorded, Evaluation)}
    assert len(drawings) == 3 + len(models)
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    for one in of(recorded, Evaluation):
        assert f"<td>{one.cache}</td>" in html and f"<td>{one.kv_bytes:,}</td>" in html


@pytest.mark.slow
def test_the_page_of_a_pretrained_model(tmp_path):
    """Without a training the page shows what there is: quality, fidelity, retrieval with its heat map, each cache by name."""
    recorded = record_files.read(readme.RESULTS / "smollm2.jsonl")
    page.write(tmp_path / "report.html", recorded, "kvcascade report")
    html = (tmp_path / "report.html").read_text()
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawings) == 2
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    assert [
        title for title in ("Learning", "Fidelity", "What can still be found", "Speed") if f"<h2>{title}" in html
    ] == [
        "Fidelity",
        "What can still be found",
    ]
    evaluations, retrievals = of(recorded, Compared), of(recorded, Retrieval)
    for caches in ({r.cache for r in evaluations}, {r.cache for r in retrievals}):
        assert len(caches) >= 8 and "full" in caches and any(cache.startswith("random") for cache in caches)
    assert all(one.kv_bytes == one.kv_bytes_predicted and one.traces == 1 for one in evaluations)


def test_nothing_to_report_is_refused(tmp_path):
    with pytest.raises(BadInput, match="nothing to report"):
        page.write(tmp_path / "report.html", [], "kvcascade report")
    assert not list(tmp_path.iterdir())


def test_every_method_stands_next_to_full_and_random(recorded):
    """Each model was run behind the full cache and random eviction, and every group of evicting caches has a random one."""
    for model in {one.model for one in of(recorded, Evaluation)}:
        caches = [one.cache for one in of(recorded, Evaluation) if one.model == model]
        assert "full" in caches and any(cache.startswith("random") for cache in caches)
    for name, group in suite.CACHES.items():
        assert name == "everything" or any(text.startswith("random") for text in group)


def test_recorded_bytes_are_exact_and_savings_are_covered(recorded):
    """In the recorded runs predicted bytes equal measured ones, and caches at 67 % and 90 % saved are among them."""
    evaluations = of(recorded, Evaluation)
    assert all(one.kv_bytes == one.kv_bytes_predicted and one.traces == 1 for one in evaluations)
    saved = [one.compression for one in evaluations if "heavy" in one.cache]
    assert max(saved) >= 0.9 and any(2 / 3 <= share < 0.75 for share in saved)
    assert next(one for one in evaluations if one.cache == str(suite.parse("neurokv"))).kept == 353


def test_caches_of_equally_many_tokens_are_ranked_and_told_apart_where_they_are(recorded):
    """The best first; one that is only by chance behind the one before is marked; without the full cache nothing is said."""
    first = next(r for r in of(recorded, Evaluation) if r.cache == "full")
    noise = np.random.default_rng(0).normal(0, 0.01, (4, first.sequences))

    def behind(cache: str, index: int, kept: int, cost: float) -> Evaluation:
        nll_windows = 3 + cost + noise[index]
        nll = float(nll_windows.mean())
        return changed(first, cache=cache, kept=kept, nll_windows=nll_windows.tolist(), nll=nll, ppl=math.exp(nll),
                       document_windows=[*range(first.sequences)])  # fmt: skip

    caches = [
        ("full", 512, 0.0),
        ("random 128", 128, 0.5),
        ("recent 128", 128, 0.1),
        ("sink 4 | recent 124", 128, 0.1005),
    ]
    found = [behind(cache, index, kept, cost) for index, (cache, kept, cost) in enumerate(caches)]
    (line,) = [line for line in page.findings(found) if "best first" in line]
    order = [found.index(r) for r in sorted(found[2:], key=lambda r: r.ppl)]
    assert re.fullmatch(
        rf"{first.model}, 128 of 512 tokens, best first: `{re.escape(caches[order[0]][0])}` .*, ≈ `{re.escape(caches[order[1]][0])}` .*, "
        r"then `random 128` \+6\d\.\d% perplexity; ≈: not told apart from the one before\.",
        line,
    )
    assert not any("best first" in line for line in page.findings(found[1:]))


def test_fill_replaces_what_is_between_the_markers():
    """Only the marked part changes, twice gives the same, and an unknown name is told."""
    text = "a\n<!-- t -->\nold\n<!-- end t -->\nb"
    once = tables_of.fill(text, {"t": "new"})
    assert once == "a\n<!-- t -->\nnew\n<!-- end t -->\nb" == tables_of.fill(once, {"t": "new"})
    with pytest.raises(BadInput, match="'t'"):
        tables_of.fill(text, {"u": "x"})


def test_a_spec_in_a_markdown_table_keeps_its_columns():
    """The pipes of a cascade are escaped."""
    line = markdown(Table("", ["cache", "x"], [["sink 4 | recent 4", "1"]])).splitlines()[2]
    assert line == "| sink 4 \\| recent 4 | 1 |"


def test_the_suite_shrinks_with_the_context():
    """Counts are of 512 tokens; a shorter context has proportionally fewer, and each cache keeps its group."""
    assert [str(s) for s in suite.scaled(["sink 4 | recent 124"], 128)] == ["sink 1 | recent 31"]
    for spec in suite.caches(128):
        assert suite.group_of(str(spec), 128) in suite.CACHES


def test_a_terminal_shows_the_arguments_of_a_policy():
    """What stands in brackets is text, not markup."""
    shown = io.StringIO()
    table = Table("tova[together=true]", ["[cache]"], [["decayed[life=8] 16"]])
    Console(file=shown, width=60).print(on_terminal(table))
    assert all(words in shown.getvalue() for words in ("tova[together=true]", "[cache]", "decayed[life=8] 16"))
