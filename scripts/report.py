"""A page of what was recorded: `kvcascade report records.jsonl --page report.html`; seconds."""

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated

import tyro

from kvcascade.cache.errors import BadInput
from kvcascade.eval import record_files
from kvcascade.eval.report import page
from kvcascade.scripts.arguments import arguments_of


@dataclasses.dataclass(frozen=True)
class Args:
    """Write one self-contained page of the records in some files: evaluations, retrieval, trainings, latencies, crash tests."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files that `evaluate`, `retrieve`, `compare`, `crash` or `study` wrote."""
    page: Path = Path("report.html")
    """The page to write."""


def main(arguments: list[str]) -> None:
    """Read the records, write the page, say where it is."""
    args = arguments_of(Args, "report", arguments)
    if not args.files:
        raise BadInput("name at least one file of records")
    found, left_out = record_files.gather([*args.files])
    page.write(args.page, found, shlex.join(["kvcascade", "report", *arguments]), left_out)
    print(args.page)
