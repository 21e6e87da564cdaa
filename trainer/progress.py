"""How far a long job has come, on one line."""

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

LINE_EVERY_S = 60.0


def byte_bar(total_bytes: int, label: str) -> tqdm:
    """A bar of bytes on a terminal; anywhere else a line a minute."""
    every_s = 0.1 if sys.stderr.isatty() else LINE_EVERY_S
    return tqdm(
        total=total_bytes,
        desc=label,
        unit="B",
        unit_scale=True,
        mininterval=every_s,
        maxinterval=every_s,
    )


class Progress:
    """Images done, their rate, the time left, and the encoder's share of the time that went by.

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
        """So many images more, over which the encoder was busy for so many seconds."""
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
        """So many images are no longer to be done here."""
        self._total -= images
        if self._bar is not None:
            self._bar.total = self._total

    @property
    def images_per_s(self) -> float:
        """Since the start."""
        return self._images / (time.perf_counter() - self._start_s)

    @property
    def encoder_share(self) -> float:
        """Share of the time since the start that the encoder was busy."""
        return self._encoder_s / (time.perf_counter() - self._start_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the bar, and say how it went."""
        if self._bar is not None:
            self._bar.close()
        if error is None:
            seconds = time.perf_counter() - self._start_s
            print(
                f"{self._images} images in {tqdm.format_interval(seconds)}: "
                f"{self.images_per_s:.1f} images/s, encoder {self.encoder_share:.1%} of the time",
                flush=True,
            )
