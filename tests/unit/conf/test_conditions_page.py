"""The commands of docs/conditions.md name commands, experiments and options that exist."""

import re
import shlex

import pytest

from tests.support.paths import ROOT
from trainer.cli import load_config

PAGE = (ROOT / "docs" / "conditions.md").read_text()
COMMANDS = re.findall(r"^    python -m ([\w.]+) (.+)$", PAGE.replace("\\\n", ""), re.MULTILINE)
KINDS = ("super_resolution", "inpainting", "semantic_map", "layout", "text_transformer")


def test_every_spatial_kind_has_its_commands() -> None:
    configs = [load_config(shlex.split(words)) for _, words in COMMANDS]
    trained = {str(config.conditioner.kind) for config in configs}
    assert set(KINDS) <= trained


@pytest.mark.parametrize("command", sorted({command for command, _ in COMMANDS}))
def test_every_command_exists(command: str) -> None:
    assert (ROOT / command.replace(".", "/") / "__main__.py").is_file()


def test_named_experiments_and_pictures_are_there() -> None:
    for name in re.findall(r"\+experiment=(\w+)", PAGE):
        assert (ROOT / "conf" / "experiment" / f"{name}.yaml").is_file()
    for path in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", PAGE):
        assert (ROOT / "docs" / path).is_file()
