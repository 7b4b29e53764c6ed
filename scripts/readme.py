"""Fill the generated parts of README.md and of docs/ from the recorded runs: `make readme`; a second."""

from pathlib import Path

from kvcascade.eval import record_files, records
from kvcascade.eval.kernels import tables
from kvcascade.eval.report import costs, figures, page
from kvcascade.kernels.files import write_whole

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "eval" / "results" / "toy.jsonl"
PRETRAINED, KERNELS, SPEED, STREAM, FIT, CRASH, WEIGHTS = (
    RESULTS.with_name(f"{name}.jsonl") for name in ("smollm2", "kernels", "speed", "stream", "fit", "crash", "weights")
)
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("results", "speed", "memory", "kernels"))]


def generated() -> dict[Path, str]:
    """The files that come from the records, with their content: pages and figures."""
    toy, pretrained = record_files.read(RESULTS), record_files.read(PRETRAINED)
    parts = page.readme_tables(toy) | tables.readme_tables(record_files.read(KERNELS))
    parts |= {"pretrained": page.pretrained_table(pretrained), "summary": page.summary_table(pretrained)}
    made = (costs.speed_table, SPEED), (costs.stream_table, STREAM), (costs.fits_table, FIT), (costs.crash_table, CRASH)
    parts |= {file.stem: table(record_files.read(file)) for table, file in (*made, (costs.weights_table, WEIGHTS))}
    drawn = {"toy": [r for r in records.of_kind(toy, "evaluate") if r["model"] == "mha"]}
    drawn["smollm2"] = records.of_kind(pretrained, "evaluate")
    pages = {path: page.fill(path.read_text("utf-8"), parts) for path in PAGES}
    return pages | {ROOT / "docs" / f"{name}.svg": figures.quality_against_bytes(mine) for name, mine in drawn.items()}


if __name__ == "__main__":
    for path, content in generated().items():
        write_whole(path, content.encode())
