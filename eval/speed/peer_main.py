"""A peer's side of a comparison, run by a Python that has the peer's library: a JSON line in for each call, a JSON line out.

    python eval/speed/peer_main.py                          say which of the libraries are here, and the variants of each
    python eval/speed/peer_main.py LIBRARY VARIANT MODEL    be that variant, of a model's GGUF file or directory

Nothing of kvcascade is imported: `peer_LIBRARY.py` beside this file is the library's. Its `Variant(name, model, threads)` has `about` and
`prepare`, `prefill`, `decode`, `kv_bytes`, which are called with the line's arguments: [method, *arguments].
"""

import importlib
import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path

LIBRARIES = ("transformers", "kvpress", "llamacpp")


def main(arguments: list[str]) -> None:
    """Say what there is, or answer calls until the input ends."""
    sys.path.append(sys.path.pop(0))  # what a library imports is not what happens to lie beside this file
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer

    def say(answer) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    if not arguments:
        modules = {library: importlib.import_module(f"peer_{library}") for library in LIBRARIES}
        here = {name: m for name, m in modules.items() if all(map(importlib.util.find_spec, m.NEEDS))}
        return say({"value": {name: list(module.VARIANTS) for name, module in here.items()}})
    library, variant, model = arguments
    try:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        running = importlib.import_module(f"peer_{library}").Variant(variant, Path(model), threads)
        say({"value": running.about | {"threads": threads}})
    except Exception:
        return say({"error": _reason()})
    for line in sys.stdin:
        method, *rest = json.loads(line)
        try:
            say({"value": getattr(running, method)(*rest)})
        except Exception:
            say({"error": _reason()})


def _reason() -> str:
    return traceback.format_exc().strip().splitlines()[-1]


if __name__ == "__main__":
    main(sys.argv[1:])
