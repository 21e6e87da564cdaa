import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trainer.charts import (
    MOST_POINTS,
    Line,
    Mark,
    Trial,
    line_chart,
    pareto_front,
    smoothed,
    thinned,
)
from trainer.report import MOST_PICTURES, main, render
from trainer.run_folder import read_metrics, read_run
from trainer.sweep_table import FOLDER, TABLE, SweepTable

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
    assert main([str(folder), *map(str, others)]) == 0
    return Page((folder / "report.html").read_text())


def test_a_diffusion_run_is_told_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = write_run(tmp_path / "run")
    page = page_of(folder)
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert page.attributes("meta", "name") == ["viewport", "color-scheme"]
    headings = (
        "emoji / demo|Finished|200 of 200 steps|Samples|Evaluation|Training|Loss by timestep|"
        "Learning rate|Gradient norm|Throughput|Data wait|Resolved config|Versions"
    )
    for text in headings.split("|"):
        assert text in page.text, text
    assert "Fréchet distance (EfficientNet-Lite0) 100 floor 27.2 · untrained 312" in page.text
    assert "CLIP score 0.2 shuffled 0.03 · untrained 0.04" in page.text
    assert "Images seen 6.4k 200 steps of 32" in page.text
    assert "Throughput 28.4 images/s data wait 0.2 %" in page.text
    assert "Training time 5 min" in page.text
    assert "floor: real validation images, 27.2" in page.text
    assert "untrained model, 312" in page.text
    assert "a red heart a cat" in page.text
    assert "global_batch_size: 32" in page.text
    assert "torch 2.15.0 commit 0a1b2c3" in page.text
    assert "num_samples" not in page.text
    charts = [values["viewbox"] for tag, values in page.tags if tag == "svg"]
    assert len(charts) == 8, "two metrics, loss, by timestep, and four more"


def test_the_page_fetches_nothing_and_ids_are_unique(tmp_path: Path):
    other = write_run(tmp_path / "other", settings=config(run={"name": "other"}))
    page = page_of(write_run(tmp_path / "run"), other)
    policy = page.attributes("meta", "content")
    assert any(text.startswith("default-src 'none'; img-src data:") for text in policy)
    for tag, values in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base"}
        for name, value in values.items():
            if name in {"src", "href", "xlink:href", "srcset"}:
                assert value.startswith(("data:image/webp;base64,", "#")), value[:40]
            assert "http" not in value.split(",")[0] or tag == "meta"
    style = (tmp_path / "run" / "report.html").read_text().split("<style>")[1].split("</style>")[0]
    assert "http" not in style
    assert "@import" not in style
    ids = Counter(values["id"] for _, values in page.tags if "id" in values)
    assert [name for name, count in ids.items() if count > 1] == []
    targets = [values["xlink:href"] for _, values in page.tags if "xlink:href" in values]
    targets += [values["clip-path"][4:-1] for _, values in page.tags if values.get("clip-path", "")]
    assert targets
    assert {target.removeprefix("#") for target in targets} <= set(ids)


def write_sweep(folder: Path, name: str, *, prompt: str = "ddim") -> None:
    rows = [
        ({"sampler": prompt, "sampler.steps": "10"}, {"fd_inception": 30.5, "clip_score": 0.25}),
        ({"sampler": prompt, "sampler.steps": "50"}, {"fd_inception": 20.0, "clip_score": 0.3}),
        ({"sampler": "plms", "sampler.steps": "10"}, {"fd_inception": 44.0, "clip_score": 0.2}),
    ]
    path = folder / FOLDER / name / TABLE
    path.parent.mkdir(parents=True)
    SweepTable(rows).save(path)


def write_checkpoint(folder: Path, step: int) -> None:
    path = folder / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    files = {"rank_00000.safetensors": {"bytes": 2**31}, "state.json": {"bytes": 2**29}}
    (path / "manifest.json").write_text(json.dumps({"version": 1, "files": files}))


def test_sweeps_checkpoints_and_replaced_samples_are_listed(tmp_path: Path):
    folder = write_run(tmp_path / "run")
    bare = page_of(folder).text
    for heading in ("Sweep", "Checkpoints", "Replaced samples"):
        assert heading not in bare
    write_sweep(folder, "sampler-steps_0a1b")
    write_checkpoint(folder, 100)
    write_checkpoint(folder, 200)
    bad = [{"key": f"k{n}", "shard": "7.tar", "reason": "no caption"} for n in range(60)]
    ledger = "".join(f"{json.dumps(entry)}\n" for entry in bad)
    (folder / "quarantine.jsonl").write_text(f"{ledger}half a li")
    page = page_of(folder)
    assert "Sweep sampler-steps_0a1b" in page.text
    assert "FID (Inception) against CLIP score, best to the upper left" in page.text
    assert "sampler sampler.steps FID (Inception) CLIP score Pareto" in page.text
    assert "ddim 10 30.5 0.25 ddim 50 20 0.3 ★ plms 10 44 0.2" in page.text
    assert re.search(r"step_00000200 \S+ \S+ 2.5 2 step_00000100 ", page.text)
    assert "Sample Shard Reason k59 7.tar no caption k58" in page.text
    assert "k10 " in page.text
    assert "k9 " not in page.text
    assert "60 in all: 60 × no caption" in page.text


