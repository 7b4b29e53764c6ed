"""A training run as a whole: its folder, its corpus, its model, from the first step or from where it stopped."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
import tiktoken
from jaxtyping import Integer

from kvcascade.cache.errors import BadInput
from kvcascade.model import convert as pooling
from kvcascade.model import gpt, known, pretrained, tokenizer
from kvcascade.model.config import ModelConfig
from kvcascade.model.pretrained import Model
from kvcascade.train import checkpoint, config, data, loop
from kvcascade.train.config import RunConfig, located

log = logging.getLogger("kvcascade")


def start(path: Path, wanted: RunConfig) -> None:
    """Make a new run's folder, with the tokeniser that its configuration asks for.

    BadInput, with nothing written, if a run is there already or the run's text or devices do not suit its settings.
    """
    checkpoint.check_free(path)
    text = data.load(wanted.data.source)
    encoding = data.encoding_for(text, wanted.data.tokenizer, wanted.model.vocab)
    if encoding.n_vocab != wanted.model.vocab:
        raise BadInput(
            f"model.vocab is {wanted.model.vocab}, but the tokenizer {encoding.name} has {encoding.n_vocab} tokens"
        )
    loop.check(wanted, _corpus(text, encoding), loop.data_mesh())
    checkpoint.create(path, wanted, encoding, data.fingerprint(text))


def resume(
    path: Path, report: Callable[[int, dict], None], wanted: RunConfig | None = None, track: Sequence[str] = ()
) -> None:
    """Train a run from its newest checkpoint, or from fresh parameters where there is none, to its last step.

    `wanted` may have other values for the settings in `config.MAY_CHANGE` and name another place of the text: they become the run's own.
    BadInput, with nothing touched, if it differs in others, if another process trains the run, or if its text is another one now.
    `report` and `track` as in `loop.fit`.
    """
    settings, _ = checkpoint.open_run(path)
    wanted = wanted or settings
    moved = wanted.data != settings.data
    if not config.may_become(settings, wanted) or (moved and not checkpoint.text_fingerprint(path)):
        check_same(path, wanted)
    with checkpoint.writing(path):
        corpus = load_corpus(path, wanted.data.source)
        loop.check(wanted, corpus, loop.data_mesh())
        if wanted != settings:
            checkpoint.change(path, wanted)
        state = loop.initial_state(wanted, gpt.init(wanted.model, wanted.train.seed))
        loop.fit(path, wanted, corpus, state, report, track=track)


def check_same(path: Path, wanted: RunConfig) -> None:
    """BadInput if a run was started with other settings than those wanted."""
    found = config.differences(checkpoint.open_run(path)[0], wanted)
    if found:
        raise BadInput(
            f"{path} was started with other settings: {'; '.join(found[:3])}; --resume takes the run's own, "
            "or more steps and other intervals"
        )


def load_corpus(path: Path, source: str | None = None) -> loop.Corpus:
    """The tokens that a run learns from and is validated on, now to be found as `source`; BadInput if they are others than at its start."""
    settings, encoding = checkpoint.open_run(path)
    text = _own_text(str(path), source or settings.data.source, checkpoint.text_fingerprint(path))
    return _corpus(text, encoding)


def _corpus(text: data.Text, encoding: tiktoken.Encoding) -> loop.Corpus:
    lengths = tokenizer.token_bytes(encoding)
    return loop.Corpus(data.tokenize(text.train, encoding), data.tokenize(text.validation, encoding), lengths)


def _own_text(run: str, source: str, fingerprint: str | None) -> data.Text:
    """A run's text, if it still is what it was."""
    text = data.load(source)
    if fingerprint and data.fingerprint(text) != fingerprint:
        mend = "use that Python" if source == "stdlib" else "put that back, or say where it is by --data.source"
        raise BadInput(f"{source} is not the text any more that {run} was started on; {mend}")
    return text


def open_model(name: str, report: pretrained.Report = lambda done, of: None, weights: str = "float32") -> Model:
    """A model by its name: a run's folder, or what `pretrained.load` takes; BadInput where there is none."""
    if pretrained.is_pretrained(name):
        return pretrained.load(name, report, weights)
    trained = checkpoint.load_run(Path(name).expanduser())
    settings = trained.config
    return Model(
        name,
        settings.model,
        trained.params,
        trained.encoding,
        data=settings.data.source,
        trained_on=checkpoint.text_fingerprint(trained.path) or "",
        seed=settings.train.seed,
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


def evaluation_text(model: Model, source: str | None) -> tuple[Integer[np.ndarray, " T"], Integer[np.ndarray, " D"]]:
    """Tokens to evaluate a model on, and where documents begin in them; the text is what `_evaluated` says."""
    text = _evaluated(model, source)
    tokens = data.tokenize(text, model.encoding)
    return tokens, data.document_starts(text, tokens, tokenizer.token_bytes(model.encoding))


def _evaluated(model: Model, source: str | None) -> datasets.Dataset:
    """The text to evaluate a model on: of the one that a run was trained on the validation split, of another file all.

    Texts are compared by content. Logs one line where the text asked for is the run's own, and a warning where it holds
    parts of what the run was trained on, or that cannot be told. BadInput if the run's own text is another one now.
    """
    if model.trained_on is None:
        return data.unseen(source or model.data)
    same = "%s is the text that %s was trained on: of it, the validation split is taken"
    if source is None or located(source) == model.data:
        if source:
            log.info(same, source, model.name)
        return _own_text(model.name, model.data, model.trained_on).validation
    own, why = None, None
    try:
        own = _own_text(model.name, model.data, model.trained_on)
    except BadInput as error:
        why = error
    known = model.trained_on or (own and data.fingerprint(own))
    with contextlib.suppress(BadInput):  # too short to have two splits, so not what a run was trained on
        if data.fingerprint(asked := data.load(source)) == known:
            log.info(same, source, model.name)
            return asked.validation
    text = data.unseen(source)
    if own is None:
        log.warning("whether %s was trained on parts of %s cannot be told: %s", model.name, source, why)
    elif (share := data.seen(*(data.tokenize(each, model.encoding) for each in (text, own.train)))) >= 0.01:
        log.warning("WARNING: %s was trained on %.0f%% of %s, word for word", model.name, 100 * share, source)
    return text


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
    text = checkpoint.text_fingerprint(source)
    checkpoint.create(path, settings, trained.encoding, text, loop.initial_state(settings, params))
    return steps
