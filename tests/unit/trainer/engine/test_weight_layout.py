"""Convolutions' weights in the order of channels-last, under DeepSpeed on one process."""

import pytest
import torch
from torch import Tensor, nn

from tests.support.cudnn_layouts import Layouts
from trainer.cli import load_config
from trainer.config import Config
from trainer.engine import engine as module
from trainer.engine.engine import Engine
from trainer.engine.weight_layout import ChannelsLastConv2d, wants_channels_last
from trainer.runtime.ranks import join

STAGES = [0, 1, 2, 3]


def config(stage: int, *options: str) -> Config:
    return load_config(
        [
            "+experiment=emoji",
            "train.global_batch_size=3",
            "train.micro_batch_size=3",
            "train.max_steps=10",
            "ema.decays=[0.5]",
            f"deepspeed.stage={stage}",
            *options,
        ]
    )


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.SiLU(), nn.Conv2d(5, 3, (3, 1)), nn.Conv2d(3, 1, 1)
    )


def images(step: int) -> Tensor:
    x = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(step))
    return x.contiguous(memory_format=torch.channels_last)


def trained(engine: Engine, *steps: int) -> dict[tuple[str, str], Tensor]:
    """Every tensor of a checkpoint after these steps."""
    for step in steps:
        engine.backward((engine.model(images(step)) - 1).square().mean())
        assert engine.step(step).applied
    return {(kind, name): tensor for kind, name, tensor in engine.tensors(engine.kinds)}


@pytest.fixture
def channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "wants_channels_last", lambda config, device: True)


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_does_not_know_the_order_of_weights(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trained(Engine(network(), config(stage), join()), 0, 1)
    monkeypatch.setattr(module, "wants_channels_last", lambda config, device: True)
    engine = Engine(network(), config(stage), join())
    found = trained(engine, 0, 1)
    assert found.keys() == plain.keys()
    for key, tensor in found.items():
        assert tensor.is_contiguous()
        torch.testing.assert_close(tensor, plain[key], atol=1e-6, rtol=1e-4)
    other = network()
    other.load_state_dict(engine.ema_weights("decay_0.5"))
    torch.testing.assert_close(
        other.get_parameter("2.weight").detach(), found["ema.decay_0.5", "2.weight"]
    )


@pytest.mark.usefixtures("channels_last")
@pytest.mark.parametrize("stage", STAGES)
def test_a_fresh_engine_goes_on_bit_equal(stage: int) -> None:
    first = Engine(network(), config(stage), join())
    saved = trained(first, 0, 1)
    second = Engine(network(), config(stage), join())
    second.load(lambda kind, name: saved[kind, name], first.adam_steps())
    one, other = trained(first, 2), trained(second, 2)
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.usefixtures("channels_last")
def test_a_tensor_of_another_shape_is_named_by_the_shape_of_the_weight() -> None:
    engine = Engine(network(), config(1), join())
    with pytest.raises(ValueError, match=r"weight/0\.weight is \[5, 2\], not \[5, 2, 3, 3\]"):
        engine.load(lambda kind, name: torch.zeros(5, 2), 0)


@pytest.mark.usefixtures("channels_last")
@pytest.mark.parametrize("stage", STAGES)
def test_convolutions_read_channels_last_weights_after_a_step(stage: int) -> None:
    engine = Engine(network(), config(stage), join())
    trained(engine, 0)
    with Layouts() as layouts:
        engine.backward(engine.model(images(1)).square().mean())
    assert len(layouts.forward) == len(layouts.backward) == 3
    assert all(each.weight and each.input for each in (*layouts.forward, *layouts.backward))
    kinds = [type(layer) for layer in engine.module.children()]
    assert kinds == [ChannelsLastConv2d, nn.SiLU, ChannelsLastConv2d, nn.Conv2d]


def test_only_denoisers_on_gpus_store_weights_so() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    options = "train.channels_last=true"
    assert wants_channels_last(config(1, options), gpu)
    assert not wants_channels_last(config(1, options), cpu)
    assert not wants_channels_last(config(1, "train.channels_last=false"), gpu)
    first_stage = load_config(["+experiment=emoji_autoencoder", options])
    assert not wants_channels_last(first_stage, gpu)
