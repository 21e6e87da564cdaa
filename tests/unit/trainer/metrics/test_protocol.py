"""What a protocol depends on, and what it does not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from models.config import ConditionerConfig, DiffusionConfig
from tests.support.small_metric import MeanColour
from trainer.cli import load_config
from trainer.config.choices import Features
from trainer.metrics.protocol import LATER, Protocol, folder_protocol, samples_protocol
from trainer.runtime import rng

REFERENCE = {"dataset": "d" * 64, "num_samples": 38, "seed": 0}
EXTRACTORS = [MeanColour(Features.dinov2)]


def samples(*options: str, device: str = "cpu", conditions: str = "") -> Protocol:
    config = load_config(["+experiment=emoji", *options])
    return samples_protocol(config, EXTRACTORS, REFERENCE, torch.device(device), conditions)


def folder(*options: str) -> Protocol:
    config = load_config(["+experiment=emoji", *options])
    return folder_protocol(config, EXTRACTORS, REFERENCE)


def test_conditions_made_of_other_images_are_another_protocol() -> None:
    first, second = samples(conditions="a" * 64), samples(conditions="b" * 64)
    assert len({samples().hash, first.hash, second.hash}) == 3
    perceptual = "eval.perceptual_features=efficientnet_lite0"
    assert samples(perceptual, conditions="a" * 64).hash != first.hash
    assert samples(perceptual).hash == samples().hash


def test_later_options_change_the_protocol_only_where_they_are_set() -> None:
    defaults: dict[str, Any] = {"diffusion": DiffusionConfig(), "conditioner": ConditionerConfig()}
    drawn: Any = samples().content["samples"]
    for section, options in LATER.items():
        assert options == {name: getattr(defaults[section], name) for name in options}
        assert not options.keys() & drawn[section].keys()
    for option in ("diffusion.latent_scale=channels", "conditioner.degradation=bsr_light"):
        assert samples(option).hash != samples().hash


def test_a_folder_to_measure_later_leaves_the_protocol_of_a_training_as_it_is() -> None:
    assert samples("eval.images=elsewhere").hash == samples().hash
    assert samples().content["samples"] != folder().content["samples"]
    assert samples("eval.images=elsewhere").hash != folder("eval.images=elsewhere").hash


@pytest.mark.parametrize(
    "option",
    ["eval.num_samples=7", "eval.seed=1", "sampler.steps=3", "eval.clip_score=false"],
)
def test_only_samples_depend_on_how_they_are_drawn(option: str) -> None:
    assert samples(option).hash != samples().hash
    assert folder(option).hash == folder().hash


def test_the_arithmetic_counts_where_it_differs_from_fp32() -> None:
    fp32, bf16, tf32 = "train.precision=fp32", "train.precision=bf16", "eval.tf32=true"
    exact = samples(fp32)
    # a CPU draws in fp32 whatever the training's precision, and has no TF32
    assert samples(bf16, tf32).hash == samples(fp32, device="cuda").hash == exact.hash
    others = [samples(bf16, device="cuda"), samples(fp32, tf32, device="cuda")]
    others.append(samples(bf16, tf32, device="cuda"))
    assert len({one.hash for one in [exact, *others]}) == 4
    drawn = others[2].content["samples"]
    assert isinstance(drawn, dict)
    assert drawn.items() >= {"precision": "bfloat16", "products": "tf32"}.items()
    assert {folder(option).hash for option in (fp32, bf16, tf32)} == {folder().hash}


@pytest.mark.parametrize("stream", ["NORMAL_STREAM", "CHOICE_STREAM"])
def test_only_samples_depend_on_the_draws(monkeypatch: pytest.MonkeyPatch, stream: str) -> None:
    before, of_files = samples().hash, folder().hash
    monkeypatch.setattr(rng, stream, "another")
    assert samples().hash != before
    assert folder().hash == of_files


@pytest.mark.parametrize(
    "option",
    ["eval.metrics=[precision_recall]", "data.image_size=128", "eval.kid_subset_size=30"],
)
def test_both_depend_on_what_is_compared(option: str) -> None:
    kid = ["eval.metrics=[frechet,kid]", "eval.kid_subset_size=20"]
    assert samples(*kid, option).hash != samples(*kid).hash
    assert folder(*kid, option).hash != folder(*kid).hash


def test_a_protocol_is_written_once_under_its_hash(tmp_path: Path) -> None:
    ((path, content),) = samples().file(tmp_path).items()
    assert path == tmp_path / "protocols" / f"{samples().hash}.json"
    path.parent.mkdir()
    path.write_bytes(content)
    assert samples().file(tmp_path) == {}
