"""The frozen networks of a latent job: images to moments, captions to text tokens."""

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data import transforms
from models import autoencoder, conditioners
from models.autoencoder import load_autoencoder
from models.conditioners import Text, build_conditioner
from trainer.config import Config, Precision


class Moment:
    """A point in time: where the device's queue of work stands now."""

    def __init__(self, device: torch.device) -> None:
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        self._time_s = time.perf_counter()

    def wait(self) -> None:
        """Return when the device has come here."""
        if self._event is not None:
            self._event.synchronize()

    def since(self, earlier: "Moment") -> float:
        """Seconds between two moments that the device has passed."""
        if self._event is not None and earlier._event is not None:
            return earlier._event.elapsed_time(self._event) / 1000
        return self._time_s - earlier._time_s


class Encoded(NamedTuple):
    """What the networks made of a batch; on its way from the device until `wait` returns."""

    arrays: dict[str, Tensor]
    """By member: moments [B, 2, C, h, w] or text tokens [B, T, D], float16 on the CPU."""
    forward: tuple[Moment, Moment]
    """Where the networks' work began and ended."""
    arrived: Moment

    def wait(self) -> float:
        """Wait for the arrays, and return the seconds that the networks took."""
        self.arrived.wait()
        begin, end = self.forward
        return end.since(begin)


class Encoder:
    """The first stage, and the text encoder where its output is stored.

    Raises: ValueError or FileNotFoundError naming the option of a network that cannot be had.
    """

    def __init__(self, config: Config) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._flip = config.data.flip
        bf16 = config.precompute.precision is Precision.bf16
        self._dtype = torch.bfloat16 if bf16 else torch.float32
        first_stage = load_autoencoder(config.autoencoder)
        text = build_conditioner(config.conditioner) if config.data.store_text else None
        if text is not None and not isinstance(text, Text):
            raise ValueError("data.store_text needs conditioner.kind=text or transformers")
        self.identity: dict[str, Any] = {
            "encoder": autoencoder.fingerprint(first_stage),
            "transform": transforms.describe(config.data.image_size),
            "precision": config.precompute.precision.value,
            "flip": self._flip,
            "text_encoder": conditioners.fingerprint(text) if text else "",
        }
        self._first_stage = first_stage.to(self._device, self._dtype).eval()
        self._text = text.to(self._device) if text else None

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, captions: list[str]) -> Encoded:
        """Encode a batch, without waiting for the device.

        pixels: [B, H, W, 3] uint8 on the CPU.
        """
        if self._device.type == "cuda":
            pixels = pixels.pin_memory()  # only from there are copies made beside the networks
        images = pixels.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        images = (images.float() / 127.5 - 1).to(self._dtype)
        begin = Moment(self._device)
        arrays = {"moments.npy": self._first_stage.encode(images)}
        if self._flip:
            arrays["flip.moments.npy"] = self._first_stage.encode(images.flip(3))
        if self._text is not None:
            arrays["text.npy"] = self._text(captions).tokens
        end = Moment(self._device)
        arrays = {name: value.half().to("cpu", non_blocking=True) for name, value in arrays.items()}
        return Encoded(arrays, (begin, end), Moment(self._device))
