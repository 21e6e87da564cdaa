"""Evaluate the samples of a checkpoint, or image files."""

import json
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from data.secrets import public
from data.storage.atomic import append_lines, write_atomic
from data.storage.lease import NAME
from trainer.callbacks import send_evaluations
from trainer.callbacks.callback import Start
from trainer.checkpoints.reader import Checkpoint, chosen_checkpoint
from trainer.config import Config
from trainer.metrics.evaluator import build_evaluator
from trainer.metrics.image_folder import ImageFolder
from trainer.metrics.protocol import Protocol
from trainer.pictures.png import save_png
from trainer.pipeline import Pipeline
from trainer.runs.evaluations import Values, to_log_line
from trainer.runs.files import RunFiles
from trainer.runs.ownership import owned
from trainer.runs.paths import CHECKPOINTS, EVALUATIONS, METRICS, step_name
from trainer.runs.record import public_config
from trainer.runs.wandb_id import wandb_id
from trainer.runtime.ranks import Ranks, join
from trainer.train.stop import StopRequest

MAX_NAME = 40
"""[characters] Part of a folder's name that stays in the name of a file, which has 255 bytes."""


def evaluate(config: Config) -> int:
    """Measure checkpoint.load, the run's newest checkpoint, or the images of eval.images.

    Writes the numbers into run.dir/evaluations. Those of the run's own checkpoints also go into
    its metrics.jsonl and its W&B run, like the evaluations during training.
    Returns the exit code: 0 done, 85 asked to stop.
    Raises: FileNotFoundError or ValueError that names the config path of missing data or weights;
    SystemExit if another process is measuring the same.
    """
    ranks = join()
    stop = StopRequest(ranks, "batch")
    done = (_evaluate_folder if config.eval.images else _evaluate_checkpoint)(config, ranks, stop)
    return 0 if done else stop.exit_code("finished parts of references are saved")


def _evaluate_folder(config: Config, ranks: Ranks, stop: StopRequest) -> bool:
    """Measure eval.images; return False if asked to stop."""
    folder = ImageFolder(config.eval.images, config.data.image_size, "eval.images")
    without_prompts = replace(config, eval=replace(config.eval, clip_score=False))
    evaluator = build_evaluator(without_prompts, ranks)
    name = f"images_{public(Path(config.eval.images).name)[:MAX_NAME]}"
    stem = _stem(config, name, evaluator.folder_protocol)
    with _owned(stem, ranks):
        values = evaluator.evaluate_folder(folder, stop.stopping)
        if values is not None and ranks.is_main:
            _save_values(stem, values)
    return values is not None


def _evaluate_checkpoint(config: Config, ranks: Ranks, stop: StopRequest) -> bool:
    """Measure a checkpoint's samples; return False if asked to stop."""
    checkpoint = chosen_checkpoint(config, ranks)
    evaluator = build_evaluator(config, ranks)
    name, is_own = step_name(checkpoint.step), _is_own(config, checkpoint)
    averages = checkpoint.state.averages
    about: dict[str, float | str] = {"step": checkpoint.step}
    if config.ema.use and config.ema.use != averages[0]:
        about["average"] = config.ema.use
        name = f"{name}_{config.ema.use}"
    stem = _stem(config, name if is_own else f"other_{name}", evaluator.samples_protocol)
    with _owned(stem, ranks):
        pipeline = Pipeline.load(config, checkpoint, ranks.device)
        keep = stem if config.eval.keep_samples else None
        result = evaluator.evaluate(pipeline, stop.stopping, keep, baselines=evaluator.is_paired)
        if result is None or not ranks.is_main:
            return result is not None
        for path, payload in result.files.items():
            write_atomic(path, payload)
        save_png(stem.with_name(f"{stem.name}.png"), result.picture, result.about)
        values = {**about, **result.metrics}
        _save_values(stem, values)
        if is_own:
            append_lines(Path(config.run.dir) / METRICS, [json.dumps(to_log_line(values))])
            _send_to_wandb(config, checkpoint)
    return True


def _stem(config: Config, name: str, protocol: Protocol) -> Path:
    return Path(config.run.dir) / EVALUATIONS / f"{name}_{protocol.hash}"


def _owned(stem: Path, ranks: Ranks) -> AbstractContextManager[None]:
    """Own the output of one checkpoint, or folder, under one protocol."""
    remedy = "evaluate another checkpoint, or with other options"
    return owned(stem.parent, remedy, ranks, f".{stem.name}{NAME}")


def _save_values(stem: Path, values: Values) -> None:
    """Write the numbers of an evaluation as JSON, and print them."""
    path = stem.with_name(f"{stem.name}.json")
    write_atomic(path, (json.dumps(dict(values), indent=1) + "\n").encode())
    width = max(map(len, values), default=0)
    for name, value in values.items():
        print(f"{name:>{width}}  {f'{value:.6g}' if isinstance(value, float) else value}")
    print(f"numbers: {path}")


def _is_own(config: Config, checkpoint: Checkpoint) -> bool:
    own = Path(config.run.dir) / CHECKPOINTS
    return checkpoint.path.resolve().parent == own.resolve()


def _send_to_wandb(config: Config, checkpoint: Checkpoint) -> None:
    """Send the numbers to W&B if the training has ended; otherwise the training sends them.

    Two processes must not write to one run: W&B would lose rows.
    """
    last = Path(config.run.dir) / CHECKPOINTS / step_name(config.train.max_steps)
    if last.exists():
        state = checkpoint.training
        run_id, plain = wandb_id(Path(config.run.dir), state.wandb_id), public_config(config)
        files = RunFiles(Path(config.run.dir))
        send_evaluations(Start(config, plain, state.step, run_id, files))
        files.close()
