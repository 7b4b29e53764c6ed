"""Which caches an engine serves, and what it does with each: finds a prompt that another had, lets a row stop, continues it several times, foresees."""

from typing import NamedTuple

import pytest
from test_rows import CHUNK, CONFIG, alone, growing, params, requests, serve

from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.serve.engine import Engine
from kvcascade.serve.plan import Limits
from kvcascade.serve.propose import by_text, ngram
from kvcascade.serve.rows import RowDevice, device_for


class Way(NamedTuple):
    """What an engine does with a cache."""

    blocks: bool
    """Some of its tokens are on blocks."""
    own: bool
    """Rows have slots of their own: who stops is put aside whole, and a prompt goes on from a snapshot; else it is computed again, or found."""
    foresees: bool


LEGAL = {
    "full@f32 on blocks": Way(blocks=True, own=False, foresees=True),
    "full@int4h on blocks": Way(blocks=True, own=False, foresees=True),
    "sink 2 | recent 6": Way(blocks=False, own=True, foresees=False),
    "full@int8": Way(blocks=False, own=True, foresees=False),
    "pending 4 | full@int8": Way(blocks=False, own=True, foresees=True),
    "pending 4 | sink 2 | recent 6": Way(blocks=False, own=True, foresees=True),
    "sink 16@int8 on blocks | recent 4 | heavy 6@int8": Way(blocks=True, own=True, foresees=False),
    "sink 16@int8 on blocks | pending 4 | recent 4 | heavy 6@int8": Way(blocks=True, own=True, foresees=True),
    "layers[0:1]: full@f32 on blocks ; layers[1:]: sink 2 | recent 9": Way(blocks=True, own=True, foresees=False),
    "layers[0:1]: full@f32 on blocks ; layers[1:]: pending 4 | recent 9": Way(blocks=True, own=True, foresees=True),
    "heads[0]: recent 5 ; heads[1]: sink 2 | heavy 8@int4h": Way(blocks=False, own=True, foresees=False),
    "heads[0]: pending 4 | recent 5 ; heads[1]: pending 2 | sink 4": Way(blocks=False, own=True, foresees=True),
    "heads[0]: pending 4 | recent 5 ; heads[1]: sink 4": Way(blocks=False, own=True, foresees=False),
    "snap[window=4] 12 then recent 6": Way(blocks=False, own=True, foresees=False),
    "snap[window=4] 12 then pending 4 | recent 6": Way(blocks=False, own=True, foresees=True),
}

REFUSED = {
    "heavy 8 on blocks": "heavy lets go of what later tokens do not need, and blocks are shared by rows whose later tokens differ",
    "random 8 on blocks": "random lets go of what later tokens do not need",
    "recent 8 on blocks": "recent lets go of what later tokens do not need",
    "pending 8 on blocks | recent 4": "pending lets go of what later tokens do not need",
    "recent 4 | full on blocks": "full on blocks must be the first tier, and the only one on blocks",
    "recent 4 | sink 4 on blocks": "sink 4 on blocks must be the first tier, and the only one on blocks",
    "sink 4 on blocks | full on blocks": "full on blocks must be the first tier, and the only one on blocks",
    "sink 4 on blocks then recent 4": "sink 4 on blocks must be the first tier, and the only one on blocks",
    "heads[0]: full on blocks ; heads[1]: recent 4": "a block has all KV heads of its tokens",
    "layers[0:1]: full on blocks ; layers[1:]: sink 4 on blocks | recent 4": "a block has the same ones in all layers",
    "kvzip 20": "reads a prompt twice, and here it enters in parts",
    "sink 16 on blocks | kvzip 20": "reads a prompt twice, and here it enters in parts",
    "recent 4 | pending 4 | sink 2": "pending 4 must be the first tier of those that rows have of their own",
    "sink 2 | pending 4": "pending 4 must be the first tier of those that rows have of their own",
    "full on blocks | pending 4 | recent 4": "nothing passes a full tier, so it must be the last",
}


def device(spec: str, blocks: int = 60, **limits):
    return device_for(CONFIG, params(), parse(spec), blocks, Limits(tokens=CHUNK, rows=6, **limits), size=4)


@pytest.mark.slow
@pytest.mark.parametrize("spec", LEGAL)
def test_what_is_legal_runs(spec: str) -> None:
    """Requests of all sorts, beside each other and with little room, get what each would get alone."""
    way = LEGAL[spec]
    ours = Engine(device(spec, snapshots=2**24))
    assert isinstance(ours.device, RowDevice) == ours.blocks.own == way.own and (ours.device.about["spec"] == spec)
    found = serve({spec: ours})[spec]
    assert ours.stats["found"] and (not ours.stats["again"] or not way.own)
    narrow = Engine(device(spec, blocks=9 if way.blocks else 60))
    assert len(serve({spec: narrow}, asked=growing)[spec]) == len(growing())
    if way.blocks:
        assert narrow.stats["stopped"] and bool(narrow.stats["put_aside"]) == way.own
    if way.own:
        assert found == alone(spec)
    try:
        foreseeing = Engine(device(spec, ahead=3), propose=by_text(ngram))
    except BadInput as refused:
        assert not way.foresees and "what is foreseen is tried where it can be taken back" in str(refused)
    else:
        assert way.foresees and serve({spec: foreseeing})[spec] == found and foreseeing.stats["drafted"]


@pytest.mark.parametrize("spec", REFUSED)
def test_what_is_not_is_refused_with_its_sentence(spec: str) -> None:
    with pytest.raises(BadInput) as refused:
        device(spec)
    assert REFUSED[spec] in str(refused.value)


def test_all_sorts_of_requests_are_among_them() -> None:
    some = requests()
    assert any(each.continuations > 1 for each in some) and any(each.sampling.temperature for each in some)