def test_damaged_and_hostile_tables_stay_text(tmp_path: Path):
    folder = write_run(tmp_path / "run")
    write_sweep(folder, "good", prompt=EVIL)
    write_sweep(folder, "bad")
    (folder / FOLDER / "bad" / TABLE).write_bytes(b"PAR1 and no more")
    write_checkpoint(folder, 100)
    (folder / "checkpoints" / "step_00000100" / "manifest.json").write_text('{"files": [1')
    entry = {"key": EVIL, "shard": EVIL, "reason": EVIL}
    (folder / "quarantine.jsonl").write_text(f"{json.dumps(entry)}\n[1]\n")
    page = page_of(folder)
    assert "Sweep good" in page.text
    assert "Sweep bad" not in page.text
    assert "Checkpoints" not in page.text
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [name for _, values in page.tags for name in values if name.startswith("on")]
    assert page.text.count("alert(1)") >= 6


FIGURES = st.tuples(st.integers(0, 9), st.integers(0, 9))


@given(st.lists(FIGURES, max_size=12))
def test_the_pareto_front_is_what_nothing_beats(figures: list[tuple[int, int]]):
    trials = [Trial(name=str(n), distance=d, score=s) for n, (d, s) in enumerate(figures)]

    def beaten(trial: Trial) -> bool:
        return any(
            other.distance <= trial.distance
            and other.score >= trial.score
            and (other.distance, other.score) != (trial.distance, trial.score)
            for other in trials
        )

    front = pareto_front(trials)
    best = {(trial.distance, trial.score) for trial in trials if not beaten(trial)}
    assert {(trial.distance, trial.score) for trial in front} == best
    assert len(front) == len(best)


