"""The table of methods says what caches of them take."""

import pytest

from kvcascade.cache.cascade import Cascade
from kvcascade.cache.policies import POLICIES
from kvcascade.cache.tier import Tier
from kvcascade.eval.memory import methods
from kvcascade.kernels.heads import Heads

HEADS = Heads(6, 3, 16)


@pytest.mark.parametrize("method", methods.methods(HEADS), ids=POLICIES)
def test_bytes_are_those_of_a_cache(method: methods.Method) -> None:
    """Keys, values and a position for each slot, what the table says besides, and nothing where tokens never leave."""
    tier = Tier(method.policy, "100%" if method.name == "full" else 8)
    slots, plain = tier.slots(64), 3 * (2 * 16 * 2 + 4)
    assert Cascade(tier).nbytes(64, HEADS) == slots * (plain + method.per_token) + method.per_layer


def test_every_policy_says_what_it_keeps_in_a_sentence() -> None:
    _, columns, rows = methods.table(HEADS)
    assert [row[0].split()[0] for row in rows] == [*POLICIES]
    assert all(len(row) == len(columns) and 10 < len(row[1]) < 130 and "(" not in row[1].split(":")[0] for row in rows)
    by_name = {row[0].split()[0]: dict(zip(columns, row, strict=True)) for row in rows}
    assert by_name["snap"]["source"] == "SnapKV, Li et al. 2024, arXiv 2404.14469"
    assert by_name["expected"]["reads"] == "ExpectedMass, QueryMoments"
