"""docs/architecture.md: its pictures are those of the code, and every stop of its tour exists."""

import ast
import re

import pytest

from docs.draw_architecture import BESIDE, NODES, PICTURES, command, draw_floors, draw_flow, layers
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STOPS = re.findall(r"`([\w/]+\.py)`,\s+`([\w.]+)`", PAGE)


def test_the_pictures_are_those_of_the_code() -> None:
    assert (PICTURES / "flow.svg").read_text(encoding="utf-8") == draw_flow()
    assert (PICTURES / "floors.svg").read_text(encoding="utf-8") == draw_floors()


def test_every_command_is_in_the_picture() -> None:
    doors = {path.parent.name for path in (ROOT / "trainer").glob("*/__main__.py")}
    assert {node.title for node in NODES if node.kind == "command"} == doors
    assert set(layers("trainer")[0]) == doors
    with pytest.raises(FileNotFoundError, match="train is no command"):
        command("train", 0, 0)


def test_boxes_lie_within_the_picture_and_apart() -> None:
    assert all(node.kind == "command" for node in BESIDE)
    for number, one in enumerate(NODES):
        assert 0 <= one.x <= one.x + one.width <= 1000
        for other in NODES[number + 1 :]:
            aside = one.x + one.width < other.x or other.x + other.width < one.x
            assert aside or abs(one.y - other.y) > 54, (one.title, other.title)


def test_the_tour_has_ten_stops() -> None:
    assert re.findall(r"^(\d+)\. \*\*", PAGE, flags=re.M) == [str(n) for n in range(1, 11)]
    for stop in re.split(r"^\d+\. \*\*", PAGE, flags=re.M)[1:]:
        assert re.search(r"`[\w/]+\.py`,\s+`[\w.]+`", stop)


@pytest.mark.parametrize(("path", "name"), STOPS)
def test_a_stop_exists(path: str, name: str) -> None:
    body: list[ast.stmt] = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    for part in name.split("."):
        (found,) = (
            node
            for node in body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part
        )
        body = found.body


@pytest.mark.parametrize("path", re.findall(r"`([\w/]+\.py)`", PAGE))
def test_a_file_exists(path: str) -> None:
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_people_find_the_page(page: str) -> None:
    assert "docs/architecture.md" in (ROOT / page).read_text(encoding="utf-8")
