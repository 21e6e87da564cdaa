"""What the project says of itself agrees: hooks, CI, version and changelog."""

import re
import tomllib

import yaml

from tests.support.makefile import commands
from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_a_commit_is_checked_as_by_make_lint() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert [hook["entry"] for hook in hooks] == commands("lint")
    assert all(hook["always_run"] and not hook["pass_filenames"] for hook in hooks)


def test_ci_runs_make_test_on_the_oldest_python() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    versions = [step["with"]["python-version"] for step in job["steps"] if "with" in step]
    assert [command.partition("make ")[2] for command in commands] == ["test"]
    assert [f">={version}" for version in versions] == [PROJECT["requires-python"]]


def test_the_readme_lists_every_experiment_and_page() -> None:
    text = (ROOT / "README.md").read_text()
    experiments = [path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")]
    assert [name for name in experiments if f"`{name}`" not in text] == []
    pages = [path.name for path in (ROOT / "docs").glob("*.md")]
    assert [name for name in pages if f"(docs/{name}" not in text] == []


def test_the_changelog_begins_with_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(.+)\] - (?:unreleased|\d{4}-\d{2}-\d{2})$", text, re.MULTILINE)
    assert len(versions) == text.count("\n## ")
    assert versions[0] == PROJECT["version"]
    parts = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert {*parts} <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
