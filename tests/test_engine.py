"""The engine against `generate` of each request alone, whatever pool, budget, codec and kernels."""

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
import pytest

from kvcascade.cache.block_cache import BlockCache
from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.kernels import backend, native
from kvcascade.kernels.traffic import counting
from kvcascade.model import generate, gpt
from kvcascade.model.config import ModelConfig
from kvcascade.model.sampling import FREE, GREEDY, Sampling, restrictions, settings
from kvcascade.serve.device import Device, step
from kvcascade.serve.engine import Engine
from kvcascade.serve.plan import Limits
from kvcascade.serve.propose import by_text, ngram
from kvcascade.serve.request import Request
from kvcascade.serve.rows import RowDevice

CONFIG = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, mlp=64, vocab=97, context=96)


@functools.cache
def params():
    """Larger than they are drawn, so that no two logits are near each other."""
    return jax.tree.map(lambda x: x * 4 if x.ndim == 2 else x, gpt.init(CONFIG, 0))


def requests(count: int = 16) -> list[Request]:
    """Prompts of 1 to 70 tokens, half of them with a common beginning of 37, some that sample, some with several continuations."""
    rng = np.random.default_rng(0)
    common = rng.integers(0, CONFIG.vocab, 37).tolist()
    found = []
    for index in range(count):
        prompt = (common if index % 2 else []) + rng.integers(0, CONFIG.vocab, rng.integers(1, 34)).tolist()
        sampling = Sampling(temperature=0.7, top_k=20, seed=index, repetition_penalty=1.3) if index % 3 == 2 else GREEDY
        found.append(Request(prompt, int(rng.integers(1, 20)), sampling, continuations=3 if index % 8 == 2 else 1))
    return found


def serve(engine: Engine, wanted: list[Request], every: int = 1) -> list[list[int]]:
    """All requests, one more every so many steps; the tokens of each row."""
    coming, rows, steps = list(wanted), {}, 0
    while coming or engine.busy:
        if coming and steps % every == 0:
            rows |= {number: [] for number in engine.submit(coming.pop(0))}
        for event in engine.run_step():
            assert event.finished != "error"
            if event.token is not None:
                rows[event.id].append(event.token)
        engine.check()
        for row in engine.queue.running:  # less than a block of each row is empty
            assert len(row.table.blocks) <= engine.blocks.needed(len(row.tokens))
        steps += 1
        assert steps < 5000
    assert engine.blocks.states()["used"] == 0
    return list(rows.values())


@functools.cache
def alone(codec: str = "f32") -> list[list[int]]:
    """What `generate` makes of each request by itself."""
    found = []
    for request in requests():
        for index in range(request.continuations):
            cache = generate.empty_cache(CONFIG, parse(f"full@{codec}"), 1, 96)
            sampling = dataclasses.replace(request.sampling, seed=request.sampling.seed + index)
            made = generate.generate(CONFIG, params(), cache, [list(request.prompt)], request.count, [sampling])
            found.append(np.concatenate([new for new, _ in made])[:, 0].tolist())
    return found


def engine(
    codec: str, blocks: int, size: int = 16, tokens: int = 32, rows: int = 8, reuse: bool = True, aside: int = 0
) -> Engine:
    spec = parse(f"full@{codec} on blocks")
    return Engine(Device(CONFIG, params(), spec, blocks, Limits(tokens, rows, aside=aside), size=size), reuse)


