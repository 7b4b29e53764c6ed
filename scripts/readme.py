"""Fill the generated parts of README.md and of docs/ from the recorded runs: `make readme`; a second."""

from pathlib import Path
from typing import Any

from kvcascade.eval import record_files, records
from kvcascade.eval.kernels import tables
from kvcascade.eval.memory import methods
from kvcascade.eval.quality import parity, ranking
from kvcascade.eval.records import Board, Evaluation, Parity, Record, Served
from kvcascade.eval.report import costs, figures, page
from kvcascade.eval.report import readme as tables_of
from kvcascade.kernels.files import write_whole

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "eval" / "results"
PAGES = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("results", "leaderboard", "codecs", "speed", "serving", "memory", "kernels", "methods")
    ),
]


def recorded[R: Record](name: str, kind: type[R] = Record) -> list[R]:
    """The records of one kind in a file of results."""
    return records.of(record_files.read(RESULTS / f"{name}.jsonl"), kind)


def generated() -> dict[Path, str]:
    """The files that come from the records, with their content: pages and figures."""
    toy, pretrained = recorded("toy"), recorded("smollm2")
    costly = {
        name: recorded(name)
        for name in (
            "speed",
            "heads",
            "bits",
            "stream",
            "serving",
            "users",
            "speculation",
            "fit",
            "crash",
            "weights",
            "prompt",
        )
    }
    kernels: list[Any] = record_files.read(RESULTS / "kernels.jsonl")
    parts = tables_of.readme_tables(toy) | tables_of.pretrained_tables(pretrained) | costs.readme_tables(costly)
    board = recorded("leaderboard")
    parts |= tables_of.codecs_tables(recorded("codecs")) | tables_of.board_tables(board)
    parts |= {"searches": tables_of.searches_table(board)}
    parts |= tables_of.methods_tables(recorded("methods")) | tables.readme_tables(kernels)
    parts |= {
        "methods": methods.markdown(),
        "ranker": ranking.page(recorded("ranker")),
        "parity": parity.markdown(recorded("parity", Parity)),
    }
    evaluations = {"toy": records.of(toy, Evaluation), "smollm2": records.of(pretrained, Evaluation)}
    drawn = {name: [r for r in mine if r.model in ("mha", "smollm2")] for name, mine in evaluations.items()}
    served = records.grouped(records.of(costly["serving"], Served), lambda r: r.case)
    pages = {path: tables_of.fill(path.read_text("utf-8"), parts) for path in PAGES}
    pages |= {ROOT / "docs" / "serving.svg": figures.first_tokens(served[0])}
    pages |= {ROOT / "docs" / "leaderboard.svg": page.board_figure(records.of(board, Board)[-1], board)}
    return pages | {ROOT / "docs" / f"{name}.svg": figures.quality_against_bytes(mine) for name, mine in drawn.items()}


if __name__ == "__main__":
    for path, content in generated().items():
        write_whole(path, content.encode())
