"""What a study measures: the caches it compares, and records of training and of bytes by layer kind."""

import dataclasses
import hashlib
import statistics
from collections.abc import Iterable
from pathlib import Path

import jax

from kvcascade.cache.codec import CODECS
from kvcascade.cache.spec import CacheSpec, parse
from kvcascade.cache.tier import Tier
from kvcascade.eval.measure import Job
from kvcascade.eval.memory import buffers
from kvcascade.eval.memory.arithmetic import full_bytes
from kvcascade.eval.records import Layer, Training, grouped
from kvcascade.model import gpt
from kvcascade.model.config import ModelConfig
from kvcascade.model.pretrained import Model
from kvcascade.train import checkpoint

# Grouped by what they are compared with: a method stands next to random eviction of the same bytes, and all next to `full`.
CACHES = {
    "everything": ("full", "full@int8", "full@int4", "full@int4h", "sink 4 | recent 28 | full@int4h"),
    "a quarter of the tokens": (
        "random 128",
        "recent 128",
        "sink 4 | recent 124",
        "recent 64 | heavy 64",
        "position-aware 128",
    ),
    "published hybrid, 353 tokens": ("random 353", "sink 4 | recent 349", "neurokv"),
    "a third of the bytes": ("random 160", "sink 4 | recent 156", "sink 2 | recent 62 | heavy 256@int4h"),
    "a tenth of the bytes": ("random 48", "sink 4 | recent 44", "sink 2 | recent 22 | heavy 64@int4h"),
}


ALL = tuple(text for group in CACHES.values() for text in group)

TELLING = (
    "full",
    "random 128",
    "recent 128",
    "sink 4 | recent 124",
    "recent 64 | heavy 64",
    "random 48",
    "sink 4 | recent 44",
    "sink 2 | recent 22 | heavy 64@int4h",
)
"""Few of them that tell policies apart. A toy's minutes of training do not teach it to look far back, and every window serves it well."""

GROWING = ("full", "full@int8", "full@int4h", "neurokv", "sink 4 | recent 124", "sink 2 | recent 22 | heavy 64@int4h")
TIMED = ("full", "full@int8", "recent 128", "sink 4 | recent 124", "recent 64 | heavy 64")


def caches(context: int) -> list[CacheSpec]:
    """The study's caches, for a context."""
    return scaled(ALL, context)


def scaled(texts: Iterable[str], context: int) -> list[CacheSpec]:
    """Specs whose counts are of a context of 512 tokens, shrunk for a shorter one."""
    return [parse(text) if context >= 512 else _shrink(parse(text), context / 512) for text in texts]


def group_of(spec: str, context: int) -> str:
    """The group of CACHES that a cache of `caches(context)` is in, or `other caches`."""
    names = [name for name, group in CACHES.items() for _ in group]
    return dict(zip(map(str, caches(context)), names, strict=True)).get(spec, "other caches")


def _shrink(spec: CacheSpec, share: float) -> CacheSpec:
    def smaller(tier: Tier) -> Tier:
        return (
            tier if isinstance(tier.count, str) else dataclasses.replace(tier, count=max(1, round(tier.count * share)))
        )

    return spec.mapped(smaller)


def run_name(model: str, seed: int) -> str:
    """The folder of a model trained from a seed: the first has the model's own name."""
    return f"{model}-{seed}" if seed else model


def by_model(trainings: list[Training]) -> dict[str, list[Training]]:
    """The trainings of each model, one for each seed."""
    name = lambda run: run.model.removesuffix(f"-{run.seed}") if run.seed else run.model
    return {name(runs[0]): runs for runs in grouped(trainings, name)}


def training_job(name: str, path: Path, unigram_bits_per_byte: float) -> Job:
    """How a run learned."""
    about = {"kind": "train", "model": name, "log": hashlib.sha256((path / "log.jsonl").read_bytes()).hexdigest()[:16]}
    return Job(about, "train", lambda: [training(name, path, unigram_bits_per_byte)], f"{name}: how it learned")


def growth_job(model: Model, specs: list[CacheSpec]) -> Job:
    """Bytes of caches by context."""
    about = {
        "kind": "growth",
        "model": model.name,
        "shape": dataclasses.asdict(model.config),
        "caches": [*map(str, specs)],
    }
    return Job(about, "eval/memory", lambda: buffers.growth(model.name, model.config, specs), "bytes by context")


def layers_job(config: ModelConfig) -> Job:
    """Bytes per token by kind of layer."""
    about = {"kind": "layer", "shape": dataclasses.asdict(config)}
    return Job(about, "eval/memory", lambda: layer_kinds(config), "bytes by kind of layer")


def training(name: str, path: Path, unigram_bits_per_byte: float) -> Training:
    """How a run learned: its validation curve, its speed, its shape, its best checkpoint."""
    config, _ = checkpoint.open_run(path)
    log = checkpoint.read_log(path)
    curve = [line for line in log if "validation_loss" in line]
    best = min(curve, key=lambda line: line["validation_loss"])
    _, abstract = gpt.graph(config.model)
    found = {
        "data": config.data.source,
        "tokenizer": config.data.tokenizer,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(abstract)),
        "shape": dataclasses.asdict(config.model),
        "steps": config.train.steps,
        "tokens_per_step": config.train.batch_size * config.model.context,
        "seed": config.train.seed,
        "curve": [
            [line["step"], line["validation_loss"], line["validation_stderr"], line["validation_bits_per_byte"]]
            for line in curve
        ],
        "losses": [[line["step"], round(line["loss"], 4)] for line in log if "loss" in line],
        "validation_loss": best["validation_loss"],
        "validation_stderr": best["validation_stderr"],
        "validation_bits_per_byte": best["validation_bits_per_byte"],
        "unigram_bits_per_byte": unigram_bits_per_byte,
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in log if "loss" in line),
        "train_seconds": log[-1]["seconds"],
        "kv_bytes_per_token": full_bytes(config.model, 1),
    }
    return Training(model=name, **found)


def layer_kinds(config: ModelConfig) -> list[Layer]:
    """Bytes per token in one layer for MHA, GQA and MQA of this width, by codec, by allocation; scales and positions included."""
    found = []
    for kv_heads in sorted({config.heads, max(1, config.heads // 4), 1}, reverse=True):
        one = dataclasses.replace(config, layers=1, kv_heads=kv_heads, unlike=())
        kind = "MHA" if kv_heads == config.heads else "MQA" if kv_heads == 1 else "GQA"
        for codec in CODECS:
            if codec not in ("f32", "int4h"):  # f32 is for tests; int4h takes the bytes of int4
                size = buffers.allocated(one, parse(f"full@{codec}"), config.context) / config.context
                found.append(Layer(layer=f"{kind}, {kv_heads} KV heads", codec=codec, bytes_per_token=size))
    return found
