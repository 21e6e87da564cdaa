"""Metrics of an interval, recomputed by hand, on a clock that the tests turn."""

from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch

from trainer.config import Precision
from trainer.engine.engine import StepResult
from trainer.runtime.ranks import ALONE, Ranks
from trainer.train import meter as module
from trainer.train.meter import Meter
from trainer.train.task import Loss

CPU = torch.device("cpu")
PEAK = 1e11
"""FLOP/s of a device, in tests of MFU."""


class Clock:
    """Stands in for the module `time`: seconds pass only in `sleep`."""

    def __init__(self) -> None:
        self._now_s = 1000.0

    def perf_counter(self) -> float:
        return self._now_s

    def sleep(self, seconds: float) -> None:
        self._now_s += seconds


class FirstOfTwo(Ranks):
    """Rank 0 of two; every sum over both ranks adds what rank 1 has of that name."""

    others: Mapping[str, list[float] | list[list[float]]] = {
        "table": [[0.0, 3.0], [0.0, 6.0]],  # seconds in forward passes, and of waiting
        "train/loss": [5.0, 1.0],
        "optim/skipped_share": [0.0, 1.0],
    }

    def sum_(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensor += torch.tensor(self.others[name], dtype=torch.float64)


class Unconnected(Ranks):
    """A rank whose sums over all ranks are its own."""

    def sum_(self, tensors: Mapping[str, torch.Tensor]) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module, "time", found)
    return found


def train(
    meter: Meter, clock: Clock, *, loss: float = 1.0, wait_s: float = 1.0, applied: bool = True
) -> None:
    """A step of 4 s over 12 images: a wait for data, 0.5 s in the forward pass, and the rest."""
    clock.sleep(wait_s)
    meter.waited(wait_s)
    with meter.forward():
        clock.sleep(0.5)
    count = torch.tensor(4.0)
    meter.loss(Loss(torch.tensor(loss), {"train/loss": (loss * count, count)}))
    clock.sleep(3.5 - wait_s)
    meter.step(StepResult(applied=applied, grad_norm=10 * loss, lr=loss / 100), images=12)


