"""`trainer.evaluate` and `trainer.reference`: measure a checkpoint, or image files, as a job."""

import json
from pathlib import Path

from trainer import distributed
from trainer.checkpoint import Checkpoint, chosen_checkpoint
from trainer.config import Config, WandbMode
from trainer.evaluations import Values, append_line, as_logged
from trainer.evaluator import Evaluator
from trainer.image_folder import ImageFolder
from trainer.images import save_png
from trainer.pipeline import Pipeline
from trainer.runs import describe


def evaluate(config: Config) -> None:
    """Measure checkpoint.load, the run's newest checkpoint, or the images of eval.images.

    The numbers go into a file in run.dir/evaluations; those of the run's own checkpoints also
    into its metrics.jsonl and its W&B run, as if the training had made them.
    Raises: FileNotFoundError or ValueError naming what is missing.
    """
    ranks = distributed.join()
    if config.eval.images:
        folder = ImageFolder(config.eval.images, config.data.image_size, "eval.images")
        evaluator = Evaluator(config, ranks)
        values = evaluator.evaluate_folder(folder)
        if ranks.is_main:
            _report(_stem(config, f"images_{Path(config.eval.images).name}", evaluator), values)
        return
    checkpoint = chosen_checkpoint(config)
    evaluator = Evaluator(config, ranks)
    name, is_own = f"step_{checkpoint.step:08d}", _is_own(config, checkpoint)
    averages: list[str] = checkpoint.state["averages"]
    about: dict[str, float | str] = {"step": checkpoint.step}
    if config.ema.use and config.ema.use != averages[0]:
        about["average"] = config.ema.use
        name = f"{name}_{config.ema.use}"
    stem = _stem(config, name if is_own else f"other_{name}", evaluator)
    pipeline = Pipeline.load(config, checkpoint, ranks.device)
    result = evaluator.evaluate(pipeline, keep=stem if config.eval.keep_samples else None)
    if result is None or not ranks.is_main:
        return
    save_png(stem.with_name(f"{stem.name}.png"), result.picture)
    values = {**about, **result.metrics}
    _report(stem, values)
    if is_own:
        append_line(Path(config.run.dir) / "metrics.jsonl", json.dumps(as_logged(values)))
        _mirror(config, checkpoint)


def make_references(config: Config) -> None:
    """Make what is missing of the references of eval.features, and say where they are."""
    evaluator = Evaluator(config, distributed.join())
    for name, reference in evaluator.references.items():
        print(f"{name}: {reference.moments.count} images, in {config.eval.references}")


def _stem(config: Config, name: str, evaluator: Evaluator) -> Path:
    return Path(config.run.dir) / "evaluations" / f"{name}_{evaluator.protocol_hash}"


def _report(stem: Path, values: Values) -> None:
    path = stem.with_name(f"{stem.name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(dict(values), indent=1) + "\n")
    part.replace(path)
    for name, value in values.items():
        print(f"{name:>24}  {value:.6g}" if isinstance(value, float) else f"{name:>24}  {value}")
    print(f"numbers: {path}")


def _is_own(config: Config, checkpoint: Checkpoint) -> bool:
    own = Path(config.run.dir) / "checkpoints"
    return checkpoint.path.resolve().parent == own.resolve()


def _mirror(config: Config, checkpoint: Checkpoint) -> None:
    """Send the numbers to W&B where the training has ended; else it will send them itself.

    W&B loses rows of a run that two processes write to.
    """
    last = Path(config.run.dir) / "checkpoints" / f"step_{config.train.max_steps:08d}"
    if config.logger.wandb.mode is WandbMode.disabled or not last.exists():
        return
    from trainer.callbacks.wandb import Wandb

    about = describe(config)
    Wandb(config.logger.wandb, config.run, about, checkpoint.state["wandb_id"]).close()
