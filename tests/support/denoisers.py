"""Small denoisers in float64 whose output is known."""

import torch
from torch import Tensor

from models.config import (
    DiffusionConfig,
    NoiseSchedule,
    PredictionType,
    SamplerName,
)
from models.diffusion.samplers import Predict
from models.diffusion.schedules import NoiseLevel

NOISE = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


MIX = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


CONTINUOUS = {NoiseSchedule.edm, NoiseSchedule.flow}


DETERMINISTIC = [name for name in SamplerName if name is not SamplerName.euler_ancestral]


FLOW = DiffusionConfig(schedule=NoiseSchedule.flow, prediction_type=PredictionType.flow)


EDM = DiffusionConfig(schedule=NoiseSchedule.edm)


def randn(generator: torch.Generator) -> Tensor:
    return torch.randn(NOISE.shape, generator=generator, dtype=NOISE.dtype)


def output_of(
    prediction: PredictionType, denoised: Tensor, noise: Tensor, level: NoiseLevel
) -> Tensor:
    match prediction:
        case PredictionType.epsilon:
            return noise
        case PredictionType.sample:
            return denoised
        case PredictionType.v_prediction:
            return level.signal * noise - level.noise * denoised
        case PredictionType.flow:
            return noise - denoised


def network(prediction: PredictionType) -> Predict:
    """A smooth denoiser with bounded latents, in the output of the prediction type."""

    def predict(latents: Tensor, level: NoiseLevel) -> Tensor:
        denoised = torch.tanh(torch.einsum("ij,bjhw->bihw", MIX, latents))
        noise = (latents - level.signal * denoised) / level.noise
        return output_of(prediction, denoised, noise, level)

    return predict


class Recorded:
    """A denoiser that remembers what it was asked."""

    def __init__(self, predict: Predict) -> None:
        self.predict = predict
        self.latents: list[Tensor] = []
        self.levels: list[NoiseLevel] = []

    def __call__(self, latents: Tensor, level: NoiseLevel) -> Tensor:
        self.latents.append(latents)
        self.levels.append(level)
        return self.predict(latents, level)
