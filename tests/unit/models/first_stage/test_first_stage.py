"""The identity: a first stage whose latents are the pixels."""

import numpy as np
import torch

from models.config import AutoencoderConfig, AutoencoderKind
from models.first_stage.autoencoder import fingerprint, load_autoencoder, sample_posterior
from models.first_stage.memory import activation_bytes

CONFIG = AutoencoderConfig(kind=AutoencoderKind.identity, latent_channels=3)
PIXELS = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)


def test_every_pixel_value_comes_back_from_latents_stored_in_half_precision() -> None:
    identity = load_autoencoder(CONFIG)
    images = torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 127.5 - 1
    moments = identity.encode(images).half().float()  # as they are stored
    assert moments.shape == (1, 2, 3, 16, 16)
    latents = sample_posterior(moments, torch.randn(1, 3, 16, 16))
    decoded = ((identity.decode(latents) + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(decoded.permute(0, 2, 3, 1), torch.from_numpy(PIXELS))


def test_it_has_no_weights_and_the_size_of_the_image() -> None:
    identity = load_autoencoder(CONFIG)
    assert identity.state_dict() == {}
    assert identity.to(torch.bfloat16).dtype == torch.float32
    assert CONFIG.downsample_factor == 1
    assert activation_bytes(CONFIG, 16 * 16, 4) == 3 * 16 * 16 * 4
    other = AutoencoderConfig(kind=AutoencoderKind.identity, latent_channels=3, in_channels=1)
    assert fingerprint(identity) != fingerprint(load_autoencoder(other))
