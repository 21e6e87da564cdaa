"""Progress of a precompute job, on one line."""

import sys
import time
from typing import Self

from tqdm import tqdm

from trainer.runtime.progress import LINE_EVERY_S


class EncodingProgress:
    """Prints the images done, their rate, the time left, and the encoder's share of the time.

    A bar on a terminal; anywhere else, such as in a job's log file, a line a minute.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._images = 0
        self._encoder_s = 0.0
        self._start_s = self._shown_s = time.perf_counter()
        self._bar = (
            tqdm(total=total, desc="precompute", unit="image", dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )

    def add(self, images: int, encoder_s: float) -> None:
        """Add images done, and the seconds for which the encoder was busy with them."""
        self._images += images
        self._encoder_s += encoder_s
        now_s = time.perf_counter()
        if self._bar is not None:
            self._bar.set_postfix_str(f"encoder {self.encoder_share:.0%}", refresh=False)
            self._bar.update(images)
        elif now_s - self._shown_s >= LINE_EVERY_S:
            self._shown_s = now_s
            left_s = (self._total - self._images) / self.images_per_s
            print(
                f"precompute {self._images}/{self._total} images  "
                f"{self.images_per_s:.1f} images/s  encoder {self.encoder_share:.0%}  "
                f"{tqdm.format_interval(left_s)} left",
                flush=True,
            )

    def skip(self, images: int) -> None:
        """Subtract images from the total: another task encodes them."""
        self._total -= images
        if self._bar is not None:
            self._bar.total = self._total

    @property
    def images_per_s(self) -> float:
        """Images done per second since the start."""
        return self._images / (time.perf_counter() - self._start_s)

    @property
    def encoder_share(self) -> float:
        """Share of the time since the start for which the encoder was busy, in [0, 1]."""
        return self._encoder_s / (time.perf_counter() - self._start_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Close the bar; without an error, print a summary."""
        if self._bar is not None:
            self._bar.close()
        if error is None:
            seconds = time.perf_counter() - self._start_s
            print(
                f"{self._images} images in {tqdm.format_interval(seconds)}: "
                f"{self.images_per_s:.1f} images/s, encoder {self.encoder_share:.1%} of the time",
                flush=True,
            )