CONFIGURATIONS = {
    "roomy": {"blocks": 400, "tokens": 48, "rows": 32},
    "few tokens a step": {"blocks": 400, "tokens": 8},
    "hardly any blocks": {"blocks": 9, "tokens": 16},
    "no reuse": {"blocks": 12, "reuse": False},
    "put aside": {"blocks": 9, "tokens": 16, "aside": 20},
    "put aside, nothing found": {"blocks": 9, "tokens": 16, "aside": 20, "reuse": False},
    "one row": {"blocks": 40, "rows": 3, "tokens": 3},
    "wider blocks": {"blocks": 9, "size": 32},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_tokens_are_those_of_each_request_alone(name: str) -> None:
    ours = engine("f32", **CONFIGURATIONS[name])
    assert serve(ours, requests()) == alone()
    if name == "hardly any blocks":
        assert ours.stats["stopped"] and ours.blocks.evictions
    if name.startswith("put aside"):
        assert ours.stats["put_aside"] and not ours.queue.aside and not ours.device._aside  # pyright: ignore
    if ours.reuse:
        assert ours.stats["found"] and ours.stats["copied"]


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["bf16", "int4h", "int8/int4"])
def test_stored_in_fewer_bits_all_configurations_agree(codec: str) -> None:
    names = "few tokens a step", "hardly any blocks", "put aside"
    found = [serve(engine(codec, **CONFIGURATIONS[name]), requests()) for name in names]
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 5, 16])
def test_through_xla(size: int) -> None:
    with backend.using("xla"):
        assert serve(engine("f32", 130 if size < 16 else 20, size), requests()) == alone()


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no Triton")
def test_through_triton() -> None:
    """The GPU kernel, interpreted: three requests over a pool that is too small for them, and the tokens that XLA finds."""
    config = dataclasses.replace(CONFIG, width=64)
    weights = jax.tree.map(lambda x: x * 4 if x.ndim == 2 else x, gpt.init(config, 0))
    common = list(range(1, 17))
    wanted = [Request(common + [3, 5], 4), Request(common + [7], 5), Request([2, 4], 17)]
    found = {}
    for implementation in ("xla", "triton"):
        with backend.using(implementation), counting() as traffic:
            device = Device(config, weights, parse("full@int8 on blocks"), 5, Limits(8, 3), context=32)
            ours = Engine(device)
            found[implementation] = serve(ours, wanted)
        assert ours.stats["found"] and (implementation == "xla" or "_attend" in {name for name, _ in traffic.read})
    assert found["triton"] == found["xla"]


@pytest.mark.skipif(not native.ready(), reason="no C++ compiler")
@pytest.mark.parametrize("length", range(30, 50))
def test_every_length_modulo_the_block(length: int) -> None:
    """A partly filled block is nothing special, with a hit and without one."""
    ours, prompt = shared_engine(), np.random.default_rng(length).integers(0, CONFIG.vocab, length).tolist()
    first = serve(ours, [Request(prompt, 6)])
    before = ours.stats["found"]
    assert serve(ours, [Request(prompt, 6)]) == first
    assert ours.stats["found"] - before == (length - 1) // 16 * 16


@functools.cache
def shared_engine() -> Engine:
    return engine("int8", 40)


@pytest.mark.slow
def test_nothing_is_compiled_after_warming_up() -> None:
    ours = engine("int8", 9, tokens=24, aside=20)
    device = ours.device
    assert isinstance(device, Device)
    device.warm()
    compiled = device.compiled()
    device._seconds = 0.0, 0.0, math.inf  # whatever was measured
    serve(ours, [dataclasses.replace(each, likely=index % 3) for index, each in enumerate(requests())])
    assert ours.stats["put_aside"] and device.compiled() == compiled


def test_the_likeliest_tokens_are_told() -> None:
    """Beside the drawn one's own log-probability, which is that of the model before any setting."""
    ours = engine("f32", 40)
    two = ours.submit(Request([3, 5, 7], 4, likely=5))[0], ours.submit(Request([2], 4, Sampling(1.0)))[0]
    while ours.busy:
        for event in ours.run_step():
            assert len(event.likely) == (5 if event.id == two[0] else 0)
            if event.likely:
                numbers, logprobs = zip(*event.likely, strict=True)
                assert numbers[0] == event.token and abs(logprobs[0] - event.logprob) < 1e-5  # pyright: ignore
                assert [*logprobs] == sorted(logprobs, reverse=True) and sum(map(math.exp, logprobs)) < 1
    with pytest.raises(BadInput, match="of 20 at most, not of 21"):
        ours.submit(Request([1], 1, likely=21))


