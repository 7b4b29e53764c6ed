"""The main job: `kvcascade study --preset quick --dir runs/study`; about 8 minutes on two cores (full: 75 minutes, smoke: one).

Trains a GPT with multi-head attention, retrains it with grouped-query attention from scratch and from its mean-pooled checkpoint,
evaluates each, and a pretrained model on the same text, behind the caches of `eval/suite.py`, and writes DIR/report.html, DIR/records.jsonl and DIR/tables.md.
A study that was stopped goes on where it was, in its trainings and in its measurements.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Literal

import kvcascade
from kvcascade.cache.errors import BadInput
from kvcascade.eval import record_files, suite
from kvcascade.eval.measure import Job
from kvcascade.eval.quality import evaluation
from kvcascade.eval.quality.evaluation import Protocol
from kvcascade.eval.records import Evaluation, grouped, of
from kvcascade.eval.report import page, readme
from kvcascade.eval.speed import bench
from kvcascade.kernels.files import write_whole
from kvcascade.model.pretrained import Model
from kvcascade.scripts import console
from kvcascade.scripts.arguments import Recorded, arguments_of
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
    caches: tuple[str, ...] = suite.ALL
    """What each model is run behind."""
    seeds: int = 1
    """Trainings of each model, from seed 0 on; caches are measured on the first."""
    pretrained: int = 0
    """Windows scored per cache of a pretrained model, none without one."""


SCALES = {
    "smoke": Scale("nano", steps=60, share=0.3, windows=4, caches=suite.TELLING[:4]),
    "quick": Scale("toy", steps=80, share=0.25, windows=8, caches=suite.TELLING, pretrained=16),
    "full": Scale("toy", steps=600, share=0.1, windows=64, seeds=3, pretrained=64),
}


PRETRAINED, TOKENS = "smollm2", 256
"""The pretrained model, and how much of a text a window of its has: enough to lose what matters, and soon scored."""


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
    """Run what is not done yet, then measure what is not recorded yet, and write the page."""
    args = arguments_of(Args, "study", arguments)
    scale = SCALES[args.preset]
    trained = [_train(args.dir, scale, args.data, seed) for seed in range(scale.seeds)]
    models = {name: dataclasses.replace(run.open_model(str(args.dir / name)), name=name) for name in trained[0]}
    if scale.pretrained:
        models |= _pretrained()
    file = args.dir / "records.jsonl"
    found = console.measured(
        "measure", _jobs(args.dir, models, [*itertools.chain(*trained)], scale), Recorded(out=file)
    )
    write_whole(file, record_files.lines(found))  # what an earlier study left goes
    command = f"kvcascade study --preset {args.preset}" + ("" if args.data == "stdlib" else f" --data {args.data}")
    page.write(args.dir / "report.html", found, command)
    tables = readme.readme_tables(found)
    (args.dir / "tables.md").write_text("\n\n".join(tables.values()) + "\n", "utf-8")
    for mine in grouped(of(found, Evaluation), lambda r: r.model):
        console.show(evaluation.table(mine))
    print(tables["findings"] + f"\n\nThe whole story: {args.dir / 'report.html'}")


def _train(folder: Path, scale: Scale, data: str, seed: int) -> list[str]:
    """Train the three models from one seed, as far as they are not; return the names of their runs."""
    base = config.PRESETS[scale.preset]
    train = dataclasses.replace(base.train, steps=scale.steps, evaluate_every=max(1, scale.steps // 10), seed=seed)
    mha = dataclasses.replace(base, train=train, data=dataclasses.replace(base.data, source=data))
    gqa = dataclasses.replace(mha, model=dataclasses.replace(mha.model, kv_heads=mha.model.heads // 4))
    wanted = {
        suite.run_name(name, seed): settings for name, settings in (("mha", mha), ("gqa", gqa), ("uptrained", None))
    }
    for name, settings in wanted.items():
        path = folder / name
        if not (path / "config.json").exists():
            if settings:
                run.start(path, settings)
            else:
                run.convert(folder / suite.run_name("mha", seed), path, gqa.model.kv_heads, "mean", scale.share)
        elif settings:
            run.check_same(path, settings)
        with console.training(f"train {name}", checkpoint.open_run(path)[0].train.steps) as show:
            run.resume(path, show)
    return [*wanted]


def _pretrained() -> dict[str, Model]:
    """The model that has learned to look far back, where it can be had; a line says where it cannot."""
    try:
        return {PRETRAINED: console.open_model(PRETRAINED)}
    except BadInput as error:
        console.say(f"the study goes on without a pretrained model: {error}")
        return {}


def _jobs(folder: Path, models: dict[str, Model], trained: list[str], scale: Scale) -> list[Job]:
    """How each run learned; each model behind each cache; the speed of the first and the last run; bytes by context and by kind of layer."""
    toys = [model for name, model in models.items() if name != PRETRAINED]
    first, last = toys[0], toys[-1]
    corpus = run.load_corpus(folder / first.name)
    unigram = data.unigram_bits_per_byte(corpus.train, corpus.validation, corpus.token_bytes)
    context = first.config.context
    rows = kvcascade.windows(first, None, context, scale.windows)
    specs = suite.scaled(scale.caches, context)
    timed = suite.scaled([text for text in suite.TIMED if text in scale.caches], context)
    jobs: list[Job] = [suite.training_job(name, folder / name, unigram) for name in trained]
    jobs += [evaluation.job(model, spec, rows, Protocol()) for model in toys for spec in specs]
    if model := models.get(PRETRAINED):
        rows = kvcascade.windows(model, None, TOKENS, scale.pretrained)
        jobs += [evaluation.job(model, spec, rows, Protocol()) for spec in suite.scaled(suite.TELLING, TOKENS)]
    jobs += [bench.job([model], timed, [], 8, context // 2, steps=24, repeats=5, prefills=5) for model in (first, last)]
    return [*jobs, suite.growth_job(last, suite.scaled(suite.GROWING, context)), suite.layers_job(first.config)]
