"""The training loop, from the first step or from the newest checkpoint."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.streams.stream import Batch
from trainer.callbacks import Callbacks
from trainer.callbacks.callback import Start
from trainer.checkpoints.reader import Checkpoint
from trainer.checkpoints.retention import Retention
from trainer.checkpoints.state import RunState
from trainer.checkpoints.writer import CheckpointWriter
from trainer.config import Config
from trainer.engine.engine import StepResult
from trainer.engine.engines import Engines
from trainer.runs.files import RunFiles
from trainer.runs.ownership import owned
from trainer.runs.paths import CHECKPOINTS
from trainer.runs.record import public_config
from trainer.runs.wandb_id import wandb_id
from trainer.runtime.launcher import UNWRITTEN_EXIT_CODE
from trainer.runtime.ranks import Ranks, end_together, join
from trainer.train.evaluations import Evaluations
from trainer.train.feed import Feed
from trainer.train.guards import FiniteGuard, Incidents, QuarantineLedger, SpikeGuard
from trainer.train.meter import Meter
from trainer.train.preflight import preflight
from trainer.train.snapshots import Snapshots
from trainer.train.start import TrainingStart, open_training
from trainer.train.stop import StopRequest
from trainer.train.watchdog import Watchdog


def fit(config: Config) -> int:
    """Train to train.max_steps, from the newest checkpoint in run.dir if there is one.

    Returns the exit code: 0 done, 74 done, but a file of the run folder is incomplete, 85 stopped
    early with a checkpoint.
    Raises: ValueError or OSError that names the config path or the file; SystemExit if another
    process owns run.dir.
    """
    ranks = join()
    stop = StopRequest(ranks)
    config.run.dir = ranks.from_main(lambda: config.run.dir)  # ${now:…} differs between ranks
    with owned(Path(config.run.dir), "choose another run.name", ranks):
        loop = TrainingLoop(config, ranks, open_training(config, ranks))
        try:
            code = loop.train(stop)
        finally:
            incomplete = loop.close()
    return code or (UNWRITTEN_EXIT_CODE if incomplete else 0)


@dataclass(slots=True)
class LoopState:
    """The part of RunState that the loop changes."""

    step: int
    evaluated: bool
    """False if an evaluation is due at this step and was not made."""


class TrainingLoop:
    """Trains a task, with an engine for each of its modules."""

    def __init__(self, config: Config, ranks: Ranks, start: TrainingStart) -> None:
        task, checkpoint = start.task, start.checkpoint
        self.config = config
        self.ranks = ranks
        self.task = task
        self.folder = Path(config.run.dir)
        self.public_config = public_config(config)  # made once: it takes tens of ms
        self.watchdog = Watchdog(config.watchdog, self.folder, ranks)
        self.state = LoopState(0, not config.eval.every)
        self.meter = Meter(ranks, config.train.precision)
        self.feed = Feed(ranks.device)
        self.files = RunFiles(self.folder, writes=ranks.is_main)
        self.incidents = Incidents(self.files, ranks)
        self.finite = FiniteGuard(config.guards, task.stream, ranks, self.incidents)
        self.spikes = SpikeGuard(config.guards)
        self.quarantine = QuarantineLedger(self.files, task.stream.quarantine, ranks)
        self.engines = Engines(task.modules, task.averaged, config, ranks)
        self.engine = self.engines.averaged
        if checkpoint is not None:
            self._restore(checkpoint)
            self.spikes.load(checkpoint.training.spikes)
            self.ranks.say(f"going on from {checkpoint.path}")
            self.files.restore(checkpoint.training.unwritten)
        if start.optimizer_of is not None:
            self.engines.load(start.optimizer_of)
        self.evaluations = Evaluations(config, ranks, task, self.engine, self.files, self.watchdog)
        step, kept = self.state.step, Retention.of(config.checkpoint)
        self.checkpoints = CheckpointWriter(
            self.folder / CHECKPOINTS, ranks, kept, step, outages=self.files.outages
        )
        self.snapshots = Snapshots(config, ranks, step, self.files.outages)
        saved_id = checkpoint.training.wandb_id if checkpoint is not None else ""
        self.wandb_id = ranks.from_main(lambda: wandb_id(self.folder, saved_id))
        evaluated = self.state.evaluated
        facts = Start(config, self.public_config, step, self.wandb_id, self.files, evaluated)
        self.callbacks = Callbacks.open(facts) if ranks.is_main else Callbacks()

    def train(self, stop: StopRequest) -> int:
        """Train until train.max_steps or a request to stop; return the exit code."""
        config, state = self.config, self.state
        if state.step < config.train.max_steps:
            self._preflight()
        state.evaluated |= not config.eval.every  # the checkpoint's run may have evaluated
        if not state.evaluated and not self._evaluate(stop):
            return self._stop(stop)
        for micro_batches in self._steps():
            spike = self._train_step(micro_batches)
            if spike and self._rewind():
                continue
            step, done = state.step, state.step == config.train.max_steps
            must_stop = config.checkpoint.stop_on_failure and self.checkpoints.failed
            stopping = stop.agreed(must_stop, late=not done and state.evaluated)
            if step % config.train.log_every == 0 or done:
                self._log()
            if not state.evaluated and not stopping:
                stopping = not self._evaluate(stop)
            self.snapshots.take(step, self.engine, self._shared_state)
            if stopping:
                return self._stop(stop)
            if done or step % config.checkpoint.every == 0:
                self._save()
        self._finish_writing()
        self.watchdog.pause("the end", state.step)
        average = self.engine.averages[0]
        self.ranks.say(self.task.finish(lambda: self.engine.ema_weights(average), self.folder))
        return 0

    def _finish_writing(self) -> None:
        patience_s = self.config.checkpoint.patience_s
        self.checkpoints.finish(patience_s)
        self.snapshots.finish(patience_s)

    def close(self) -> str:
        """Wait for files that are being written, and end the threads.

        Returns the files of the run folder that are incomplete, in words; empty if all are whole.
        """
        self.watchdog.pause("the end", self.state.step)
        self.checkpoints.wait()
        self.snapshots.wait()
        self.callbacks.close()
        self.watchdog.close()
        # a last save that failed has waited for the same disk
        patience_s = 0.0 if self.checkpoints.failed else self.config.checkpoint.patience_s
        return self.files.close(patience_s)

    def _preflight(self) -> None:
        data_step = self.spikes.data_step
        steps = data_step(self.state.step), data_step(self.config.train.max_steps - 1)
        self.meter.flops_per_image = preflight(
            self.config, self.ranks, self.task, self.engines, steps
        )

    def _steps(self) -> Iterator[list[Batch]]:
        """Yield this rank's micro batches of each remaining step; measure the waits for them."""
        batches = self.task.stream.steps(0)
        next_in_stream = -1
        while self.state.step < self.config.train.max_steps:
            self.watchdog.step(self.state.step)
            start_s = time.perf_counter()
            wanted = self.spikes.data_step(self.state.step)
            if wanted != next_in_stream:  # at the start, after a skipped window or a rewind
                batches.close()
                batches = self.task.stream.steps(wanted)
            micro_batches = next(batches)
            next_in_stream = wanted + 1
            self.meter.waited(time.perf_counter() - start_s)
            yield micro_batches
        batches.close()

    def _train_step(self, micro_batches: list[Batch]) -> bool:
        """Take one optimizer step; return whether its loss is a spike."""
        state, every = self.state, self.config.eval.every
        results: list[StepResult] = []
        losses: list[Tensor] = []
        for turn in self.task.turns(state.step):
            engine = self.engines[turn.module_name]
            for batch in self.feed.copied(micro_batches):
                with self.meter.forward():
                    loss = turn.loss(engine.model, batch)
                self.finite.loss(batch, loss.mean)
                engine.backward(loss.mean)
                self.meter.loss(loss)
                losses.append(loss.mean.detach())
            if turn.close is not None:
                turn.close()
            results.append(engine.step(state.step))
        result = replace(results[0], applied=all(result.applied for result in results))
        self.meter.step(result, self.config.train.global_batch_size)
        state.step += 1
        at_end = state.step == self.config.train.max_steps
        state.evaluated = not (every and (at_end or state.step % every == 0))
        self.finite.step(state.step, result.applied)
        if not (self.spikes.active and result.applied):
            return False
        of_first_turn = losses[: len(micro_batches)]
        mean = self.ranks.mean(torch.stack(of_first_turn).mean().item())
        return self.spikes.is_spike(mean)

    def _rewind(self) -> bool:
        """Go back to a checkpoint before the spike of the last step; return False without one."""
        spike, state = self.state.step - 1, self.state
        self.watchdog.pause("rewinding", state.step)
        first_bad = self.spikes.first_bad_step(spike)
        if self.spikes.exhausted:
            end_together(
                self.ranks,
                f"step {state.step}: another loss spike after guards.max_rewinds="
                f"{self.config.guards.max_rewinds} rewinds, listed in {self.incidents.path}: "
                "lower optim.lr or optim.max_grad_norm, or look at the data",
            )
        checkpoint = self.checkpoints.go_back(first_bad)
        if checkpoint is None:
            event = f"loss spike, but no checkpoint is as old as step {first_bad}: going on"
            self.incidents.add(event, state.step)
            return False
        self._restore(checkpoint)
        self.snapshots.go_back(state.step)
        skipped = self.spikes.rewind(spike, checkpoint.training.spikes)
        event = f"loss spike: back to step {state.step}, and on without {skipped}"
        self.incidents.add(event, spike + 1, back_to=state.step)
        self.callbacks.rewound(state.step)
        return True

    def _log(self) -> None:
        self.quarantine.share()
        values = self.meter.values() | {
            "data/rejected": float(len(self.task.stream.quarantine)),
            "optim/skipped_steps": float(self.finite.total),
        }
        self.callbacks.metrics(self.state.step, values)

    def _evaluate(self, stop: StopRequest) -> bool:
        """Measure every average; return False if a request to stop came."""
        start_s = time.perf_counter()
        if not self.evaluations.make(self.state.step, stop, self.callbacks):
            return False
        self.state.evaluated = True
        self.meter.exclude(time.perf_counter() - start_s)
        return True

    def _stop(self, stop: StopRequest) -> int:
        self._save()
        self._finish_writing()
        return stop.exit_code(f"step {self.state.step} is saved")

    def _save(self) -> None:
        step = self.state.step
        self.watchdog.pause("saving", step)
        self.quarantine.share()
        record = RunState(
            **self._shared_state(),
            **asdict(self.state),
            wandb_id=self.wandb_id,
            averages=list(self.engine.averages),
            adam_steps=self.engines.adam_steps(),
            metrics=self.evaluations.at(step),
            cursor=self.task.stream.cursor(self.spikes.data_step(step)),
            finite=self.finite.state(),
            spikes=self.spikes.state(),
            quarantine=list(self.task.stream.quarantine.rejected),
            meter=self.meter.state(),
            world_size=self.ranks.world_size,
            unwritten=self.files.unwritten(),
        )
        tensors, num_bytes = self.engines.tensors(), self.engines.num_bytes()
        self.checkpoints.save(step, tensors, num_bytes, self.engines.buffers(), record)

    def _shared_state(self) -> dict[str, Any]:
        """Return the fields of the state that checkpoints and snapshots share."""
        return {
            "images_seen": self.state.step * self.config.train.global_batch_size,
            "task": self.task.state(),
            "config": self.public_config,
        }

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint, without the state of the spike guard."""
        saved = checkpoint.training
        self.engines.load(checkpoint)
        for field in fields(LoopState):
            setattr(self.state, field.name, getattr(saved, field.name))
        self.meter.load(saved.meter)
        self.finite.load(saved.finite)
        self.task.stream.quarantine.add(saved.quarantine)
        self.task.load(saved.task)