def test_the_metrics_of_an_interval_and_their_units(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Linux counts the peak memory of a process in KiB
    monkeypatch.setattr("resource.getrusage", lambda _: SimpleNamespace(ru_maxrss=3 * 2**20))
    meter = Meter(ALONE, Precision.fp32)
    train(meter, clock, loss=1.0)
    train(meter, clock, loss=2.0, wait_s=3.0, applied=False)
    assert meter.values() == pytest.approx(
        {
            "train/loss": 1.5,
            "optim/skipped_share": 0.5,
            "optim/lr": 0.02,  # the last step's
            "optim/grad_norm": 20.0,
            "throughput/images_per_s": 24 / 8,
            "throughput/images_per_s_per_device": 24 / 8,
            "time/step_s": 4.0,
            "time/data_wait_pct": 100 * (1 + 3) / 8,
            "time/data_wait_max_pct": 100 * (1 + 3) / 8,
            "time/data_wait_max_rank": 0,
            "time/forward_s": 0.5,  # a step's
            "time/slowest_rank": 0,
            "time/slowest_rank_ratio": 1.0,
            "memory/max_allocated_gib": 3.0,
        }
    )


def test_an_interval_begins_where_the_last_one_ends(clock: Clock) -> None:
    meter = Meter(ALONE, Precision.fp32)
    train(meter, clock, loss=7.0, wait_s=3.0, applied=False)
    meter.values()
    clock.sleep(4.0)  # the log's own time belongs to the next interval
    train(meter, clock)
    values = meter.values()
    assert values["train/loss"] == 1.0
    assert values["optim/skipped_share"] == 0
    assert values["time/step_s"] == 8
    assert values["throughput/images_per_s"] == 12 / 8
    assert values["time/data_wait_pct"] == 100 * 1 / 8
    assert values["time/forward_s"] == 0.5


def test_a_pause_is_in_no_rate_and_in_no_share(clock: Clock) -> None:
    meter = Meter(ALONE, Precision.fp32)
    train(meter, clock)
    clock.sleep(100.0)
    meter.exclude(100.0)
    train(meter, clock)
    values = meter.values()
    assert values["throughput/images_per_s"] == 24 / 8
    assert values["time/step_s"] == 4
    assert values["time/data_wait_pct"] == 100 * 2 / 8


def test_two_ranks_add_their_losses_and_name_the_one_that_waits_and_the_slow_one(
    clock: Clock,
) -> None:
    meter = Meter(FirstOfTwo(0, 2, CPU), Precision.fp32)
    train(meter, clock, loss=2.0)
    train(meter, clock, loss=2.0)
    assert meter.state() == meter.state()  # the other rank's sums are added to copies
    values = meter.values()
    assert values["train/loss"] == (4 * 2.0 + 4 * 2.0 + 5.0) / (4 + 4 + 1)
    assert values["throughput/images_per_s"] == 24 / 8  # a step's images are those of all ranks
    assert values["throughput/images_per_s_per_device"] == 24 / 8 / 2
    assert values["time/data_wait_pct"] == 100 * (2 + 6) / 2 / 8
    assert values["time/data_wait_max_pct"] == 100 * 6 / 8
    assert values["time/data_wait_max_rank"] == 1
    assert values["time/forward_s"] == (1 + 3) / 2 / 2  # the mean rank's, in each of two steps
    assert values["time/slowest_rank"] == 1
    assert values["time/slowest_rank_ratio"] == 3 / 2


@pytest.mark.parametrize(("ranks", "mfu_pct"), [(ALONE, 6.0), (FirstOfTwo(0, 2, CPU), 3.0)])
def test_mfu_is_the_share_of_the_peak_of_all_devices(
    ranks: Ranks, mfu_pct: float, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "peak_flops_per_s", lambda device, precision: PEAK)
    meter = Meter(ranks, Precision.bf16)
    train(meter, clock)
    assert "throughput/mfu_pct" not in meter.values()  # FLOPs are not counted yet
    meter.flops_per_image = 2e9
    train(meter, clock)
    # 12 images of 2 GFLOP in 4 s are 6 GFLOP/s, of a peak of 100 GFLOP/s a device
    assert meter.values()["throughput/mfu_pct"] == pytest.approx(mfu_pct)


def test_there_is_no_mfu_without_a_known_peak(clock: Clock) -> None:
    meter = Meter(ALONE, Precision.bf16)
    meter.flops_per_image = 2e9
    train(meter, clock)
    assert "throughput/mfu_pct" not in meter.values()


def test_an_interval_that_is_cut_in_two_has_the_means_of_the_whole(clock: Clock) -> None:
    whole, before, after = (Meter(ALONE, Precision.fp32) for _ in range(3))
    for meter in (whole, before):
        train(meter, clock, loss=1.0, applied=False)
    after.load(before.state())
    for meter in (whole, after):
        train(meter, clock, loss=4.0)
    expected, found = whole.values(), after.values()
    for name in ("train/loss", "optim/skipped_share"):
        assert found[name] == expected[name]
    assert found["train/loss"] == 2.5
    assert before.values()["train/loss"] == 1.0  # reading the state changes nothing


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_rank_goes_on_from_the_sums_of_all(rank: int) -> None:
    saved = {"train/loss": [8.0, 4.0], "optim/skipped_share": [1.0, 2.0]}
    meter = Meter(Unconnected(rank, 2, CPU), Precision.fp32)
    meter.load(saved)
    # the others have the same names, because all ranks add up one name after another
    empty = {"train/loss": [0.0, 0.0]}
    assert meter.state() == (saved if rank == 0 else empty)


def test_a_gpu_shows_the_peaks_of_the_interval_alone(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = {"allocated": 0, "reserved": 0}

    def use(gib: int) -> None:
        peaks.update(
            allocated=max(peaks["allocated"], gib * 2**30),
            reserved=max(peaks["reserved"], (gib + 1) * 2**30),
        )

    def reset(device: torch.device) -> None:
        peaks.update(allocated=0, reserved=0)

    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: peaks["allocated"])
    monkeypatch.setattr("torch.cuda.max_memory_reserved", lambda device: peaks["reserved"])
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", reset)
    use(40)  # the rehearsal
    meter = Meter(Ranks(0, 1, torch.device("cuda")), Precision.fp32)
    step = StepResult(applied=True, grad_norm=1.0, lr=0.1)

    def shown(gib: int) -> tuple[float, float]:
        use(gib)
        clock.sleep(1.0)
        meter.step(step, images=1)
        values = meter.values()
        return values["memory/max_allocated_gib"], values["memory/max_reserved_gib"]

    assert shown(20) == (20, 21)
    assert shown(10) == (10, 11)
    use(60)  # an evaluation
    meter.exclude(0.0)
    assert shown(15) == (15, 16)