def test_moving_is_weighed_against_computing() -> None:
    device = engine("int8", 9, aside=4).device
    assert isinstance(device, Device)
    device.warm()
    start, each, token = device._seconds
    assert start >= 0 and each >= 0 and 0 < token < math.inf
    device._seconds = 1.0, 0.5, 0.02  # 16 blocks come to 0.5 s moved, a block to 0.32 s computed
    assert [device.quicker(count) for count in (1, 4, 5, 17)] == [False, False, True, True]


def test_salts_keep_prefixes_apart() -> None:
    ours, prompt = engine("f32", 60), list(range(40))
    for salt, found in (("a", 0), ("b", 0), ("a", 32)):
        before = ours.stats["found"]
        serve(ours, [dataclasses.replace(Request(prompt, 2), salt=salt)])
        assert ours.stats["found"] - before == found


def test_a_row_that_is_cancelled_is_gone_at_once() -> None:
    ours = engine("f32", 40)
    (first,) = ours.submit(Request(list(range(20)), 30))
    three = ours.submit(Request(list(range(5)), 30, continuations=3))
    waiting = ours.submit(Request([1], 30))[0]
    ours.run_step()
    used = ours.blocks.states()["used"]
    assert ours.cancel(first) and ours.blocks.states()["used"] < used
    assert ours.cancel(three[1]) and ours.cancel(waiting) and not ours.cancel(waiting)
    ours.check()
    rest = {event.id for _ in range(40) for event in ours.run_step()}
    assert rest == {three[0], three[2]} and not ours.busy


def test_continuations_share_the_prompt() -> None:
    ours = engine("f32", 60)
    ours.submit(Request(list(range(64)) + [1], 20, Sampling(temperature=1.0), continuations=4))
    while len(ours.queue.running) < 4:
        ours.run_step()
    for _ in range(3):
        ours.run_step()
    used, apart = ours.blocks.states()["used"], 4 * ours.blocks.needed(65 + 4)
    assert used == 4 + 4 and 1 - used / apart >= 0.55  # four full blocks of all, and one of each


@pytest.mark.skipif(not native.ready(), reason="no C++ compiler")
def test_a_step_copies_no_pool() -> None:
    """Donated and written in place: no copy of its shape in the program, and temporaries smaller than one layer's part."""
    ours = engine("int8", 2000).device
    assert isinstance(ours, Device)
    out, none = np.full(8, -1, np.int32), np.full(8, -1, np.int32)
    by = settings([GREEDY] * 8, 8)
    leaves, tree = jax.tree.flatten((ours.cache, ours._seen))

    def whole(leaves, token, position, row, out, table):
        cache, seen = tree.unflatten(leaves)
        found = step(
            CONFIG, params(), cache, seen, token, position, row, out, table, by, restrictions([FREE] * 8, CONFIG.vocab)
        )
        return found[:3], jax.tree.leaves(found[3:])

    arguments = leaves, np.zeros(8, np.int32), none, none, out, ours._table
    compiled = jax.jit(whole, donate_argnums=0).lower(*arguments).compile()
    memory, program = compiled.memory_analysis(), compiled.as_text()
    assert memory and program
    assert isinstance(ours.cache, BlockCache)
    pools = jax.tree.leaves(ours.cache.pools)
    shapes = [
        f"{x.dtype.name.replace('int8', 's8').replace('bfloat16', 'bf16')}[{','.join(map(str, x.shape))}]"
        for x in pools
    ]
    copies = [line for line in program.splitlines() if " copy(" in line]
    assert shapes and not [line for line in copies if any(shape in line for shape in shapes)]
    assert memory.temp_size_in_bytes < sum(x.nbytes for x in pools) / CONFIG.layers
    assert sum(x.nbytes for x in pools) == 2000 * 16 * (parse("full@int8").nbytes(CONFIG.layer_heads, 1) - 4 * 2 * 2)


@pytest.mark.parametrize(
    "spec", ["full", "sink 16 on blocks | recent 4", "layers[0:1]: full on blocks ; layers[1:]: recent 4"]
)
def test_caches_that_are_not_wholly_on_blocks_are_refused(spec: str) -> None:
    with pytest.raises(BadInput, match="wholly on blocks"):
        Device(CONFIG, params(), parse(spec), 20)


