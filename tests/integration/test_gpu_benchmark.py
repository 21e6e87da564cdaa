"""The GPU benchmark on a CPU: every line of its rows, and what becomes of rows that do not end."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.gpu.rows import (
    ROWS,
    ROWS_ON_SEVERAL,
    Prediction,
    Row,
    figure_lines,
    predictions,
    table,
)
from tests.benchmarks.gpu.runner import Job, Result, judge, run, summary
from tests.support.makefile import commands
from tests.support.paths import ROOT
from tests.support.processes import forks

BENCHMARK = [sys.executable, "-m", "tests.benchmarks.gpu", "--device", "cpu", "--small"]
ON_GPUS_ALONE = {"xformers_ratio"}
PREDICTED = Prediction(1.0, 2.0, "x", "")


def benchmark(folder: Path, *words: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [*BENCHMARK, "--out", str(folder), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + (folder / "gpu.log").read_text()[-4000:]
    assert "cpu, figures mean nothing" in done.stdout
    return json.loads((folder / "gpu.json").read_text())["rows"]


def assert_complete(rows: list[dict[str, Any]]) -> None:
    """All rows ended well, with every figure that is predicted, and judged none of them."""
    for row in rows:
        assert (row["state"], row["why"], row["within"]) == ("done", "", {})
        figures = row["figures"]
        wanted = predictions(ROOT).get(str(row["row"]), {}).keys() - ON_GPUS_ALONE
        assert wanted <= figures.keys()


def test_every_row_runs_with_tiny_networks(tmp_path: Path) -> None:
    rows = benchmark(tmp_path)
    assert [row["row"] for row in rows] == [row.name for row in ROWS]
    assert_complete(rows)
    figures = {str(row["row"]): row["figures"] for row in rows}
    assert figures["correctness"]["tests_failed"] == 0
    assert figures["resume"]["stop_code"] == 85
    assert figures["resume"]["loss_difference"] == 0
    assert figures["faults"]["too_large_named"] == 1
    assert figures["faults"]["nan_steps_skipped"] == 1


@pytest.mark.campaign
def test_every_row_of_several_gpus_runs_on_two_processes(tmp_path: Path) -> None:
    rows = benchmark(tmp_path, "--gpus", "2")
    assert [row["row"] for row in rows] == [row.name for row in ROWS_ON_SEVERAL]
    assert {row["state"] for row in rows} == {"done"}


def test_collectives_run_on_two_processes(tmp_path: Path) -> None:
    (row,) = benchmark(tmp_path, "--gpus", "2", "--rows", "bandwidth")
    assert_complete([row])


def test_no_row_stops_the_others(tmp_path: Path) -> None:
    job = Job("cpu", True, 1, tmp_path, tmp_path / "log")
    rows = [
        (Row("left out", "rows:table", 1, ("torch", "no_such_package"), ""), 9.0),
        (Row("not reached", "rows:table", 10, (), ""), 9.0),
        (Row("fails", "rows:no_such_function", 60, (), ""), 90.0),
        (Row("slow", "correctness:measure", 0.5, (), ""), 9.0),
    ]
    results = [run(row, job, forks, left_s) for row, left_s in rows]
    states = [(one.state, one.why) for one in results]
    assert states[:2] == [
        ("left out", "needs no_such_package"),
        ("not reached", "9 s left of 10"),
    ]
    assert states[2][0] == "failed"
    assert states[2][1].startswith("AttributeError: ")
    assert "no_such_function" in (tmp_path / "log").read_text()
    assert states[3][0] == "failed"
    assert states[3][1].startswith("stopped after ")
    assert "tests_exit_code" not in results[3].figures  # it was killed, not waited for
    assert summary(results).startswith("rows: 0 done, 2 failed, 1 left out, 1 not reached")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the row would run")
def test_without_a_gpu_the_driver_says_so(tmp_path: Path) -> None:
    """Not that it cannot be used in a forked process: that would be so on a GPU, too."""
    words = ["--device", "cuda", "--rows", "steps", "--out", str(tmp_path)]
    done = subprocess.run(
        [*BENCHMARK[:3], *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "steps: failed: RuntimeError: Found no NVIDIA driver" in done.stdout


def test_without_any_package_all_rows_are_left_out(tmp_path: Path) -> None:
    """As on a machine to which nothing was brought."""
    bare = [sys.executable, "-I", "-S", "-c"]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['gpu', '--out', 'out']\n"
    code += "from tests.benchmarks.gpu import __main__; sys.exit(__main__.main())"
    done = subprocess.run([*bare, code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"rows: 0 done, 0 failed, {len(ROWS)} left out" in done.stdout
    assert "steps: left out: needs torch, numpy, yaml" in done.stdout


def test_figures_are_held_against_their_predictions(capsys: pytest.CaptureFixture[str]) -> None:

    result = Result("row", "done", figures={"good": 1.5, "bad": 2.5, "free": 7, "word": "flash"})
    predicted = {"good": PREDICTED, "bad": PREDICTED, "missing": PREDICTED}
    judge(result, predicted, on_gpu=True)
    assert result.within == {"good": True, "bad": False}
    good, bad, free, _ = capsys.readouterr().out.splitlines()[1:]
    assert good.split() == ["good", "1.5", "predicted", "1", "to", "2", "x:", "within"]
    assert bad.endswith("predicted 1 to 2 x: NOT within")
    assert free.split() == ["free", "7"]
    assert summary([result]).endswith("predictions: 1 within, 1 not")
    (line,) = figure_lines({"good": 1.5}, predicted, on_gpu=False)
    assert line.endswith("cpu, figures mean nothing")


def test_the_documented_predictions_are_those_of_the_file() -> None:
    assert table(predictions(ROOT)) in (ROOT / "docs" / "benchmarks.md").read_text()
    names = [row.name for row in (*ROWS, *ROWS_ON_SEVERAL)]
    assert set(predictions(ROOT)) <= set(names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("words", "installs", "ends"),
    [([], False, "--out place"), (["WHEELS=wheels", "GPUS=8"], True, "--out place --gpus 8")],
)
def test_make_gpu(words: list[str], installs: bool, ends: str) -> None:
    made = commands("gpu", "OUT=place", "GPUS=", "WHEELS=", *words)
    assert any("--no-index" in line and line.endswith("wheels/*.whl") for line in made) == installs
    assert made[-1].endswith(ends)
