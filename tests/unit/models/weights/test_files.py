"""Weights in the files of torch and of wrappers: read whole, or refused by what is wrong."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from models.weights.files import load_weights, read_weights, unwrapped, widened

OPTION = "unet.weights"


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"conv": nn.Conv2d(2, 3, 1), "norm": nn.BatchNorm2d(3)})


WEIGHTS = network().state_dict()


def loaded(path: Path) -> dict[str, Tensor]:
    """The weights of another random network, after those of the file were loaded."""
    torch.manual_seed(1)
    other = nn.ModuleDict({"conv": nn.Conv2d(2, 3, 1), "norm": nn.BatchNorm2d(3)})
    load_weights(other, path, option=OPTION, described_by="unet.*")
    return other.state_dict()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.full((3,), torch.nan), r"has values that are not finite, in conv\.bias"),
        (torch.tensor([0, torch.inf, 0]), r"has values that are not finite, in conv\.bias"),
        (
            torch.ones(3, dtype=torch.int32),
            r"conv\.bias holds torch\.int32, not torch\.float32",
        ),
    ],
)
def test_values_that_nothing_can_be_trained_from_are_refused(
    value: Tensor, said: str, tmp_path: Path
) -> None:
    save_file({**WEIGHTS, "conv.bias": value}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=said):
        loaded(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_weights_of_less_precision_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({**WEIGHTS, "conv.bias": WEIGHTS["conv.bias"].to(dtype)}, path)
    assert torch.equal(loaded(path)["conv.bias"], WEIGHTS["conv.bias"].to(dtype).float())


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
@pytest.mark.parametrize("key", ["", "state_dict", "module", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.unet."])
def test_files_of_torch_and_of_wrappers_are_read(
    suffix: str, key: str, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"weights{suffix}"
    named = {prefix + name: value for name, value in WEIGHTS.items()}
    torch.save({key: named, "epoch": 3, "args": {"lr": 0.1}} if key else named, path)
    found = loaded(path)
    assert all(torch.equal(found[name], value) for name, value in WEIGHTS.items())
    assert (f"without the prefix {prefix} " in capsys.readouterr().out) == bool(prefix)


def test_a_wrapped_safetensors_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({f"module.{name}": value for name, value in WEIGHTS.items()}, path)
    found = loaded(path)
    assert all(torch.equal(found[name], value) for name, value in WEIGHTS.items())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model": WEIGHTS, "ema": WEIGHTS}, "several sets of tensors, ema, model: save"),
        ({"epoch": 3}, "is a torch file without tensors by name"),
        ([1, 2], "is a torch file without tensors by name"),
        ({"module": {**WEIGHTS, "conv.more": torch.zeros(1)}}, "its conv.more has no place"),
    ],
)
def test_another_torch_file_is_refused(content: object, said: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=rf"^unet\.weights: .*{said}"):
        loaded(path)


PART = st.text("abz_01", min_size=1, max_size=3)
NAME = st.lists(PART, min_size=1, max_size=4).map(".".join)


@settings(max_examples=300, deadline=None)
@given(names=st.sets(NAME, min_size=1, max_size=6), prefix=st.lists(PART, max_size=3))
def test_a_prefix_is_removed_from_all_names_or_from_none(
    names: set[str], prefix: list[str]
) -> None:
    weights = {name: torch.tensor(number) for number, name in enumerate(sorted(names))}
    before = "".join(f"{part}." for part in prefix)
    wrapped = {before + name: value for name, value in weights.items()}
    found = unwrapped(wrapped, set(weights), Path("w"), OPTION)
    assert len(found) == len(weights)
    assert [value.item() for value in found.values()] == list(range(len(weights)))
    lengths = {len(name) - len(short) for name, short in zip(wrapped, found, strict=True)}
    assert len(lengths) == 1
    if set(wrapped) & set(weights):
        assert found.keys() == wrapped.keys()


def test_only_channels_of_the_input_are_added() -> None:
    narrow = {"conv": torch.ones(3, 2, 1, 1), "bias": torch.ones(3)}
    wide = widened(narrow, "conv", torch.empty(3, 5, 1, 1))
    assert wide["conv"].shape == (3, 5, 1, 1)
    assert wide["conv"].sum() == narrow["conv"].sum() == wide["conv"][:, :2].sum()
    for other in (torch.empty(3, 1, 1, 1), torch.empty(3, 2, 1, 1)):
        assert torch.equal(widened(narrow, "conv", other)["conv"], narrow["conv"])
    assert widened(narrow, "conv", torch.empty(4, 5, 3, 3))["conv"].shape == (3, 5, 1, 1)
    assert widened(narrow, "missing", torch.empty(3, 5, 1, 1)).keys() == narrow.keys()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^unet\.weights: no file at .*none\.bin"):
        read_weights(tmp_path / "none.bin", OPTION)
