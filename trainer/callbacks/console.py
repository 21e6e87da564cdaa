"""Numbers on standard output: a progress bar on a terminal, lines in a log file."""

import sys
from pathlib import Path

from tqdm import tqdm

from trainer.callbacks.callback import Callback
from trainer.runs.evaluations import Values

SHOWN = {
    "train/loss": ("loss", "{:.4f}"),
    "optim/lr": ("lr", "{:.1e}"),
    "optim/grad_norm": ("grad", "{:.2f}"),
    "throughput/images_per_s": ("images/s", "{:.1f}"),
    "throughput/mfu_pct": ("mfu %", "{:.1f}"),
    "time/data_wait_pct": ("wait %", "{:.1f}"),
}
SLOW = 1.25
"""Ratio of a rank's forward time to the mean from which the rank counts as slow."""


class Console(Callback):
    """Shows the numbers of a training on standard output."""

    def __init__(self, first_step: int, max_steps: int) -> None:
        self._max_steps = max_steps
        self._bar = (
            tqdm(total=max_steps, initial=first_step, unit="step", dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )

    def metrics(self, step: int, values: Values) -> None:
        """Show training metrics in the bar or on a line, and evaluations on a line."""
        evaluation = {name: value for name, value in values.items() if name.startswith("eval/")}
        if evaluation:
            shown = [f"{n.removeprefix('eval/')} {_short(v)}" for n, v in evaluation.items()]
            self._print(step, "  ".join(shown))
        shown = [
            f"{label} {form.format(values[name]):>7}"
            for name, (label, form) in SHOWN.items()
            if name in values
        ]
        ratio = values.get("time/slowest_rank_ratio")
        if isinstance(ratio, float) and ratio >= SLOW:
            rank = values["time/slowest_rank"]
            shown.append(f"rank {rank} is slow: {ratio:.2f} x the mean forward pass")
        if shown and self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str("  ".join(shown))
        elif shown:
            if "time/step_s" in values:  # a bar shows the time left by itself
                left_s = (self._max_steps - step) * float(values["time/step_s"])
                shown.append(f"{tqdm.format_interval(left_s)} left")
            self._print(step, "  ".join(shown))

    def picture(self, step: int, path: Path) -> None:
        """Print the path of the picture."""
        self._print(step, str(path))

    def rewound(self, step: int) -> None:
        """Set the bar back."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """End the bar; it stays on the screen."""
        if self._bar is not None:
            self._bar.close()

    def _print(self, step: int, text: str) -> None:
        line = f"step {step:>{len(str(self._max_steps))}}/{self._max_steps}  {text}"
        if self._bar is not None:
            self._bar.write(line)
        else:
            print(line, flush=True)


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
