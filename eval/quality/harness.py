"""Tasks of EleutherAI's lm-evaluation-harness behind a cache.

A context enters in one prefill and what follows it token by token, so that an eviction is felt as a user would feel it. What a context and
its continuation are, windows of long texts, stop texts and metrics are lm-eval's own; this module needs it to be installed.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import CacheSpec
from kvcascade.cache.whole import nbytes
from kvcascade.eval import measure
from kvcascade.eval.quality import tasks as records_of_tasks
from kvcascade.eval.quality.perplexity import DISPATCH
from kvcascade.eval.records import TaskResult
from kvcascade.model import chat, generate, gpt
from kvcascade.model.config import ModelConfig
from kvcascade.model.gpt import Params
from kvcascade.model.pretrained import Model
from kvcascade.model.sampling import Sampling
from kvcascade.model.vocabulary import FileTokenizer

NEW_TOKENS = 256  # lm-eval's, where a task does not say how many
SHORTEST = 64  # tokens of the smallest cache, where there are longer rows, and of the smallest prefill
RESAMPLES = 10_000  # of lm-eval's bootstrap, for metrics that are no means
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

type Row = tuple[list[int], list[int]]
"""Tokens of a context, at least one, and of its continuation, at least one."""


def tasks(include: Path | None) -> TaskManager:
    """The tasks that lm-eval knows, and those of the YAML files in a folder; BadInput where there is no such folder."""
    if include is not None and not include.is_dir():
        raise BadInput(f"--include {include} is no folder")
    return TaskManager(include_path=include)


def check(known: TaskManager, names: Sequence[str]) -> None:
    """BadInput for the first task that cannot be made: there is none, its YAML is wrong, or its texts are not here and cannot be fetched."""
    datasets.disable_progress_bars()
    for name in names:
        try:
            known.load([name])
        except Exception as error:  # of datasets, yaml, jinja2 and the tasks' own code
            reason = error.args[0] if isinstance(error, KeyError) and error.args else error
            raise BadInput(f"the task {name}: {reason or type(error).__name__}") from error


def evaluate(
    model: "CachedModel",
    known: TaskManager,
    task: str,
    few_shot: int | None = None,
    limit: int | None = None,
    chat_template: bool = False,
) -> list[dict[str, Any]]:
    """What a task comes to, as a part of its record; a group comes to one for each of its tasks and one for itself."""
    os.environ["DISABLE_MULTIPROC"] = "1"  # or lm-eval forks the process that runs JAX's threads
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found: Any = simple_evaluate(
                model=model, tasks=[task], num_fewshot=few_shot, limit=limit, bootstrap_iters=RESAMPLES, log_samples=False,
                apply_chat_template=chat_template, task_manager=known,
            )  # fmt: skip
    except OverflowError as error:
        raise BadInput(f"the task {task}: a perplexity is larger than any number") from error
    return [
        {
            "task": name,
            "version": str(found["versions"].get(name)),
            "few_shot": found["n-shot"].get(name),
            "samples": each["sample_len"],
            "metrics": _metrics(each),
        }
        for name, each in (found["results"] | found.get("groups", {})).items()
    ]


def job(
    model: Model,
    label: str,
    cache: Callable[[int], CacheSpec],
    known: TaskManager,
    task: str,
    context: int,
    batch: int,
    few_shot: int | None = None,
    limit: int | None = None,
    chat_template: bool = False,
) -> measure.Job:
    """The measurement of one task, or of a group of them, behind one cache; `cache` is given the tokens that a row's cache is made for."""
    about = {
        "kind": "harness", "model": model.name, "weights": model.config.weights, "weights_key": model.fingerprint, "cache": label, "task": task,
        "texts": _texts_key(known, task), "context": context, "batch": batch, "few_shot": few_shot, "limit": limit, "chat": chat_template,
        "lm_eval": importlib.metadata.version("lm-eval"),
    } | cache(context).content  # fmt: skip

    def run() -> list[TaskResult]:
        behind = CachedModel(model, cache, context, batch)
        results = evaluate(behind, known, task, few_shot, limit, chat_template)
        spec, longest, size = cache(behind.longest), behind.longest, behind.kv_bytes
        make = lambda each: records_of_tasks.record(model, spec, each, context, longest, size, chat_template)
        return [make(each) for each in results]

    return measure.Job(about, "eval/quality", run, f"{label}: {task}")


