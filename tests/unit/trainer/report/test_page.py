import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.pages import EVIL, Page, config, diffusion_lines, page_of, write_run
from trainer.pictures.grids import about_grid
from trainer.pictures.png import encode_png, grid
from trainer.report.job import report
from trainer.report.page import MOST_PICTURES, render
from trainer.runs.events import add_event, event_line
from trainer.runs.history import read_metrics, read_run
from trainer.runs.paths import DATA, SWEEPS
from trainer.runs.sweeps import TABLE, SweepTable


def test_a_diffusion_run_is_told_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_the_page_fetches_nothing_and_ids_are_unique(tmp_path: Path) -> None:
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


def test_what_became_of_the_samples_is_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    assert "Examples" not in page_of(folder).text
    entry = {"fate": "rejected", "reason": "<b>no caption", "count": 1234, "examples": ["a", "b"]}
    facts = {"found": 5000, "samples": 3766, "left_out": [entry], "noted": {"grey": 2}}
    (folder / DATA).write_text(json.dumps(facts))
    text = page_of(folder).text
    assert "Of 5,000 samples found, 3,766 are used." in text
    assert "rejected 1,234 <b>no caption a, b noted 2 grey" in text
    (folder / DATA).write_text('{"found": 5, "samples": 5}')
    assert "Of 5 samples found, 5 are used." in page_of(folder).text
    assert "Examples" not in page_of(folder).text, "a head without rows"
    for damaged in ('{"left_out": 3}', "[]", "{", '{"left_out": [3, {}], "noted": []}'):
        (folder / DATA).write_text(damaged)
        page_of(folder)


def write_sweep(folder: Path, name: str, *, prompt: str = "ddim") -> None:
    rows = [
        ({"sampler": prompt, "sampler.steps": "10"}, {"fd_inception": 30.5, "clip_score": 0.25}),
        ({"sampler": prompt, "sampler.steps": "50"}, {"fd_inception": 20.0, "clip_score": 0.3}),
        ({"sampler": "plms", "sampler.steps": "10"}, {"fd_inception": 44.0, "clip_score": 0.2}),
    ]
    path = folder / SWEEPS / name / TABLE
    path.parent.mkdir(parents=True)
    SweepTable(rows).save(path)


def write_checkpoint(folder: Path, step: int) -> None:
    path = folder / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    files = {"rank_00000.safetensors": {"bytes": 2**31}, "state.json": {"bytes": 2**29}}
    (path / "manifest.json").write_text(json.dumps({"version": 1, "files": files}))


def test_sweeps_checkpoints_and_replaced_samples_are_listed(tmp_path: Path) -> None:
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


