"""Choose the scale of the latents that a denoiser trains on."""

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from data.storage.documents import is_json_object, read_json
from data.streams.latents import LatentStream
from models.config import LatentScaling
from models.latent_diffusion import LatentScale
from trainer.config import Config
from trainer.runtime.ranks import Ranks

DIFFUSERS_FACTOR = 0.18215
"""scaling_factor of a first stage of diffusers whose config.json is older than this entry."""


def choose_scale(
    config: Config, ranks: Ranks, stream: LatentStream, told: float | None
) -> LatentScale:
    """Return the scale that diffusion.latent_scale names, and say it; collective.

    told: the factor in the file of unet.weights, if it has one (`load_unet`).
    Raises: ValueError or OSError that names the config path of a factor that cannot be used.
    """
    info = stream.manifest.latents
    assert info is not None
    factor, source = None, "diffusion.scaling_factor"
    match config.diffusion.latent_scale:
        case LatentScaling.factor:
            factor = config.diffusion.scaling_factor
        case LatentScaling.first_batch:
            factor, source = _of_first_batch(ranks, stream), "1 / deviation in the first batch"
        case LatentScaling.auto if config.unet.weights:
            factor, source = _imported(config, told)
            if factor is None:
                ranks.say(
                    "unet.weights: no file tells the scale of the latents of this U-Net, so every "
                    "channel gets mean 0 and variance 1; Stable Diffusion's is "
                    "diffusion.latent_scale=factor diffusion.scaling_factor=0.18215"
                )
        case _:
            pass
    if factor is None:
        return LatentScale(info.mean, info.std)
    ranks.say(f"latents are multiplied by {factor:.6g}: {source}")
    return LatentScale.by_factor(factor, info.shape[0])


def _of_first_batch(ranks: Ranks, stream: LatentStream) -> float:
    """Return 1 / standard deviation of the latents of the first global batch; collective.

    It is that of all channels together, without their means (Rombach et al. 2022, appendix G), and
    the same on any number of ranks: the sums of each sample are added up exactly.
    """
    with closing(stream.steps(0)) as steps:
        moments = [row for batch in next(steps) for row in batch.arrays["moments"].double()]
    own = [
        (mean.sum().item(), (mean.square() + log_variance.exp()).sum().item(), mean.numel())
        for mean, log_variance in moments
    ]
    rows = [row for of_rank in ranks.gather(own) for row in of_rank]
    total, squares, count = map(math.fsum, zip(*rows, strict=True))
    variance = squares / count - (total / count) ** 2
    if variance <= 0:
        raise ValueError(
            f"diffusion.latent_scale=first_batch: the first latents of {stream.option} are all "
            "equal; choose channels or factor"
        )
    return variance**-0.5


def _imported(config: Config, told: float | None) -> tuple[float | None, str]:
    """Return the factor of the model that unet.weights comes from, and the place that tells it.

    A file of CompVis may hold it. diffusers writes it into the config.json of the first stage.
    """
    if told is not None:
        return _checked(told, f"scale_factor in {config.unet.weights}")
    for path in _first_stages(config):
        if not path.is_file():
            continue
        try:
            content: object = read_json(path, below=path.parent)
        except ValueError as error:
            raise ValueError(f"unet.weights: {path} cannot be read: {error}") from error
        if is_json_object(content) and "_class_name" in content:
            factor = content.get("scaling_factor", DIFFUSERS_FACTOR)
            return _checked(factor, f"scaling_factor in {path}")
    return None, ""


def _checked(factor: object, place: str) -> tuple[float, str]:
    if not isinstance(factor, float | int) or not 0 < factor < math.inf:
        raise ValueError(
            f"unet.weights: {place} is {factor!r}, which is no factor; give "
            "diffusion.latent_scale=factor and diffusion.scaling_factor"
        )
    return float(factor), place


def _first_stages(config: Config) -> Iterator[Path]:
    """Yield where diffusers' config.json of the first stage may lie."""
    folder = Path(config.unet.weights).absolute().parent
    if folder.name == "unet":
        yield from (folder.parent / name / "config.json" for name in ("vae", "vqvae"))
    if config.autoencoder.weights:
        yield Path(config.autoencoder.weights).absolute().parent / "config.json"
