"""Training, from the first step or from the last checkpoint: read this file top to bottom."""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.cursor import Cursor
from data.manifest import Rejected, write_ledger
from data.stream import Batch
from trainer.callbacks import Callback, Callbacks
from trainer.callbacks.console import Console
from trainer.callbacks.jsonl import JsonLines
from trainer.checkpoint import Checkpoint, latest_checkpoint
from trainer.checkpoint_writer import CheckpointWriter
from trainer.config import Config, Task, WandbMode
from trainer.distributed import Ranks, join
from trainer.engine import StepResult
from trainer.engines import Engines
from trainer.evaluations import logged
from trainer.guards import FiniteGuard, Incidents, SpikeGuard, end_together
from trainer.images import save_png
from trainer.meter import Meter
from trainer.preemption import REQUEUE_EXIT_CODE, StopRequest
from trainer.preflight import preflight
from trainer.retention import Retention
from trainer.run_folder import QUARANTINE
from trainer.runs import describe, open_run
from trainer.snapshots import Snapshots
from trainer.tasks import TrainingTask
from trainer.watchdog import Watchdog


def fit(config: Config) -> int:
    """Train to train.max_steps, or on from the newest checkpoint in run.dir.

    Returns the exit code: 0 done, 85 stopped early with a checkpoint.
    Raises: ValueError or OSError that names the config path or file at fault.
    """
    ranks = join()
    stop = StopRequest(ranks)
    folder = Path(config.run.dir)
    checkpoint = latest_checkpoint(folder / "checkpoints", ranks)
    task = _build_task(config, ranks)
    if checkpoint is not None:
        checkpoint.check_averages(config.ema)
        Cursor.from_json(checkpoint.state["cursor"]).check(task.stream.cursor(0))
    if ranks.is_main:
        open_run(config)
    run = Run(config, ranks, task, checkpoint)
    try:
        return run.train(stop)
    finally:
        run.close()


def _build_task(config: Config, ranks: Ranks) -> TrainingTask:
    if config.task is Task.autoencoder:
        from trainer.tasks.autoencoder import AutoencoderTask

        return AutoencoderTask(config, ranks)
    from trainer.tasks.diffusion import DiffusionTask

    return DiffusionTask(config, ranks)


@dataclass(slots=True)
class Progress:
    """What a run has done; with the weights and moments, all that resuming needs."""

    step: int
    evaluated: bool
    """Whether the evaluation that is due at this step, if any, has been made."""
    wandb_id: str


