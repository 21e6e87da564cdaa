"""A new run takes the weights of another bit by bit, or names the one that does not fit."""

import tempfile
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.states import run_state
from trainer.checkpoints.retention import EVERYTHING
from trainer.checkpoints.writer import CheckpointWriter
from trainer.cli import load_config
from trainer.config import Config
from trainer.runs.record import plain_config
from trainer.runtime.ranks import ALONE
from trainer.train import fine_tuning
from trainer.train.fine_tuning import INPUT, Loaded, begin_with
from trainer.train.task import Trained

AVERAGES = ("decay_0.5", "decay_0.9")
CONFIG = load_config(["+experiment=emoji"])


@dataclass(frozen=True)
class Shape:
    """A network: a first convolution, linear layers by name, and buffers of a norm."""

    channels: int
    width: int
    kernel: int
    layers: tuple[tuple[str, int, int], ...]
    norm: int

    def build(self) -> nn.ModuleDict:
        conv = nn.Conv2d(self.channels, self.width, self.kernel)
        layers = {name: nn.Linear(a, b, bias=False) for name, a, b in self.layers}
        unet = nn.ModuleDict({"conv_in": conv, **layers})
        return nn.ModuleDict({"unet": unet, "norm": nn.BatchNorm1d(self.norm)})


@dataclass(frozen=True)
class Task:
    """What `begin_with` uses of a task."""

    trained: dict[str, Trained]
    averaged: str = "model"

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {name: one.module for name, one in self.trained.items()}

    def begin_with(self, state: dict[str, Any]) -> None:
        """Take nothing from the other task's state."""


SIDES = st.integers(1, 4)
LAYERS = st.lists(
    st.tuples(st.sampled_from("abcd"), SIDES, SIDES), max_size=3, unique_by=lambda layer: layer[0]
).map(tuple)
SHAPES = st.builds(
    Shape,
    channels=SIDES,
    width=SIDES,
    kernel=st.sampled_from([1, 3]),
    layers=LAYERS,
    norm=SIDES,
)


def save(shape: Shape, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Write a checkpoint of random tensors; return them by kind."""
    network = shape.build()
    weights = dict(network.named_parameters())
    kinds = {
        kind: {name: torch.randn(value.shape) for name, value in weights.items()}
        for kind in ("weight", *(f"ema.{name}" for name in AVERAGES))
    }
    kinds["buffer"] = {name: value + 3 for name, value in network.named_buffers()}
    writer = CheckpointWriter(folder / "checkpoints", ALONE, EVERYTHING, 3)
    tensors = [(k, n, t) for k in kinds if k != "buffer" for n, t in kinds[k].items()]
    buffers = {f"buffer/{name}": value for name, value in kinds["buffer"].items()}
    writer.save(3, tensors, 0, buffers, run_state(3, *AVERAGES, config=plain_config(CONFIG)))
    writer.finish()
    return kinds


def begin(config: Config, shape: Shape) -> tuple[dict[str, Tensor], Loaded]:
    """The tensors of a network of this shape with which a new run begins."""
    module = shape.build()
    task = Task({"model": Trained(module, averaged=True)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fine_tuning, "build_task", lambda config, ranks: task)
        _, loaded = begin_with(config, ALONE)
    assert loaded is not None
    return module.state_dict(), loaded


def configured(origin: Path, choice: str, widen: bool) -> Config:
    config = deepcopy(CONFIG)
    config.checkpoint.load, config.unet.widen_input = str(origin), widen
    config.checkpoint.load_raw = choice == "weight"
    config.ema.use = "" if choice == "weight" else choice.removeprefix("ema.")
    return config


CHOICES = st.sampled_from(["weight", "ema.", *(f"ema.{name}" for name in AVERAGES)])


@settings(max_examples=200)
@given(shape=SHAPES, more=st.integers(0, 3), choice=CHOICES, widen=st.booleans())
def test_what_fits_is_taken_bit_by_bit_and_new_input_is_zeros_when_asked_for(
    shape: Shape, more: int, choice: str, widen: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        saved = save(shape, Path(folder))
        config = configured(Path(folder), choice, widen)
        wider = replace(shape, channels=shape.channels + more)
        if more and not widen:
            with pytest.raises(ValueError, match=rf"^checkpoint\.load: .*{INPUT} is \[.*widen_inp"):
                begin(config, wider)
            return
        found, loaded = begin(config, wider)
    kind = choice if choice != "ema." else f"ema.{AVERAGES[0]}"
    assert loaded.optimizer_of is None
    assert str(loaded.about["weights"]).endswith("raw weights" if kind == "weight" else kind[4:])
    expected = {**saved[kind], **saved["buffer"]}
    assert found.keys() == expected.keys()
    assert not found[INPUT][:, shape.channels :].any()
    found[INPUT] = found[INPUT][:, : shape.channels]
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


@settings(max_examples=200)
@given(shape=SHAPES, other=SHAPES, choice=CHOICES, widen=st.booleans())
def test_any_other_shape_is_refused_by_the_name_of_a_tensor(
    shape: Shape, other: Shape, choice: str, widen: bool
) -> None:
    here, there = (
        {n: list(t.shape) for n, t in s.build().state_dict().items()} for s in (other, shape)
    )
    if widen and here[INPUT][1] > there[INPUT][1]:
        there[INPUT][1] = here[INPUT][1]
    wrong = [n for n in here.keys() | there.keys() if here.get(n) != there.get(n)]
    with tempfile.TemporaryDirectory() as folder:
        save(shape, Path(folder))
        config = configured(Path(folder), choice, widen)
        if not wrong:
            begin(config, other)
            return
        with pytest.raises(
            ValueError, match=r"^checkpoint\.load: .* is of another network"
        ) as error:
            begin(config, other)
    lines = [
        f": {n} is {there.get(n, 'missing')} there, and {here.get(n, 'missing')} here"
        for n in wrong
    ]
    assert any(line in str(error.value) for line in lines)
