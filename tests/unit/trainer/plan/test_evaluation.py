"""Memory and time of an evaluation, against sums done by hand and traces."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.first_stage.autoencoder import Autoencoder, build_autoencoder
from models.first_stage.memory import activation_bytes
from models.layers.attention import reference_attention
from models.layers.blocks import use_attention
from tests.support.plans import small
from trainer.cli import load_config
from trainer.plan.forecast import make_forecast, trace_step
from trainer.plan.job import summary_lines
from trainer.plan.tracing import LiveBytes, fake_mode, fake_module

EVALUATED = ["eval.every=10", "eval.num_samples=16", "eval.batch_size=8", "sampler.steps=5"]


def test_an_evaluation_costs_what_is_counted_by_hand() -> None:
    config = small("emoji", *EVALUATED, "sampler.guidance_scale=3", "train.max_steps=100")
    traced = trace_step(config, device="cpu")
    forecast = make_forecast(config, traced)
    evaluation, found = forecast.evaluation, traced.evaluation
    assert evaluation is not None
    assert found is not None
    module = traced.step.build_module()
    use_attention(module, reference_attention)  # torch counts no kernel of a CPU
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        traced.step.loss(module, 3)
    assert found.forward_flops == counter.get_total_flops() / 3
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build_autoencoder(config.autoencoder).decode(torch.empty(1, 4, 8, 8))
    assert found.decoding_flops == counter.get_total_flops()
    # 16 images, 5 steps, with and without the condition; this peak is that of fp32
    work = 16 * (5 * 2 * found.forward_flops + found.decoding_flops)
    assert evaluation.seconds == pytest.approx(forecast.machine.products_s(work))
    memory, weights = forecast.memory, 4 * traced.sizes.total
    state = memory.weights + memory.optimizer + memory.ema + weights + found.frozen_bytes
    decoding = 8 * 3 * 16 * 16**2 * 4  # the lowest level's channels at half the resolution
    assert evaluation.phase == "drawing"
    assert evaluation.peak_bytes == pytest.approx(state + 8 * 2 * found.forward_bytes, rel=1e-6)
    assert 8 * 2 * found.forward_bytes > decoding
    without = replace(forecast, evaluation=None)
    assert (forecast.days - without.days) * 86_400 == pytest.approx(11 * evaluation.seconds)


def test_an_evaluation_that_does_not_fit_is_said() -> None:
    config = small("emoji", *EVALUATED)
    forecast = make_forecast(config, trace_step(config, device="cpu"))
    assert forecast.evaluation is not None
    assert forecast.fits
    short = replace(forecast, limit_bytes=forecast.memory.peak)
    assert not replace(short, evaluation=replace(forecast.evaluation, peak_bytes=10**15)).fits
    assert replace(short, evaluation=None).fits
    (line,) = (line for line in summary_lines(forecast) if "an evaluation" in line)
    assert "GiB at its peak, drawing" in line


@pytest.mark.parametrize("experiment", ["laion_512", "churches_256", "emoji"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_a_first_stage_is_that_of_a_trace(experiment: str, dtype: torch.dtype) -> None:
    config = load_config([f"+experiment={experiment}"])
    stage, pixels = config.autoencoder, config.data.image_size
    side, mode = pixels // stage.downsample_factor, fake_mode()
    module = fake_module(lambda: build_autoencoder(stage), dtype, mode).eval()
    assert isinstance(module, Autoencoder)
    bound = activation_bytes(stage, pixels**2, dtype.itemsize)
    with mode, torch.no_grad(), LiveBytes(module) as decoding:
        module.decode(torch.empty(2, stage.latent_channels, side, side, dtype=dtype))
    assert 0.6 * bound < decoding.stretch(0).peak_bytes / 2 < 1.01 * bound
    with mode, torch.no_grad(), LiveBytes(module) as encoding:
        module.encode(torch.empty(2, 3, pixels, pixels, dtype=dtype))
    assert encoding.stretch(0).peak_bytes / 2 < 1.01 * bound
