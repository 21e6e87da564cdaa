"""Every experiment says what it costs, what number to expect, and where both come from."""

import re

import pytest

from tests.support.paths import ROOT
from trainer.cli import load_config
from trainer.plan.forecast import make_forecast, trace_step

FOLDER = ROOT / "conf" / "experiment"
EXPERIMENTS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SOURCES = r"not measured|`trainer\.plan[^`]*`|(?:docs|conf)/[\w/]+\.md|\(table \d+|, table \d+\)"
PLANNED = r"planned ([\d,.]+) GPU-hours of one A100 of 80 GB \(`trainer\.plan ([^`]+)`\)"


def header(experiment: str) -> dict[str, str]:
    """The paragraphs of the comment at the top of an experiment, by their first word."""
    lines = (FOLDER / f"{experiment}.yaml").read_text().partition("\ndefaults:")[0].splitlines()
    text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)
    found = re.findall(r"^(\w+): (.*(?:\n  .*)*)", text, re.MULTILINE)
    return {name: " ".join(paragraph.split()) for name, paragraph in found}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("name", ["Cost", "Expect"])
def test_says_cost_and_number_with_their_source(experiment: str, name: str) -> None:
    paragraph = header(experiment)[name]
    assert re.search(SOURCES, paragraph), paragraph
    for document in re.findall(r"(?:docs|conf)/[\w/]+\.md", paragraph):
        assert (ROOT / document).is_file()


@pytest.mark.parametrize(
    "experiment",
    [
        "ffhq_256",
        "churches_256",
        "imagenet_256",
        "inpainting_256",
        pytest.param("super_resolution_256", marks=pytest.mark.campaign),
        pytest.param("semantic_map_256", marks=pytest.mark.campaign),
        pytest.param("layout_256", marks=pytest.mark.campaign),
        pytest.param("text_256", marks=pytest.mark.campaign),
        pytest.param("own_256", marks=pytest.mark.campaign),
        pytest.param("laion_256", marks=pytest.mark.campaign),
        pytest.param("laion_512", marks=pytest.mark.campaign),
    ],
)
def test_the_plan_still_says_the_planned_hours(experiment: str) -> None:
    found = re.search(PLANNED, header(experiment)["Cost"])
    assert found
    hours, options = found.groups()
    config = load_config([f"+experiment={experiment}", "plan.gpu=a100_80gb", *options.split()])
    assert f"{make_forecast(config, trace_step(config)).gpu_hours:,.1f}" == hours


MEASURED = [name for name in EXPERIMENTS if re.search(r"(?:docs|conf)/", header(name)["Expect"])]


def test_the_demo_and_its_first_stages_have_been_measured() -> None:
    assert {"emoji", "emoji_autoencoder", "emoji_autoencoder_gan"} <= {*MEASURED}


@pytest.mark.parametrize("experiment", MEASURED)
def test_figures_from_documents_stand_there(experiment: str) -> None:
    paragraph = header(experiment)["Expect"]
    (document,) = re.findall(r"(?:docs|conf)/[\w/]+\.md", paragraph)
    text = (ROOT / document).read_text()
    figures = re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", paragraph.partition("(")[0])
    assert figures
    assert all(figure in text for figure in figures)
