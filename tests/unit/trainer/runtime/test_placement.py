"""Networks that are lent to a device come back where and as they were."""

from typing import Any, Self

import pytest
import torch
from torch import nn

from trainer.runtime.placement import on_device

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("fails", [False, True])
def test_modules_come_back_in_the_mode_of_each_of_their_parts(fails: bool) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    module[1].eval()
    try:
        with on_device([module], CPU):
            assert not any(part.training for part in module.modules())
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert [part.training for part in module.modules()] == [True, True, False]


class Movable(nn.Module):
    """A module that can come back from the device meta, which stands in for a second device.

    kind: of its only tensor.
    """

    def __init__(self, kind: str = "parameter") -> None:
        super().__init__()
        self._kind = kind
        self._values = torch.ones(2)
        self._hold(self._values.clone())

    def to(self, *place: Any, **options: Any) -> Self:
        """place: the device alone."""
        assert not options
        (device,) = place
        self._hold(self._values.clone() if device == CPU else self._values.to(device))
        return self

    def _hold(self, values: torch.Tensor) -> None:
        if self._kind == "parameter":
            self.held = nn.Parameter(values)
        else:
            self.register_buffer("held", values)


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
@pytest.mark.parametrize("fails", [False, True])
def test_modules_come_back_to_where_they_were(fails: bool, kind: str) -> None:
    module, resident = Movable(kind), nn.Linear(2, 2, device="meta")
    try:
        with on_device([module, resident], META):
            assert module.held.is_meta
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert module.held.device == CPU
    assert resident.weight.is_meta


def test_what_was_lent_inside_inference_can_be_trained() -> None:
    module = Movable()
    with torch.inference_mode(), on_device([module], META):
        assert not module.held.is_inference()
    (module.held**2).sum().backward()
    assert module.held.grad is not None


def test_a_module_without_tensors_is_lent_too() -> None:
    with on_device([nn.Identity()], META):
        pass


@pytest.mark.parametrize(("device", "times"), [("cuda", 1), ("cpu", 0)])
def test_the_memory_of_a_gpu_is_free_for_others_afterwards(
    device: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
    with on_device([nn.Identity()], torch.device(device)):
        assert not freed
    assert len(freed) == times
