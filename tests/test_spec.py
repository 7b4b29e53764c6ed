import dataclasses

import pytest

from kvcascade.cache.cascade import Cascade
from kvcascade.cache.codec import int4, int8
from kvcascade.cache.errors import BadInput
from kvcascade.cache.policies import POLICIES, Heavy, PositionAware, Random, Recent
from kvcascade.cache.spec import PRESETS, CacheSpec, Part, everywhere, parse
from kvcascade.cache.tier import Tier, full, heavy, recent, sink
from kvcascade.kernels.heads import Heads
from kvcascade.kernels.slots import Codecs

FORM = "a tier is written POLICY[ARGUMENT=VALUE] COUNT@CODEC"


def told(text: str) -> str:
    """What the user reads, which is one line."""
    with pytest.raises(BadInput) as caught:
        parse(text)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "text, reason, marked",
    [
        ("", "a tier is missing", "→←"),
        ("sink 4 |", "a tier is missing", "sink 4 |→←"),
        ("| sink 4", "a tier is missing", "→←| sink 4"),
        ("sink 4 || recent 2", "a tier is missing", "sink 4 |→←| recent 2"),
        ("sinks 4", "no policy 'sinks'; did you mean 'sink'?", "→sinks← 4"),
        ("sink 4 | recnt 2", "did you mean 'recent'?", "sink 4 | →recnt← 2"),
        ("xyz 4", "there are full, sink, recent, heavy, random, position-aware", "→xyz← 4"),
        ("streamin", "did you mean 'streaming'?", "→streamin←"),
        ("neurokv | recent 4", "a preset's name stands alone", "→neurokv← | recent 4"),
        ("sink", "sink needs a number of slots, such as 'sink 64'", "→sink←"),
        ("sink 0", "at least 1 slot, not 0", "sink →0←"),
        ("sink 4.5", "'4.5' is not a share of the context", "sink →4.5←"),
        ("lag[sinks=-1] 4", "must be a whole number from 0 on", "lag[→sinks=-1←] 4"),
        ("sink 0%", "'0%' is not a share of the context", "sink →0%←"),
        ("sink 100.1%", "'100.1%' is not a share of the context", "sink →100.1%←"),
        ("sink -1", FORM, "→sink -1←"),
        ("recent 2 | SINK 4", FORM, "recent 2 | →SINK 4←"),
        ("sink 4, recent 4", FORM, "→sink 4, recent 4←"),
        ("heavy 64@", FORM, "→heavy 64@←"),
        ("heavy 64@int9", "no codec 'int9'; did you mean 'int8'?", "heavy 64@→int9←"),
        ("heavy 64@x", "there are f32, bf16, fp8, int8, planes, int4, int4h, nvfp4, int3, int3h", "heavy 64@→x←"),
        ("heavy\n64@x", "no codec 'x'", "heavy 64@→x←"),
        ("full@int8/int5", "no codec 'int5'; did you mean 'int8'?", "full@→int8/int5←"),
        ("full@int8/int4/int4", FORM, "→full@int8/int4/int4←"),
        ("full 3", "full keeps the whole context", "full →3←"),
        ("full | recent 4", "must be the last", "→full | recent 4←"),
        ("recent[w=1] 4", "recent takes no arguments", "recent[→w=1←] 4"),
        ("random[sed=1] 4", "random has seed", "random[→sed=1←] 4"),
        ("random[] 4", "an argument is written NAME=VALUE", "random[→←] 4"),
        ("random[seed] 4", "an argument is written NAME=VALUE", "random[→seed←] 4"),
        ("random[seed=x] 4", "seed must be a whole number, not 'x'", "random[→seed=x←] 4"),
        ("random[seed=1.5] 4", "seed must be a whole number, not '1.5'", "random[→seed=1.5←] 4"),
        ("position-aware[mass=nan] 4", "mass must be", "position-aware[→mass=nan←] 4"),
        ("position-aware[mass=inf] 4", "mass must be", "position-aware[→mass=inf←] 4"),
        ("position-aware[mass=1e999] 4", "mass must be a finite number", "position-aware[→mass=1e999←] 4"),
        ("layers[2:2]: full", "layers[2:2] has no layers", "→layers[2:2]:← full"),
        (
            "layers[0:1]: full ; layers[3:2]: full",
            "layers[3:2] has no layers",
            "layers[0:1]: full ; →layers[3:2]:← full",
        ),
        ("layers[0:1]: full ; sink 4", "each part between ; starts with layers[A:B]:", "; →sink 4←"),
        ("full ; full", "each part between ; starts with layers[A:B]:", "→full← ; full"),
        ("layers[0:1]: sink 4 | fill", "did you mean 'full'?", "layers[0:1]: sink 4 | →fill←"),
    ],
)
def test_a_wrong_text_is_told_in_one_line_with_its_place(text: str, reason: str, marked: str) -> None:
    """The message says what is wrong, at which character, and shows the place between arrows."""
    message = told(text)
    assert reason in message
    assert marked in message
    place = int(message.split("character ")[1].split(":")[0])
    assert text[place - 1 :].startswith(marked.split("→")[1].split("←")[0])


def test_a_preset_inside_a_cascade_is_not_suggested_to_itself() -> None:
    """The hint is another name than the one that was written."""
    assert "did you mean 'streaming'" not in told("streaming | recent 4")


