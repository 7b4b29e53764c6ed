"""Write golden_harness.json: what lm-eval's own backend for transformers says of the models of harness_cases.py and their tasks.

Run by hand where torch, transformers, accelerate and lm-eval are installed: python tests/make_golden_harness.py
"""

import importlib.metadata
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import harness_cases  # pyright: ignore
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM  # pyright: ignore
from lm_eval.tasks import TaskManager

from kvcascade.eval.quality.harness import RESAMPLES

OUT = Path(__file__).with_name("golden_harness.json").resolve()
os.environ["DISABLE_MULTIPROC"] = "1"
found: dict = {name: importlib.metadata.version(name) for name in ("lm-eval", "transformers", "torch")}
os.chdir(harness_cases.TASKS)
known = TaskManager(include_path=".", include_defaults=False)
make: Any = HFLM  # whose decorator hides what it takes
for model in harness_cases.MODELS:
    with tempfile.TemporaryDirectory() as folder:
        harness_cases.write(model, Path(folder))
        theirs = make(folder, device="cpu", dtype="float32", batch_size=1, max_length=harness_cases.CONTEXT)
        for chat in (False, True):
            said: Any = simple_evaluate(
                model=theirs, tasks=list(harness_cases.NAMES), num_fewshot=1 if chat else None, task_manager=known,
                bootstrap_iters=RESAMPLES, apply_chat_template=chat,
            )  # fmt: skip
            for task in harness_cases.NAMES:
                requests = [
                    [*arguments, response[0]]
                    for sample in said["samples"][task]
                    for arguments, response in zip(sample["arguments"], sample["resps"], strict=True)
                ]
                metrics = {key: value for key, value in said["results"][task].items() if "," in key}
                found[f"{model}{'-chat' if chat else ''}/{task}"] = {"requests": requests, "metrics": metrics}
OUT.write_text(json.dumps(found, ensure_ascii=False, indent=1, default=float) + "\n")
