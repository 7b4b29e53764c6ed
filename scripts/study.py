"""The main job: `kvcascade study --preset quick --dir runs/study`; about 8 minutes on two cores (full: 75 minutes, smoke: one).

Trains a GPT with multi-head attention, retrains it with grouped-query attention from scratch and from its mean-pooled checkpoint,
evaluates each behind the caches of `eval/suite.py`, and writes DIR/report.html, DIR/records.jsonl and DIR/tables.md.
A study that was stopped goes on where it was.
"""

import dataclasses
import time
from pathlib import Path
from typing import Literal

from kvcascade.eval import buffers, latency, perplexity, record_files, records, report, suite
from kvcascade.scripts import console
from kvcascade.scripts.arguments import arguments_of
from kvcascade.train import checkpoint, config, data, run


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much of a study is done."""

    preset: str
    steps: int
    share: float
    """Steps of uptraining, as a share."""
    windows: int
    """Windows scored per cache."""
    every: int = 1
    """1 evaluates all of the suite's caches, n every n-th."""


SCALES = {
    "smoke": Scale("nano", steps=60, share=0.3, windows=4, every=5),
    "quick": Scale("toy", steps=120, share=0.25, windows=8),
    "full": Scale("toy", steps=1800, share=0.1, windows=16),
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Train MHA, retrain GQA both ways, run each behind caches, and write one page about it."""

    preset: Literal["smoke", "quick", "full"] = "quick"
    """How much: smoke only shows that it works, quick is the demo, full is what the README's tables come from."""
    dir: Path = Path("runs/study")
    """Folder of the three runs and of report.html."""
    data: str = "stdlib"
    """Text to train and evaluate on: stdlib, file:PATH, or a hub data set."""


def main(arguments: list[str]) -> None:
    """Run what is not done yet, then measure everything and write the page."""
    args = arguments_of(Args, "study", arguments)
    scale = SCALES[args.preset]
    base = config.PRESETS[scale.preset]
    train = dataclasses.replace(base.train, steps=scale.steps, evaluate_every=max(1, scale.steps // 18))
    mha = dataclasses.replace(base, train=train, data=dataclasses.replace(base.data, source=args.data))
    gqa = dataclasses.replace(mha, model=dataclasses.replace(mha.model, kv_heads=mha.model.heads // 4))
    wanted = {"mha": mha, "gqa": gqa, "uptrained": None}
    for name, settings in wanted.items():
        path = args.dir / name
        if not (path / "config.json").exists():
            if settings:
                run.start(path, settings)
            else:
                run.convert(args.dir / "mha", path, gqa.model.kv_heads, "mean", scale.share)
        elif settings:
            run.check_same(path, settings)
        with console.training(f"train {name}", checkpoint.open_run(path)[0].train.steps) as show:
            run.resume(path, show)
    found = _measure(args.dir, list(wanted), scale)
    file = args.dir / "records.jsonl"
    file.unlink(missing_ok=True)
    record_files.append(file, found)
    command = f"kvcascade study --preset {args.preset}" + ("" if args.data == "stdlib" else f" --data {args.data}")
    report.write(args.dir / "report.html", found, command)
    tables = report.readme_tables(found)
    (args.dir / "tables.md").write_text("\n\n".join(tables.values()) + "\n", "utf-8")
    evaluations = records.of_kind(found, "evaluate")
    for name in wanted:
        console.table(*records.evaluation_table([r for r in evaluations if r["model"] == name]))
    print(tables["findings"] + f"\n\nThe whole story: {args.dir / 'report.html'}")


def _measure(folder: Path, names: list[str], scale: Scale) -> list[records.Record]:
    models = {name: dataclasses.replace(run.open_model(str(folder / name)), name=name) for name in names}
    first, last = models[names[0]], models[names[-1]]
    corpus = run.load_corpus(folder / names[0])
    unigram = data.unigram_bits_per_byte(corpus.train, corpus.validation, corpus.token_bytes)
    context = first.config.context
    rows = data.windows(corpus.validation, context, scale.windows)
    specs = suite.caches(context)[:: scale.every]
    found = [records.stamp(suite.training(name, folder / name, unigram), 0) for name in names]
    with console.progress("evaluate caches", len(names) * len(specs)) as show:
        for name, model in models.items():
            for spec in specs:
                start = time.monotonic()
                scores = perplexity.score(model.config, model.params, spec, rows, batch=8)
                one = records.evaluation(model, spec, model.data, rows, 0, corpus.token_bytes, scores, 8)
                found.append(records.stamp(one, time.monotonic() - start))
                show(len(records.of_kind(found, "evaluate")), f"{name}: {spec}")
    timed = suite.scaled(suite.TIMED[:: scale.every], context)
    for model in (first, last):
        for one in latency.decode_step(model.config, model.params, timed, batch=8):
            found.append(records.stamp({"model": model.name} | one, 0))
    grown = buffers.growth(last.config, suite.scaled(suite.GROWING, context))
    measured = [{"model": last.name} | one for one in grown]
    return found + [records.stamp(one, 0) for one in measured + suite.layer_kinds(first.config)]
