"""Fill the generated parts of README.md and of docs/ from the recorded runs: `make readme`; a second."""

from pathlib import Path
from typing import Any

from kvcascade.eval import record_files, records
from kvcascade.eval.kernels import tables
from kvcascade.eval.memory import methods
from kvcascade.eval.quality import parity
from kvcascade.eval.records import Evaluation, Parity, Record
from kvcascade.eval.report import costs, figures, page
from kvcascade.kernels.files import write_whole

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "eval" / "results" / "toy.jsonl"
PRETRAINED, KERNELS, SPEED, STREAM, FIT, CRASH, WEIGHTS, PROMPT, PARITY = (
    RESULTS.with_name(f"{name}.jsonl")
    for name in ("smollm2", "kernels", "speed", "stream", "fit", "crash", "weights", "prompt", "parity")
)
PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("results", "speed", "memory", "kernels", "methods")),
]


def generated() -> dict[Path, str]:
    """The files that come from the records, with their content: pages and figures."""
    toy, pretrained = (records.of(record_files.read(path), Record) for path in (RESULTS, PRETRAINED))
    costly = {
        file.stem: records.of(record_files.read(file), Record) for file in (SPEED, STREAM, FIT, CRASH, WEIGHTS, PROMPT)
    }
    kernels: list[Any] = record_files.read(KERNELS)
    parts = page.readme_tables(toy) | page.pretrained_tables(pretrained) | costs.readme_tables(costly)
    parts |= tables.readme_tables(kernels) | {"methods": methods.markdown()}
    parts["parity"] = parity.markdown(records.of(record_files.read(PARITY), Parity))
    evaluations = {"toy": records.of(toy, Evaluation), "smollm2": records.of(pretrained, Evaluation)}
    drawn = {name: [r for r in mine if r.model in ("mha", "smollm2")] for name, mine in evaluations.items()}
    pages = {path: page.fill(path.read_text("utf-8"), parts) for path in PAGES}
    return pages | {ROOT / "docs" / f"{name}.svg": figures.quality_against_bytes(mine) for name, mine in drawn.items()}


if __name__ == "__main__":
    for path, content in generated().items():
        write_whole(path, content.encode())
