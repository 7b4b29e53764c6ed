"""A training run as a whole: its folder, its corpus, its model, from the first step or from where it stopped."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tiktoken
from jaxtyping import Int32

from kvcascade.cache.errors import BadInput
from kvcascade.model import convert as pooling
from kvcascade.model import gpt, known, pretrained, tokenizer
from kvcascade.model.config import ModelConfig
from kvcascade.model.pretrained import Model
from kvcascade.train import checkpoint, config, data, loop
from kvcascade.train.config import RunConfig


def start(path: Path, wanted: RunConfig) -> None:
    """Make a new run's folder, with the tokeniser that its configuration asks for.

    BadInput, with nothing written, if a run is there already or the run's text or devices do not suit its settings.
    """
    checkpoint.check_free(path)
    encoding = data.encoding_for(data.load(wanted.data.source), wanted.data.tokenizer, wanted.model.vocab)
    if encoding.n_vocab != wanted.model.vocab:
        raise BadInput(
            f"model.vocab is {wanted.model.vocab}, but the tokenizer {encoding.name} has {encoding.n_vocab} tokens"
        )
    loop.check(wanted, load_corpus(wanted, encoding), loop.data_mesh())
    checkpoint.create(path, wanted, encoding)


def resume(path: Path, report: Callable[[int, dict], None]) -> None:
    """Train a run from its newest checkpoint, or from fresh parameters where there is none, to its last step.

    BadInput, with nothing touched, if another process trains it.
    """
    settings, encoding = checkpoint.open_run(path)
    with checkpoint.writing(path):
        corpus = load_corpus(settings, encoding)
        state = loop.initial_state(settings, gpt.init(settings.model, settings.train.seed))
        loop.fit(path, settings, corpus, state, report)


def check_same(path: Path, wanted: RunConfig) -> None:
    """BadInput if a run was started with other settings than those wanted."""
    found = config.differences(checkpoint.open_run(path)[0], wanted)
    if found:
        raise BadInput(f"{path} was started with other settings: {'; '.join(found[:3])}; --resume takes the run's own")


def load_corpus(settings: RunConfig, encoding: tiktoken.Encoding) -> loop.Corpus:
    """The tokens that a run learns from and is validated on."""
    text = data.load(settings.data.source)
    lengths = tokenizer.token_bytes(encoding)
    return loop.Corpus(data.tokenize(text.train, encoding), data.tokenize(text.validation, encoding), lengths)


def open_model(name: str, report: pretrained.Report = lambda done, of: None, weights: str = "float32") -> Model:
    """A model by its name: a run's folder, or what `pretrained.load` takes; BadInput where there is none."""
    if pretrained.is_pretrained(name):
        return pretrained.load(name, report, weights)
    trained = checkpoint.load_run(Path(name).expanduser())
    settings = trained.config
    return Model(
        name, settings.model, trained.params, trained.encoding, data=settings.data.source, seed=settings.train.seed
    )


def shape(name: str, weights: str | None = None) -> ModelConfig:
    """The shape of a model by its name, one of `known.KNOWN` or what `open_model` takes, without its weights; kept in `weights` if given."""
    if name in known.KNOWN:
        found = known.KNOWN[name]
    elif pretrained.is_pretrained(name):
        found = pretrained.shape(name)
    else:
        found = checkpoint.open_run(Path(name).expanduser())[0].model
    return found if weights is None else dataclasses.replace(found, weights=weights)


def evaluation_tokens(model: Model, source: str | None):
    """Tokens to evaluate a model on: of its own text the validation split, which a run was not trained on; of another file all."""
    if source is None or source == model.data:
        return data.tokenize(data.load(model.data).validation, model.encoding)
    return data.tokenize(data.unseen(source), model.encoding)


def evaluation_windows(
    model: Model, source: str | None, context: int, count: int, bos: bool
) -> Int32[np.ndarray, "B T"]:
    """The first windows of the text to evaluate a model on, so many, of so many tokens, of which BOS is the first if `bos`."""
    begin = [model.bos] if bos else []
    rows = data.windows(evaluation_tokens(model, source), context - len(begin), count)
    return np.concatenate([np.full((count, len(begin)), begin, np.int32), rows], 1)


def convert(source: Path, path: Path, kv_heads: int, method: str, share: float) -> int:
    """Make a run whose step 0 is the source's last checkpoint with fewer KV heads, to be uptrained; return its steps.

    It trains for `share` of the source's steps with the same schedule, shrunk, and a fresh optimiser. Raises BadInput if a run is there already.
    """
    if not 0 < share <= 1:
        raise BadInput(f"the share of steps to uptrain is {share}; it must be above 0 and at most 1")
    checkpoint.check_free(path)
    trained = checkpoint.load_run(source, checkpoint.LATEST)
    shape, params = pooling.convert(trained.config.model, trained.params, kv_heads, method, trained.config.train.seed)
    train = trained.config.train
    steps = max(1, round(train.steps * share))
    shrink = lambda every: max(1, min(every, steps // 10))
    train = dataclasses.replace(
        train,
        steps=steps,
        warmup=min(train.warmup, steps // 5),
        evaluate_every=shrink(train.evaluate_every),
        log_every=shrink(train.log_every),
    )
    settings = dataclasses.replace(trained.config, model=shape, train=train)
    checkpoint.create(path, settings, trained.encoding, loop.initial_state(settings, params))
    return steps
