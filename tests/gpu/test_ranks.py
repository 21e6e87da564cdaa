"""Collectives of the ranks on NCCL, with one rank that does not take itself for alone."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from trainer.runtime.ranks import Ranks

pytestmark = pytest.mark.gpu
_dist: Any = dist  # torch does not export its stores


class One(int):
    """The number 1 that is more than 1: `Ranks` then calls every collective."""

    def __eq__(self, other: object) -> bool:
        return False

    def __gt__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


@pytest.fixture
def ranks(device: torch.device) -> Iterator[Ranks]:
    kind = "nccl" if device.type == "cuda" else "gloo"
    where = device if device.type == "cuda" else None
    dist.init_process_group(kind, store=_dist.HashStore(), rank=0, world_size=1, device_id=where)
    yield Ranks(0, One(1), device)
    dist.destroy_process_group()


def test_every_collective_of_one_rank_returns_its_own_value(ranks: Ranks) -> None:
    third = 1 / 3  # it would change in fp32
    ranks.barrier()
    assert ranks.any(True)
    assert not ranks.any(False)
    assert ranks.maximum(third) == third
    assert ranks.mean(third) == third
    value = {"of": [1, "any", None]}
    assert ranks.gather(value) == [value]
    assert ranks.collect(value) == [value]
    assert ranks.from_main(lambda: value) == value
    for kind in (torch.float64, torch.int64):
        tensors = {"on the CPU": torch.arange(5, dtype=kind)}
        tensors["on the device"] = torch.arange(7, dtype=kind, device=ranks.device)
        before = {name: each.clone() for name, each in tensors.items()}
        ranks.sum_(tensors)
        assert all(torch.equal(tensors[name], before[name]) for name in tensors)
        assert [each.device.type for each in tensors.values()] == ["cpu", ranks.device.type]


def test_ranks_of_a_thread_need_no_gpu(ranks: Ranks) -> None:
    own = ranks.for_thread()
    assert own.device.type == "cpu"
    assert own.begin_maximum(1 / 3).value() == 1 / 3
    assert own.gather("value") == ["value"]
