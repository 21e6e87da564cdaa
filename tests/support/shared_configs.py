"""Notice the test that changes a config which several tests share."""

import copy

from trainer.config import Config

_shared: list[tuple[Config, Config]] = []
"""Each config with a copy of what it was."""


def remember(config: Config) -> None:
    _shared.append((config, copy.deepcopy(config)))


def check_unchanged() -> None:
    for config, before in _shared:
        assert config == before, "this test changes a config that others use: dataclasses.replace"
