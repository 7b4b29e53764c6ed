"""The arithmetic of memory: published figures, the bytes of caches that are really allocated, and rows that fill a budget."""

import dataclasses

import jax
import pytest

from kvcascade.cache.errors import BadInput
from kvcascade.cache.layer import LayerCache
from kvcascade.cache.spec import parse
from kvcascade.cache.whole import Cache, nbytes
from kvcascade.eval.memory import arithmetic
from kvcascade.kernels import aot
from kvcascade.model import gpt
from kvcascade.model.known import KNOWN
from kvcascade.scripts import cli

GIB, MIB = 2**30, 2**20
SPECS = [
    "full",
    "full@f32",
    "full@fp8",
    "full@int8",
    "full@int4",
    "full@nvfp4",
    "sink 1 | recent 50% | heavy 32 | heavy 12.5%@int8",
    "sink 4 | recent 6 | recent 13%@int8 | recent 70%@int4h",
    "position-aware 25%@int4h | random[seed=1] 7@nvfp4",
    "layers[0:3]: full@int8 ; layers[3:]: sink 2 | heavy 20%@int4",
]


def test_published_figures():
    """Keys and values in 16 bits: Llama 2 7B at 4,096 tokens 2 GiB, GPT-2 at 512 tokens 18 MiB; a full cache has int32 positions besides."""
    for name, context, published in (("llama2-7b", 4096, 2 * GIB), ("gpt2", 512, 18 * MIB)):
        config = KNOWN[name]
        assert arithmetic.full_bytes(config, context) == published
        positions = config.layers * config.kv_heads * context * 4
        assert arithmetic.decode_step(config, parse("full"), context).cache == published + positions


def test_a_window_bounds_a_full_cache_and_what_savings_are_measured_by():
    """Mistral 7B sees 4,096 of 32,768 tokens: 2 · 32 layers · 8 heads · 128 numbers · 2 bytes of each, 512 MiB, and no more."""
    config = KNOWN["mistral-7b"]
    assert arithmetic.full_bytes(config, 32_768) == arithmetic.full_bytes(config, 4096) == 512 * MIB
    full = parse("full").nbytes(config.layer_heads, 32_768)
    assert full == 512 * MIB + 4 * 32 * 8 * 4096 == arithmetic.decode_step(config, parse("full"), 32_768).cache
    assert parse("heavy 50%").slots(config.layer_heads, 32_768) == 4096


@pytest.mark.slow
@pytest.mark.parametrize(("name", "context"), [("gpt2", 200), ("smollm2-135m", 130), ("qwen3-0.6b", 101)])
def test_bytes_are_those_of_caches_that_are_really_allocated(name, context):
    """Three models by ten specs, every codec, shares of the context and ranges of layers, to the byte."""
    config = KNOWN[name]
    # Compiled once for all layers that are alike.
    allocate = jax.jit(LayerCache.empty, static_argnums=(0, 1, 2, 3))
    for text in SPECS:
        spec = parse(text)
        groups = spec.groups(config.layer_heads)
        cache = Cache.of_groups(groups, (allocate(each.cascade, 1, each.of, context) for each in groups))
        buffers = sum(shard.data.nbytes for leaf in jax.tree.leaves(cache) for shard in leaf.addressable_shards)
        assert len(cache.layers) == config.layers
        assert arithmetic.decode_step(config, spec, context).cache == nbytes(cache) == buffers, text


@pytest.mark.parametrize("kept", ["float32", "bfloat16", "int8"])
def test_weights_are_the_bytes_of_the_parameters(nano, kept):
    config = dataclasses.replace(nano.config, weights=kept, biases="all", qk_norm=True, tied=False)
    params = jax.tree.leaves(gpt.init(config, 0))
    assert arithmetic.weights(config) == sum(leaf.nbytes for leaf in params)
    if kept == "float32":
        assert arithmetic.weights(config) == 4 * sum(leaf.size for leaf in params)


