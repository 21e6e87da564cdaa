"""Which options may differ from a checkpoint's, by use of the checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.checkpoints.identity import (
    RULES,
    SAME,
    Rule,
    Use,
    check_draw,
    check_resume,
    differences,
    find_rules,
)
from trainer.cli import load_config
from trainer.config import Config, Task
from trainer.config.tasks import TASKS
from trainer.options import paths, sections
from trainer.runs.record import plain_config

PATH = Path("runs/emoji/demo/checkpoints/step_00000004")
LEAVES = [
    option.path for section in sections() for option in section.options if "[]" not in section.path
]
CONFIG = load_config(["+experiment=emoji"])


def saved(config: Config, changes: Mapping[str, object]) -> dict[str, Any]:
    """The config as a checkpoint holds it, with other values at these paths."""
    tree = plain_config(config)
    for path, value in changes.items():
        *sections, name = path.split(".")
        place = tree
        for section in sections:
            place = place[section]
        place[name] = value
    return tree


def test_every_option_is_classed_by_its_own_entry_or_its_sections() -> None:
    assert set(RULES) <= set(paths())
    tops = {path.partition(".")[0] for path in LEAVES}
    assert tops <= set(RULES), "give the new section an entry in RULES"


def test_an_option_without_an_entry_may_not_differ() -> None:
    assert find_rules("anything.new") == SAME
    assert find_rules("unet.anything_new") == SAME


@pytest.mark.parametrize("use", Use)
def test_the_same_config_has_no_differences(use: Use) -> None:
    assert differences(CONFIG, plain_config(CONFIG), use) == []


READ = [path for path in LEAVES if not path.startswith(tuple(TASKS[Task.diffusion].unread))]


@settings(max_examples=300, deadline=None)
@given(changed=st.sets(st.sampled_from(READ), max_size=12), use=st.sampled_from(Use))
def test_each_changed_option_is_found_once_and_by_its_rule(changed: set[str], use: Use) -> None:
    other = saved(CONFIG, dict.fromkeys(changed, "another value"))
    found = {one.path: one for one in differences(CONFIG, other, use)}
    rules = {path: getattr(find_rules(path), use) for path in changed}
    assert found.keys() == {path for path, rule in rules.items() if rule is not Rule.free}
    for path, one in found.items():
        assert one.old == "another value"
        assert one.rule is rules[path]
    refused = [path for path, rule in rules.items() if rule is Rule.refused]
    if use is Use.resume and refused:
        with pytest.raises(ValueError) as raised:
            check_resume(CONFIG, other, PATH)
        line = str(raised.value)
        assert "\n" not in line
        assert all(f"{path} was another value, is " in line for path in refused)


FIRST_STAGE = load_config(["+experiment=emoji_autoencoder_gan"])


@pytest.mark.parametrize(
    ("path", "before", "rule"),
    [
        ("autoencoder.loss.gan_weight", 0.0, Rule.refused),
        ("autoencoder.loss.gan_weight", 0.25, Rule.told),
        ("autoencoder.codebook_decay", 0.99, Rule.refused),
        ("autoencoder.loss.kl_weight", 1.0, Rule.told),
        ("autoencoder.loss.discriminator.layers", 7, Rule.refused),
    ],
)
def test_a_number_may_change_but_not_remove_a_part_of_the_network(
    path: str, before: float, rule: Rule
) -> None:
    (found,) = differences(FIRST_STAGE, saved(FIRST_STAGE, {path: before}), Use.resume)
    assert (found.path, found.rule) == (path, rule)


def test_options_of_another_task_are_not_compared_in_training() -> None:
    first_stage = saved(FIRST_STAGE, {"unet.heads": [64], "diffusion.num_timesteps": 7})
    assert differences(FIRST_STAGE, first_stage, Use.resume) == []
    denoiser = saved(CONFIG, {"autoencoder.loss.l1_weight": 7.0})
    assert differences(CONFIG, denoiser, Use.resume) == []


def test_an_option_added_since_the_checkpoint_had_its_default() -> None:
    old = plain_config(CONFIG)
    del old["unet"]["resblock_updown"], old["guards"]
    assert differences(CONFIG, old, Use.resume) == []
    changed = load_config(["+experiment=emoji", "unet.resblock_updown=true"])
    (found,) = differences(changed, old, Use.resume)
    assert str(found) == "unet.resblock_updown was false, is true"
    assert found.rule is Rule.refused


def test_an_option_removed_since_the_checkpoint_is_told() -> None:
    (found,) = check_resume(CONFIG, saved(CONFIG, {"unet.dropout": 0.1}), PATH)
    assert str(found) == "unet.dropout was 0.1, is null"


def test_values_are_spelt_like_on_a_command_line_and_bounded() -> None:
    other = saved(CONFIG, {"unet.heads": [9, 9, 9], "train.precision": "bf16", "optim.lr": 5e-4})
    with pytest.raises(
        ValueError, match=r"^run\.dir: .*step_00000004 .*unet\.heads was \[9,9,9\],"
    ):
        check_resume(CONFIG, other, PATH)
    told = {one.path: str(one) for one in differences(CONFIG, other, Use.resume)}
    assert told["train.precision"] == "train.precision was bf16, is fp32"
    assert told["optim.lr"] == "optim.lr was 0.0005, is 0.001"
    (long,) = check_resume(CONFIG, saved(CONFIG, {"eval.prompts": ["x" * 10_000]}), PATH)
    assert len(str(long)) < 250


def test_drawing_needs_the_model_and_tells_the_rest() -> None:
    of_training = saved(CONFIG, {"optim.lr": 9.0, "run.seed": 9, "diffusion.loss_weight": "other"})
    assert check_draw(CONFIG, of_training, PATH, "run.dir") == ""
    moved = saved(CONFIG, {"conditioner.pretrained": "elsewhere.safetensors"})
    assert "conditioner.pretrained was elsewhere" in check_draw(CONFIG, moved, PATH, "run.dir")
    for path in ("unet.heads", "diffusion.prediction_type", "conditioner.features"):
        with pytest.raises(ValueError, match=rf"^checkpoint\.load: .*{path} was other, is "):
            check_draw(CONFIG, saved(CONFIG, {path: "other"}), PATH, "checkpoint.load")
