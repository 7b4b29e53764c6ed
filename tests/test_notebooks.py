"""The notebooks run, and what is kept in them is what comes out."""

import re

import nbformat
import pytest
from make_notebooks import NOTEBOOKS, executed
from nbformat import NotebookNode


def printed(notebook: NotebookNode) -> str:
    """What the cells wrote and showed, as text."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs)


def figures(text: str) -> dict[str, dict[str, str]]:
    """The rows of a table of evaluations, by cache."""
    title, *rows = [
        re.split(r" *[│┃] *", line.strip()[1:-1].strip()) for line in text.splitlines() if line.startswith(("│", "┃"))
    ]
    return {row[0]: dict(zip(title, row, strict=True)) for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_keeps_what_comes_out(path):
    """No cell fails; bytes are those that are kept, and perplexities nearly, since sums differ between processors, where the text is the same."""
    kept, fresh = (printed(each) for each in (nbformat.read(path, as_version=4), executed(path)))
    windows = [re.findall(r"^windows (\w+)$", text, re.MULTILINE) for text in (kept, fresh)]
    before, after = figures(kept), figures(fresh)
    assert len(windows[0]) == 1 and len(before) > 2 and before.keys() == after.keys()
    for cache, row in before.items():
        for column in ("kept", "KV bytes", "saved", "traces"):
            assert after[cache][column] == row[column], (cache, column)
        if windows[0] == windows[1]:
            assert float(after[cache]["PPL"]) == pytest.approx(float(row["PPL"]), rel=0.03), cache


def test_nothing_of_a_machine_is_kept():
    """No path, no error and no warning stands in an output."""
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                assert output.output_type != "error" and output.get("name") != "stderr"
        assert not re.search(r"/(home|tmp|root|Users|usr)/|site-packages", printed(notebook))
