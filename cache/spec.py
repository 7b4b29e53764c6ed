"""Any cache in one line: the text of a spec, its parser, and the names for often-used lines.

    full                                    everything, bf16
    full@int4                               everything, four bits
    sink 4 | recent 124                     StreamingLLM
    random[seed=1] 25%                      a quarter of the context, by lot
    layers[0:2]: full ; layers[2:]: sink 4 | recent 60
    heads[0,2]: full ; heads[1]: recent 60  by KV heads, of all layers
    layers[0:2]: full ; layers[2:] heads[0]: full ; layers[2:] heads[1:3]: sink 4 | recent 60
    snap 25% then recent 128                what SnapKV keeps of the prompt, and then all of 128 tokens

A part is of the layers and the KV heads that it names, of all where it names none; parts cover each head of each layer once.
`then`: the tiers after it stand in front of the others from the first token on that follows a prompt.
`|` is the cascade, `POLICY[ARGUMENT=VALUE,...] COUNT[@CODEC]` a tier. COUNT is slots per KV head, or a share of the context;
CODEC is for keys and values, `KEYS/VALUES` names one for each: `full@int8/int4`.
A codec's last letter is the basis that it encodes in (`codec.BASES`); those of a calibration name its file: `full@int4m with FILE`.
`pending 16 | …`: tokens wait in bf16, and 16 at a time go to the tiers behind, which rank once for all of them.
`on blocks` puts a first tier that forgets nothing, full or sink, into blocks that rows of the same tokens share: `full@int8 on blocks`.
"""

import dataclasses
import difflib
import re
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from kvcascade.cache import calibration
from kvcascade.cache.basis import Bases
from kvcascade.cache.block_cache import BlockCache, limit
from kvcascade.cache.cascade import Cascade
from kvcascade.cache.codec import CODECS, NAMES, bf16
from kvcascade.cache.errors import BadInput
from kvcascade.cache.groups import Group
from kvcascade.cache.layer import LayerCache
from kvcascade.cache.policies import NAMED, Full
from kvcascade.cache.policy import Policy
from kvcascade.cache.policy import argument as argument_of
from kvcascade.cache.statistic import Statistic
from kvcascade.cache.tier import BLOCK, Tier
from kvcascade.cache.whole import Cache
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.slots import Codec, Codecs

DESCRIBED = yaml.safe_load(Path(__file__).with_name("presets.yaml").read_text("utf-8"))
"""Presets by their names: each a cache, and whose settings those are."""
PRESETS: dict[str, str] = {name: each["cache"] for name, each in DESCRIBED.items()}


