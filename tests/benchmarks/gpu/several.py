"""Several GPUs, by torchrun: bandwidth, ZeRO stages, and checkpoints on other numbers of ranks."""

import json
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.gpu.jobs import losses, metrics, words_of
from tests.benchmarks.gpu.setting import Setting
from tests.support.paths import ROOT


def torchrun(ranks: int, *words: str) -> subprocess.CompletedProcess[str]:
    """`torchrun … -m WORDS`; the last words of a failure are printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, f"--nproc-per-node={ranks}", "-m", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-4000:])
    return done


def measure_bandwidth(setting: Setting) -> None:
    """Note the bus bandwidth of all-reduce and all-gather."""
    size = 2**20 if setting.small else 2**30
    done = torchrun(setting.gpus, "tests.benchmarks.gpu.collectives", str(size))
    for name, value in json.loads(done.stdout.splitlines()[-1]).items():
        setting.note(name, value)


def measure_stages(setting: Setting) -> None:
    """Note images a second of each ZeRO stage on one GPU and on all; the work a GPU is the same."""
    for stage in (1,) if setting.small else range(4):
        rates = {}
        for ranks in (1, setting.gpus):
            run = f"zero{stage}_{ranks}"
            done = torchrun(ranks, "trainer", *words_on(setting, ranks, run, stage))
            if done.returncode == 0:
                lines = metrics(setting.folder / run)
                rates[ranks] = lines[-1]["throughput/images_per_s"]
                setting.note(f"{run}_img_per_s", rates[ranks])
                setting.note(f"{run}_gib", lines[-1]["memory/max_allocated_gib"])
        if len(rates) == 2:
            scaled = rates[setting.gpus] / setting.gpus / rates[1]
            setting.note(f"zero{stage}_scaling_pct", 100 * scaled)


def words_on(setting: Setting, ranks: int, run: str, stage: int, *more: str) -> list[str]:
    """The same work for each rank; without ZeRO, bf16 has no fp32 weights."""
    each = 4 if setting.small else 64
    words = words_of(setting, run, f"deepspeed=zero{stage}")
    precision = ["train.precision=fp32"] if stage == 0 else []
    return [*words, f"train.global_batch_size={each * ranks}", *precision, *more]


def measure_topology(setting: Setting) -> None:
    """Stop on all GPUs, go on with half of them, and compare with an undisturbed run."""
    ranks, half = setting.gpus, max(1, setting.gpus // 2)
    steps = ["train.max_steps=4"]  # the request to stop takes effect after the second
    for stage in (1,) if setting.small else (1, 3):
        name = f"stage{stage}"
        whole = torchrun(
            ranks, "trainer", *words_on(setting, ranks, f"{name}_whole", stage, *steps)
        )
        halves = f"{name}_halves"
        words = words_on(setting, ranks, halves, stage, *steps)
        stopped = torchrun(ranks, "tests.support.stop_at", "1", "SIGTERM", "trainer", *words)
        setting.note(f"{name}_saved", int("is saved" in stopped.stdout))
        resumed = torchrun(half, "trainer", *words)
        setting.note(f"{name}_resumed", int(resumed.returncode == 0))
        if whole.returncode == resumed.returncode == 0:
            setting.note(f"{name}_loss_difference", difference(setting.folder, name))


def difference(folder: Path, name: str) -> float:
    pairs = zip(losses(folder / f"{name}_whole"), losses(folder / f"{name}_halves"), strict=True)
    return max(abs(one - other) for one, other in pairs)
