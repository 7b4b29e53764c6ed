"""Any cache in one line: the text of a spec, its parser, and the names for often-used lines.

    full                                    everything, bf16
    full@int4                               everything, four bits
    sink 4 | recent 124                     StreamingLLM
    random[seed=1] 25%                      a quarter of the context, by lot
    layers[0:2]: full ; layers[2:]: sink 4 | recent 60
    snap 25% then recent 128                what SnapKV keeps of the prompt, and then all of 128 tokens

`then`: the tiers after it stand in front of the others from the first token on that follows a prompt.
`|` is the cascade, `POLICY[ARGUMENT=VALUE,...] COUNT[@CODEC]` a tier. COUNT is slots per KV head, or a share of the context;
CODEC is for keys and values, `KEYS/VALUES` names one for each: `full@int8/int4`.
`on blocks` puts a first tier that forgets nothing, full or sink, into blocks that rows of the same tokens share: `full@int8 on blocks`.
"""

import dataclasses
import difflib
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from kvcascade.cache.block_cache import BlockCache, limit
from kvcascade.cache.cascade import Cascade
from kvcascade.cache.codec import CODECS, bf16
from kvcascade.cache.errors import BadInput
from kvcascade.cache.layer import LayerCache
from kvcascade.cache.policies import POLICIES, Full
from kvcascade.cache.policy import Policy
from kvcascade.cache.policy import argument as argument_of
from kvcascade.cache.statistic import Statistic
from kvcascade.cache.tier import BLOCK, Tier
from kvcascade.cache.whole import Cache
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.slots import Codecs