class Part(NamedTuple):
    """A cascade, and whose it is."""

    start: int
    """The first layer."""
    stop: int | None
    """The layer after the last; None: the model's end."""
    cascade: Cascade
    heads: tuple[int, ...] | None = None
    """KV heads of these layers, in their order; None: all."""

    def __str__(self) -> str:
        layers = "" if self[:2] == (0, None) else f"layers[{self.start}:{'' if self.stop is None else self.stop}]"
        heads = "" if self.heads is None else f"heads[{_written(self.heads)}]"
        whose = " ".join(filter(None, [layers, heads])) or "layers[0:]"
        return f"{whose}: {self.cascade}"


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """A model's cache as a value: a cascade for each range of layers, or for some of their KV heads. Its text parses back to an equal value."""

    parts: tuple[Part, ...]
    calibration: str = ""
    """The file of what is known of the model, for codecs that need it."""

    def groups(self, heads: Sequence[Heads]) -> list[Group]:
        """The groups of KV heads of each layer, of layers with these heads, in the order of the layers and of each group's first head.

        BadInput unless each head of each layer is in exactly one part, and where a policy cannot rank for these layers.
        """
        grid: list[dict[int, Cascade]] = [{} for _ in heads]
        wrong = lambda what: BadInput(f"cache spec {str(self)!r}: {what}")
        for start, stop, cascade, chosen in self.parts:
            # A part has a layer at least, so an open one that begins past the model's end is told as well.
            for layer in range(start, max(len(heads), start + 1) if stop is None else stop):
                if layer >= len(heads):
                    raise wrong(f"the model has {len(heads)} layers, there is no layer {layer}")
                for head in range(heads[layer].kv) if chosen is None else chosen:
                    if head >= heads[layer].kv:
                        raise wrong(f"layer {layer} has {heads[layer].kv} KV heads, there is no head {head}")
                    if head in grid[layer]:
                        what = f"layer {layer}" if chosen is None else f"head {head} of layer {layer}"
                        raise wrong(f"{what} is in two parts")
                    grid[layer][head] = cascade
        for layer, (found, each) in enumerate(zip(grid, heads, strict=True)):
            if not found:
                raise wrong(f"layer {layer} of the model's {len(heads)} is in no part")
            if missing := {*range(each.kv)} - {*found}:
                raise wrong(f"head {min(missing)} of layer {layer}, which has {each.kv} KV heads, is in no part")
        for policy in self._policies:
            policy.check(heads)
        if self.calibration:
            calibration.read(self.calibration).check(self.calibration, heads)
        return [
            Group(layer, tuple(head for head in sorted(found) if found[head] == cascade), cascade, heads[layer])
            for layer, found in enumerate(grid)
            for cascade in dict.fromkeys(found[head] for head in sorted(found))
        ]

    @property
    def cascades(self) -> tuple[Cascade, ...]:
        """Those of all parts, each once."""
        return tuple(dict.fromkeys(part.cascade for part in self.parts))

    def mapped(self, change: Callable[[Tier], Tier]) -> "CacheSpec":
        """The same cache with other tiers."""
        new = lambda cascade: Cascade(*map(change, cascade.tiers), front=cascade.front)
        parts = tuple(part._replace(cascade=new(part.cascade)) for part in self.parts)
        return dataclasses.replace(self, parts=parts)

    @property
    def codecs(self) -> tuple[Codec, ...]:
        """Those of all tiers, each once."""
        every = (codec for cascade in self.cascades for tier in cascade.tiers for codec in tier.codecs)
        return tuple(dict.fromkeys(every))

    @property
    def rereads(self) -> tuple[Statistic, ...]:
        """The numbers for which a prompt is read a second time."""
        return tuple(dict.fromkeys(each for cascade in self.cascades for each in cascade.rereads))

    def init(self, batch: int, heads: Sequence[Heads], context: int) -> Cache:
        """An empty cache for rows of up to `context` tokens and a model whose layers have these heads, one after the other.

        With tiers on blocks a `BlockCache`, in which each row has blocks of its own.
        """
        groups = self.groups(heads)
        if self.on_blocks:
            return BlockCache.empty(groups, batch, context, bases=self.bases(groups))
        pairs = zip(groups, self.bases(groups), strict=True)
        made = (LayerCache.empty(each.cascade, batch, each.heads, context, each.ids, some) for each, some in pairs)
        return Cache.of_groups(groups, made)

    def bases(self, groups: Sequence[Group]) -> list[tuple[Bases | None, ...]]:
        """The bases of each group's tiers; () where none of them needs any."""
        found = calibration.read(self.calibration) if self.calibration else None

        def of(group: Group) -> tuple[Bases | None, ...]:
            k, v = (found.k[group.layer], found.v[group.layer]) if found else calibration.unknown(group.of)
            each = tuple(calibration.bases(tier.codecs, k, v, group.chosen) for tier in group.cascade.tiers)
            return each if any(each) else ()

        return [of(group) for group in groups]

    @property
    def on_blocks(self) -> bool:
        """Whether some layer has a tier on blocks."""
        return any(cascade.shared for cascade in self.cascades)

    def check_in_rows(self, what: str) -> None:
        """BadInput for tiers on blocks, which that cannot measure."""
        if self.on_blocks:
            raise BadInput(f"{what} counts slots of rows, and {self} has blocks")

    def slots(self, heads: Sequence[Heads], context: int) -> int:
        """Tokens kept per KV head, in the layer that keeps most."""
        return max(each.cascade.slots(context, each.of.window) for each in self.groups(heads))

    def nbytes(self, heads: Sequence[Heads], context: int) -> int:
        """Predicted bytes of one row: codes, scales, positions and numbers of every layer, what layers remember, a number for each block."""
        groups = self.groups(heads)
        return sum(each.nbytes(context) for each in groups) + 4 * -(-limit(groups, context) // BLOCK)

    @property
    def content(self) -> dict[str, Any]:
        """What a record says of it besides its text: the fingerprints of files that policies rank by and codecs are made from; nothing where
        there are none."""
        found = [content for policy in self._policies if (content := policy.content())]
        found += [calibration.read(self.calibration).fingerprint] if self.calibration else []
        return {"cache_content": found} if found else {}

    @property
    def _policies(self) -> list[Policy]:
        return list(dict.fromkeys(tier.policy for cascade in self.cascades for tier in cascade.tiers))

    def __str__(self) -> str:
        alike = len(self.parts) == 1 and self.parts[0][:2] == (0, None) and self.parts[0].heads is None
        whose = str(self.parts[0].cascade) if alike else " ; ".join(map(str, self.parts))
        return f"{whose} with {self.calibration}" if self.calibration else whose


def _written(heads: Sequence[int]) -> str:
    """Numbers in rising order, where three and more follow one another as a range."""
    runs: list[list[int]] = []
    for head in heads:
        if runs and head == runs[-1][-1] + 1:
            runs[-1].append(head)
        else:
            runs.append([head])
    return ",".join(f"{run[0]}:{run[-1] + 1}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)


def everywhere(cascade: Cascade) -> CacheSpec:
    """The same cascade in every layer."""
    return CacheSpec((Part(0, None, cascade),))


def parse(text: str) -> CacheSpec:
    """Read a spec's text, or a preset's name with or without `preset:`; BadInput with the place between arrows if it is not one."""
    kind, colon, name = text.partition(":")
    if colon and kind.strip() == "preset":
        if name.strip() not in PRESETS:
            raise BadInput(f"no preset {_unknown(name.strip(), PRESETS)}")
        text = name
    if text.strip() in PRESETS:
        text = PRESETS[text.strip()]
    whole = text
    text, _, file = text.partition(" with ")
    parts = []
    for start, piece in _split(text, ";"):
        whose = WHOSE.match(piece)
        if whose and (whose["first"] or whose["heads"] is not None):
            end = start + whose.end()
            first, stop = int(whose["first"] or 0), int(whose["stop"]) if whose["stop"] else None
            if stop is not None and stop <= first:
                raise _wrong(text, start, end, f"layers[{first}:{stop}] has no layers")
            try:
                heads = None if whose["heads"] is None else _heads(whose["heads"])
            except BadInput as error:
                raise _wrong(text, start, end, str(error)) from None
            parts.append(Part(first, stop, _cascade(text, end, piece[whose.end() :]), heads))
        elif len(_split(text, ";")) > 1:
            raise _wrong(
                text, start, start + len(piece), "each part between ; starts with layers[A:B]: or heads[A,B]: or both"
            )
        else:
            parts.append(Part(0, None, _cascade(text, start, piece)))
    spec = CacheSpec(tuple(parts), file.strip())
    needed = [codec.name for codec in spec.codecs if codec.basis in calibration.CALIBRATED]
    if needed and not spec.calibration:
        raise _wrong(
            whole, 0, len(whole), f"{needed[0]} needs a calibration, which kvcascade calibrate makes: … with FILE"
        )
    if spec.calibration and not needed:
        raise _wrong(whole, len(text), len(whole), "no codec needs the calibration")
    return spec


WHOSE = re.compile(
    r"\s*(?:layers\s*\[\s*(?P<first>\d+)\s*:\s*(?P<stop>\d*)\s*\]\s*)?(?:heads\s*\[(?P<heads>[\d\s,:]*)\]\s*)?:"
)


def _heads(text: str) -> tuple[int, ...]:
    """KV heads, one by one or as ranges: `0,2`, `0:4`."""
    found = []
    for each in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?::\s*(\d+)\s*)?", each)
        if not match:
            raise BadInput("heads are written one by one or as ranges, such as heads[0,2] or heads[0:4]")
        numbers = range(int(match[1]), int(match[2]) if match[2] else int(match[1]) + 1)
        if not numbers:
            raise BadInput(f"heads[{each.strip()}] has no heads")
        found += numbers
    if len({*found}) < len(found):
        raise BadInput(f"heads[{text.strip()}] names one twice")
    return tuple(sorted(found))


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

    if match["policy"] not in NAMED:
        presets = "" if match["policy"] not in PRESETS else "; a preset's name stands alone"
        raise wrong("policy", f"no policy {_unknown(match['policy'], NAMED)}{presets}")
    try:
        policy = _policy(match["policy"], match["arguments"])
    except BadInput as error:
        raise wrong("arguments", str(error)) from None
    names = [name.strip() for name in (match["codec"] or bf16.name).split("/")]
    for name in names:
        if name not in NAMES:
            raise wrong("codec", f"no codec {_unknown(name, NAMES, CODECS)}")
    codecs = Codecs(NAMES[names[0]], NAMES[names[-1]])
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
    types = typing.get_type_hints(NAMED[name], include_extras=True)
    types = {field.name: types[field.name] for field in dataclasses.fields(NAMED[name])}
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
    return NAMED[name](**values)


def _unknown(name: str, known: Iterable[str], named: Iterable[str] = ()) -> str:
    """What a name may have been meant to be; of many known ones only some are named."""
    close = difflib.get_close_matches(name, {*known, *PRESETS} - {name}, n=1)
    return f"{name!r}; did you mean {close[0]!r}?" if close else f"{name!r}; there are {', '.join(named or known)}"
