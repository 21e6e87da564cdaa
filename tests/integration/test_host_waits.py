"""A training step reads no number of a device but those that DeepSpeed reads."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from torch import Tensor

from tests.support.host_waits import HostWaits, cause
from tests.support.workshop import Workshop
from trainer.train.loop import fit

SHORT, LONG = 2, 6
ALLOWED = {0: 1, 1: 0, 2: 0}
"""Waits a step outside of DeepSpeed, by stage; at stage 0 the trainer looks for infinities."""


def counting(method: Callable[..., object], places: Counter[str]) -> Callable[..., object]:
    def call(tensor: Tensor, *given: object, **named: object) -> object:
        places[cause()] += 1
        return method(tensor, *given, **named)

    return call


def waits(
    workshop: Workshop, folder: Path, monkeypatch: pytest.MonkeyPatch, steps: int, *options: str
) -> Counter[str]:
    """What the main thread waits for in a run of so many steps, which logs and saves once."""
    config = workshop.config(
        "emoji",
        *options,
        f"train.max_steps={steps}",
        "train.log_every=100",
        run=folder / str(steps),
    )
    counted = HostWaits()
    with monkeypatch.context() as patched, counted:
        for name in ("cpu", "tolist", "numpy"):
            method = getattr(Tensor, name)
            patched.setattr(Tensor, name, counting(method, counted.places))
        assert fit(config) == 0
    return counted.places


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_step_waits_for_the_device_in_deepspeed_alone(
    stage: int, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = partial(waits, workshop, tmp_path, monkeypatch)
    few, many = count(SHORT, f"deepspeed.stage={stage}"), count(LONG, f"deepspeed.stage={stage}")
    found = {place: number / (LONG - SHORT) for place, number in (many - few).items()}
    of_deepspeed = found.pop("deepspeed", 0.0)
    assert sum(found.values()) == ALLOWED[stage], found
    assert (of_deepspeed > 0) == (stage > 0), "the counter sees what DeepSpeed reads"
