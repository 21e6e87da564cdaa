"""Encode images to moments of the posterior, and captions to text tokens."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.shards import transforms
from data.shards.annotations import AnnotationRule
from data.shards.captions import CaptionRule
from models.conditioning.conditioners import build_conditioner
from models.conditioning.text import Text, text_fingerprint
from models.first_stage import autoencoder
from models.first_stage.autoencoder import load_autoencoder
from trainer.config import Config, Precision
from trainer.precompute.decode import IMAGE


class DeviceEvent:
    """A point in the device's queue of work; on the CPU, a point in time.

    `torch.cuda.Event`, for any device.
    """

    def __init__(self, device: torch.device) -> None:
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        self._time_s = time.perf_counter()

    def wait(self) -> None:
        """Wait until the device has done all work before this event."""
        if self._event is not None:
            self._event.synchronize()

    def since(self, earlier: "DeviceEvent") -> float:
        """Return the seconds from an earlier event; the device must have passed both."""
        if self._event is not None and earlier._event is not None:
            return earlier._event.elapsed_time(self._event) / 1000
        return self._time_s - earlier._time_s


class Encoded(NamedTuple):
    """The encoded batch; its copy to the host is complete once `wait` returns."""

    arrays: dict[str, Sequence[Tensor]]
    """Member of the latent shard → of each sample moments [2, C, h, w], or text tokens [T, D], of
    several captions [captions, T, D]; float16 on the CPU."""
    forward: tuple[DeviceEvent, DeviceEvent]
    """Start and end of the forward passes."""
    arrived: DeviceEvent
    """End of the copies to the host."""

    def wait(self) -> float:
        """Wait for the arrays; return the seconds of the forward passes."""
        self.arrived.wait()
        begin, end = self.forward
        return end.since(begin)


class Encoder:
    """The frozen first stage and, with data.store_text, the text encoder.

    Raises: ValueError or FileNotFoundError that names the option of a network that cannot be
    loaded.
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
            "transform": transforms.transform_name(config.data.image_size, config.data.pixels),
            "precision": config.precompute.precision.value,
            "flip": self._flip,
            "text_encoder": text_fingerprint(text) if text else "",
            "captions": CaptionRule.of(config.data).several if text else "",
            "annotations": " ".join(AnnotationRule(config.data.maps, config.data.boxes).members),
            "images": IMAGE if config.data.store_images else "",
        }
        self._first_stage = first_stage.to(self._device, self._dtype).eval()
        self._text = text.to(self._device) if text else None

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, captions: Sequence[Sequence[str]]) -> Encoded:
        """Start to encode a batch, and return without waiting for the device.

        pixels: [B, H, W, 3] uint8 on the CPU; captions: [B], all captions of each sample.
        """
        if self._device.type == "cuda":
            pixels = pixels.pin_memory()  # only copies from pinned memory run in parallel
        images = pixels.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        images = (images.float() / 127.5 - 1).to(self._dtype)
        begin = DeviceEvent(self._device)
        moments = self._first_stage.encode(images)
        arrays = {"moments.npy": moments}
        if self._flip:
            arrays["flip.moments.npy"] = self._first_stage.encode(images.flip(3))
        if self._text is not None:
            texts = [text for of_sample in captions for text in of_sample]
            starts = range(0, len(texts), len(pixels))
            parts = [self._text.encode(texts[start : start + len(pixels)]) for start in starts]
            arrays["text.npy"] = torch.cat(parts)
        end = DeviceEvent(self._device)
        host = {name: value.half().to("cpu", non_blocking=True) for name, value in arrays.items()}
        rows: dict[str, Sequence[Tensor]] = {name: list(value) for name, value in host.items()}
        if self.identity["captions"]:
            rows["text.npy"] = host["text.npy"].split([len(of_sample) for of_sample in captions])
        return Encoded(rows, (begin, end), DeviceEvent(self._device))
