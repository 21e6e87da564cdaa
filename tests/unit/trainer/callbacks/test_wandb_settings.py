"""W&B's own variables stand between an option that is set and the defaults."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.callbacks.wandb_settings import chosen_mode, environment, init_arguments
from trainer.config import RunConfig, WandbConfig, WandbMode

RUN = RunConfig(experiment="emoji", name="wide", dir="/runs/wide")
AUTO, ONLINE, OFFLINE, DISABLED = WandbMode


@pytest.mark.parametrize(
    ("option", "variables", "mode"),
    [
        (AUTO, {}, OFFLINE),
        (AUTO, {"WANDB_API_KEY": "k"}, ONLINE),
        (AUTO, {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, OFFLINE),
        (AUTO, {"WANDB_API_KEY": "k", "WANDB_MODE": "dryrun"}, OFFLINE),
        (AUTO, {"WANDB_API_KEY": "k", "WANDB_MODE": "Disabled"}, DISABLED),
        (AUTO, {"WANDB_API_KEY": "k", "WANDB_DISABLED": "true"}, DISABLED),
        (AUTO, {"WANDB_DISABLED": "true", "WANDB_MODE": "online"}, DISABLED),
        (AUTO, {"WANDB_DISABLED": "false", "WANDB_MODE": "online"}, ONLINE),
        (AUTO, {"WANDB_API_KEY": "k", "WANDB_MODE": "onlin"}, OFFLINE),
        (OFFLINE, {"WANDB_API_KEY": "k", "WANDB_MODE": "online"}, OFFLINE),
        (ONLINE, {"WANDB_MODE": "disabled", "WANDB_DISABLED": "true"}, ONLINE),
        (DISABLED, {"WANDB_MODE": "online"}, DISABLED),
    ],
)
def test_an_option_wins_over_a_variable_and_this_over_the_default(
    option: WandbMode, variables: dict[str, str], mode: WandbMode
) -> None:
    assert chosen_mode(WandbConfig(mode=option), variables) is mode


def test_names_and_places_follow_the_same_order() -> None:
    variables = {
        "WANDB_PROJECT": "theirs",
        "WANDB_ENTITY": "team",
        "WANDB_NAME": "night",
        "WANDB_RESUME": "must",
        "WANDB_DIR": "/scratch",
    }
    default = init_arguments(WandbConfig(), RUN, "id", {})
    assert default == {
        "project": "latent-foundry",
        "entity": None,
        "name": "emoji/wide",
        "id": "id",
        "resume": "allow",
        "dir": str(Path("/runs/wide").resolve()),
        "mode": "offline",
    }
    theirs = init_arguments(WandbConfig(), RUN, "id", variables)
    assert theirs == default | {
        "project": "theirs",
        "entity": "team",
        "name": "night",
        "resume": "must",
        "dir": str(Path("/scratch").resolve()),
    }
    mine = init_arguments(WandbConfig(project="mine", entity="me"), RUN, "id", variables)
    assert mine == theirs | {"project": "mine", "entity": "me"}


@settings(max_examples=200)
@given(
    st.dictionaries(st.sampled_from(["WANDB_MODE", "WANDB_DISABLED", "WANDB_RESUME"]), st.text())
)
def test_any_words_give_arguments_that_wandb_has(variables: dict[str, str]) -> None:
    found = init_arguments(WandbConfig(), RUN, "id", variables)
    assert found["mode"] in ("online", "offline", "disabled")
    assert found["resume"] in ("allow", "must", "never", "auto")


def test_what_was_read_cannot_override_it_later() -> None:
    variables = {"WANDB_MODE": "online", "WANDB_RUN_ID": "a", "WANDB_API_KEY": "k", "HOME": "/"}
    kept = {"WANDB_API_KEY": "k", "HOME": "/", "WANDB_MODE": "offline"}
    assert environment(variables, "offline") == kept