def test_requests_that_could_never_end_are_refused() -> None:
    ours = engine("f32", 5)
    with pytest.raises(BadInput, match="100 tokens are more than the engine's context of 96"):
        engine("f32", 20).submit(Request([1] * 90, 10))
    for request, reason in (
        (Request([], 3), "the prompt is empty"),
        (Request([1], 0), "a token and a continuation at least"),
        (Request([1] * 60, 10), "70 tokens take 5 blocks of 16, and the pool has 4"),
        (Request([97], 1), "numbers from 0 to 96"),
        (Request([1], 1, continuations=0), "a token and a continuation at least"),
    ):
        with pytest.raises(BadInput, match=reason):
            ours.submit(request)
    assert not ours.busy


def test_more_rows_may_draw_than_a_step_has_tokens() -> None:
    ours = engine("f32", 60, tokens=4, rows=8)
    found = serve(ours, [Request([1, 2, 3], 3, Sampling(1.0), continuations=8)])
    assert [len(row) for row in found] == [3] * 8
    wide = engine("f32", 60, tokens=32, rows=8)
    assert found == serve(wide, [Request([1, 2, 3], 3, Sampling(1.0), continuations=8)])


@pytest.mark.parametrize("reuse", [True, False])
def test_what_is_found_is_others(reuse: bool) -> None:
    """A row that stopped and finds its own blocks has not found anything, and what it computes again is counted."""
    ours = engine("f32", 9, tokens=16, reuse=reuse)
    serve(ours, [Request([index] * 20, 16) for index in range(6)])
    assert ours.stats["stopped"] and not ours.stats["found"] and (reuse or ours.stats["again"])
    assert ours.stats["tokens"] - ours.stats["again"] == 6 * (20 + 16 - 1)


def test_logits_that_are_not_numbers_end_their_row_alone() -> None:
    leaves, tree = jax.tree.flatten(params()["embed"])
    table = np.array(leaves[0])
    table[5] = np.nan
    broken = params() | {"embed": tree.unflatten([jax.numpy.asarray(table), *leaves[1:]])}
    ours = Engine(Device(CONFIG, broken, parse("full on blocks"), 20, Limits(16, 4)))
    (number,) = ours.submit(Request([5], 3))
    events = ours.run_step()
    assert [(event.id, event.finished) for event in events] == [(number, "error")] and not ours.busy
    ours.check()


def texts() -> list[Request]:
    """Prompts that repeat themselves, of which some are drawn from."""
    rng = np.random.default_rng(1)
    found = []
    for index in range(6):
        part = rng.integers(0, CONFIG.vocab, 5).tolist()
        sampling = Sampling(temperature=0.2, seed=index) if index % 2 else GREEDY
        found.append(Request(part * 4, int(rng.integers(8, 40)), sampling))
    # Its last step is of one token, as are those of rows that generate.
    return [*found, Request([7, 8] * 8 + [7], 12, Sampling(temperature=1.0), continuations=3)]


def foresee(by, asked: list[Request], ahead: int = 3, **room) -> tuple[list[list[int]], Engine]:
    device = Device(CONFIG, params(), parse("full@f32 on blocks"), size=16, limits=Limits(16, 3, ahead=ahead), **room)
    ours = Engine(device, propose=by_text(by))
    return serve(ours, asked), ours


