"""How RoPE is stretched to contexts longer than a model was first trained on, as its files say it."""

import dataclasses
import math

import numpy as np

from kvcascade.model.metadata import Metadata

KINDS = ("default", "linear", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class Stretch:
    """What frequencies are divided by, and what queries and keys are multiplied by."""

    factors: tuple[float, ...] = ()
    """One number per pair of channels; empty: 1."""
    long_factors: tuple[float, ...] = ()
    """In their place in contexts of more than `short_context` tokens; empty: the same."""
    short_context: int = 0
    scale: float = 1.0
    """Both queries and keys, so that their products grow by its square."""
    width: int = 0
    """Channels of a head that are turned; 0: all."""


def stretch(said: Metadata, base: float, head_dim: int, context: int, original: int | None = None) -> Stretch:
    """The stretch that a table such as config.json's `rope_scaling` describes, for heads of a width and a model's context.

    `original` is the context it was first trained on, where that stands beside the table. Raises BadInput for a kind that is not one of
    KINDS, for values that cannot be, and for a factor whose kind is not said. As in transformers' modeling_rope_utils.
    """
    kind = said.text("rope_type", said.text("type", None))
    if kind is None and "factor" in said:
        raise said.bad("factor", "stands without a rope_type that says what it is")
    original = said.whole("original_max_position_embeddings", original)
    pairs = head_dim // 2
    match {"su": "longrope", None: "default", "none": "default"}.get(kind, kind):
        case "default":
            return Stretch()
        case "linear":
            return Stretch((said.number("factor", above=0),) * pairs)
        case "llama3":
            return Stretch(_llama3(said, base, head_dim, original or context))
        case "yarn":
            return _yarn(said, base, head_dim, original or context)
        case "longrope":
            short, long = (
                tuple(float(x) for x in said.numbers(f"{name}_factor", above=0, count=pairs))
                for name in ("short", "long")
            )
            factor = context / original if original else said.number("factor", above=0)
            original = original or context
            usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
            return Stretch(short, long, original, said.number("attention_factor", usual, above=0))
    raise said.bad("rope_type", f"is {kind}, which is not implemented; there are {', '.join(KINDS)}")


def _llama3(said: Metadata, base: float, head_dim: int, original: int) -> tuple[float, ...]:
    """Long wavelengths by the factor, short ones by 1, between them both in proportion (Llama 3.1)."""
    factor, low = said.number("factor", above=0), said.number("low_freq_factor", above=0)
    high = said.number("high_freq_factor", above=low)
    wavelength = 2 * np.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    share = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return tuple(float(x) for x in 1 / ((1 - share) / factor + share))


def _yarn(said: Metadata, base: float, head_dim: int, original: int) -> Stretch:
    """Pairs that turn less than `beta_slow` times in the original context by the factor, those that turn more than `beta_fast` times by 1.

    YaRN (Peng et al. 2023, §3.2), with its temperature (§3.3) as a scale of queries and keys.
    """
    factor = said.number("factor", above=0)
    fast, slow = said.number("beta_fast", 32.0, above=0), said.number("beta_slow", 1.0, above=0)
    if base <= 1:
        raise said.bad("rope_type", f"is yarn, which needs a base above 1, not {base}")
    ends = [head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (fast, slow)]
    if said.flag("truncate", True):
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    low, high = max(ends[0], 0), min(ends[1], head_dim - 1)
    share = 1 - np.clip((np.arange(head_dim // 2) - low) / (high - low or 0.001), 0, 1)
    grown = lambda weight: 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0
    weights = said.number("mscale", 0.0), said.number("mscale_all_dim", 0.0)
    usual = grown(weights[0]) / grown(weights[1]) if all(weights) else grown(1.0)
    scale = said.number("attention_factor", usual, above=0)
    return Stretch(tuple(float(x) for x in 1 / ((1 - share) / factor + share)), scale=scale)