CELLS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(
    st.lists(
        st.tuples(
            st.fixed_dictionaries({"sampler": CELLS, "sampler.steps": CELLS}),
            st.dictionaries(st.sampled_from(["fd_x", "clip_score"]), st.floats(-1e9, 1e9)),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_a_sweep_table_is_read_as_it_was_written(rows: list[tuple[dict[str, str], dict]]):
    table = SweepTable(rows)
    with TemporaryDirectory() as folder:
        table.save(Path(folder) / TABLE)
        again = SweepTable.load(Path(folder) / TABLE)
    assert again.options == table.options
    assert again.shown() == table.shown()
    lines = table.markdown().splitlines()
    assert len({line.count("|") - line.count(r"\|") for line in lines}) == 1


def test_hostile_files_stay_text(tmp_path: Path):
    folder = write_run(
        tmp_path / "run",
        lines=[{"step": 1, "train/loss": 1.0, f"eval/{EVIL.replace('/', '')}": 2.0}],
        settings=config(run={"experiment": EVIL, "name": EVIL}, eval={"prompts": [EVIL, 3]}),
    )
    (folder / "versions.json").write_text(json.dumps({EVIL: f"{EVIL}\ud800"}))
    page = page_of(folder, write_run(tmp_path / "other", settings=config(run={"name": EVIL})))
    tags = {tag for tag, _ in page.tags}
    assert "script" not in tags
    assert not [name for _, values in page.tags for name in values if name.startswith("on")]
    assert page.attributes("img", "src") and "x" not in page.attributes("img", "src")
    assert page.text.count("alert(1)") >= 6
    assert "{{ 7*7 }}" in page.text


def test_hostile_yaml_builds_no_object(tmp_path: Path):
    folder, trap = write_run(tmp_path / "run"), tmp_path / "trap"
    (folder / "config.yaml").write_text(f"!!python/object/apply:os.mkdir ['{trap}']")
    assert "os.mkdir" in page_of(folder).text
    assert not trap.exists()


@pytest.mark.parametrize("damage", ["missing", "no_metrics", "empty", "no_line"])
def test_no_run_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str):
    folder = tmp_path / "run"
    if damage != "missing":
        folder.mkdir()
    if damage in {"empty", "no_line"}:
        (folder / "metrics.jsonl").write_text("" if damage == "empty" else '{"st\n')
    assert main([str(folder)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert str(folder) in output.err
    assert not (folder / "report.html").exists()


def test_a_bare_metrics_file_is_enough(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "train/loss": 0.5}\n')
    for name in ("config.yaml", "versions.json"):
        (tmp_path / name).write_text(": [broken")
    page = page_of(tmp_path)
    assert tmp_path.name in page.text
    assert "Loss 0.5" in page.text


def test_a_resumed_run_counts_once_and_torn_lines_are_told(tmp_path: Path):
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"step": 200, "train/lo{"step": 150, "train/loss": 9}\n')
        log.write('{"step": 200, "train/loss": 7.0}\n')
    run = read_run(folder)
    assert run.damaged_lines == 1
    assert run.points("train/loss")[-2:] == [(150, 1 / 150), (200, 7.0)]
    assert run.last("eval/clip_score") == 0.2, "another line of the same step adds to it"
    assert "1 unreadable line of metrics.jsonl left out" in page_of(folder).text


@settings(deadline=None, max_examples=60)
@given(
    noise=st.lists(st.text(max_size=20) | st.sampled_from(["[" * 9999, '{"step": 1e999}', "null"])),
    steps=st.lists(st.integers(0, 50), min_size=1),
)
def test_any_noise_between_lines_leaves_the_metrics(noise: list[str], steps: list[int]):
    lines = [json.dumps({"step": step, "k": i, "s": "text"}) for i, step in enumerate(steps)]
    broken = [line.replace("\n", " ") for line in noise if not _is_metrics(line)]
    mixed = [*broken, *(part for pair in zip(lines, broken, strict=False) for part in pair)]
    series, _ = read_metrics("\n".join([*mixed, *lines]))
    assert series == {"k": {step: float(i) for i, step in enumerate(steps)}}


def _is_metrics(line: str) -> bool:
    try:
        return "step" in json.loads(line) and "1e999" not in line
    except (ValueError, TypeError, RecursionError):
        return False


@pytest.mark.parametrize(
    ("last_loss", "last_step", "age_s", "status"),
    [
        (0.1, 200, 1e6, "Finished"),
        (0.1, 150, 10, "Running, about 1 min left"),
        (0.1, 150, 7200, "Not finished; silent for 2.0 h"),
        (float("nan"), 200, 10, "Diverged: the loss of step 200 is nan"),
    ],
)
def test_status(tmp_path: Path, last_loss: float, last_step: int, age_s: float, status: str):
    lines = [
        {"step": 100, "train/loss": 0.2, "time/step_s": 1.5},
        {"step": last_step, "train/loss": last_loss, "time/step_s": 1.5},
    ]
    run = read_run(write_run(tmp_path / "run", lines))
    os.utime(tmp_path / "run" / "metrics.jsonl", (1e9, 1e9))
    run = read_run(tmp_path / "run")
    page = Page(render([run], 1e9 + age_s))
    assert status in page.text
    assert "nan" not in re.sub("is nan|_nan_", "", page.text)


EXTREMES = (0, -1, 1e308, -1e308, 5e-324, float("nan"), float("inf"), 10**400, True, None, "x", [])


@pytest.mark.filterwarnings("error")
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_extreme_values_still_give_a_page(tmp_path_factory: pytest.TempPathFactory, data: Any):
    keys = {key for line in diffusion_lines() for key in line if key != "step"}
    line = st.fixed_dictionaries({key: st.sampled_from(EXTREMES) for key in sorted(keys)})
    lines = data.draw(st.lists(line, min_size=2, max_size=4))
    rows = [{"step": step, "train/loss": 1.0} | row for step, row in enumerate(lines)]
    numbers = st.sampled_from([0, -3, float("inf"), float("nan"), "many", [1], None])
    train = {key: data.draw(numbers) for key in ("max_steps", "global_batch_size", "log_every")}
    whole = config(train=train, run=data.draw(numbers), eval={"prompts": data.draw(numbers)})
    folder = write_run(tmp_path_factory.mktemp("extreme") / "run", rows, whole, (0,))
    assert "Training" in page_of(folder).text


def test_an_autoencoder_run_shows_psnr_and_loss_parts(tmp_path: Path):
    lines = [
        {"step": 0, "eval/psnr_db": 6.0},
        {"step": 100, "train/loss": 0.3, "train/loss_l1": 0.2, "train/kl": 1234.0},
        {"step": 100, "eval/psnr_db": 26.85},
        {"step": 200, "eval/psnr_db": 25.0},
    ]
    page = page_of(write_run(tmp_path / "run", lines, config(task="autoencoder")))
    assert "PSNR of reconstructions 25 dB best 26.9 · untrained 6" in page.text
    for text in ("Reconstructions", "loss_l1", "kl"):
        assert text in page.text


def test_others_are_compared(tmp_path: Path):
    runs = []
    for name, offset in (("first", 0.0), ("second", 0.5)):
        lines = [
            {**line, "train/loss": line["train/loss"] + offset} if "train/loss" in line else line
            for line in diffusion_lines()
        ]
        runs.append(write_run(tmp_path / name, lines, config(run={"name": name})))
    page = page_of(*runs)
    assert "Comparison Run Steps Loss Fréchet distance (EfficientNet-Lite0)" in page.text
    assert "first 200 0.005 100 0.2 28.4" in page.text
    assert "second 200 0.505 100 0.2 28.4" in page.text
    assert page.text.count("second") >= 8, "table, picture, and the legends of six charts"
    assert not (runs[1] / "report.html").exists()


def test_pictures_are_newest_first_and_broken_ones_are_told(tmp_path: Path):
    folder = write_run(tmp_path / "run")
    (folder / "samples" / "step_00000150.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
    (folder / "samples" / "step_best.png").write_bytes(b"")
    page = page_of(folder)
    assert page.attributes("input", "aria-label") == ["Step 200", "Step 100", "Step 0"]
    checked = [values["id"] for tag, values in page.tags if "checked" in values]
    assert checked == ["grid-1"]
    assert page.attributes("label", "for") == ["grid-1", "grid-2", "grid-3"]
    assert "1 unreadable picture left out" in page.text


def test_of_many_pictures_a_selection_is_kept(tmp_path: Path):
    page = page_of(write_run(tmp_path / "run", steps_with_picture=tuple(range(0, 300, 5))))
    labels = page.attributes("input", "aria-label")
    assert len(labels) == len(set(labels)) == MOST_PICTURES
    assert (labels[0], labels[-1]) == ("Step 295", "Step 0")


def test_the_report_needs_no_torch(tmp_path: Path):
    write_run(tmp_path / "run")
    code = (
        "import sys; from trainer.report import main; code = main(sys.argv[1:]);"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "run"], check=True, timeout=60)


def curve(svg: str, colour: str) -> list[tuple[float, float]]:
    """Points of the longest path of straight strokes in a colour; y grows downwards."""
    paths = [
        values["d"]
        for tag, values in Page(svg).tags
        if tag == "path" and f"stroke: var(--{colour})" in values.get("style", "")
    ]
    straight = max((path for path in paths if "C" not in path), key=len)
    numbers = [float(n) for n in straight.replace("M", "").replace("L", "").split()]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_a_chart_draws_what_it_is_given():
    points = [(step, 100.0 - step) for step in (0, 10, 60)]
    marks = [Mark(value=150, colour="untrained"), Mark(value=20, colour="floor")]
    svg = line_chart("c", [Line(points=points, colour="series-1")], marks, axis="from_zero")
    drawn = curve(svg, "series-1")
    (x0, y0), (x1, y1), (x2, y2) = drawn
    assert (x2 - x1) / (x1 - x0) == pytest.approx(5, rel=1e-3)
    assert (y2 - y1) / (y1 - y0) == pytest.approx(5, rel=1e-3)
    pixels_per_unit = (y2 - y0) / 60
    for colour, value in (("untrained", 150), ("floor", 20)):
        heights = {y for _, y in curve(svg, colour)}
        assert len(heights) == 1
        assert heights.pop() == pytest.approx(y0 + (100 - value) * pixels_per_unit, rel=1e-3)
    assert "#" not in svg.replace('"#c-', "").replace("url(#c-", ""), "a colour is left"


def test_values_over_orders_of_magnitude_go_on_a_logarithmic_axis():
    points = [(step, 10.0**-step) for step in range(4)]
    lines = [Line(points=points, colour="a")]
    for svg, even in (
        (line_chart("c", lines), True),
        (line_chart("c", lines, axis="linear"), False),
    ):
        drawn = curve(svg, "a")
        gaps = [b[1] - a[1] for a, b in pairwise(drawn)]
        assert (gaps == pytest.approx([gaps[0]] * 3, rel=1e-3)) is even


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 5000), seed=st.integers(0, 9999))
def test_thinning_keeps_order_and_extremes(n: int, seed: int):
    values = [random.Random(seed + i).random() for i in range(n)]
    points = list(enumerate(values))
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert kept == sorted(set(kept) & set(points))
    assert {min(values), max(values)} <= {value for _, value in kept}


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 500), slope=st.floats(-10, 10), start=st.floats(-10, 10))
def test_smoothing_has_no_lag_and_less_noise(n: int, slope: float, start: float):
    line = [(50 * i, start + slope * i) for i in range(n)]
    for (step, value), (smooth_step, smooth) in zip(line, smoothed(line), strict=True):
        assert step == smooth_step
        assert smooth == pytest.approx(value, abs=1e-6)
    noisy = [(i, float(i % 2)) for i in range(600)]
    middle = [value for _, value in smoothed(noisy)[50:-50]]
    assert max(middle) - min(middle) < 0.1
