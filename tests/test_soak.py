"""Thousands of requests, a tenth of them cancelled: no block is lost, nothing grows, and everybody gets what they asked for."""

import gc
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from test_engine import CONFIG, params

from kvcascade.cache.spec import parse
from kvcascade.model.sampling import GREEDY, Sampling
from kvcascade.serve.engine import Engine
from kvcascade.serve.plan import Limits
from kvcascade.serve.propose import by_text, ngram
from kvcascade.serve.request import Request
from kvcascade.serve.rows import device_for

pytestmark = pytest.mark.slow


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


SPECS = {
    "full@int8 on blocks": (10_000, 16, 16, 32),
    "sink 32@int8 on blocks | pending 4 | recent 6 | heavy 4@int8": (2_000, 11, 8, 16),
}
"""Caches: how many requests, blocks, tokens of a block and tokens of a step each gets."""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("spec", SPECS)
def test_thousands_of_requests(spec: str) -> None:
    draw, rng = random.Random(0), np.random.default_rng(0)
    count, blocks, size, tokens = SPECS[spec]
    limits = Limits(tokens, 12, aside=6, snapshots=2**18, ahead=2)
    device = device_for(CONFIG, params(), parse(spec), blocks, limits, size=size)
    device.warm()
    device._seconds = 0.0, 0.0, math.inf  # whatever is measured
    engine, compiled = Engine(device, propose=by_text(ngram)), device.compiled()
    common = [rng.integers(0, CONFIG.vocab, 20).tolist() for _ in range(40)]
    wanted: dict[int, int] = {}
    had: dict[int, int] = {}
    submitted = cancelled = steps = 0
    memory = []
    while submitted < count or engine.busy:
        while submitted < count and len(engine.live) < 24:
            prompt = draw.choice(common)[: draw.randrange(1, 21)] + [draw.randrange(CONFIG.vocab)]
            sampling = Sampling(1.0, seed=submitted) if submitted % 4 else GREEDY
            more = 3 if submitted % 97 == 0 else 1
            tokens = draw.choice([1, 2, 4, 25])
            for number in engine.submit(Request(prompt, tokens, sampling, more, priority=draw.randrange(2))):
                wanted[number] = tokens
            submitted += 1
            if submitted % 10 == 3:
                live = draw.choice([number for number in engine.live])
                gone = {*engine.live}
                assert engine.cancel(live)
                cancelled += 1
                for number in gone - {*engine.live}:
                    del wanted[number]
                    had.pop(number, None)
        for event in engine.run_step():
            assert event.finished != "error"
            had[event.id] = had.get(event.id, 0) + 1
            if event.finished:
                assert had.pop(event.id) == wanted.pop(event.id)
        engine.check()
        steps += 1
        if steps % 200 == 0:
            gc.collect()
            memory.append(resident())
    assert cancelled == count // 10 and not wanted and not had and not device._aside and not engine.queue.aside
    assert engine.blocks.states()["used"] == 0 and device.compiled() == compiled
    assert engine.stats["stopped"] and engine.stats["put_aside"] and engine.stats["found"] and engine.blocks.evictions
    assert sum(engine.accepted)
    assert max(memory[len(memory) // 2 :]) - memory[2] < 4 * 2**20, memory
