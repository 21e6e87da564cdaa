"""The loss of a denoiser on a fake GPU: nothing in it waits for the device."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from typing_extensions import override

from models.condition import Condition
from models.conditioning.class_label import ClassLabel
from models.conditioning.conditioner import Conditioner, Inputs, Size
from models.conditioning.conditioners import build_conditioner
from models.conditioning.given import Given
from models.latent_diffusion import LatentDiffusion, LatentScale
from models.layers.attention import padded_sdpa_attention
from models.layers.blocks import use_attention
from models.unet import UNet2DCondition
from tests.support.host_waits import HostWaits
from tests.support.text_encoders import bert, write_clip, write_tokenizer
from tests.support.workshop import NETWORKS, RUN
from trainer.cli import load_config
from trainer.config import Config
from trainer.train.denoising_loss import DenoisingLoss
from trainer.train.task import shapes_only

GPU = torch.device("cuda", 0)
BATCH, SIDE = 3, 8


def config_of(*more: str) -> Config:
    return load_config(["+experiment=emoji", *NETWORKS, *RUN, "unet.context_dim=32", *more])


def options_of(kind: str, folder: Path) -> list[str]:
    """The options of a small conditioner of this kind."""
    if kind == "text":
        config, _ = write_clip(folder)
        return [f"conditioner.model={config.model}", f"conditioner.pretrained={config.pretrained}"]
    if kind == "transformers":
        torch.manual_seed(0)
        bert().save_pretrained(folder)
        write_tokenizer(folder)
        return [f"conditioner.pretrained={folder}", "conditioner.context_length=12"]
    if kind == "none":
        return ["unet.context_dim=0"]
    return ["conditioner.num_classes=4"]


def on_gpu(module: nn.Module) -> nn.Module:
    """The module with fake tensors on a fake GPU; call it within fake mode."""
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    moved: Any = torch.empty_like(tensor, device=GPU)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    table[name] = (
                        nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved
                    )
    return module


def waits(config: Config, conditioner: Conditioner, *, stored: bool = False) -> dict[str, int]:
    """The host waits of a micro batch's forward pass on a fake GPU."""
    arrays = {"moments": torch.randn(BATCH, 2, 4, SIDE, SIDE).half()}
    if stored:
        arrays["text"] = torch.randn(BATCH, 12, 32).half()
    batch = shapes_only(**arrays)
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu(conditioner)
        scale, encode = LatentScale([0.0] * 4, [1.0] * 4), nn.Identity()
        loss = DenoisingLoss(config, scale, conditioner, encode, GPU)
        trained = conditioner if conditioner.trainable else None
        model = on_gpu(LatentDiffusion(UNet2DCondition(config.unet), trained))
        use_attention(model, padded_sdpa_attention)
        batch.drawn = loss.draw(batch)
        moved = batch.tensors(lambda tensor: tensor.to(GPU))
        loss(model, moved)  # the first call keeps the condition of the empty caption
        with HostWaits() as counted:
            assert loss(model, moved).mean.device == GPU
    return counted.places


def small(kind: str, folder: Path) -> Config:
    options = [f"conditioner.kind={kind}", "conditioner.width=32", *options_of(kind, folder)]
    return config_of(*options, "diffusion.offset_noise=0.1")


@pytest.mark.parametrize("kind", ["text", "transformers", "class_label", "none"])
def test_no_loss_waits_for_the_device(kind: str, tmp_path: Path) -> None:
    config = small(kind, tmp_path)
    assert not waits(config, build_conditioner(config.conditioner))


@pytest.mark.parametrize("kind", ["text", "transformers"])
def test_no_loss_on_stored_text_waits_for_the_device(kind: str, tmp_path: Path) -> None:
    config = small(kind, tmp_path)
    assert not waits(config, build_conditioner(config.conditioner), stored=True)


def test_captions_that_are_read_in_the_loss_are_a_wait(tmp_path: Path) -> None:
    class Late(ClassLabel):
        @override
        def prepare(self, given: Given, size: Size) -> Inputs:
            self.given = given
            return {}

        @override
        def forward(self, inputs: Inputs, size: Size) -> Condition:
            ids = super().prepare(self.given, size)
            return super().forward({name: of_each.to(GPU) for name, of_each in ids.items()}, size)

    config = small("class_label", tmp_path)
    assert waits(config, Late(config.conditioner))


@pytest.mark.parametrize(
    "wait",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: bool((tensor > 0).any()),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: tensor + torch.tensor([1.0, 2.0], device=GPU),
        lambda tensor: tensor.cpu(),
    ],
)
def test_the_counter_knows_a_wait(wait: Callable[[Tensor], object]) -> None:
    with FakeTensorMode(), HostWaits() as counted:
        tensor = torch.ones(2, device=GPU)
        assert not counted.places
        with suppress(DataDependentOutputException, DynamicOutputShapeException):
            wait(tensor)
    assert counted.places
