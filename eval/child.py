"""Work that may end its process, done in a process of its own: a compiler that aborts fails one case, not all."""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence

from kvcascade.eval.records import Record


def results(
    command: Sequence[str], cases: Sequence[str], environment: Mapping[str, str], told: Callable[[], None]
) -> dict[str, Record]:
    """What a command finds out of each case, given as its last arguments: it prints a JSON object with `case` for each, in their order.

    One that ends before its time has failed at the case that it was at, and is started again for those after it.
    """
    found: dict[str, Record] = {}
    while left := [case for case in cases if case not in found]:
        with (
            tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
            subprocess.Popen(
                [*command, *left],
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
                errors="replace",
            ) as child,
        ):
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith("{"):
                    one = json.loads(line)
                    found[one.pop("case")] = one
                    told()
            status = child.wait()
            errors.seek(0)
            said = [line.strip() for line in errors if line.strip()]
        left = [case for case in cases if case not in found]
        if left:
            found[left[0]] = {"failed": f"ended with status {status}: {said[-1] if said else 'without a word'}"}
            told()
    return found