@pytest.mark.parametrize(
    "text, reason",
    [
        ("layers[0:2]: full", "layer 2 of the model's 3 is in no part"),
        ("layers[1:]: full", "layer 0 of the model's 3 is in no part"),
        ("layers[0:1]: full ; layers[2:]: full", "layer 1 of the model's 3 is in no part"),
        ("layers[0:2]: full ; layers[1:]: sink 4", "layer 1 is in two parts"),
        ("full ; layers[1:]: sink 4", "each part between ;"),
        ("layers[0:4]: full", "the model has 3 layers, there is no layer 3"),
        ("layers[0:]: full ; layers[9:]: recent 4", "the model has 3 layers, there is no layer 9"),
        ("layers[0:]: full ; layers[3:]: recent 4", "the model has 3 layers, there is no layer 3"),
    ],
)
def test_each_layer_of_a_model_is_in_one_part(text: str, reason: str) -> None:
    """A part too many, too few or too far is told with the layer and the spec."""
    with pytest.raises(BadInput) as caught:
        parse(text).groups([Heads(1, 1, 8)] * 3)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_text_is_the_value_that_python_would_build() -> None:
    """All the forms: presets, codecs, arguments, shares, parts, and space wherever one may like it."""
    assert parse("full") == everywhere(Cascade(full))
    assert parse("full@int4") == everywhere(Cascade(Tier(full.policy, "100%", int4)))
    assert parse(" sink  4|recent 60 | heavy 64 @ int8 ") == everywhere(
        Cascade(sink(4), recent(60), heavy(64, codec=int8))
    )
    assert parse("random[seed=-3] 12.5%") == everywhere(Cascade(Tier(Random(-3), "12.5%")))
    assert parse("position-aware[ mass = 1 , sinks=2 ] 8") == everywhere(
        Cascade(Tier(PositionAware(mass=1.0, sinks=2), 8))
    )
    assert parse("layers[0:2]: full ; layers [ 2 : ] : heavy 8") == CacheSpec(
        (Part(0, 2, Cascade(full)), Part(2, None, Cascade(Tier(Heavy(), 8))))
    )
    assert str(parse("layers[0:]:full")) == "full"
    assert parse("heavy 8 @ int8 / int4") == everywhere(Cascade(heavy(8, codec=Codecs(int8, int4))))
    assert parse("full@int8/int8") == parse("full@int8") and str(parse("full@int8/int8")) == "full@int8"
    assert str(parse("full@bf16/int4")) == "full@bf16/int4"


@dataclasses.dataclass(frozen=True)
class Worded(Recent):
    """Arguments of every type that a spec can write."""

    oldest: bool = False
    pool: str = "mean"
    share: float = 0.5


@dataclasses.dataclass(frozen=True)
class Listed(Recent):
    """An argument of a type that none can."""

    some: tuple = ()


def test_arguments_of_every_type_come_back_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """`False` is no text that is true, a word has no quotes, and a type that cannot be written is told in one line."""
    monkeypatch.setitem(POLICIES, "worded", Worded)
    monkeypatch.setitem(POLICIES, "listed", Listed)
    for policy in (Worded(oldest=True), Worded(pool="max-7"), Worded(oldest=True, pool="x", share=1e-30)):
        spec = everywhere(Cascade(Tier(policy, 4)))
        assert parse(str(spec)) == spec
    assert parse("worded[oldest=false] 4") == parse("worded 4")
    assert str(parse("worded[oldest=true,pool=max] 4")) == "worded[oldest=true,pool=max] 4"
    assert "oldest must be true or false, not 'False'" in told("worded[oldest=False] 4")
    assert "pool must be a word, not 'a b'" in told("worded[pool=a b] 4")
    assert "share must be a finite number, not 'inf'" in told("worded[share=inf] 4")
    assert "must be of the type int, float, bool or str" in told("listed[some=1] 4")


def test_parts_are_laid_out_over_the_layers() -> None:
    """`layers[A:B]` is from A to before B, in any order of parts."""
    spec = parse("layers[2:]: sink 2 ; layers[0:1]: full ; layers[1:2]: recent 3")
    assert [str(group.cascade) for group in spec.groups([Heads(1, 1, 8)] * 4)] == [
        "full",
        "recent 3",
        "sink 2",
        "sink 2",
    ]


@pytest.mark.parametrize(
    "count, context, slots",
    [("25%", 512, 128), ("25%", 10, 2), ("0.1%", 100, 1), ("100%", 7, 7), ("33.3%", 100, 33), (5, 3, 5)],
)
def test_a_share_is_rounded_to_at_least_one_slot(count: int | str, context: int, slots: int) -> None:
    """A share of the context is rounded; a number is a number whatever the context."""
    assert recent(count).slots(context) == slots


def test_a_cascade_needs_a_tier_and_keeps_at_most_the_context() -> None:
    """An empty cascade is refused; more slots than tokens keep no more than the tokens."""
    with pytest.raises(BadInput, match="at least one tier"):
        Cascade()
    assert Cascade(sink(4), recent(6)).slots(8) == 8
    assert Cascade(sink(4), recent(3)).slots(8) == 7


def test_a_preset_may_be_said_to_be_one() -> None:
    """`preset:NAME` is NAME, and nothing else is taken for it."""
    assert parse("preset:h2o") == parse(" preset: h2o ") == parse("h2o")
    assert told("preset:h20") == "no preset 'h20'; did you mean 'h2o'?"
    assert told("preset:recent 4").startswith("no preset 'recent 4'; there are streaming, h2o")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_a_cascade_for_every_model(name: str) -> None:
    """Presets say nothing about layers."""
    assert len(parse(name).cascades) == 1
