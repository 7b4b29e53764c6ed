"""A ranker is trained on what tokens got of later queries, and is asked of tokens as it saw them in training."""

import json
import shlex
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tiny_models
from planted_rankers import SHAPE, networks, planted

from kvcascade.cache import ranker
from kvcascade.cache.ranker import Ranker, Shape
from kvcascade.cache.spec import parse
from kvcascade.eval import record_files, records
from kvcascade.eval.quality import ranking
from kvcascade.kernels.heads import Heads
from kvcascade.model import generate
from kvcascade.scripts import cli
from kvcascade.train import ranker as training
from kvcascade.train.ranker import Examples, Settings


@pytest.mark.parametrize("heads", [Heads(4, 2, 8), Heads(4, 2, 8, window=5, soft_cap=2.0, scale=1.0)])
def test_later_attention_is_that_of_the_queries_it_names(heads: Heads) -> None:
    """Token by token, in plain sums: shares of a softmax times how many tokens there are, the mean over queries and heads."""
    T, skip, horizon = 12, 2, 6
    draw = np.random.default_rng(0).standard_normal
    q, k = draw((T, 4, 8)), draw((T, 2, 8))
    got = training.later_attention(jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32), heads, skip, horizon)
    for token in range(T):
        for head in (0, 1):
            found = []
            for i in range(token + skip, min(token + horizon, T)):
                for n in (2 * head, 2 * head + 1):
                    seen = [j for j in range(i + 1) if not heads.window or i - j < heads.window]
                    logits = np.array([q[i, n] @ k[j, head] * heads.scale for j in seen])
                    logits = heads.soft_cap * np.tanh(logits / heads.soft_cap) if heads.soft_cap else logits
                    weights = dict(zip(seen, np.exp(logits) / np.exp(logits).sum(), strict=True))
                    found.append(weights.get(token, 0.0) * (i + 1))
            assert got[head, token] == pytest.approx(np.mean(found) if found else 0.0, rel=1e-4, abs=1e-6)


def test_tokens_are_asked_of_as_they_were_learned_from(nano) -> None:
    """What a network says of a recorded token is the number that it carries behind a prompt, in each layer and head."""
    config, params = nano
    rows = np.random.default_rng(0).integers(0, 61, (5, 32), np.int32)  # more than go through together
    found = training.record(config, params, rows, Settings(skip=4, horizon=20))
    assert found.windows == 5 and found.y_JE.shape == (4, 5 * (32 - 4 - training.LEAST + 1))
    assert found.y_JE.min() >= np.log(training.FLOOR) and found.y_JE.std() > 0.01
    said = ranker.scores(ranker.read(planted()).networks, jnp.asarray(found.x_JEF, jnp.float32))
    cache = generate.empty_cache(config, parse(f"learned[ranker={planted()}] 32@f32"), 5, 32)
    _, cache = generate.prefill(config, params, cache, jnp.asarray(rows), jnp.broadcast_to(jnp.arange(32), (5, 32)))
    position_JWE = found.by_window(np.expm1(found.x_JEF[..., -1].astype(np.float32))).round().astype(int)
    for layer, held in enumerate(cache.layers):
        number, pos = np.asarray(held.slots[0].numbers[0]), np.asarray(held.slots[0].pos_BKS)
        for head in (0, 1):
            network = 2 * layer + head
            at = position_JWE[network]
            by_position = np.take_along_axis(number[:, head], pos[:, head].argsort(-1), 1)
            want = found.by_window(np.asarray(said))[network]
            np.testing.assert_allclose(np.take_along_axis(by_position, at, 1), want, atol=0.03)  # recorded in float16


def test_networks_learn_what_can_be_learned() -> None:
    """A product of two features, whatever their scales; the best step of the held-out windows is kept, in the target's own scale."""
    draw = np.random.default_rng(0).standard_normal((SHAPE.networks, 2048, SHAPE.features))
    y = 3 * draw[..., 0] * draw[..., 1] - 7
    x = (5 * draw + 2).astype(np.float16)
    told: list[tuple[int, float]] = []
    settings = Settings(hidden=16, steps=600, batch=128, learning_rate=1e-2)
    examples = Examples(x, y.astype(np.float32), 8)
    found, held, left = training.fit(examples, SHAPE, settings, lambda *both: told.append(both))
    assert [step for step, _ in told] == [*range(50, 601, 50)] and left == min(loss for _, loss in told) < 0.2
    assert held.windows == 1 and held.y_JE.shape == (SHAPE.networks, 256)
    said = ranker.scores(found.networks, jnp.asarray(held.x_JEF, jnp.float32))
    error = ((np.asarray(said) - held.y_JE) ** 2).mean(1) / examples.part(0, 7).y_JE.var(1)
    assert error.mean() == pytest.approx(left, rel=1e-2)


