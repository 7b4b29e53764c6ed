"""Rows with slots of their own in an engine: whatever runs beside a request, stops it or begins like it, it gets what it would get alone."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_engine import proposers
from test_pending import content

from kvcascade.cache.errors import BadInput
from kvcascade.cache.rows import Lines
from kvcascade.cache.snapshots import Snapshots
from kvcascade.cache.spec import parse
from kvcascade.model import generate, gpt
from kvcascade.model.config import ModelConfig
from kvcascade.model.sampling import FREE, GREEDY, Sampling, restrictions, settings
from kvcascade.serve.device import draw
from kvcascade.serve.engine import Engine
from kvcascade.serve.plan import Limits
from kvcascade.serve.propose import by_text, ngram
from kvcascade.serve.request import Request
from kvcascade.serve.rows import RowDevice, device_for, put, take

CONFIG = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, mlp=64, vocab=97, context=96)
CHUNK = 8
SPECS = (
    "sink 2 | recent 6",
    "sink 16@f32 on blocks | recent 4 | heavy 6@int8",
    "layers[0:1]: full@f32 on blocks ; layers[1:]: sink 2 | recent 9",
    "heads[0]: recent 5 ; heads[1]: sink 2 | heavy 8@int4h",
    "snap[window=4] 12 then recent 6",
    "sink 1 | expected[every=8] 10 | keydiff 6@int8",
)


@functools.cache
def params():
    """Larger than they are drawn, so that no two logits are near each other."""
    return jax.tree.map(lambda x: x * 4 if x.ndim == 2 else x, gpt.init(CONFIG, 0))


def requests(count: int = 10) -> list[Request]:
    """Prompts of 1 to 60 tokens, half of them with a common beginning, some that sample, some with several continuations."""
    rng = np.random.default_rng(0)
    common = rng.integers(0, CONFIG.vocab, 29).tolist()
    found = []
    for index in range(count):
        prompt = (common if index % 2 else []) + rng.integers(0, CONFIG.vocab, rng.integers(1, 31)).tolist()
        sampling = Sampling(temperature=0.7, top_k=20, seed=index, repetition_penalty=1.3) if index % 3 == 2 else GREEDY
        found.append(Request(prompt, int(rng.integers(2, 16)), sampling, continuations=3 if index % 5 == 2 else 1))
    return found


def growing() -> list[Request]:
    """Short prompts, of which much comes."""
    return [Request([index + 1, 5, 9], 17 - index) for index in range(6)]


@functools.partial(jax.jit, static_argnames="prompting")
def stepped(params, cache, token_1T, position_1T, prompting):
    if prompting:
        layers = (dataclasses.replace(each, prompting=each.cascade.front > 0) for each in cache.layers)
        cache = dataclasses.replace(cache, layers=tuple(layers))
    model = nnx.merge(gpt.graph(CONFIG)[0], params)
    x_1TM, cache = model.hidden(token_1T, position_1T, cache)
    return model.logits(x_1TM), cache.answering()


@functools.cache
def alone(spec: str, asked: Callable[[], list[Request]] = requests) -> list[list[int]]:
    """What comes of each request by itself: its prompt in chunks from its beginning, then token by token."""
    found = []
    for request in asked():
        for index in range(request.continuations):
            by = dataclasses.replace(request.sampling, seed=request.sampling.seed + index)
            cache = generate.empty_cache(CONFIG, parse(spec), 1, CONFIG.context).answering()
            tokens, start = list(request.prompt), 0
            while len(tokens) < len(request.prompt) + request.count:
                prompting = start < len(request.prompt)
                size = CHUNK if prompting else 1
                part = tokens[start : start + size]
                token, position = np.zeros((1, size), np.int32), np.full((1, size), -1, np.int32)
                token[0, : len(part)], position[0, : len(part)] = part, np.arange(len(part)) + start
                logits, cache = stepped(params(), cache, token, position, prompting)
                start += len(part)
                if start == len(tokens):
                    had = np.zeros((1, CONFIG.vocab), bool)
                    had[0, tokens] = True
                    at = jnp.asarray([start]), settings([by], 1), jnp.asarray(had), restrictions([FREE], CONFIG.vocab)
                    tokens.append(int(draw(logits[:, len(part) - 1].astype(jnp.float32), *at)[0][0]))
            found.append(tokens[len(request.prompt) :])
    return found


def engine(spec: str, blocks: int = 60, size: int = 4, limit: Limits | None = None) -> Engine:
    limits = limit or Limits(tokens=CHUNK, rows=6)
    return Engine(RowDevice(CONFIG, params(), parse(spec), blocks, limits, size=size))


def serve(engines: dict[str, Engine], every: int = 1, asked=requests) -> dict[str, list[list[int]]]:
    """All requests by each engine, one more every so many steps; the tokens of each row."""
    coming = {name: asked() for name in engines}
    found: dict[str, dict[int, list[int]]] = {name: {} for name in engines}
    steps = 0
    while any(coming.values()) or any(each.busy for each in engines.values()):
        for name, ours in engines.items():
            if coming[name] and steps % every == 0:
                found[name] |= {number: [] for number in ours.submit(coming[name].pop(0))}
            for event in ours.run_step():
                assert event.finished != "error"
                if event.token is not None:
                    found[name][event.id].append(event.token)
            ours.check()
        steps += 1
        assert steps < 5000
    return {name: list(each.values()) for name, each in found.items()}


@pytest.mark.parametrize("spec", [SPECS[1], pytest.param(SPECS[4], marks=pytest.mark.slow)])
def test_tokens_are_those_of_each_request_alone(spec: str) -> None:
    """Beside others, in turns with them, and some from where another prompt was."""
    ours = engine(spec, limit=Limits(tokens=CHUNK, rows=6, snapshots=2**24))
    assert serve({spec: ours})[spec] == alone(spec)
    assert ours.stats["found"] and not ours.stats["again"]


@pytest.mark.slow
def test_requests_of_six_caches_at_once_are_as_alone() -> None:
    engines = {spec: engine(spec) for spec in SPECS}
    assert serve(engines, every=2) == {spec: alone(spec) for spec in SPECS}


@pytest.mark.parametrize("spec", [SPECS[1], pytest.param(SPECS[2], marks=pytest.mark.slow)])
def test_who_stops_is_put_aside_and_goes_on_as_he_was(spec: str) -> None:
    """With hardly any blocks; nothing is computed twice."""
    ours = engine(spec, blocks=9)
    assert serve({spec: ours}, asked=growing)[spec] == alone(spec, growing)
    assert ours.stats["stopped"] and ours.stats["put_aside"] == ours.stats["stopped"] and not ours.stats["again"]
    assert not ours.queue.aside and not ours.device._aside  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "spec", [SPECS[1], *(pytest.param(spec, marks=pytest.mark.slow) for spec in (SPECS[0], *SPECS[2:]))]
)
def test_snapshot_swap_and_neither_leave_the_same_state(spec: str) -> None:
    """Bit for bit: one that computes all of its prompt, one that begins from another's snapshot, and one that is put aside on the way."""
    request = dataclasses.replace(requests()[1], count=9, sampling=GREEDY, continuations=1)

    def state(ours: Engine, swap_at: int = -1) -> list[np.ndarray]:
        (number,) = ours.submit(request)
        row = ours.live[number].row
        held: list[np.ndarray] = []
        step = 0
        while ours.busy:
            if step == swap_at:
                device = ours.device
                assert isinstance(device, RowDevice)
                place = jnp.int32(row.place)
                kept = [np.asarray(x) for x in take(device.cache, place)]
                for each in (device._nothing, kept):
                    device.cache = put(device.cache, place, [*map(jnp.asarray, each)])
            if row.held and row.table.computed == len(request.prompt) + request.count - 2:
                assert isinstance(ours.device, RowDevice)
                held = [np.asarray(x) for x in take(ours.device.cache, jnp.int32(row.place))]
            ours.run_step()
            step += 1
        assert held
        return held

    plain = state(engine(spec))
    again = engine(spec, limit=Limits(tokens=CHUNK, rows=6, snapshots=2**24))
    for found in (state(engine(spec), swap_at=5), state(again), state(again)):
        for a, b in zip(plain, found, strict=True):
            np.testing.assert_array_equal(a, b)
    assert again.stats["found"] >= CHUNK * (len(request.prompt) // CHUNK - 1)


WAITING = (
    "pending 4 | sink 2 | recent 6",
    "sink 16@f32 on blocks | pending 4 | recent 4 | heavy 6@int8",
    "heads[0]: pending 3 | recent 5 ; heads[1]: pending 4 | sink 2 | heavy 8@int4h",
    "pending 4 | sink 1 | expected[every=8] 10 | keydiff 6@int8",
)


def repeating() -> list[Request]:
    """Texts in which something comes again, some drawn, some of them several times."""
    return [*requests(6), Request([7, 8] * 8 + [7], 12, Sampling(temperature=1.0), continuations=3), *growing()[:3]]


@pytest.mark.slow
@pytest.mark.parametrize("spec", WAITING)
def test_what_is_foreseen_changes_no_token(spec: str) -> None:
    """By what followed before, by the very answer, by what never comes and by now and then."""
    plain = alone(spec, repeating)
    prompts = [[*request.prompt] for request in repeating() for _ in range(request.continuations)]
    whole = [[*prompt, *row] for prompt, row in zip(prompts, plain, strict=True)]

    found = {}
    for name, by in proposers(whole).items():
        device = RowDevice(CONFIG, params(), parse(spec), 60, Limits(tokens=CHUNK, rows=6, ahead=3), size=4)
        found[name] = Engine(device, propose=by_text(by))
        assert serve({spec: found[name]}, asked=repeating)[spec] == plain, name
    # Of rows that go on from one prompt the first that is alike is another's.
    assert 0 < sum(found["answer"].accepted) <= found["answer"].stats["drafted"] < 1.2 * sum(found["answer"].accepted)
    assert sum(found["wrong"].accepted) < 0.05 * found["wrong"].stats["drafted"]
    assert found["answer"].accepted[1] and found["ngram"].accepted[0]


@pytest.mark.parametrize("spec", WAITING)
def test_what_was_foreseen_leaves_no_trace(spec: str) -> None:
    """Bit for bit: tokens that come one by one, or some at once of which the last do not count, beside another row; all that slots hold that are
    not empty, what layers remember, and what each token saw."""
    shape = len(CONFIG.layer_heads), 2, CONFIG.context, 1
    vectors = lambda heads: np.random.default_rng(heads).normal(size=(2, *shape, heads, 8)).astype(np.float32)
    q, k, v = vectors(4), vectors(2), vectors(2) + 1

    @functools.partial(jax.jit, static_argnames="most")
    def call(cache, row_N, position_N, wrong_N, line_RA, kept_R, most):
        lines, seen = Lines.of(cache, line_RA, len(row_N)), []
        for index in range(shape[0]):
            of = lambda x, index=index: jnp.asarray(x)[wrong_N, index, row_N, position_N.clip(0)]
            out, lines = lines.step(index, of(q), of(k), of(v), position_N[:, None])
            seen.append(out[:, 0])
        return jnp.stack(seen), lines.accept(kept_R, position_N)

    def after(draft: Callable[[int], tuple[int, int]], most: int) -> tuple[dict[tuple[int, int], np.ndarray], list]:
        """Tokens in steps: of the first row so many that are right and so many that are not behind them, of the second one every other step."""
        cache, seen = parse(spec).init(2, CONFIG.layer_heads, CONFIG.context), {}
        at, steps = [0, 0], 0
        while at[0] < 60:
            right, wrong = draft(at[0])
            row, position, false, line = [], [], [], np.full((2, most), -1, np.int32)
            for index, count in enumerate((right + wrong, steps % 2)):
                line[index, :count] = range(len(row), len(row) + count)
                row += [index] * count
                position += range(at[index], at[index] + count)
                false += [int(index == 0 and each >= right) for each in range(count)]
            fill = 5 - len(row)
            padded = lambda x, none, fill=fill: np.asarray(x + [none] * fill, np.int32)
            kept = np.asarray([right, steps % 2], np.int32)
            given = padded(row, -1), padded(position, -1), padded(false, 0)
            found, cache = call(cache, given[0], given[1], given[2], line, kept, most)
            for place in range(len(row)):
                if not false[place]:
                    seen[row[place], position[place]] = np.asarray(found[:, place])
            at, steps = [at[0] + right, at[1] + steps % 2], steps + 1
        memories = [np.asarray(x)[:1] for layer in cache.layers for x in jax.tree.leaves(layer.memories)]
        return seen, [x[:1] for layer in cache.layers for slots in layer.slots for x in content(slots)] + memories

    room = lambda position: min([3, *(each - 1 - position % each for each in waits)])
    waits = [cascade.pending for cascade in parse(spec).cascades]
    rng = np.random.default_rng(0)

    def draft(position: int) -> tuple[int, int]:
        count = 1 + min(room(position), 59 - position)
        right = int(rng.integers(1, count + 1))
        return right, count - right

    plain, foreseen = after(lambda position: (1, 0), 1), after(draft, 4)
    for position in range(60):
        np.testing.assert_array_equal(foreseen[0][0, position], plain[0][0, position])
    for a, b in zip(foreseen[1], plain[1], strict=True):
        np.testing.assert_array_equal(a, b)


def test_nothing_is_compiled_after_the_warm_up() -> None:
    spec = WAITING[1]
    device = RowDevice(
        CONFIG, params(), parse(spec), 10, Limits(tokens=CHUNK, rows=6, aside=9, snapshots=2**24, ahead=2), size=4
    )
    ours = Engine(device, propose=by_text(ngram))
    device = ours.device
    assert isinstance(device, RowDevice)
    device.warm()
    before = [each._cache_size() for each in device.jitted], {*device.programs}
    serve({spec: ours})
    assert ([each._cache_size() for each in device.jitted], {*device.programs}) == before


def test_one_row_at_a_time() -> None:
    """As where a conversation is watched: whatever begins is put into the only row."""
    ours = engine(SPECS[0], limit=Limits(tokens=CHUNK, rows=1))
    assert serve({SPECS[0]: ours}, asked=growing)[SPECS[0]] == alone(SPECS[0], growing)


def test_prompts_get_their_chunk_beside_many_that_generate() -> None:
    """A step has room for fewer tokens than a chunk where rows generate, and takes one all the same."""
    ours = engine(SPECS[0])
    for _ in range(4):
        ours.submit(Request([5, 6, 7], 60))
    for _ in range(6):
        ours.run_step()
    (late,) = ours.submit(Request([1] * 20, 3))
    heard = [event.id for _ in range(6) for event in ours.run_step()]
    assert late in heard


def test_the_best_snapshots_are_kept_within_their_room() -> None:
    known = Snapshots(room=100, chunk=4)
    text = list(range(12))
    for stop in (4, 8):
        assert known.lacks(b"", text[:stop])
        known.keep(b"", text[:stop], f"after {stop}", 40)
    assert not known.lacks(b"", text[:4]) and not known.lacks(b"", text[:6])
    assert known.find(b"", text) == (8, "after 8") and known.find(b"other", text) == (0, None)
    assert known.find(b"", [*text[:4], 99, 5, 6, 7]) == (4, "after 4")
    known.keep(b"", [9] * 4, "another", 40)  # the one used longest ago goes
    assert known.find(b"", text) == (4, "after 4") and known.nbytes == 80
    known.keep(b"", [8] * 4, "too large", 101)
    assert known.find(b"", [8] * 4) == (0, None) and known.nbytes == 80
    known.keep(b"", [9] * 4, "again", 60)
    assert known.nbytes == 100


def test_what_it_cannot_have_is_refused() -> None:
    with pytest.raises(BadInput, match="wholly on blocks"):
        RowDevice(CONFIG, params(), parse("full on blocks"), 20)
    with pytest.raises(BadInput, match="reads a prompt twice"):
        device_for(CONFIG, params(), parse("kvzip 20"), 20)
    assert isinstance(device_for(CONFIG, params(), parse("sink 4 | recent 9"), 20), RowDevice)
