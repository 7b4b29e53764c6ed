"""The shape of a model, as data."""

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvcascade.cache.errors import BadInput
from kvcascade.kernels.heads import Heads, Rope
from kvcascade.kernels.linear import WEIGHTS
from kvcascade.kernels.nonlinear import ACTIVATIONS, GATED

CHOICES = {
    "weights": WEIGHTS,
    "dtype": ("float32", "bfloat16"),
    "positions": ("rope", "learned", "none"),
    "norm": ("rms", "layer"),
    "biases": ("none", "qkv", "all"),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a GPT; every array of the model follows from it.

    Parameters are float32. Matrices and embeddings start from N(0, 0.02²), the two projections that write into the
    residual stream from N(0, 0.02²/(2·layers)) (GPT-2, Radford et al. 2019), norms from one. Norms, RoPE, softmax and
    the loss are computed in float32 whatever `dtype` says.
    """

    layers: int = 4
    width: int = 256
    heads: int = 8
    kv_heads: int = 8
    """KV heads: = heads is MHA, 1 is MQA, between them GQA."""
    mlp: int = 1024
    experts: int = 0
    """Parts of the MLP, each `mlp` wide, of which a token goes through a few (Mixtral, Qwen3-MoE); 0: it is one."""
    experts_per_token: int = 0
    experts_normalised: bool = True
    """Whether the chosen experts' shares are made to sum to 1."""
    vocab: int = 4096
    context: int = 512
    """Tokens that the model is trained on and may be asked for."""
    activation: str = "gelu"
    """relu, gelu, or, with a gate, swiglu or geglu."""
    dropout: float = 0.0
    """Share of MLP activations dropped in training."""
    positions: str = "rope"
    """rope; learned: an embedding of each position is added to the token's; none (SmolLM3's NoPE layers)."""
    rope_base: float = 10_000.0
    rope_factors: tuple[float, ...] = ()
    """What each pair's frequency is divided by, head_dim / 2 numbers (Llama 3's way to longer contexts); empty: 1."""
    rope_long_factors: tuple[float, ...] = ()
    """In place of `rope_factors` in contexts of more than `rope_short_context` tokens (LongRoPE); empty: the same."""
    rope_short_context: int = 0
    rope_scale: float = 1.0
    """What RoPE multiplies queries and keys by besides (YaRN)."""
    rope_width: int = 0
    """Channels of a head that RoPE turns (Phi-3), a half of them the first of each half; 0: all."""
    head_width: int = 0
    """Width of a head; 0: width / heads."""
    norm: str = "rms"
    """rms or layer, the second with a bias."""
    norm_eps: float = 1e-6
    qk_norm: bool = False
    """RMSNorm of every head's query and key before RoPE (Qwen3)."""
    post_norms: bool = False
    """Norms after attention and after the MLP as well, before what they give is added (Gemma 2)."""
    biases: str = "none"
    """Which projections have a bias: none, qkv or all."""
    tied: bool = True
    """Whether the head is the embedding, or a matrix of its own."""
    scaled_embedding: bool = False
    """Whether embeddings are multiplied by sqrt(width) (Gemma)."""
    final_soft_cap: float = 0.0
    """The head's logits become cap · tanh(logit / cap) (Gemma 2); 0: they stay."""
    window: int = 0
    """Positions that a query sees, its own included (Mistral's sliding window); 0: all."""
    attention_scale: float = 0.0
    """What the product of a query and a key is multiplied by; 0: 1 / sqrt(head_dim)."""
    soft_cap: float = 0.0
    """Attention logits become cap · tanh(logit / cap) (Gemma 2); 0: they stay."""
    unlike: tuple[Heads, ...] = ()
    """The heads of each layer of a model whose layers are not all alike, the first as the fields above say; empty: all are."""
    weights: str = "float32"
    """What matrices and embeddings are kept in: float32, or, not to be trained any more, bfloat16 or int8."""
    dtype: str = "float32"
    """What the matrix products are computed in: float32 or bfloat16."""

    def __post_init__(self):
        for name in ("layers", "width", "heads", "kv_heads", "mlp", "vocab", "context"):
            if getattr(self, name) < 1:
                raise BadInput(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("window", "head_width", "rope_short_context", "experts"):
            if getattr(self, name) < 0:
                raise BadInput(f"model.{name} is {getattr(self, name)}; it must be at least 0")
        if not self.head_width and self.width % self.heads or self.head_dim % 2:
            raise BadInput(f"model.width {self.width} must be an even multiple of model.heads {self.heads}")
        if self.heads % self.kv_heads:
            raise BadInput(f"model.kv-heads {self.kv_heads} must divide model.heads {self.heads}")
        if self.activation not in ACTIVATIONS:
            raise BadInput(f"model.activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        for name, values in CHOICES.items():
            if getattr(self, name) not in values:
                raise BadInput(f"model.{name} {getattr(self, name)!r} is not one of {', '.join(values)}")
        if not 0 < self.rope_base < math.inf:
            raise BadInput(f"model.rope_base is {self.rope_base}; it must be above 0 and finite")
        for name in ("rope_factors", "rope_long_factors"):
            if len(factors := getattr(self, name)) not in (0, self.rope_pairs):
                raise BadInput(f"model.{name} has {len(factors)} numbers, not {self.rope_pairs}")
        if not 0 <= self.rope_width <= self.head_dim or self.rope_width % 2:
            raise BadInput(f"model.rope_width is {self.rope_width}; it must be even and at most {self.head_dim}")
        if self.unlike and (len(self.unlike) != self.layers or self.unlike[0] != self._alike):
            raise BadInput(f"model.unlike has to have {self.layers} heads, of which the first are {self._alike}")
        for heads in self.unlike:
            if min(heads.queries, heads.kv, heads.width, heads.value_width) < 1 or heads.queries % heads.kv:
                raise BadInput(f"model.unlike has {heads}, which cannot be: KV heads divide the queries' heads")
        for name in ("attention_scale", "soft_cap", "final_soft_cap", "rope_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise BadInput(f"model.{name} is {getattr(self, name)}; it must be at least 0 and finite")
        if self.experts and not 0 < self.experts_per_token <= self.experts:
            raise BadInput(f"model.experts_per_token is {self.experts_per_token}, of {self.experts} experts")
        if self.experts and (self.activation not in GATED or self.biases == "all" or self.dropout):
            raise BadInput("model.experts are for a gated activation, without biases and dropout")
        if not 0 <= self.dropout < 1:
            raise BadInput(f"model.dropout is {self.dropout}; it must be at least 0 and below 1")

    @property
    def head_dim(self) -> int:
        return self.head_width or self.width // self.heads

    @property
    def rope_pairs(self) -> int:
        """Pairs of channels that RoPE turns."""
        return (self.rope_width or self.head_dim) // 2

    @property
    def layer_heads(self) -> tuple[Heads, ...]:
        """What the attention of each layer is."""
        return self.unlike or (self._alike,) * self.layers

    @property
    def _rope(self) -> Rope:
        return Rope(
            self.rope_base,
            self.rope_factors,
            self.rope_long_factors,
            self.rope_short_context,
            self.rope_scale,
            self.rope_width,
        )

    @property
    def _alike(self) -> Heads:
        return Heads(
            queries=self.heads,
            kv=self.kv_heads,
            width=self.head_dim,
            scale=self.attention_scale,
            soft_cap=self.soft_cap,
            window=self.window,
            rope=self._rope if self.positions == "rope" else None,
        )


def by_layer(config: ModelConfig, changes: Sequence[dict[str, Any]]) -> ModelConfig:
    """The model whose layers differ from `config` in these fields of their attention, one dict per layer."""
    layers = [dataclasses.replace(config, **each) for each in changes]
    heads = tuple(each.layer_heads[0] for each in layers)
    return dataclasses.replace(layers[0], unlike=heads if len({*heads}) > 1 else ())


def built(cls: type, content: dict, source: Path | str, name: str) -> Any:
    """A dataclass from the dict of its fields, as JSON and YAML have them; BadInput naming the source and the setting that is wrong."""
    known = typing.get_type_hints(cls)
    for key in content:
        if key not in known:
            raise BadInput(f"{source}: unknown setting {name}.{key}; there are {', '.join(known)}")
    try:
        return cls(**{key: _typed(value, known[key], source, f"{name}.{key}") for key, value in content.items()})
    except TypeError as error:
        raise BadInput(f"{source}: {name} is incomplete: {error}") from error


def _typed(value: object, wanted: Any, source: Path | str, name: str) -> object:
    """The value, or BadInput naming the setting if it is not of the type wanted."""
    if isinstance(wanted, types.UnionType):  # with None
        return None if value is None else _typed(value, typing.get_args(wanted)[0], source, name)
    if typing.get_origin(wanted) is tuple and isinstance(value, list | tuple):
        return tuple(_typed(each, typing.get_args(wanted)[0], source, name) for each in value)
    if hasattr(wanted, "__dataclass_fields__") and isinstance(value, dict):
        return built(wanted, value, source, name)
    if wanted is float and isinstance(value, int | str):  # YAML 1.1 takes 1e-3, without a dot, for a string
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)
    if not isinstance(value, typing.get_origin(wanted) or wanted) or isinstance(value, bool) is not (wanted is bool):
        raise BadInput(f"{source}: {name} must be {wanted.__name__}, not {value!r}")
    return value
