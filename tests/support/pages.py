"""Run folders for reports, and a report as its tags."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from trainer.report.job import report

VOID = {"meta", "img", "input", "br", "link"}


EVIL = "</pre></summary><script>alert(1)</script><img src=x onerror=alert(2)>\"'{{ 7*7 }}"


class Page(HTMLParser):
    """Tags with attributes, the text, and whether tags nest; raises where they do not."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self._words: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        self.text = " ".join(self._words)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self._words += data.split()

    def attributes(self, tag: str, name: str) -> list[str]:
        return [values[name] for found, values in self.tags if found == tag and name in values]


def config(**sections: Any) -> dict[str, Any]:
    return {
        "task": "diffusion",
        "run": {"experiment": "emoji", "name": "demo"},
        "train": {"max_steps": 200, "global_batch_size": 32, "log_every": 50},
        "eval": {"prompts": ["a red heart", "a cat"]},
        **sections,
    }


def diffusion_lines() -> list[dict[str, float]]:
    first = {
        "step": 0,
        "eval/num_samples": 512,
        "eval/fd_efficientnet_lite0": 312.5,
        "eval/floor/fd_efficientnet_lite0": 27.25,
        "eval/floor/num_samples": 148,
        "eval/clip_score": 0.04,
        "eval/clip_score_shuffled": 0.039,
        "eval/clip_score_stderr": 0.005,
    }
    lines: list[dict[str, float]] = [first]
    for step in (50, 100, 150, 200):
        lines.append(
            {
                "step": step,
                "train/loss": 1 / step,
                "train/loss_by_timestep/0": 2 / step,
                "train/loss_by_timestep/1": 1 / step,
                "optim/lr": 1e-3,
                "optim/grad_norm": 0.5,
                "throughput/images_per_s": 28.4,
                "time/step_s": 1.5,
                "time/data_wait_pct": 0.25,
            }
        )
        if step % 100 == 0:
            lines.append(
                {
                    "step": step,
                    "eval/fd_efficientnet_lite0": 200 - step / 2,
                    "eval/clip_score": step / 1000,
                    "eval/clip_score_shuffled": 0.03,
                    "eval/clip_score_stderr": 0.004,
                }
            )
    return lines


def write_run(
    folder: Path,
    lines: list[dict[str, Any]] | None = None,
    settings: dict[str, Any] | None = None,
    steps_with_picture: tuple[int, ...] = (0, 100, 200),
) -> Path:
    (folder / "samples").mkdir(parents=True)
    rows = diffusion_lines() if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "config.yaml").write_text(yaml.safe_dump(settings or config()))
    (folder / "versions.json").write_text(json.dumps({"torch": "2.15.0", "commit": "0a1b2c3"}))
    for step in steps_with_picture:
        Image.new("RGB", (40, 30), (step % 256, 90, 0)).save(
            folder / "samples" / f"step_{step:08d}.png"
        )
    return folder


def page_of(folder: Path, *others: Path) -> Page:
    assert report([str(folder), *map(str, others)]) == 0
    return Page((folder / "report.html").read_text())
