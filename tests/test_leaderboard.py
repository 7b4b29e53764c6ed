"""The leaderboard: places with intervals, what is not told apart from the first, and who takes part; of a whole one test_cli has one."""

import numpy as np
import pytest

from kvcascade.eval import records, stats
from kvcascade.eval.records import Board, Evaluation
from kvcascade.eval.report import page, readme
from kvcascade.eval.search import leaderboard

ENTRIES = (
    ("method: heavy", 0.25, "heavy 4"),
    ("method: random", 0.25, "random 4"),
    ("tuned", 0.25, "recent 4@int8"),
    ("codec: int8", 0.5, "full@int8"),
)
LOSSES = {"full": 3.0, "heavy 4": 3.2, "random 4": 4.0, "recent 4@int8": 3.19, "full@int8": 3.01}


def evaluated(cache: str, loss: float, noise: float = 0.0, seed: int = 0) -> Evaluation:
    """Twelve windows of as many documents, harder ones and easier ones."""
    rng = np.random.default_rng(seed)
    windows = (loss + np.linspace(-1, 1, 12) + noise * rng.standard_normal(12)).tolist()
    nll = float(np.mean(windows))
    return Evaluation(
        model="m", weights="int8", weights_key="w", cache=cache, data="file:text", rows="r", windows="spread", context=64, sequences=12,
        document_windows=[*range(12)], documents=12, seed=0, tokens=12 * 63, nll=nll, nll_windows=windows, ppl=float(np.exp(nll)), bits_per_byte=1.0,
        kv_bytes=100, kv_bytes_predicted=100, compression=0.75, kept=4, tokens_per_second=1.0, traces=1, device="cpu", commit="c",
    )  # fmt: skip


@pytest.fixture
def board() -> Board:
    entries = [records.Entry(name=name, budget=budget, cache=cache) for name, budget, cache in ENTRIES]
    return Board(
        model="m", weights="int8", weights_key="w", data="file:text", rows="r", context=64, windows=12, calibration="", entries=entries
    )  # fmt: skip


@pytest.fixture
def found(board: Board) -> list:
    scores = [evaluated(cache, loss, 0.05, seed) for seed, (cache, loss) in enumerate(LOSSES.items())]
    return [board, *scores]


def test_places_go_by_loss_and_near_ones_are_not_told_apart(board: Board, found: list) -> None:
    standings = leaderboard.standing(board, 0.25, found)
    assert [each.name for each in standings] == ["tuned", "method: heavy", "method: random"]
    assert [each.place for each in standings] == [1, 2, 3]
    assert standings[0].places == (1, 2) == standings[1].places and standings[2].places == (3, 3)
    assert [each.level for each in standings] == [True, True, False]
    assert [each.behind for each in standings] == [False, False, True]
    assert standings[0].change == pytest.approx(standings[0].change) and "%" in standings[0].change
    other = [*found[:1], *(records.changed(each, rows="others") for each in found[1:])]
    assert leaderboard.standing(board, 0.25, other) == []


def test_finalists_are_the_best_of_each_budget_and_what_they_are_beside(board: Board, found: list) -> None:
    assert leaderboard.finalists(board, found, 1) == ["full", "full@int8", "recent 4@int8", "random 4"]
    assert leaderboard.finalists(board, found, 0) == ["full", "random 4"]


def test_tables_figure_and_page_show_all_that_was_scored(board: Board, found: list, tmp_path) -> None:
    half, quarter = leaderboard.tables(board, found)
    assert "50%" in half.title and len(half.rows) == 1 and len(quarter.rows) == 3
    assert {*map(len, half.rows + quarter.rows)} == {len(half.columns)}
    best = leaderboard.best_of_each(board, found)
    assert [row[1] for row in best.rows] == ["codec: int8", "tuned", "method: heavy", "method: random"]
    panels, full = leaderboard.panels(board, found)
    kinds = {record.cache: kind for entries in panels.values() for kind, _, record in entries}
    assert full is not None and full.cache == "full" and [*panels] == [0.5, 0.25]
    assert kinds == {"heavy 4": "method", "random 4": "random", "recent 4@int8": "tuned", "full@int8": "codec"}
    page.write(tmp_path / "board.html", found, "kvcascade leaderboard")
    text = (tmp_path / "board.html").read_text("utf-8")
    assert "<h2>Leaderboard</h2>" in text and "12 windows of 64 tokens" in text and "in 5 of 5 rows" in text
    assert "method: heavy" in readme.board_tables(found)["board"]


@pytest.mark.parametrize("clusters", [None, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]])
def test_ranks_are_certain_where_all_windows_agree(clusters: list[int] | None) -> None:
    """A constant difference is one in each draw; series that are equal in the mean alone may have any place."""
    rng = np.random.default_rng(0)
    hard = rng.standard_normal(12)
    values = np.stack([hard + 0.1, hard, hard + 0.2])
    assert stats.ranks(values, clusters) == [(2, 2), (1, 1), (3, 3)]
    push = np.repeat([1.0, -1.0, 1.0, -1.0], 3)
    assert stats.ranks(np.stack([hard + push, hard, hard - push]), clusters)[::2] == [(1, 3), (1, 3)]