def test_damaged_and_hostile_tables_stay_text(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    write_sweep(folder, "good", prompt=EVIL)
    write_sweep(folder, "bad")
    (folder / SWEEPS / "bad" / TABLE).write_bytes(b"PAR1 and no more")
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


def test_hostile_files_stay_text(tmp_path: Path) -> None:
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


def test_hostile_yaml_builds_no_object(tmp_path: Path) -> None:
    folder, trap = write_run(tmp_path / "run"), tmp_path / "trap"
    (folder / "config.yaml").write_text(f"!!python/object/apply:os.mkdir ['{trap}']")
    assert "os.mkdir" in page_of(folder).text
    assert not trap.exists()


@pytest.mark.parametrize("damage", ["missing", "no_metrics", "empty", "no_line"])
def test_no_run_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    folder = tmp_path / "run"
    if damage != "missing":
        folder.mkdir()
    if damage in {"empty", "no_line"}:
        (folder / "metrics.jsonl").write_text("" if damage == "empty" else '{"st\n')
    assert report([str(folder)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert str(folder) in output.err
    assert not (folder / "report.html").exists()


def test_a_bare_metrics_file_is_enough(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "train/loss": 0.5}\n')
    for name in ("config.yaml", "versions.json"):
        (tmp_path / name).write_text(": [broken")
    page = page_of(tmp_path)
    assert tmp_path.name in page.text
    assert "Loss 0.5" in page.text


def test_a_resumed_run_counts_once_and_torn_lines_are_told(tmp_path: Path) -> None:
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
def test_any_noise_between_lines_leaves_the_metrics(noise: list[str], steps: list[int]) -> None:
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
def test_status(
    tmp_path: Path, last_loss: float, last_step: int, age_s: float, status: str
) -> None:
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
def test_extreme_values_still_give_a_page(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    keys = {key for line in diffusion_lines() for key in line if key != "step"}
    line = st.fixed_dictionaries({key: st.sampled_from(EXTREMES) for key in sorted(keys)})
    lines = data.draw(st.lists(line, min_size=2, max_size=4))
    rows = [{"step": step, "train/loss": 1.0} | row for step, row in enumerate(lines)]
    numbers = st.sampled_from([0, -3, float("inf"), float("nan"), "many", [1], None])
    train = {key: data.draw(numbers) for key in ("max_steps", "global_batch_size", "log_every")}
    whole = config(train=train, run=data.draw(numbers), eval={"prompts": data.draw(numbers)})
    folder = write_run(tmp_path_factory.mktemp("extreme") / "run", rows, whole, (0,))
    assert "Training" in page_of(folder).text


def test_an_autoencoder_run_shows_psnr_and_loss_parts(tmp_path: Path) -> None:
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


def test_others_are_compared(tmp_path: Path) -> None:
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


def test_samples_have_their_captions(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps_with_picture=(0,))
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    names = ["a red heart", EVIL, "a\x1bcat"]
    about = about_grid(names, 2)
    (folder / "samples" / "step_00000100.png").write_bytes(encode_png(grid(images, 2), about))
    page = page_of(folder)
    tiles = [values for tag, values in page.tags if tag == "i" and values.get("role") == "img"]
    assert [values["aria-label"] for values in tiles] == ["a red heart", EVIL, "a\\x1bcat"]
    assert "aspect-ratio: 8 / 8; background-position: 14.2857% 14.2857%" in tiles[0]["style"]
    assert "background-size: 275.0000% 275.0000%" in tiles[0]["style"]
    assert "Prompts, row by row" in page.text, "the other picture has no captions"
    (folder / "samples" / "step_00000000.png").unlink()
    assert "Prompts, row by row" not in page_of(folder).text


def test_starts_and_rewinds_are_listed_and_marked(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    assert "History" not in page_of(folder).text
    changed = {"optim.lr": {"old": 1.0, "new": 0.5}}
    add_event(folder, 0, "start")
    add_event(folder, 100, "resume", changed=changed)
    incident = event_line("loss spike: back to step 90", step=120, back_to=90, samples=[])
    (folder / "incidents.jsonl").write_text(f"{incident}\nnonsense\n")
    page = page_of(folder)
    assert "History Time Step Event More" in page.text
    assert re.search(r"120 loss spike: back to step 90 \S+ \S+ 100 resume", page.text)
    assert "100 resume optim.lr: 1.0 → 0.5" in page.text
    assert "resumed went back" in page.text
    strokes = [values.get("style", "") for tag, values in page.tags if tag == "path"]
    charts = sum(tag == "svg" for tag, _ in page.tags)
    assert sum("stroke: var(--bad)" in style for style in strokes) == charts == 8
    (folder / "history.jsonl").write_text('{"time": 1e400, "step": -3, "what": ["x"]}\n{"time": 5}')
    assert "History" in page_of(folder).text


def test_pictures_are_newest_first_and_broken_ones_are_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "samples" / "step_00000150.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
    (folder / "samples" / "step_best.png").write_bytes(b"")
    page = page_of(folder)
    assert page.attributes("input", "aria-label") == ["Step 200", "Step 100", "Step 0"]
    checked = [values["id"] for _, values in page.tags if "checked" in values]
    assert checked == ["grid-1"]
    assert page.attributes("label", "for") == ["grid-1", "grid-2", "grid-3"]
    assert "1 unreadable picture left out" in page.text


def test_of_many_pictures_a_selection_is_kept(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", steps_with_picture=tuple(range(0, 300, 5))))
    labels = page.attributes("input", "aria-label")
    assert len(labels) == len(set(labels)) == MOST_PICTURES
    assert (labels[0], labels[-1]) == ("Step 295", "Step 0")


def test_the_report_needs_no_torch(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    code = (
        "import sys; from trainer.report.job import report; code = report(sys.argv[1:]);"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "run"], check=True, timeout=60)
