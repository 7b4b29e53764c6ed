"""Allocation: what each layer and head gets is what the published rule says, or the best that there is."""

import itertools

import numpy as np
import pytest

from kvcascade.cache import allocate
from kvcascade.cache.cascade import Cascade
from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.cache.tier import full, heavy, recent, sink
from kvcascade.kernels.heads import Heads

HEADS = (Heads(6, 3, 16),) * 4
template = lambda count: Cascade(sink(1), recent(count))


def best(errors, sizes, budget: int, distinct: int) -> float:
    """The least sum of errors, by trying all."""
    L, K, O = errors.shape
    found = np.inf
    for picks in itertools.product(range(O), repeat=L * K):
        place = np.reshape(picks, (L, K, 1))
        if np.take_along_axis(sizes, place, 2).sum() > budget or any(len({*row.ravel()}) > distinct for row in place):
            continue
        found = min(found, np.take_along_axis(errors, place, 2).sum())
    return found


@pytest.mark.parametrize("distinct", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_the_best_that_there_is(seed: int, distinct: int) -> None:
    rng = np.random.default_rng(seed)
    errors, sizes = rng.random((2, 3, 4)), rng.integers(1, 20, (2, 3, 4))
    budget = int(sizes.mean() * 5)
    place = allocate.by_curves(errors, sizes, budget, distinct=distinct)
    assert np.take_along_axis(sizes, place[..., None], 2).sum() <= budget
    assert all(len({*row}) <= distinct for row in place)
    found = np.take_along_axis(errors, place[..., None], 2).sum()
    assert found == pytest.approx(best(errors, sizes, budget, distinct), rel=1e-3)


def test_options_that_are_not_allowed_are_not_chosen_and_too_few_bytes_are_told() -> None:
    errors, sizes = np.zeros((2, 2, 3)), np.broadcast_to([5, 3, 1], (2, 2, 3))
    errors[..., 2] = 1
    assert (allocate.by_curves(errors, sizes, 100, np.array([False, True, True])) == 1).all()
    with pytest.raises(BadInput, match="nothing fits into 3 bytes; the smallest of the options takes 4"):
        allocate.by_curves(errors, sizes, 3)


def test_layers_and_heads_that_are_alike_are_one_part() -> None:
    a, b = template(3), template(5)
    spec = allocate.by_heads([[a, b, a], [a, b, a], [b, b, b], [a, a, a]])
    assert str(spec) == (
        "layers[0:2] heads[0,2]: sink 1 | recent 3 ; layers[0:2] heads[1]: sink 1 | recent 5 ; "
        "layers[2:3]: sink 1 | recent 5 ; layers[3:4]: sink 1 | recent 3"
    )
    assert parse(str(spec)) == spec
    assert len(spec.groups(HEADS)) == 6
    assert str(allocate.by_heads([[a]] * 4)) == "layers[0:4]: sink 1 | recent 3"


def test_a_pyramid_falls_from_layer_to_layer_and_has_its_mean() -> None:
    spec = allocate.pyramid(lambda count: Cascade(heavy(count)), 100, 30, window=8, beta=20.0)
    counts = [each.cascade.tiers[0].slots(512) for each in spec.groups(HEADS[:1] * 30)]
    assert counts == sorted(counts, reverse=True) and len(counts) == 30
    assert np.mean(counts) == pytest.approx(100, abs=0.5)
    assert counts[-1] == 8 + round(92 / 20) and counts[0] == 8 + round(2 * 92 - 92 / 20)
    with pytest.raises(BadInput, match="none behind a window"):
        allocate.pyramid(template, 8, 4)


def test_the_heads_with_the_largest_gates_retrieve() -> None:
    gates = np.random.default_rng(0).random((4, 3))
    spec = allocate.duo(gates, 0.25, Cascade(full), template(3))
    kept = {(each.layer, head) for each in spec.groups(HEADS) if each.cascade == Cascade(full) for head in each.chosen}
    assert kept == {(int(at) // 3, int(at) % 3) for at in np.argsort(-gates, axis=None)[:3]}


def test_a_layer_shares_its_slots_above_a_floor() -> None:
    shares = np.array([[1.0, 1.0, 2.0]] * 4)
    spec = allocate.shared(lambda count: Cascade(recent(count)), shares, 40, floor=0.25)
    groups = spec.groups(HEADS)
    counts = {head: each.cascade.tiers[0].slots(512) for each in groups[:2] for head in each.chosen}
    assert counts == {0: 32, 1: 32, 2: 55}  # 10 and a quarter, or half, of 90
    assert sum(counts.values()) == pytest.approx(120, abs=3)
