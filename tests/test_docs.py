"""The study of FlashAttention says what was counted, and its kernel computes attention."""

import json
import re
from pathlib import Path

import flash_attention
import flash_figures
import flash_tables
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcascade.eval.report.readme import fill
from kvcascade.kernels import traffic

ROOT = Path(__file__).parent.parent
PAGE = flash_attention.PAGE.read_text()
FOUND = json.loads(flash_attention.NUMBERS.read_text())


def test_the_page_and_its_figures_are_fresh():
    """They are what the recorded numbers make; `make readme` renews them."""
    made = flash_attention.generated(FOUND)
    assert len(made) == 6
    for path, content in made.items():
        assert path.read_text() == content, path.name


def test_another_number_makes_another_page():
    """A number that changes would be seen."""
    other = json.loads(json.dumps(FOUND))
    other["decode"][-1]["own"] *= 2
    assert fill(PAGE, flash_tables.tables(other)) != PAGE


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
)
def test_links_lead_somewhere(page):
    path = ROOT / page
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_page_is_found_from_the_readme_and_shows_every_figure():
    assert "(docs/flash_attention.md)" in (ROOT / "README.md").read_text()
    assert set(re.findall(r"!\[[^]]+\]\((\w+)\.svg\)", PAGE)) == flash_figures.drawn(FOUND).keys()
    assert set(re.findall(r"<!-- end (\w+) -->", PAGE)) == flash_tables.tables(FOUND).keys()


def test_what_the_page_says_in_words_is_in_the_numbers():
    """Flash moves what equation (2) says; naive what 12 N² says, nearly; the kernel of a decode step the floor, nearly; XLA more than for bf16."""
    for one in FOUND["forward"]:
        if one["program"].startswith("flash"):
            assert one["moved"] == flash_tables.flash_bytes(one["tokens"], int(one["program"][5:]))
    last = {one["program"]: one for one in FOUND["forward"] if one["tokens"] == flash_attention.TOKENS[-1]}
    assert last["naive"]["moved"] == pytest.approx(flash_tables.naive_bytes(last["naive"]["tokens"]), rel=0.03)
    assert (
        last["loop"]["moved"] > last["naive"]["moved"]
        and last["loop"]["temporaries"] < last["naive"]["temporaries"] / 50
    )
    steps = {one["codec"]: one for one in FOUND["decode"] if one["slots"] == flash_attention.SLOTS[-1]}
    assert all(one["own"] <= 1.1 * one["floor"] for one in steps.values())
    assert all(one["xla"]["moved"] > steps["bf16"]["xla"]["moved"] for name, one in steps.items() if name != "bf16")


@pytest.mark.parametrize("queries", [16, 64])
def test_the_flash_kernel_is_attention_and_moves_what_the_formula_says(queries):
    pytest.importorskip("triton")
    import flash_kernel

    T, H = 128, flash_tables.H
    q, k, v = (jax.random.normal(jax.random.key(i), (T, H), jnp.bfloat16) for i in range(3))
    with traffic.counting() as counted:
        out, lse = jax.block_until_ready(flash_kernel.attention(4 * q, k, v, queries, interpret=True))
    wide = [np.asarray(x, np.float64) for x in (4 * q, k, v)]
    logits = wide[0] @ wide[1].T * H**-0.5
    expected = np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(lse, expected, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(out, np.float64), np.exp(logits - expected[:, None]) @ wide[2], atol=2e-2)
    assert counted.read.total() + counted.written.total() == flash_tables.flash_bytes(T, queries)
