"""A smaller model that foresees for a larger one: answers are the same, what it has read is what the rows have, and it is trained on what the model says."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiktoken
from safetensors.flax import load_file, save_file
from served import toy
from test_engine import CONFIG, params, requests, serve, texts

from kvcascade.cache.block_cache import BlockCache
from kvcascade.cache.blocks import Table
from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.eval import record_files
from kvcascade.eval.records import Distilled, of
from kvcascade.kernels.heads import capped
from kvcascade.model import gpt
from kvcascade.model.config import ModelConfig
from kvcascade.model.programs import traced
from kvcascade.model.sampling import Sampling
from kvcascade.scripts import console, distill
from kvcascade.scripts.arguments import foreseen
from kvcascade.serve import draft
from kvcascade.serve.device import Device
from kvcascade.serve.draft import Draft, Follower
from kvcascade.serve.engine import Engine
from kvcascade.serve.plan import Limits, Plan, Row, Run
from kvcascade.serve.propose import by_model
from kvcascade.serve.request import Request
from kvcascade.serve.rows import device_for
from kvcascade.train import distillation
from kvcascade.train.distillation import Settings

SMALL = ModelConfig(
    layers=1, width=16, heads=2, kv_heads=1, mlp=32, vocab=CONFIG.vocab, context=CONFIG.context, window=24
)
LEARNING = Settings(texts=12, length=48, layers=1, width=64, window=16, steps=30, batch=4)


def itself() -> Draft:
    return Draft(CONFIG, params(), "the model itself")


def another() -> Draft:
    return Draft(SMALL, gpt.init(SMALL, 3), "another")


def engine(
    small: Draft | None, spec: str = "full on blocks", blocks: int = 60, rows: int = 3, ahead: int = 3
) -> Engine:
    limits = Limits(16, rows, ahead=ahead if small else 0)
    device = device_for(CONFIG, params(), parse(spec), blocks, limits, size=16, draft=small)
    return Engine(device, propose=by_model if small else None)


@pytest.mark.parametrize(
    "spec, blocks",
    [
        pytest.param("full on blocks", 60, marks=pytest.mark.slow),
        pytest.param("full on blocks", 6, marks=pytest.mark.slow),
        pytest.param("pending 8 | sink 4 | recent 80", 60, marks=pytest.mark.slow),
    ],
)
def test_what_it_foresees_changes_no_token(spec: str, blocks: int) -> None:
    """By a model that says nearly the same, and by one that says something else; where rows stop and come back, their places' content is another's."""
    plain = engine(None, spec, blocks)
    wanted = serve(plain, texts())
    for small, least in ((itself(), 0.9), (another(), 0.0)):
        ours = engine(small, spec, blocks)
        assert serve(ours, texts()) == wanted
        assert ours.stats["drafted"] and sum(ours.accepted) >= least * ours.stats["drafted"]
    assert blocks > 6 or plain.stats["stopped"]


def test_what_it_has_read_is_what_the_rows_have() -> None:
    """After texts that came, stopped and were foreseen wrongly it foresees what one does that reads them for the first time."""
    ours, seen = engine(another(), blocks=6), []
    device = ours.device
    assert isinstance(device, Device) and isinstance(follower := device.follower, Follower)
    foresee = follower.foresee

    def noted(asked):
        fresh = Follower(another(), ours.limits, CONFIG.context, traced)
        made = foresee(asked)
        if len(seen) < 40:
            seen.append(made == fresh.foresee(asked))
        return made

    follower.foresee = noted
    serve(ours, texts())
    assert len(seen) == 40 and all(seen) and 0 < sum(ours.accepted) < ours.stats["drafted"]


def test_nothing_is_compiled_after_the_warm_up() -> None:
    ours = engine(another())
    device = ours.device
    assert isinstance(device, Device) and device.follower
    device.warm()
    before = device.compiled()
    serve(ours, requests())
    assert device.compiled() == before and ours.stats["drafted"]
    plain = engine(None).device
    assert isinstance(plain, Device) and device.nbytes == plain.nbytes + device.follower.nbytes


def distribution(device: Device, tokens: list[int], temperature: float, coarsely: bool = False) -> np.ndarray:
    """Of the token that follows, as a device's model has it by its own cache."""
    row = Row(0, tokens, len(tokens) + 1, place=0, held=Table(b"", [*range(1, 1 + -(-len(tokens) // device.size))]))
    device.run(Plan([Run(row, 0, len(tokens) - 1)]), {}, False)
    assert isinstance(device.cache, BlockCache)
    cache = dataclasses.replace(
        device.cache, table_RW=jnp.asarray(device._table), row_B=jnp.zeros(1, jnp.int32), coarsely=coarsely
    )
    last = jnp.asarray([[tokens[-1]]]), jnp.asarray([[len(tokens) - 1]])
    logits, _ = gpt.step(device.config, device.params, cache, *last)
    logits = np.asarray(logits, np.float64).reshape(-1) / temperature
    return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()


def together(p: np.ndarray, q: np.ndarray) -> float:
    """How often two draws by the same noise are the same token: the sum of 1 / sum over j of max(p_j / p_i, q_j / q_i) (Daliri et al. 2024)."""
    return float(sum(1 / np.maximum(p / p[i], q / q[i]).sum() for i in range(len(p))))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["draft", "self"])
def test_what_it_foresees_comes_as_often_as_the_distributions_say(way: str) -> None:
    """The acceptance law, with every token of the vocabulary counted: two draws by one noise agree as often as the sum says; the answers of all
    seeds are those without a draft, so their distribution is the model's."""
    prompt, count, hot = [3, 1, 4, 1, 5], 400, 4.0 if way == "draft" else 0.2
    asked = [Request(prompt, 3, Sampling(temperature=hot, seed=seed)) for seed in range(count)]
    spec = parse("full@planes on blocks" if way == "self" else "full@f32 on blocks")

    def device(ahead: int) -> Device:
        small = another() if way == "draft" and ahead else None
        return device_for(
            CONFIG,
            params(),
            spec,
            60,
            Limits(32, 8, ahead=ahead, itself=way == "self" and ahead > 0),
            size=16,
            draft=small,
        )

    rows = serve(Engine(device(0)), asked)
    ours = Engine(device(1), propose=by_model)
    assert serve(ours, asked) == rows and ours.stats["drafted"] == count
    large, small = (
        device(0),
        Follower(another(), Limits(32, 8, ahead=1), CONFIG.context, traced) if way == "draft" else device(0),
    )
    shares = {}
    for token in {row[0] for row in rows}:
        text = [*prompt, token]
        shares[token] = together(distribution(large, text, hot), distribution(small, text, hot, coarsely=way == "self"))
    expected = [shares[row[0]] for row in rows]
    spread = np.sqrt(sum(share * (1 - share) for share in expected))
    assert abs(ours.accepted[0] - sum(expected)) < 4 * spread
    assert 0.02 * count < sum(expected) < 0.99 * count


@functools.cache
def learned() -> tuple[np.ndarray, np.ndarray, distillation.Learned]:
    model = toy()
    rows = distillation.write(model, LEARNING, compiled=traced)
    heard = distillation.hear(model, rows)
    return rows, heard, distillation.learn(model, rows, heard, LEARNING)


def test_the_model_writes_and_a_small_one_learns() -> None:
    """Texts begin as a conversation does and hang on the seed alone; what the head sees gives the model's own logits; learning brings it nearer."""
    model, (rows, heard, made) = toy(), learned()
    begin = distillation.opening(model)
    assert model.encoding.decode(begin) == "<|of|>user: "
    assert rows.shape == (12, 48) and (rows[:, : len(begin)] == begin).all() and len({*map(bytes, rows)}) == 12
    np.testing.assert_array_equal(distillation.write(model, LEARNING, compiled=traced), rows)
    assert (distillation.write(model, dataclasses.replace(LEARNING, seed=99), compiled=traced) != rows).any()
    head = np.asarray(model.params["embed"]["weight"], np.float64)
    wanted = np.asarray(gpt.forward(model.config, model.params, jnp.asarray(rows[:2])))
    np.testing.assert_allclose(heard[:2].astype(np.float64) @ head.T, wanted, atol=0.02 * np.abs(wanted).max())
    start = distillation.learn(model, rows, heard, dataclasses.replace(LEARNING, steps=1)).compared
    assert made.held == 1 and made.config.window == 16 and made.compared.divergence < 0.9 * start.divergence
    assert 0 < made.compared.shared <= 1 and 0 <= made.compared.alike <= 1


@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_the_divergence_is_that_of_the_distributions(cap: float) -> None:
    """More places than a block has, against float64; and its gradient against that of one formula for all."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    x, head, wanted, other = normal(700, 8), normal(33, 8), normal(700, 16), normal(33, 16)

    def softmax(a, b) -> np.ndarray:
        logits = np.asarray(a, np.float64) @ np.asarray(b, np.float64).T
        shares = np.exp(cap * np.tanh(logits / cap) if cap else logits)
        return shares / shares.sum(-1, keepdims=True)

    p, q = softmax(wanted, other), softmax(x, head)
    found, _ = distillation.compare(x, head, wanted, other, cap)
    np.testing.assert_allclose(found.divergence, (p * np.log(p / q)).sum(-1).mean(), rtol=1e-4)
    np.testing.assert_allclose(found.shared, 1 - np.abs(p - q).sum(-1).mean() / 2, rtol=1e-4)
    np.testing.assert_allclose(found.alike, (p.argmax(-1) == q.argmax(-1)).mean(), rtol=1e-6)

    def plain(x, head):
        ours, theirs = (jax.nn.log_softmax(capped(a @ b.T, cap)) for a, b in ((x, head), (wanted, other)))
        return (jnp.exp(theirs) * (theirs - ours)).sum(-1).mean()

    ours = jax.grad(lambda x, head: 3 * distillation.divergence(x, head, wanted, other, cap), (0, 1))(x, head)
    for found, right in zip(ours, jax.grad(plain, (0, 1))(x, head), strict=True):
        np.testing.assert_allclose(found, 3 * right, atol=1e-6)


@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
def test_a_file_gives_back_what_was_learned(weights: str, tmp_path) -> None:
    model, made = toy(), learned()[2]
    path = tmp_path / "draft.safetensors"
    draft.write(path, made.config, made.params, {"model_key": model.identity})
    read = draft.read(str(path), dataclasses.replace(model, config=dataclasses.replace(model.config, weights=weights)))
    assert dataclasses.replace(read.config, weights="float32") == made.config and read.config.weights == weights
    tokens = jnp.asarray(learned()[0][:1])
    found, wanted = gpt.forward(read.config, read.params, tokens), gpt.forward(made.config, made.params, tokens)
    np.testing.assert_allclose(
        found, wanted, atol={"float32": 0.02, "int8": 0.1, "int4": 0.6}[weights] * float(jnp.abs(wanted).max())
    )


def test_what_is_no_draft_of_the_model_is_refused(tmp_path, monkeypatch) -> None:
    model, made = toy(), learned()[2]
    path = tmp_path / "draft.safetensors"
    read = lambda: draft.read(str(path), model)
    with pytest.raises(BadInput, match="there is no draft"):
        read()
    path.write_bytes(b"no")
    with pytest.raises(BadInput, match="no draft, or damaged"):
        read()
    save_file({"x": jnp.ones(1)}, path)
    with pytest.raises(BadInput, match="no draft that this version reads"):
        read()
    draft.write(path, made.config, made.params, {"model_key": "another"})
    with pytest.raises(BadInput, match="of another model than toy"):
        read()
    about = {
        "format": draft.FORMAT,
        "config": json.dumps(dataclasses.asdict(made.config)),
        "about": json.dumps({"model_key": model.identity}),
    }
    draft.write(path, made.config, made.params, {"model_key": model.identity})
    arrays = load_file(path)
    arrays.pop("norm.scale")
    save_file(arrays, path, about)
    with pytest.raises(BadInput, match="its arrays are not those of its shape"):
        read()
    renamed = {f"<|{name}|>": number for number, name in ((256, "end"), (257, "off"))}
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("other", pat_str="(?s:.)", mergeable_ranks=ranks, special_tokens=renamed)
    monkeypatch.setattr(draft.pretrained, "load", lambda name, weights: dataclasses.replace(model, encoding=encoding))
    with pytest.raises(BadInput, match="has other tokens than toy"):
        draft.read("some/model", model)
    monkeypatch.setattr(draft.pretrained, "load", lambda name, weights: model)
    assert draft.read("some/model", model).fingerprint == model.fingerprint
    with pytest.raises(BadInput, match="longer than the model's"):
        Follower(another(), Limits(ahead=1), 10 * CONFIG.context, traced)


@pytest.mark.parametrize("name", ["draft", "draft:", "ngram:x", "self:y", "nothing"])
def test_what_is_no_way_to_foresee_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match="none, ngram, self or draft:MODEL"):
        foreseen(name, 3)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--to", "draft.bin"], "must end with .safetensors"),
        (["--to", "draft.safetensors", "--texts", "4"], "more than --batch"),
        (["--to", "draft.safetensors", "--width", "100"], "multiple of 64"),
    ],
)
def test_distill_refuses(arguments: list[str], said: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "open_model", lambda *_: toy())
    with pytest.raises(BadInput, match=said):
        distill.main(["--model", "toy", *arguments])
    assert not [*tmp_path.iterdir()]


def test_distill_writes_a_draft_and_a_record(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "open_model", lambda *_: toy())
    monkeypatch.setattr(distillation, "write", functools.partial(distillation.write, compiled=traced))
    sizes = "--texts 12 --length 48 --layers 1 --width 64 --steps 2 --batch 4".split()
    distill.main(["--model", "toy", "--to", "draft.safetensors", *sizes, "--out", "records.jsonl"])
    (record,) = of(record_files.read(Path("records.jsonl")), Distilled)
    assert record.fingerprint == draft.read("draft.safetensors", toy()).fingerprint and record.held_out == 1
    assert f"{record.parameters:,}" in capsys.readouterr().out
    with pytest.raises(BadInput, match="is there already"):
        distill.main(["--model", "toy", "--to", "draft.safetensors"])