def proposers(whole: list[list[int]]) -> dict[str, Callable[[Sequence[int], int], list[int]]]:
    """By what followed before, by the very answer, by what never comes and by now and then; of texts that come in the end."""

    def answer(tokens, count: int) -> list[int]:
        mine = next(each for each in whole if each[: len(tokens)] == list(tokens))
        return mine[len(tokens) : len(tokens) + count]

    wrong = lambda tokens, count: [(each + 1) % CONFIG.vocab for each in answer(tokens, count)]
    now_and_then = lambda tokens, count: answer(tokens, 2) + wrong(tokens, 9)[2:count] if len(tokens) % 3 else []
    return {"ngram": ngram, "answer": answer, "wrong": wrong, "now and then": now_and_then}


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [60, 6])
def test_what_is_foreseen_changes_no_token(blocks: int) -> None:
    """By what followed before, by the very answer, by what never comes and by now and then: greedy, and drawn."""
    plain, ours = foresee(lambda tokens, count: [], texts(), blocks=blocks)
    prompts = [[*request.prompt] for request in texts() for _ in range(request.continuations)]
    whole = [[*prompt, *row] for prompt, row in zip(prompts, plain, strict=True)]

    found = {}
    for name, by in proposers(whole).items():
        rows, found[name] = foresee(by, texts(), blocks=blocks)
        assert rows == plain, name
    # Of three rows that go on from one prompt the first that is alike is another's.
    assert 0 < sum(found["answer"].accepted) <= found["answer"].stats["drafted"] < 1.1 * sum(found["answer"].accepted)
    assert sum(found["wrong"].accepted) < 0.05 * found["wrong"].stats["drafted"]
    assert 0 < sum(found["ngram"].accepted) < found["ngram"].stats["drafted"]
    if blocks == 60:  # each step of a row brings four tokens where all are right
        assert found["answer"].stats["steps"] < 0.4 * ours.stats["steps"]
    else:
        assert found["ngram"].stats["stopped"]


def test_a_draft_is_accepted_as_often_as_it_is_likely() -> None:
    """The acceptance law, over many seeds: a token that is foreseen comes as often as the model's probability says, and the answers of all seeds
    are those without a draft, so their distribution is the model's."""
    prompt, count = [3, 1, 4, 1, 5], 400
    request = lambda seed: Request(prompt, 3, Sampling(temperature=4.0, seed=seed))
    device = lambda: Device(CONFIG, params(), parse("full@f32 on blocks"), 60, Limits(32, 8, ahead=1))
    plain = Engine(device())
    rows = serve(plain, [request(seed) for seed in range(count)])
    draft = max(range(CONFIG.vocab), key=[row[1] for row in rows].count)
    ours = Engine(device(), propose=by_text(lambda tokens, count: [draft]))
    assert serve(ours, [request(seed) for seed in range(count)]) == rows
    # Of the first token that follows the prompt nothing is foreseen, of the second one is.
    assert ours.accepted == [sum(row[1] == draft for row in rows)] and ours.stats["drafted"] == count


def test_nothing_is_foreseen_where_more_than_the_tokens_decides() -> None:
    """Not with a penalty for what was there, not where a request does not want it; and not in slots that cannot be taken back."""
    penalised = Request([1, 2, 1, 2], 9, Sampling(repetition_penalty=1.3))
    plain, _ = foresee(lambda tokens, count: [], [penalised], blocks=60)
    rows, ours = foresee(ngram, [penalised, Request([1, 2, 1, 2], 9, ahead=False)], blocks=60)
    assert rows[0] == plain[0] and not ours.stats["drafted"]
    with pytest.raises(BadInput, match="tried where it can be taken back"):
        Engine(RowDevice(CONFIG, params(), parse("sink 2 | recent 6"), 20), propose=by_text(ngram))


@pytest.mark.parametrize(
    "tokens, count, wanted",
    [
        ([1, 2, 3, 9, 1, 2, 3], 3, [9, 1, 2]),
        ([1, 2, 3, 9, 1, 2, 3], 6, [9, 1, 2, 3, 9, 1]),  # over its end it goes on
        ([5, 2, 3, 7, 8, 2, 3, 6, 5, 2, 3], 1, [7]),  # three alike rather than two
        ([2, 7, 2, 8, 2], 1, [8]),  # of equals the last
        ([4, 4], 3, [4, 4, 4]),
        ([1, 2, 3], 3, []),
        ([1], 3, []),
        ([1, 1], 0, []),
    ],
)
def test_ngram_foresees_what_followed_before(tokens: list[int], count: int, wanted: list[int]) -> None:
    assert ngram(tokens, count) == wanted