def test_a_budget_is_filled_with_users_and_with_context():
    """One more user, or one more token, would not fit; a cache of fixed counts takes any context, learned positions only their own."""
    config, spec = KNOWN["llama3-8b"], parse("full@int8")
    budget = arithmetic.budget("h100")
    held = arithmetic.decode_step(config, spec, 8192)
    users = held.users(budget)
    assert held.total(users) <= budget < held.total(users + 1)
    assert held.total(users) == held.weights + users * (held.cache + held.logits + held.inputs + held.workspace)
    assert held.logits == 2 * 128256
    assert (
        held.total(2) - held.total(1) > held.row
        and held.users(held.total(1)) == 1
        and held.users(held.total(1) - 1) == 0
    )
    longest = arithmetic.longest(config, spec, budget)
    assert longest is not None
    fits = lambda context: arithmetic.decode_step(config, spec, context).total(1) <= budget
    assert fits(longest) and not fits(longest + 1)
    assert arithmetic.longest(config, parse("sink 4 | heavy 60"), budget) is None
    assert arithmetic.longest(KNOWN["gpt2"], parse("full"), budget) == 1024
    assert arithmetic.longest(KNOWN["llama3-70b"], spec, budget) == 0
    assert arithmetic.decode_step(KNOWN["llama3-70b"], spec, 8192).users(budget) == 0


def test_ranks_of_the_first_tier_and_logits_that_are_observed_make_the_workspace(nano):
    """By hand: 2 layers, 4 heads, 2 KV heads of width 8, MLP 64, float32."""
    fixed = 4 * 32 + max(8 * 8 * 8, 2 * 64 * 4)
    at = lambda text: arithmetic.workspace(nano.config, parse(text), 100)
    assert at("full") == 2 * 4 * 2 * 101 + fixed
    assert at("sink 9 | recent 50") == 2 * 4 * 2 * 10 + fixed
    assert arithmetic.workspace(nano.config, parse("full"), 100, alone=True) == 4 * 2 * 101 + fixed
    assert at("sink 9 | heavy 50") == at("sink 9 | recent 50") + 4 * 4 * 59
    assert at("layers[0:1]: full ; layers[1:]: sink 9") == 4 * 2 * (101 + 10) + fixed


def test_the_table_has_a_row_for_every_model_context_and_cache(capsys):
    models = {name: KNOWN[name] for name in ("gpt2", "llama2-7b")}
    title, columns, rows = arithmetic.table(models, [parse("full"), parse("neurokv")], [512], "rtx3060")
    assert len(rows) == 4 and all(len(row) == len(columns) for row in rows) and "12.0 GiB" in title
    assert [row[:4] for row in rows[::2]] == [["gpt2", "512", "full", "0.23"], ["llama2-7b", "512", "full", "12.55"]]
    assert rows[0][5] == "18.3" and rows[2][8] == "0"
    cli.main(["memory", "--model", "llama2-7b", "--context", "4096", "--cache", "full"])
    assert "528,384" in capsys.readouterr().out  # 2 · 32 · 32 · 128 · 2 and a position in each of 32 · 32 places


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--gpu", "h101"], "no GPU 'h101'; there are h100"),
        (["--model", "gpt2", "--context", "2000"], "longer than the model's 1024 learned positions"),
        (["--model", "gpt9"], "no run"),
        (["--context", "0"], "--context is 0; it must be at least 1"),
        (["--cache", "heavy"], "needs a number of slots"),
    ],
)
def test_bad_input_is_one_line(arguments, line, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["memory", *arguments])
    out, err = capsys.readouterr()
    assert line in err and err.count("\n") == 1 and not out


def test_a_share_is_above_nothing_and_at_most_all():
    assert arithmetic.budget("rtx3060", 0.5) == 6 * GIB
    for share in (0.0, 1.1):
        with pytest.raises(BadInput, match="share"):
            arithmetic.budget("rtx3060", share)
    assert set(aot.MEMORY) == {*aot.KNOWN, *aot.DERIVED}