class Run:
    """A task, an engine for each of its modules, and their surroundings."""

    def __init__(
        self, config: Config, ranks: Ranks, task: TrainingTask, checkpoint: Checkpoint | None
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.task = task
        self.folder = Path(config.run.dir)
        self.described = describe(config)  # it takes tens of ms, and every save wants it
        self.watchdog = Watchdog(config.watchdog, self.folder, ranks)
        self.progress = Progress(0, not config.eval.every, self._new_wandb_id())
        self.meter = Meter(ranks, config.train.precision)
        self.incidents = Incidents(self.folder, ranks)
        self.finite = FiniteGuard(config.guards, task.stream, ranks, self.incidents)
        self.spikes = SpikeGuard(config.guards)
        self.engines = Engines(task.modules, config, ranks)
        self.engine = self.engines.first
        if checkpoint is not None:
            self._restore(checkpoint)
            self.spikes.load(checkpoint.state["spikes"])
            self._say(f"going on from {checkpoint.path}")
        self.evaluations: dict[int, dict[str, float | str]] = {}
        step, kept = self.progress.step, Retention.of(config.checkpoint)
        self.checkpoints = CheckpointWriter(self.folder / "checkpoints", ranks, kept, step)
        self.snapshots = Snapshots(config, ranks, step)
        self.callbacks = Callbacks(list(self._callbacks()) if ranks.is_main else [])

    def train(self, stop: StopRequest) -> int:
        """The loop; returns the exit code."""
        config, progress = self.config, self.progress
        if progress.step < config.train.max_steps:
            self._preflight()
        if not progress.evaluated:
            baselines = self.task.baselines() if progress.step == 0 else {}
            if not self._evaluate(baselines, stop):
                return self._stop()
        for micro_batches in self._steps():
            spike = self._train_step(micro_batches)
            if spike and self._rewind():
                continue
            step, done = progress.step, progress.step == config.train.max_steps
            stopping = stop.agreed(self._must_stop())
            if step % config.train.log_every == 0 or done:
                self._log()
            if not progress.evaluated and not stopping:
                stopping = not self._evaluate({}, stop)
            self.snapshots.take(step, self.engine, self._about)
            if stopping:
                return self._stop()
            if done or step % config.checkpoint.every == 0:
                self._save()
        self._finish_writing()
        self.watchdog.pause("the end", progress.step)
        for line in self.task.finish(self.engine.ema_weights(self.engine.averages[0]), self.folder):
            self._say(line)
        return 0

    def _finish_writing(self) -> None:
        self.checkpoints.finish()
        self.snapshots.finish()

    def _must_stop(self) -> bool:
        return self.config.checkpoint.stop_on_failure and self.checkpoints.failed

    def close(self) -> None:
        """Finish what is being written."""
        self.watchdog.pause("the end", self.progress.step)
        self.checkpoints.wait()
        self.snapshots.wait()
        self.callbacks.close()
        self.watchdog.close()

    def _preflight(self) -> None:
        plan = self.spikes.plan_step
        steps = plan(self.progress.step), plan(self.config.train.max_steps - 1)
        self.meter.flops_per_image = preflight(
            self.config, self.ranks, self.task, self.engines, steps
        )

    def _steps(self) -> Iterator[list[Batch]]:
        """This rank's micro batches of each step that is left, with the waits for them measured."""
        batches = self.task.stream.steps(0)
        position = -1
        while self.progress.step < self.config.train.max_steps:
            self.watchdog.step(self.progress.step)
            start_s = time.perf_counter()
            wanted = self.spikes.plan_step(self.progress.step)
            if wanted != position:  # at the start, at a window to skip, and after a rewind
                batches.close()
                batches = self.task.stream.steps(wanted)
            micro_batches = next(batches)
            position = wanted + 1
            self.meter.waited(time.perf_counter() - start_s)
            yield micro_batches
        batches.close()

    def _train_step(self, micro_batches: list[Batch]) -> bool:
        """One optimizer step; returns whether its loss is a spike."""
        progress, every = self.progress, self.config.eval.every
        results: list[StepResult] = []
        means: list[Tensor] = []
        for name in self.task.turns(progress.step):
            engine = self.engines[name]
            losses = self.task.losses(name, engine.model, micro_batches, progress.step)
            for batch, loss in zip(micro_batches, self.meter.forwards(losses), strict=True):
                self.finite.loss(batch, loss.mean)
                engine.backward(loss.mean)
                self.meter.loss(loss)
                means.append(loss.mean.detach())
            results.append(engine.step(progress.step))
        result = replace(results[0], applied=all(result.applied for result in results))
        self.meter.step(result, self.config.train.global_batch_size)
        progress.step += 1
        at_end = progress.step == self.config.train.max_steps
        progress.evaluated = not (at_end or (every and progress.step % every == 0))
        self.finite.step(progress.step, result.applied)
        if not (self.spikes.active and result.applied):
            return False
        mean = self.ranks.mean(torch.stack(means[: len(micro_batches)]).mean().item())
        return self.spikes.is_spike(mean)

    def _rewind(self) -> bool:
        """Go back to before the spike of the step just taken; False where nothing lies there."""
        spike, progress = self.progress.step - 1, self.progress
        self.watchdog.pause("rewinding", progress.step)
        first_bad = self.spikes.first_bad_step(spike)
        if self.spikes.exhausted:
            end_together(
                self.ranks,
                f"step {progress.step}: another loss spike after guards.max_rewinds="
                f"{self.config.guards.max_rewinds} rewinds, listed in {self.incidents.path}: "
                "lower optim.lr or optim.max_grad_norm, or look at the data",
            )
        checkpoint = self.checkpoints.go_back(first_bad)
        if checkpoint is None:
            what = f"loss spike, but no checkpoint is as old as step {first_bad}: going on"
            self.incidents.add(what, progress.step)
            return False
        step = progress.step
        self._restore(checkpoint)
        skipped = self.spikes.rewind(spike, checkpoint.state["spikes"])
        what = f"loss spike: back to step {progress.step}, and on without {skipped}"
        self.incidents.add(what, step)
        self.callbacks.rewound(progress.step)
        return True

    def _log(self) -> None:
        self._share_quarantine()
        values = self.meter.values() | {
            "data/rejected": float(len(self.task.stream.quarantine)),
            "optim/skipped_steps": float(self.finite.total),
        }
        self.callbacks.metrics(self.progress.step, values)

    def _share_quarantine(self) -> None:
        """Tell all ranks of the bad samples that each has met, and write them down."""
        quarantine = self.task.stream.quarantine
        met = [item for items in self.ranks.gather(quarantine.fresh()) for item in items]
        quarantine.add(met)
        if met and self.ranks.is_main:
            path = self.folder / QUARANTINE
            write_ledger(path, quarantine.rejected)
            self._say(
                f"{len(quarantine)} bad samples replaced so far, listed in {path}; "
                f"the last: {met[-1].key} in {met[-1].shard}: {met[-1].reason}"
            )

    def _evaluate(self, extra: dict[str, float], stop: StopRequest) -> bool:
        """Measure every average, and show the first; False where a request to stop came first."""
        start_s, step = time.perf_counter(), self.progress.step
        self.watchdog.pause("evaluation", step)
        values = logged(extra)
        for average in self.engine.averages:
            is_first = average == self.engine.averages[0]
            found = self.task.evaluate(self.engine.ema_weights(average), stop.agreed)
            if found is None:
                return False
            values |= logged(found.metrics, "" if is_first else average)
            if is_first and self.ranks.is_main:
                path = self.folder / "samples" / f"step_{step:08d}.png"
                save_png(path, found.picture)
                self.callbacks.picture(step, path)
        self.evaluations = {step: values}
        self.callbacks.metrics(step, values)
        self.progress.evaluated = True
        self.meter.exclude(time.perf_counter() - start_s)
        return True

    def _stop(self) -> int:
        self._save()
        self._finish_writing()
        self._say(f"asked to stop: step {self.progress.step} is saved; the same command goes on")
        # srun kills the other ranks when one ends with a code: the last to leave is rank 0
        return REQUEUE_EXIT_CODE if self.ranks.is_main else 0

    def _save(self) -> None:
        step = self.progress.step
        self.watchdog.pause("saving", step)
        self._share_quarantine()
        self.checkpoints.save(
            step,
            self.engines.tensors(),
            self.engines.num_bytes(),
            self.engines.buffers(),
            {
                **asdict(self.progress),
                **self.engines.state(),
                **self._about(),
                "metrics": self.evaluations.get(step, {}),
                "cursor": self.task.stream.cursor(self.spikes.plan_step(step)).to_json(),
                "finite": self.finite.state(),
                "spikes": self.spikes.state(),
                "quarantine": [asdict(item) for item in self.task.stream.quarantine.rejected],
                "meter": self.meter.state(),
                "world_size": self.ranks.world_size,
            },
        )

    def _about(self) -> dict[str, Any]:
        """What weights do not say of themselves."""
        return {
            "images_seen": self.progress.step * self.config.train.global_batch_size,
            "task": self.task.state(),
            "config": self.described,
        }

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Make everything but the spikes as it was when this checkpoint was saved."""
        state = checkpoint.state
        self.engines.load(checkpoint)
        for field in fields(Progress):
            setattr(self.progress, field.name, state[field.name])
        self.meter.load(state["meter"])
        self.finite.load(state["finite"])
        self.task.stream.quarantine.add(Rejected(**item) for item in state["quarantine"])
        self.task.load(state["task"])

    def _callbacks(self) -> Iterator[Callback]:
        step = self.progress.step
        yield Console(step, self.config.train.max_steps)
        yield JsonLines(self.folder / "metrics.jsonl", step)
        if self.config.logger.wandb.mode is not WandbMode.disabled:
            from trainer.callbacks.wandb import Wandb

            options = self.config.logger.wandb
            yield Wandb(options, self.config.run, self.described, self.progress.wandb_id)

    def _new_wandb_id(self) -> str:
        """The same for every start of this run folder."""
        return hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:16]

    def _say(self, line: str) -> None:
        if self.ranks.is_main:
            print(line, flush=True)