DESCRIBED = yaml.safe_load(Path(__file__).with_name("presets.yaml").read_text("utf-8"))
"""Presets by their names: each a cache, and whose settings those are."""
PRESETS: dict[str, str] = {name: each["cache"] for name, each in DESCRIBED.items()}


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """A model's cache as a value: a cascade for each range of layers. Its text parses back to an equal value."""

    parts: tuple[tuple[int, int | None, Cascade], ...]
    """(first layer, layer after the last or None for the model's end, cascade)"""

    def cascades(self, layers: int) -> tuple[Cascade, ...]:
        """One cascade per layer; BadInput unless each of the model's layers is in exactly one part."""
        chosen: list[Cascade | None] = [None] * layers
        for start, stop, cascade in self.parts:
            # A part has a layer at least, so an open one that begins past the model's end is told as well.
            for layer in range(start, max(layers, start + 1) if stop is None else stop):
                if layer >= layers:
                    raise BadInput(
                        f"cache spec {str(self)!r}: the model has {layers} layers, there is no layer {layer}"
                    )
                if chosen[layer] is not None:
                    raise BadInput(f"cache spec {str(self)!r}: layer {layer} is in two parts")
                chosen[layer] = cascade
        if None in chosen:
            raise BadInput(
                f"cache spec {str(self)!r}: layer {chosen.index(None)} of the model's {layers} is in no part"
            )
        return tuple(cascade for cascade in chosen if cascade is not None)

    def layers(self, heads: Sequence[Heads]) -> list[tuple[Cascade, Heads]]:
        """Each layer's cascade with its heads; BadInput as for `cascades`, and where a policy cannot rank for these."""
        for policy in self._policies:
            policy.check(heads)
        return list(zip(self.cascades(len(heads)), heads, strict=True))

    @property
    def rereads(self) -> tuple[Statistic, ...]:
        """The numbers for which a prompt is read a second time."""
        return tuple(dict.fromkeys(each for _, _, cascade in self.parts for each in cascade.rereads))

    def init(self, batch: int, heads: Sequence[Heads], context: int) -> Cache:
        """An empty cache for rows of up to `context` tokens and a model whose layers have these heads, one after the other.

        With tiers on blocks a `BlockCache`, in which each row has blocks of its own.
        """
        layers = self.layers(heads)
        if self.on_blocks:
            return BlockCache.empty(layers, batch, context)
        made = (LayerCache.empty(cascade, batch, each, context, index) for index, (cascade, each) in enumerate(layers))
        return Cache(tuple(made), tuple(range(len(heads))))

    @property
    def on_blocks(self) -> bool:
        """Whether some layer has a tier on blocks."""
        return any(cascade.shared for _, _, cascade in self.parts)

    def check_in_rows(self, what: str) -> None:
        """BadInput for tiers on blocks, which that cannot measure."""
        if self.on_blocks:
            raise BadInput(f"{what} counts slots of rows, and {self} has blocks")

    def slots(self, heads: Sequence[Heads], context: int) -> int:
        """Tokens kept per KV head, in the layer that keeps most."""
        return max(cascade.slots(context, each.window) for cascade, each in self.layers(heads))

    def nbytes(self, heads: Sequence[Heads], context: int) -> int:
        """Predicted bytes of one row: codes, scales, positions and numbers of every layer, what layers remember, a number for each block."""
        layers = self.layers(heads)
        return sum(cascade.nbytes(context, each) for cascade, each in layers) + 4 * -(-limit(layers, context) // BLOCK)

    @property
    def content(self) -> dict[str, Any]:
        """What a record says of it besides its text: the fingerprints of what policies rank by; nothing where none has any."""
        found = [content for policy in self._policies if (content := policy.content())]
        return {"cache_content": found} if found else {}

    @property
    def _policies(self) -> list[Policy]:
        return list(dict.fromkeys(tier.policy for _, _, cascade in self.parts for tier in cascade.tiers))

    def __str__(self) -> str:
        if len(self.parts) == 1 and self.parts[0][:2] == (0, None):
            return str(self.parts[0][2])
        return " ; ".join(f"layers[{a}:{'' if b is None else b}]: {cascade}" for a, b, cascade in self.parts)


def everywhere(cascade: Cascade) -> CacheSpec:
    """The same cascade in every layer."""
    return CacheSpec(((0, None, cascade),))


def parse(text: str) -> CacheSpec:
    """Read a spec's text, or a preset's name with or without `preset:`; BadInput with the place between arrows if it is not one."""
    kind, colon, name = text.partition(":")
    if colon and kind.strip() == "preset":
        if name.strip() not in PRESETS:
            raise BadInput(f"no preset {_unknown(name.strip(), PRESETS)}")
        text = name
    if text.strip() in PRESETS:
        text = PRESETS[text.strip()]
    parts = []
    for start, piece in _split(text, ";"):
        head = re.match(r"\s*layers\s*\[\s*(\d+)\s*:\s*(\d*)\s*\]\s*:", piece)
        if head:
            first, stop = int(head[1]), int(head[2]) if head[2] else None
            if stop is not None and stop <= first:
                raise _wrong(text, start, start + head.end(), f"layers[{first}:{stop}] has no layers")
            parts.append((first, stop, _cascade(text, start + head.end(), piece[head.end() :])))
        elif len(_split(text, ";")) > 1:
            raise _wrong(text, start, start + len(piece), "each part between ; starts with layers[A:B]:")
        else:
            parts.append((0, None, _cascade(text, start, piece)))
    return CacheSpec(tuple(parts))


def _split(text: str, separator: str) -> list[tuple[int, str]]:
    """The pieces between separators, each with the place where it starts."""
    pieces, start = [], 0
    for piece in text.split(separator):
        pieces.append((start, piece))
        start += len(piece) + 1
    return pieces


def _wrong(text: str, start: int, stop: int, reason: str) -> BadInput:
    piece = text[start:stop]
    start += len(piece) - len(piece.lstrip())
    stop = max(start, start + len(piece.strip()))
    marked = " ".join(f"{text[:start]}→{text[start:stop]}←{text[stop:]}".split())
    return BadInput(f"cache spec, character {start + 1}: {reason}, in '{marked}'")


def _cascade(text: str, start: int, piece: str) -> Cascade:
    halves = _split(piece, " then ")
    if len(halves) > 2:
        raise _wrong(text, start, start + len(piece), "there is one prompt, so then stands once")
    *front, back = (
        [_tier(text, start + at + inner, tier) for inner, tier in _split(half, "|")] for at, half in halves[::-1]
    )
    before = front[0] if front else []
    try:
        return Cascade(*before, *back, front=len(before))
    except BadInput as error:
        raise _wrong(text, start, start + len(piece), str(error)) from None


TIER = re.compile(
    r"\s*(?P<policy>[a-z][a-z-]*)\s*(?:\[(?P<arguments>[^\]]*)\])?(?:\s*(?P<count>[\d.]+%?))?\s*(?:@\s*(?P<codec>\w+(?:\s*/\s*\w+)?))?(?:\s+on\s+(?P<place>[a-z]+))?\s*"
)


def _tier(text: str, start: int, piece: str) -> Tier:
    match = TIER.fullmatch(piece)
    if not match:
        opened = "[" in piece and "]" not in piece  # | and ; part tiers wherever they stand
        form = (
            "a [ is not closed, or | or ; stands in an argument"
            if opened
            else "a tier is written POLICY[ARGUMENT=VALUE] COUNT@CODEC on PLACE, such as 'sink 4' or 'heavy 64@int8'"
        )
        raise _wrong(text, start, start + len(piece), "a tier is missing" if not piece.strip() else form)

    def wrong(group: str, reason: str) -> BadInput:
        a, b = match.span(group)
        return _wrong(text, start + a, start + b, reason)

    if match["policy"] not in POLICIES:
        presets = "" if match["policy"] not in PRESETS else "; a preset's name stands alone"
        raise wrong("policy", f"no policy {_unknown(match['policy'], POLICIES)}{presets}")
    try:
        policy = _policy(match["policy"], match["arguments"])
    except BadInput as error:
        raise wrong("arguments", str(error)) from None
    names = [name.strip() for name in (match["codec"] or bf16.name).split("/")]
    for name in names:
        if name not in CODECS:
            raise wrong("codec", f"no codec {_unknown(name, CODECS)}")
    codecs = Codecs(CODECS[names[0]], CODECS[names[-1]])
    count = match["count"]
    if count is None and not isinstance(policy, Full):
        raise wrong("policy", f"{match['policy']} needs a number of slots, such as '{match['policy']} 64'")
    try:
        tier = Tier(policy, "100%" if count is None else int(count) if count.isdigit() else count, codecs)
    except BadInput as error:
        raise wrong("count", str(error)) from None
    try:
        return dataclasses.replace(tier, place=match["place"] or "rows")
    except BadInput as error:
        raise wrong("place", str(error)) from None


def _policy(name: str, arguments: str | None) -> Policy:
    types = typing.get_type_hints(POLICIES[name], include_extras=True)
    types = {field.name: types[field.name] for field in dataclasses.fields(POLICIES[name])}
    values = {}
    for argument in (arguments or "").split(",") if arguments is not None else []:
        key, equals, value = (part.strip() for part in argument.partition("="))
        if not equals or key not in types:
            known = f"has {', '.join(types)}" if types else "takes no arguments"
            raise BadInput(f"{name} {known}; an argument is written NAME=VALUE")
        kind = argument_of(types[key])
        try:
            values[key] = kind.read(value)
        except ValueError:
            raise BadInput(f"{key} must be {kind.what}, not {value!r}") from None
    return POLICIES[name](**values)


def _unknown(name: str, known) -> str:
    close = difflib.get_close_matches(name, {*known, *PRESETS} - {name}, n=1)
    return f"{name!r}; did you mean {close[0]!r}?" if close else f"{name!r}; there are {', '.join(known)}"
