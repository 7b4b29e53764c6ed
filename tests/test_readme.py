"""The README says what the code does: its Python runs, its policy obeys, its tables come from the records."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvcascade.cache import policies, policy
from kvcascade.cache.cascade import Cascade
from kvcascade.cache.layer import LayerCache
from kvcascade.cache.spec import parse
from kvcascade.kernels.heads import Heads
from kvcascade.model import gpt
from kvcascade.scripts import readme

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CACHES = (ROOT / "docs" / "caches.md").read_text()
SHORT, STRIDE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
EXAMPLE, ALLOCATED, POLICY, ENGINE, DRAFT = re.findall(r"```python\n(.*?)```", CACHES, re.DOTALL)


def test_the_example_runs():
    """Composing a cascade and decoding with it works as shown."""
    names: dict = {}
    exec(EXAMPLE, names)
    assert names["logits"].shape == (1, 256)


def test_a_pyramid_is_allocated_as_shown():
    """Layers of fewer slots from the first to the last."""
    names: dict = {}
    exec(EXAMPLE.split("spec = ")[0] + ALLOCATED, names)
    assert names["spec"].slots([Heads(9, 3, 64)] * 30, 2048) == 4 + 8 + round(2 * 92 - 92 / 20)


def test_the_policy_of_the_readme_works(monkeypatch):
    """The policy shown is in effect once it is in POLICIES: multiples of the step stay."""
    names = {"dataclasses": dataclasses, "jnp": jnp, "Policy": policy.Policy, "PINNED": policy.PINNED}
    exec(POLICY, names)
    monkeypatch.setitem(policies.POLICIES, "stride", names["Stride"])
    spec = parse("stride[step=8] 6")
    assert str(spec) == "stride[step=8] 6"
    cache = LayerCache.empty(spec.cascades[0], batch=1, heads=Heads(1, 1, 4), context=40)
    for position in range(40):
        x = jax.random.normal(jax.random.key(position), (1, 1, 1, 4))
        _, cache = cache.step(x, x, x, jnp.full((1, 1), position))
    assert isinstance(cache.cascade, Cascade)
    assert sorted(cache.slots[0].pos_BKS[0, 0].tolist()) == [0, 8, 16, 24, 32, 39]


@pytest.mark.slow
def test_the_draft_of_the_readme_is_committed_in_part():
    """Of four drafted tokens two are accepted: the cache then holds the prompt and these two, and each layer as if no others had been."""
    names: dict = {"gpt": gpt, "jnp": jnp}
    exec(EXAMPLE.split("token = jnp")[0], names)
    prompt, drafted = jnp.asarray([[5, 6, 7]]), jnp.asarray([[8, 9, 10, 11]])
    _, cache = gpt.step(names["config"], names["params"], names["cache"], prompt, jnp.arange(3)[None])
    names |= {
        "cache": cache,
        "tokens": drafted,
        "positions": 3 + jnp.arange(4)[None],
        "accepted": jnp.arange(4)[None] < 2,
    }
    exec(DRAFT, names)
    _, alone = gpt.step(names["config"], names["params"], cache, drafted[:, :2], 3 + jnp.arange(2)[None])
    assert sorted(names["cache"].layers[1].slots[0].pos_BKS[0, 0].tolist()) == [0, 1, 2, 3]
    for ours, theirs in zip(jax.tree.leaves(names["cache"]), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours.astype("float32"), theirs.astype("float32"), atol=0.02)


def test_the_engine_of_the_pages_runs(capsys):
    """A request's tokens come one by one, the last of them as its end."""
    names: dict = {}
    exec(EXAMPLE.split("cache = spec")[0], names)
    names["model"] = type("Model", (), {"config": names["config"], "params": names["params"]})
    exec(ENGINE.replace('model = pretrained.load("smollm2")\n', ""), names)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 8 and said[-1].endswith(" length")


@pytest.mark.slow
def test_generated_parts_are_fresh():
    """README.md, the pages of docs/ and their figures are what the records make; `make readme` renews them."""
    for path, content in readme.generated().items():
        assert path.read_text() == content, path.name


def test_the_readme_is_short_and_says_the_same_as_the_pages():
    """At most 150 lines; the policy is the one of docs/caches.md, and what it calls is there."""
    assert len(README.splitlines()) <= 150 and POLICY == STRIDE
    names: dict = {}
    exec(SHORT.replace("smollm2", "MODEL").split("model =")[0], names)
    assert all(hasattr(names["kvc"], called) for called in re.findall(r"kvc\.(\w+)", SHORT))


def test_each_spec_of_the_readme_parses():
    """The table of specs shows real ones."""
    specs = re.findall(
        r"^\| `([^`]+)` \|", README + CACHES.split("## The idea")[1].split("## Layers and heads")[0], re.MULTILINE
    )
    specs = [text for text in specs if not text.startswith("--")]
    assert len(specs) >= 14
    for text in specs:
        parse(text.replace("\\|", "|"))
