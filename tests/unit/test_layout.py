"""Where the tests lie, and what they may import."""

import ast
import importlib.util
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.processes import PRELOADED

TESTS = ROOT / "tests"
MODULES = sorted(path.relative_to(TESTS) for path in TESTS.rglob("*.py"))
UNIT_TESTS = [path for path in MODULES if path.is_relative_to("unit") and path.match("test_*.py")]
CONFTESTS = [path for path in MODULES if path.name == "conftest.py"]


def imported(path: Path) -> set[str]:
    """The names of all modules that a file imports, and of all that could be modules."""
    found = set()
    for node in ast.walk(ast.parse((TESTS / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_module_imports_a_test_module(path: Path) -> None:
    last_names = {name: name.rpartition(".")[2] for name in imported(path)}
    wrong = [
        name
        for name, last in last_names.items()
        if name.startswith("tests.") and (last.startswith("test_") or last == "conftest")
    ]
    assert not wrong


def test_the_place_of_the_project_is_written_once() -> None:
    own = Path("unit/test_layout.py")
    found = [path for path in MODULES if path != own and "__file__" in (TESTS / path).read_text()]
    assert found == [Path("support/paths.py")]


@pytest.mark.parametrize("path", UNIT_TESTS, ids=str)
def test_unit_tests_mirror_the_tree(path: Path) -> None:
    assert (ROOT / path.parent.relative_to("unit")).is_dir()


@pytest.mark.parametrize("path", CONFTESTS, ids=str)
def test_a_conftest_holds_fixtures_only(path: Path) -> None:
    body = ast.parse((TESTS / path).read_text()).body
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    others = [node for node in body if not isinstance(node, ast.FunctionDef)]
    assert all(isinstance(node, ast.Import | ast.ImportFrom | ast.Expr) for node in others)
    for function in functions:
        decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
        is_fixture = any(text.startswith("pytest.fixture") for text in decorators)
        assert is_fixture or function.name.startswith("pytest_"), function.name


def test_what_commands_are_forked_with_exists() -> None:
    """The server that forks them says nothing of a module that it cannot import."""
    assert all(importlib.util.find_spec(name) for name in PRELOADED)
