"""Fill the README's generated parts from the recorded runs: `make readme`; a second."""

from pathlib import Path

from kvcascade.eval import record_files, records, suite
from kvcascade.eval.kernels import tables
from kvcascade.eval.report import costs, figures, page
from kvcascade.kernels.files import write_whole

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "eval" / "results" / "toy.jsonl"
PRETRAINED, KERNELS, SPEED, STREAM, FIT, CRASH, WEIGHTS = (
    RESULTS.with_name(f"{name}.jsonl") for name in ("smollm2", "kernels", "speed", "stream", "fit", "crash", "weights")
)


def generated() -> dict[Path, str]:
    """The files that come from the records, with their content: README.md and its figure."""
    found = record_files.read(RESULTS)
    readme = (ROOT / "README.md").read_text("utf-8")
    evaluations = [r for r in records.of_kind(found, "evaluate") if r["model"] == "mha"]
    groups = {r["cache"]: suite.group_of(r["cache"], r["context"]) for r in evaluations}
    pretrained = record_files.read(PRETRAINED)
    parts = {"pretrained": page.pretrained_table(pretrained), "speed": costs.speed_table(record_files.read(SPEED))}
    parts |= {"stream": costs.stream_table(record_files.read(STREAM)), "fit": costs.fits_table(record_files.read(FIT))}
    parts["weights"] = costs.weights_table(record_files.read(WEIGHTS))
    parts["crash"] = costs.crash_table(record_files.read(CRASH))
    parts |= tables.readme_tables(record_files.read(KERNELS))
    return {
        ROOT / "README.md": page.fill(readme, page.readme_tables(found) | parts),
        RESULTS.with_suffix(".svg"): figures.quality_against_bytes(evaluations, groups),
    }


if __name__ == "__main__":
    for path, content in generated().items():
        write_whole(path, content.encode())