def test_ranks_correlate_as_spearman_says() -> None:
    """With ties; and where all are equal, nothing is said."""
    a, b = np.random.default_rng(0).integers(0, 9, (2, 3, 40)).astype(np.float32)
    want = np.asarray([scipy.stats.spearmanr(x, y) for x, y in zip(a, b, strict=True)])[:, 0]
    np.testing.assert_allclose(ranking.spearman(a, b), want, rtol=1e-6)
    assert ranking.spearman(np.ones((1, 4)), b[:1, :4]) == 0


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small model and a text."""
    tiny_models.write("llama", tmp_path / "plain")
    words = np.random.default_rng(0).choice(["def", "return", "lambda", "if", "else"], 4000)
    (tmp_path / "text.txt").write_text(" ".join(words))
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMON = "rank --model plain --data file:text.txt --context 48 --windows 8 --skip 4 --horizon 24 --steps 60 --hidden 4"


@pytest.mark.slow
def test_command(there: Path, capsys: pytest.CaptureFixture) -> None:
    """It makes a folder that a spec names, says how well it ranks in each layer, and appends a record that reads back; the ranker's
    fingerprint stands in the records of what was measured with it."""
    cli.main(shlex.split(f"{COMMON} --to made --out records.jsonl"))
    told = capsys.readouterr()
    (record,) = records.of(record_files.read(there / "records.jsonl"), records.Ranking)
    assert record.held_out == 1 and len(record.correlations) == ranker.read("made").shape.layers
    assert all(f"{each['learned']:.3f}" in told.out for each in record.correlations) and "60/60" in told.err
    assert record.given["fingerprint"] == ranker.read("made").fingerprint
    about = json.loads((there / "made" / "ranker.json").read_text())
    assert about["model"] == "plain" and about["steps"] == 60 and about["fingerprint"] == record.given["fingerprint"]
    evaluate = "evaluate --model plain --data file:text.txt --context 48 --sequences 4 --out records.jsonl"
    cli.main(shlex.split(f"{evaluate} --cache 'recent 8 | learned[ranker=made] 8' --cache 'recent 16'"))
    assert "learned[ranker=made] 8" in capsys.readouterr().out
    learned, plain = records.of(record_files.read(there / "records.jsonl"), records.Evaluation)
    assert learned.given["cache_content"] == [record.given["fingerprint"]] and "cache_content" not in plain.given
    assert learned.kv_bytes == learned.kv_bytes_predicted and learned.kept == 16 and learned.traces == 1


def test_refused(there: Path, capsys: pytest.CaptureFixture) -> None:
    """In one line and status 2, before the work, with nothing left behind."""
    (there / "there").mkdir()
    other = Shape(3, 2, 8, 8)
    Ranker(other, networks(other)).write(there / "other", {})
    faults = {
        f"{COMMON} --to there": "there is there already",
        f"{COMMON} --to new --horizon 4": "--horizon is 4; it must be above --skip, 4",
        f"{COMMON} --to new --context 19": "--context is 19; it must be at least",
        f"{COMMON} --to new --windows 1": "--windows is 1",
        f"{COMMON} --to new --windows 9999": "but the text has",
        f"{COMMON} --to new --data file:missing.txt": "missing.txt",
        "evaluate --model plain --cache 'learned 8' --data file:text.txt --context 32": "learned needs a ranker",
        "evaluate --model plain --cache 'learned[ranker=there] 8' --data file:text.txt --context 32": "there is no ranker: there is no ranker.json in it",
        "evaluate --model plain --cache 'learned[ranker=other] 8' --data file:text.txt --context 32": "is of a model of",
    }
    before = sorted(path.name for path in there.iterdir())
    for typed, words in faults.items():
        with pytest.raises(SystemExit) as stopped:
            cli.main(shlex.split(typed))
        assert stopped.value.code == 2
        said = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("kvcascade: ")]
        assert len(said) == 1 and words in said[0], said
    assert sorted(path.name for path in there.iterdir()) == before
