"""Fill the README's generated parts from the recorded runs: `make readme`; a second."""

from pathlib import Path

from kvcascade.eval import figures, kernel_report, records, report, suite
from kvcascade.kernels.files import write_whole

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "eval" / "results" / "toy.jsonl"
PRETRAINED, KERNELS, FIT = (RESULTS.with_name(f"{name}.jsonl") for name in ("smollm2", "kernels", "fit"))


def generated() -> dict[Path, str]:
    """The files that come from the records, with their content: README.md and its figure."""
    found = records.read(RESULTS)
    readme = (ROOT / "README.md").read_text()
    evaluations = [r for r in report.of_kind(found, "evaluate") if r["model"] == "mha"]
    groups = {r["cache"]: suite.group_of(r["cache"], r["context"]) for r in evaluations}
    pretrained = records.read(PRETRAINED)
    parts = {"pretrained": report.pretrained_table(pretrained), "speed": report.speed_table(pretrained)}
    parts |= {"fit": report.fits_table(records.read(FIT))}
    parts |= kernel_report.readme_tables(records.read(KERNELS))
    return {
        ROOT / "README.md": report.fill(readme, report.readme_tables(found) | parts),
        RESULTS.with_suffix(".svg"): figures.quality_against_bytes(evaluations, groups),
    }


if __name__ == "__main__":
    for path, content in generated().items():
        write_whole(path, content.encode())
