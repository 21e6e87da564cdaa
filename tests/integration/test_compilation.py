"""Compiled blocks compute what the others do.

Inductor compiles for minutes, so it is a campaign. Here Dynamo's graphs run as they are.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.layers.blocks import ResBlock, SpatialAttention
from models.layers.transformer import SpatialTransformer
from tests.support.workshop import Workshop, losses
from trainer.checkpoints.reader import latest_checkpoint
from trainer.train.loop import fit


@pytest.mark.campaign
@pytest.mark.parametrize("experiment", ["emoji", "emoji_autoencoder"])
def test_compiled_blocks_have_the_loss_curve_of_the_others(
    experiment: str, workshop: Workshop, tmp_path: Path
) -> None:
    curves = []
    for compiled in ("false", "true"):
        run = tmp_path / compiled
        options = ["train.max_steps=4", "data.flip=false", f"train.compile={compiled}"]
        assert fit(workshop.config(experiment, *options, run=run)) == 0
        curves.append(losses(run))
    plain, compiled = curves
    assert sorted(plain) == sorted(compiled) == [1, 2, 3, 4]
    assert max(abs(plain[step] - compiled[step]) for step in plain) < 1e-5


@pytest.mark.parametrize(
    ("experiment", "blocks"),
    [
        ("emoji", {ResBlock, SpatialTransformer}),
        ("ffhq_256", {ResBlock, SpatialAttention}),
        ("emoji_autoencoder", {ResBlock}),
    ],
)
def test_a_compiled_training_runs_the_graphs_of_its_blocks_and_saves_under_their_own_names(
    experiment: str,
    blocks: set[type],
    workshop: Workshop,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compile_module, compiled, ran = nn.Module.compile, set[type](), list[int]()

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        def run(*values: torch.Tensor) -> Any:
            ran.append(len(inputs))
            return graph(*values)

        return run

    def compile_by_backend(module: nn.Module, **options: Any) -> None:
        compiled.add(type(module))
        compile_module(module, backend=backend, **options)

    monkeypatch.setattr(nn.Module, "compile", compile_by_backend)
    curves, shapes = [], []
    for choice in ("false", "true"):
        run = tmp_path / choice
        assert not ran
        options = ["train.max_steps=2", "data.flip=false", f"train.compile={choice}"]
        assert fit(workshop.config(experiment, *options, run=run)) == 0
        curves.append(losses(run))
        checkpoint = latest_checkpoint(run / "checkpoints")
        assert checkpoint is not None
        shapes.append(checkpoint.shapes("weight"))
    assert compiled == blocks
    assert len(ran) > 8
    plain, fast = curves
    assert sorted(plain) == sorted(fast) == [1, 2]
    assert plain[1] == fast[1]
    # graphs add up some gradients in another order, and Adam's first step divides by their size
    assert abs(plain[2] - fast[2]) < 1e-5
    assert shapes[0] == shapes[1]
