"""What the trainer costs beside the model: a run against a bare loop, in turns, in one process.

The demo's U-Net (9.35 M parameters) on random latents in batches of 16. The bare loop has the same
model, loss, data and optimizer, and nothing else: no DeepSpeed, EMA, logging or requests to stop.
Every 10 steps the run logs once. One rank has nothing to spread, so the run has ZeRO stage 0;
overrides on the command line change it: deepspeed=zero1 shows what DeepSpeed's own copies cost.

trainer_pct: more time the run takes. ema_pct: the averages' share of a step. Both in processor
time of the process, which other programs on the machine do not change much.
checkpoint_stall_ms: how long training stands still for a checkpoint written in the background;
copy_ms: how long a copy of the same tensors takes. start_s: from the start of the process to the
end of the first step, less `import torch, deepspeed`.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import nn

from data.streams.stream import Batch
from tests.support.latent_jobs import UNMEASURED, ready
from tests.support.paths import ROOT
from trainer.config import Config
from trainer.engine.optim import build_optimizer, learning_rate
from trainer.runtime.ranks import join
from trainer.train.denoiser import build_denoising
from trainer.train.loop import TrainingLoop
from trainer.train.start import TrainingStart
from trainer.train.stop import StopRequest

EVERY, BLOCKS, SAVES, STARTS = 10, 10, 5, 2


class BareLoop:
    """The same task's model and data with a plain optimizer."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._task = build_denoising(config, join())
        (trained,) = self._task.trained.values()
        self._module = trained.module
        self._optimizer = build_optimizer(config.optim, self._module.parameters())
        self._batches: Iterator[list[Batch]] = self._task.stream.steps(0)
        self._step = 0

    def steps(self, count: int) -> float:
        """Seconds that so many steps take."""
        start_s = time.process_time()
        for _ in range(count):
            for batch in next(self._batches):
                (turn,) = self._task.turns(self._step)
                turn.loss(self._module, batch).mean.backward()
            nn.utils.clip_grad_norm_(self._module.parameters(), self._config.optim.max_grad_norm)
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate(self._config.optim, self._config.train, self._step)
            self._optimizer.step()
            self._optimizer.zero_grad()
            self._step += 1
        return time.process_time() - start_s


class Turns(StopRequest):
    """Heard by the run at every step's end: gives the bare loop its turn after each block."""

    def __init__(self, bare: BareLoop) -> None:
        super().__init__(join())
        self._bare = bare
        self._steps = 0
        self._start_s = 0.0
        self.run_s: list[float] = []
        self.bare_s: list[float] = []

    def agreed(self, must: bool = False, *, late: bool = False) -> bool:
        self._steps += 1
        if self._steps % EVERY == 1:  # a block ends a step after its line was logged
            if self._steps > 1:
                self.run_s.append(time.process_time() - self._start_s)
            self.bare_s.append(self._bare.steps(EVERY))
            self._start_s = time.process_time()
        return super().agreed(must, late=late)


def timed(
    function: Callable[[], object], into: list[float], clock: Callable[[], float]
) -> Callable[[], None]:
    """The function, with its seconds kept."""

    def call() -> None:
        start_s = clock()
        function()
        into.append(clock() - start_s)

    return call


def start_s(overrides: list[str], folder: Path) -> float:
    """See the top; the least of several, in turns."""
    whole: list[float] = []
    imports: list[float] = []
    for number in range(STARTS):
        begun_s = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch, deepspeed"], check=True)
        imports.append(time.perf_counter() - begun_s)
        begun_s = time.perf_counter()
        with subprocess.Popen(
            [
                *(sys.executable, "-m", "trainer", *overrides),
                *(f"run.dir={folder / str(number)}", "train.log_every=1"),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if re.match(r"step +1/", line):
                    whole.append(time.perf_counter() - begun_s)
                    process.kill()
    return min(whole) - min(imports)


def main() -> None:
    """Print one line of JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = [
            "+experiment=emoji",
            "deepspeed=zero0",
            f"data.dir={folder}",
            f"autoencoder.weights={folder / 'first_stage.safetensors'}",
            f"run.dir={folder / 'run'}",
            "data.lanes=16",
            "train.global_batch_size=16",
            "train.micro_batch_size=16",
            f"train.max_steps={EVERY * BLOCKS + 1}",
            f"train.log_every={EVERY}",
            "checkpoint.every=1000000",
            *UNMEASURED,
            "eval.num_samples=1",
            "eval.prompts=[a picture]",
            "sampler.steps=1",
            *sys.argv[1:],
        ]
        config = ready(overrides, 128, 64)
        bare = BareLoop(config)
        bare.steps(2)
        ranks, ema_s, save_s, copy_s = join(), [], [], []
        run = TrainingLoop(config, ranks, TrainingStart(build_denoising(config, ranks), None, None))
        run.engine._update_averages = timed(run.engine._update_averages, ema_s, time.process_time)
        turns = Turns(bare)
        run.train(turns)
        tensors = [tensor for *_, tensor in run.engines.tensors()]
        clock = time.perf_counter
        for _ in range(SAVES):
            run.checkpoints.wait()
            timed(lambda: [tensor.clone() for tensor in tensors], copy_s, clock)()
            timed(run._save, save_s, clock)()
        run.close()
        step_s = statistics.median(turns.run_s) / EVERY
        pairs = zip(turns.run_s, turns.bare_s[1:], strict=False)
        figures = {
            "trainer_pct": 100 * (statistics.median(one / other for one, other in pairs) - 1),
            "ema_pct": 100 * statistics.median(ema_s) / step_s,
            "checkpoint_stall_ms": 1000 * statistics.median(save_s),
            "copy_ms": 1000 * statistics.median(copy_s),
            "step_ms": 1000 * step_s,
        }
        print(figures, flush=True)
        figures["start_s"] = start_s(overrides, folder)
    print(json.dumps({name: round(value, 2) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
