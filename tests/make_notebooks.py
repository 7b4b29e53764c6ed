"""Executes the notebooks. As a program it keeps in each what came out: `make notebooks`."""

import os
import tempfile
from pathlib import Path

import nbclient
import nbformat

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh kernel, which is of this very interpreter; CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        # What the user has for Jupyter and IPython, kernels of the same name and profiles, stays out.
        own = {"JUPYTER_DATA_DIR": folder, "JUPYTER_RUNTIME_DIR": folder, "IPYTHONDIR": folder}
        # Progress bars complain, with a path of this machine, that they would be prettier with widgets.
        own["PYTHONWARNINGS"] = "ignore:IProgress not found"
        # Times of execution would be other ones each time.
        client = nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3", record_timing=False)
        before = dict(os.environ)
        os.environ.update(own)
        try:
            return client.execute(cwd=str(path.parent))
        finally:
            os.environ.clear()
            os.environ.update(before)


def main() -> None:
    for path in NOTEBOOKS:
        notebook = executed(path)
        # The release of Python that it was run by is nobody's business, and each machine would write its own.
        notebook.metadata.pop("language_info", None)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