def _texts_key(known: TaskManager, task: str) -> str:
    """What tells a task's texts and settings from others, whatever it is called."""
    loaded = known.load([task])
    found = hashlib.sha256()
    for name, each in sorted(loaded["tasks"].items()):
        found.update(f"{name} {each.dump_config()}".encode())
        for doc in each.eval_docs:
            found.update(repr(doc).encode())
    return found.hexdigest()[:16]


def _metrics(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each metric, what was taken from an answer before it was compared (none: all of it), its value and its standard error, if it has one."""
    found = []
    for key, value in result.items():
        metric, comma, taken = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            error = result.get(f"{metric}_stderr,{taken}")
            stderr = float(error) if isinstance(error, int | float) and math.isfinite(error) else None
            found.append({"metric": metric, "filter": taken, "value": float(value), "stderr": stderr})
    return found


class CachedModel(TemplateLM):
    """A model behind a cache as lm-eval asks it; `cache` is given the tokens that a row's cache is made for.

    Texts become tokens as Hugging Face's tokenizers make them: special tokens in a text are such, and BOS comes first where the tokenizer
    puts it and the text has none. Nothing is put after a text, which goes on.
    """

    def __init__(
        self,
        model: Model,
        cache: Callable[[int], CacheSpec],
        context: int,
        batch: int,
        tell: Callable[[int, int], None] = lambda done, of: None,
    ):
        super().__init__()
        generate.check_context(model.config, context)
        self.model, self.cache, self.context, self.batch, self.tell = model, cache, context, batch, tell
        self.longest = 0
        """Tokens of the longest row so far that its cache was made for."""
        self.kv_bytes = 0
        """Measured bytes of that row's cache."""

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; for a tokenizer that has none, that of a line's end."""
        return self._special("eos_token")

    @property
    def prefix_token_id(self) -> int:
        """The token that a text without a context follows: BOS, or the one that ends a text."""
        return self._special("bos_token", "eos_token")

    def _special(self, *kinds: str) -> int:
        encoding, names = self.model.encoding, [self.model.special.get(kind) for kind in kinds]
        if isinstance(encoding, FileTokenizer):
            found = [encoding.id_of(name) for name in names if isinstance(name, str)]
            return next((token for token in found if token is not None), encoding.encode("\n")[-1])
        return encoding.encode("\n")[-1]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """The tokens of a text that may go on; those that a text begins with come first, unless it has them or they are not wanted."""
        tokens = list(self.model.encoding.encode(string, allowed_special="all", disallowed_special=()))
        begun = has_bos_prefix(string, self.name_of(self.prefix_token_id) or None)
        if add_special_tokens is False or (add_special_tokens is None and begun):
            return tokens
        return [*self.model.before, *tokens]

    def name_of(self, token: int) -> str:
        """The text that stands for a token, none where the tokenizer is not a model's own."""
        encoding = self.model.encoding
        return encoding.text_of(token) if isinstance(encoding, FileTokenizer) else ""

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """The log-likelihood in nats of each request's continuation after its context, and whether greedy decoding gives it."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], **kwargs
    ) -> list[tuple[float, bool]]:
        rows = []
        for texts, context, continuation in requests:
            if not 0 < len(continuation) <= self.context:
                raise BadInput(f"{len(continuation)} tokens to score in a context of {self.context}: {texts}")
            rows.append((context[-(self.context + 1 - len(continuation)) :], continuation))
        found: dict[int, tuple[float, bool]] = {}
        for part, size in self._batches([(len(context) + len(after) - 1, 0) for context, after in rows]):
            scored, used = score(self.model.config, self.model.params, self.cache(size), [rows[i] for i in part], size)
            found |= zip(part, scored, strict=True)
            self._used(size, used)
            self.tell(len(found), len(rows))
        return [found[index] for index in range(len(rows))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """The log-likelihood in nats of whole texts, in windows of the model's context that each follow one token or more."""
        windows = [self._windows(*request.args) for request in requests]
        scored = iter(self._loglikelihood_tokens([(None, *each) for some in windows for each in some]))
        return [sum(value for value, _ in itertools.islice(scored, len(some))) for some in windows]

    def _windows(self, text: str) -> list[Row]:
        tokens = self.tok_encode(text)
        return [*map(make_disjoint_window, get_rolling_token_windows(tokens, self.prefix_token_id, self.context, 1))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """What each request's context is continued by, up to a stop text, an end token or its number of tokens."""
        asked = [_Asked.of(self, index, *request.args) for index, request in enumerate(requests)]
        found: dict[int, str] = {}
        for part, size in self._batches([(len(each.prompt) + each.count - 1, each.count) for each in asked]):
            found |= zip(part, self._continued([asked[i] for i in part], size), strict=True)
            self.tell(len(found), len(asked))
        return [found[index] for index in range(len(asked))]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, up to where the next answer begins, or with the last message as the answer's begin.

        A template that refuses system messages gets none, as lm-eval's other backends have it. BadInput for a model without a template.
        """
        before, begun = (
            (chat_history, "") if add_generation_prompt else (chat_history[:-1], chat_history[-1]["content"])
        )
        try:
            return chat.text(self.model, before) + begun
        except BadInput:
            if all(message["role"] != "system" for message in before):
                raise
            return chat.text(self.model, [message for message in before if message["role"] != "system"]) + begun

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, where one is wanted."""
        return chat.template(self.model) if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval names the tokenizer by."""
        return self.model.name

    def _batches(self, sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[list[int], int]]:
        """Rows that go through together, and the tokens that their caches are made for; `sizes` are each row's tokens and new tokens.

        Caches are made for a power of two, at least SHORTEST and at most the longest row: few programs, and what a row gives depends on no
        other. All parts have as many rows, the last one of a kind some twice.
        """
        longest = max((tokens for tokens, _ in sizes), default=0)
        keys = [(min(max(_power(tokens), SHORTEST), longest), new) for tokens, new in sizes]
        order = sorted(range(len(sizes)), key=lambda index: (*keys[index], sizes[index]), reverse=True)
        for (size, _), alike in itertools.groupby(order, key=keys.__getitem__):
            for part in itertools.batched(alike, self.batch):
                yield [*part, *part[-1:] * (min(self.batch, len(sizes)) - len(part))], size

    def _continued(self, asked: list["_Asked"], size: int) -> list[str]:
        """The texts that rows with as many new tokens each are continued by."""
        config, spec = self.model.config, self.cache(size)
        cache = generate.empty_cache(config, spec, len(asked), size)
        self._used(size, nbytes(cache) // len(asked))
        prompts, by = [each.prompt for each in asked], [each.sampling for each in asked]
        drawn: list[list[int]] = [[] for _ in asked]
        for tokens_nB, _ in generate.generate(config, self.model.params, cache, prompts, asked[0].count, by):
            for row, tokens in zip(drawn, tokens_nB.T.tolist(), strict=True):
                row += tokens
            if all(self._ended(row, each) for row, each in zip(drawn, asked, strict=True)):
                break
        return [
            postprocess_generated_text(self._text(row), each.stops, None)
            for row, each in zip(drawn, asked, strict=True)
        ]

    def _ended(self, tokens: list[int], asked: "_Asked") -> bool:
        return not self.model.end.isdisjoint(tokens) or any(stop in self._text(tokens) for stop in asked.stops)

    def _text(self, tokens: list[int]) -> str:
        return self.model.encoding.decode([*itertools.takewhile(lambda token: token not in self.model.end, tokens)])

    def _used(self, size: int, kv_bytes: int) -> None:
        if size >= self.longest:
            self.longest, self.kv_bytes = size, kv_bytes


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What a text is to be continued by."""

    prompt: list[int]
    stops: list[str]
    count: int
    sampling: Sampling

    @classmethod
    def of(cls, model: CachedModel, index: int, context: str, said: dict[str, Any]) -> "_Asked":
        """Read a request's `generation_kwargs`; BadInput for what cannot be done. Each request draws by a seed of its own, `index`."""
        known: dict[str, Any] = {**normalize_gen_kwargs(said, NEW_TOKENS)}
        count, sampled = known.pop("max_gen_toks"), known.pop("do_sample")
        stops = [
            stop
            for stop in handle_stop_sequences(known.pop("until"), model.name_of(model.eot_token_id) or None)
            if stop
        ]
        if not 0 < count < model.context:
            raise BadInput(
                f"{count} new tokens, max_gen_toks, leave no room for a prompt in a context of {model.context}"
            )
        settings: dict[str, Any] = {"temperature": float(sampled)}
        settings |= {key: known.pop(key) for key in SETTINGS if key in known}
        if wrong := [f"{key}={value}" for key, value in known.items() if (key, value) != ("num_beams", 1)]:
            raise BadInput(f"generation_kwargs of a task cannot be {', '.join(wrong)}")
        prompt = model.tok_encode(context)[-(model.context - count) :] or [model.prefix_token_id]
        return cls(prompt, stops, count, Sampling(**settings, seed=index))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _score_steps(config, params, cache, tokens_BT, positions_BT, next_BT, steps):
    """Put the first `steps` tokens into the cache, one by one, and score the one after each."""

    def body(t, carry):
        cache, nll_BT, greedy_BT = carry
        token_B, position_B, next_B = (jnp.take(each, t, 1) for each in (tokens_BT, positions_BT, next_BT))
        logits_BTV, cache = gpt.step(config, params, cache, token_B[:, None], position_B[:, None])
        nll_B, greedy_B = _judged(logits_BTV[:, 0], next_B)
        return cache, nll_BT.at[:, t].set(nll_B), greedy_BT.at[:, t].set(greedy_B)

    start = cache, jnp.zeros(tokens_BT.shape), jnp.zeros(tokens_BT.shape, bool)
    return lax.fori_loop(0, steps, body, start)


@jax.jit
def _judged(logits_BV, next_B):
    nll_B = optax.softmax_cross_entropy_with_integer_labels(logits_BV.astype(jnp.float32), next_B)
    return nll_B, logits_BV.argmax(-1) == next_B


def score(
    config: ModelConfig, params: Params, spec: CacheSpec, rows: Sequence[Row], size: int
) -> tuple[list[tuple[float, bool]], int]:
    """The log-likelihood in nats of each row's continuation and whether greedy decoding gives it, and the measured bytes of a row's cache.

    Contexts enter in one prefill, continuations token by token through caches made for `size` tokens; the last token of a continuation enters
    none. Raises BadInput where logits are not numbers.
    """
    contexts, continuations = ([each[part] for each in rows] for part in (0, 1))
    cache = generate.empty_cache(config, spec, len(rows), size)
    kv_bytes = nbytes(cache) // len(rows)
    tokens_BT, positions_BT = map(jnp.asarray, generate.pad(contexts, SHORTEST))
    logits_BV, cache = generate.prefill(config, params, cache, tokens_BT, positions_BT)
    first_B, counts_B = (np.asarray([*map(len, texts)]) for texts in (contexts, continuations))
    most = int(counts_B.max())
    # In columns of DISPATCH, so that there is one program whatever the lengths are.
    tokens = np.zeros((len(rows), 1 + -(-(most - 1) // DISPATCH) * DISPATCH), np.int32)
    for row, continuation in enumerate(continuations):
        tokens[row, : len(continuation)] = continuation
    index = np.arange(tokens.shape[1])
    positions = np.where(index < counts_B[:, None] - 1, first_B[:, None] + index, -1)
    judged = [_judged(logits_BV, jnp.asarray(tokens[:, 0]))]
    for t in range(0, most - 1, DISPATCH):
        now, after = slice(t, t + DISPATCH), slice(t + 1, t + 1 + DISPATCH)
        arrays = (jnp.asarray(each) for each in (tokens[:, now], positions[:, now], tokens[:, after]))
        cache, *some = _score_steps(config, params, cache, *arrays, min(DISPATCH, most - 1 - t))
        judged.append(some)
    nll, greedy = (np.column_stack([np.asarray(each[part]) for each in judged]) for part in (0, 1))
    scored = index < counts_B[:, None]
    generate.check_numbers(~np.isfinite(nll) & scored, first_B)
    pairs = zip(np.where(scored, nll, 0).sum(1, dtype=np.float64), (greedy | ~scored).all(1), strict=True)
    return [(-float(total), bool(same)) for total, same in pairs], kv_bytes


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()
