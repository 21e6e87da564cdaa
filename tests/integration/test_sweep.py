"""`trainer.evaluate -m`, killed half-way and started again, and its page in a real browser."""

from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from tests.support import sweeps
from tests.support.browser import open_page
from tests.support.processes import run_command
from tests.support.workshop import Workshop, losses
from trainer.report.job import report


class Tables(HTMLParser):
    """The words of every table's cells, row by row."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._inside = False
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        self._inside = tag in ("td", "th")
        if self._inside:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep") / "run"


@pytest.fixture(scope="module")
def command(workshop: Workshop, run: Path) -> list[str]:
    return sweeps.train(workshop, run)


@pytest.fixture(scope="module")
def output(command: list[str], run: Path) -> str:
    """Of the second start, after the first was killed."""
    done = sweeps.kill_half_way(sweeps.start(command), run)
    assert 2 <= done < sweeps.POINTS
    before = {path: path.stat().st_mtime_ns for path in sweeps.points(run)}
    again = sweeps.start(command)
    ended = again.finish()
    assert ended.code == 0, ended.said
    assert ended.said.count("measured before") == done
    assert {path: path.stat().st_mtime_ns for path in before} == before
    return ended.said


def test_a_killed_sweep_ends_with_the_table_of_one_that_was_not(
    command: list[str], output: str, run: Path, tmp_path: Path
) -> None:
    assert sweeps.table(run) == sweeps.undisturbed_table(command, run, tmp_path / "run")
    assert "| dpmpp_2m | 4 " in output
    (folder,) = {path.parent for path in (run / "sweeps").glob("*/table.md")}
    assert (folder / "table.md").read_text() in output
    for name in ("pareto.png", "strip.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 100


def test_a_browser_shows_the_table_and_has_no_complaint(output: str, run: Path) -> None:
    assert report([str(run)]) == 0
    for width in (1200, 390):
        page, log, picture = open_page(run / "report.html", width=width)
        rows = Tables(page).rows
        head = next(row for row in rows if row[:1] == ["sampler"])
        assert head[1] == "sampler.guidance_scale"
        assert "CLIP score" in head
        cells = [row for row in rows if row and row[0] in ("ddim", "dpmpp_2m")]
        assert [row[:2] for row in cells] == [
            [sampler, str(scale)] for sampler in sweeps.SAMPLERS for scale in sweeps.SCALES
        ]
        distances = [f"{row['fd_efficientnet_lite0']:.4g}" for row in sweeps.table(run)]
        assert [row[2] for row in cells] == distances
        assert any(row[-1] == "★" for row in cells)
        assert "CONSOLE" not in log
        assert picture.startswith(b"\x89PNG")


def test_a_point_that_contradicts_itself_is_named_before_any_is_measured(
    command: list[str], output: str, run: Path
) -> None:
    words = [word for word in command if not word.startswith("sampler")]
    words += ["sampler=ddim", "sampler.steps=4", "sampler.guidance_scale=1", "sampler.eta=0,7"]
    done = sweeps.start(words).finish()
    assert done.code == 1
    assert done.err == "error: sampler.eta=7.0 must be a number ≥ 0 and ≤ 1 [share]\n"
    assert len(sweeps.points(run)) == sweeps.POINTS


def test_a_sweep_of_trainings_trains_each_point_as_a_run_of_its_own(
    workshop: Workshop, tmp_path: Path
) -> None:
    words = workshop.overrides("emoji", "train.max_steps=2", run=tmp_path / "run")
    done = run_command("trainer", "-m", *words, "optim.lr=0.001,0.0001")
    assert done.code == 0, done.err
    sweep = tmp_path / "run" / "sweeps"
    for rate in ("0.001", "0.0001"):
        own = sweep / f"optim.lr={rate}"
        assert f"optim.lr={rate}: step 2/2 in {own}\n" in done.out
        alone = tmp_path / rate
        again = run_command("trainer", *words, f"optim.lr={rate}", f"run.dir={alone}")
        assert again.code == 0, again.err
        assert losses(own) == losses(alone)
        assert sorted(losses(own)) == [1, 2]
    assert not (tmp_path / "run" / "checkpoints").exists()
    several = run_command("trainer", "-m", *words, "optim.lr=1,2", WANDB_RUN_ID="one")
    assert several.code == 1
    assert "error: WANDB_RUN_ID is the id of one run" in several.err
    assert "2 of 2 points are unfinished" in several.out
