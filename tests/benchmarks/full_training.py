"""One U-Net of full size trained on a CPU machine: two steps, a kill, and a third after resuming.

`+experiment=laion_512` with its own U-Net (866 M parameters), fp32, micro batch 1, latents and text
embeddings of random pictures from shards. First stage and text tower have random weights; the tower
has two layers of the real one's width, as stored embeddings leave it idle. It takes 20 GB of memory
and 45 GB of disk. Overrides on the command line change the run: deepspeed=zero2.

Memory is that of the process itself (RssAnon): mapped files are not counted.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import open_clip
import psutil
from safetensors.torch import save_file

from tests.support.latent_jobs import UNMEASURED, ready
from tests.support.paths import ROOT
from trainer.checkpoints.reader import open_checkpoint

GIB = 2**30
CLIP: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"width": 1024, "heads": 16, "layers": 2},
}


class Watched:
    """A training whose lines are timed, and whose memory is looked at all the time."""

    def __init__(self, overrides: list[str]) -> None:
        self.start_s = time.monotonic()
        self.lines: list[tuple[float, str]] = []
        self.peak_bytes = 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trainer", *overrides],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        # where memory runs out, this is what has to go
        Path(f"/proc/{self.process.pid}/oom_score_adj").write_text("1000")
        threading.Thread(target=self._read, daemon=True).start()

    def wait_for(self, pattern: str, folder: Path | None = None) -> float:
        """Seconds from the start until a line matches, or the folder is there."""
        while True:
            self.peak_bytes = max(self.peak_bytes, self._anonymous_bytes())
            for at_s, line in self.lines:
                if folder is None and re.search(pattern, line):
                    return at_s - self.start_s
            if folder is not None and folder.exists():
                return time.monotonic() - self.start_s
            if self.process.poll() is not None:
                raise RuntimeError("\n".join(line for _, line in self.lines))
            time.sleep(0.05)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip()))
            print(f"{time.monotonic() - self.start_s:7.1f} s  {line}", end="", flush=True)

    def _anonymous_bytes(self) -> int:
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return 0
        found = re.search(r"RssAnon:\s+(\d+) kB", status)
        return int(found[1]) * 1024 if found else 0


def write_clip(folder: Path, described: dict[str, Any]) -> None:
    """A text tower of random weights where `overrides_for` expects it."""
    (folder / "clip.json").write_text(json.dumps(described))
    save_file(open_clip.CLIP(**described).state_dict(), folder / "clip.safetensors")


def overrides_for(folder: Path) -> list[str]:
    """What trains the experiment on the text and first stage in a folder; later words win."""
    return [
        "+experiment=laion_512",
        f"run.dir={folder / 'run'}",
        f"data.dir={folder / 'data'}",
        "data.store_text=true",
        "data.lanes=1",
        f"autoencoder.weights={folder / 'first_stage.safetensors'}",
        f"conditioner.model={folder / 'clip.json'}",
        f"conditioner.pretrained={folder / 'clip.safetensors'}",
        "train.log_every=1",
        *UNMEASURED,
    ]


def prepare(folder: Path, more: list[str]) -> list[str]:
    """Shards of latents and text of four random pictures; returns the overrides that take them."""
    write_clip(folder, CLIP)
    overrides = [
        *overrides_for(folder),
        "precompute.precision=fp32",
        "precompute.batch_size=1",
        "precompute.workers=0",
        "train.precision=fp32",
        "train.global_batch_size=1",
        "train.micro_batch_size=1",
        "checkpoint.every=2",
        *more,
    ]
    ready(overrides, 4, 4)
    return overrides


def main() -> None:
    """Train, kill, resume, stop; then print what it took."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = prepare(folder, sys.argv[1:])
        print(f"{psutil.virtual_memory().available / GIB:.1f} GiB available", flush=True)
        checkpoints = folder / "run" / "checkpoints"
        first = Watched(overrides)
        step_s = [first.wait_for(r"step +1/"), first.wait_for(r"step +2/")]
        saved_s = first.wait_for("", checkpoints / "step_00000002")
        first.process.kill()
        first.process.wait()
        second = Watched(overrides)
        resumed_s = second.wait_for("going on from .*step_00000002")
        second.process.send_signal(signal.SIGTERM)
        third_s = second.wait_for(r"step +3/")
        second.wait_for("", checkpoints / "step_00000003")
        stopped_s = second.wait_for("step 3 is saved")
        code = second.process.wait()
        state = open_checkpoint(checkpoints / "step_00000003")
        size = sum(path.stat().st_size for path in state.path.iterdir())
        waited = [line for _, line in first.lines if "training waits" in line]
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        figures = {
            "threads": int(os.environ.get("OMP_NUM_THREADS", "0")),
            "exit_code": code,
            "parameters": sum(s.numel() for s in state.shapes("weight").values()),
            "checkpoint_gb": round(size / 1e9, 2),
            "files": len(state.files),
            "foreground": bool(waited),
            "peak_gib": round(first.peak_bytes / GIB, 2),
            "peak_resumed_gib": round(second.peak_bytes / GIB, 2),
            "first_step_s": round(step_s[0], 1),
            "step_s": round(step_s[1] - step_s[0], 1),
            "checkpoint_s": round(saved_s - step_s[1], 1),
            "resume_s": round(resumed_s, 1),
            "resumed_step_s": round(third_s - resumed_s, 1),
            "last_checkpoint_s": round(stopped_s - third_s, 1),
            "losses": [json.loads(line)["train/loss"] for line in lines],
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
