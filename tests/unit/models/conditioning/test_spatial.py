"""Conditions made of images and label maps, against plain forms of the same."""

import numpy as np
import pytest
import torch
from hypothesis import given as tried
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from models.condition import Condition
from models.conditioning.conditioner import Conditioner
from models.conditioning.conditioners import build_conditioner
from models.conditioning.degradations import bicubic, degrade
from models.conditioning.given import Given
from models.conditioning.masks import BOX_SIDE, draw_holes
from models.conditioning.semantic_map import SemanticMap, label_colours
from models.config import ConditionerConfig, ConditionerKind, Degradation
from trainer.runtime.rng import ConditionDraws

SIDE, FACTOR = 32, 4
LATENTS = SIDE // FACTOR, SIDE // FACTOR


def pictures(count: int = 3, side: int = SIDE) -> Tensor:
    """Smooth random pictures, 8 bits in [-1, 1]."""
    coarse = torch.rand(count, 3, side // 8, side // 8, generator=torch.Generator().manual_seed(0))
    pixels = F.interpolate(coarse, scale_factor=8, mode="bilinear").mul(255).round()
    return pixels / 127.5 - 1


def draws_of(*samples: int, epoch: int = 0) -> ConditionDraws:
    return ConditionDraws(7, np.full(len(samples), epoch), np.array(samples))


def as_image(pixels: Tensor) -> Image.Image:
    numbers = ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(numbers))


def conditioner_of(kind: ConditionerKind, classes: int = 0, planes: int = 3) -> Conditioner:
    return build_conditioner(ConditionerConfig(kind=kind, num_classes=classes, planes=planes))


def planes_of(condition: Condition) -> Tensor:
    assert condition.planes is not None
    assert (condition.tokens, condition.mask) == (None, None)
    return condition.planes


def test_bicubic_small_pictures_are_those_of_pillow() -> None:
    images = pictures()
    found = degrade(images, LATENTS, Degradation.bicubic, draws_of(0, 1, 2))
    for image, small in zip(images, found, strict=True):
        expected = as_image(image).resize((8, 8), Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(as_image(small)), np.asarray(expected))
    large = bicubic(found, (SIDE, SIDE))
    expected = as_image(found[1]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(as_image(large[1])), np.asarray(expected))


def test_light_degradations_are_functions_of_seed_epoch_and_sample() -> None:
    images = pictures()
    every = degrade(images, LATENTS, Degradation.bsr_light, draws_of(4, 5, 6))
    alone = degrade(images[1:2], LATENTS, Degradation.bsr_light, draws_of(5))
    assert torch.equal(every[1:2], alone)
    again = degrade(images[1:2], LATENTS, Degradation.bsr_light, draws_of(5, epoch=1))
    assert not torch.equal(alone, again)
    plain = degrade(images, LATENTS, Degradation.bsr_light)  # nothing is random: as bicubic
    assert torch.equal(plain, degrade(images, LATENTS, Degradation.bicubic))


def test_light_degradations_are_light() -> None:
    images = F.interpolate(pictures(count=1, side=16), scale_factor=8, mode="bicubic").clamp(-1, 1)
    images, size = images.expand(40, -1, -1, -1), (32, 32)
    bicubic = degrade(images, size, Degradation.bicubic)
    light = degrade(images, size, Degradation.bsr_light, draws_of(*range(40)))
    errors = (light - bicubic).square().mean((1, 2, 3)).sqrt() * 127.5
    assert errors.min() > 0
    assert 0.5 < errors.mean() < 10  # of 255
    assert errors.std() > 0.1


def test_a_small_picture_is_its_own_condition() -> None:
    kind = ConditionerKind.super_resolution
    conditioner, images = conditioner_of(kind), pictures()
    made = planes_of(conditioner.condition(Given(["", None, ""], images=images), LATENTS))
    small = degrade(images, LATENTS, Degradation.bicubic)
    assert torch.equal(made[[0, 2]], small[[0, 2]])
    assert not made[1].any()
    given = planes_of(conditioner.condition(Given([""] * 3, small=small), LATENTS))
    assert torch.equal(given, small)
    assert torch.equal(conditioner.picture(Given([""] * 3, small=small), LATENTS), small)
    with pytest.raises(ValueError, match=r"needs pictures: sample\.images, .* data\.store_images"):
        conditioner.prepare(Given([""]), LATENTS)


@tried(st.integers(0, 2**32), st.sampled_from([(16, 16), (16, 24), (8, 8)]))
def test_planes_of_a_map_are_those_of_the_authors_rescaler(
    seed: int, size: tuple[int, int]
) -> None:
    """One-hot maps, halved twice by bilinear interpolation, then a 1x1 convolution."""
    torch.manual_seed(seed)
    conditioner = conditioner_of(ConditionerKind.semantic_map, classes=9)
    assert isinstance(conditioner, SemanticMap)
    maps = torch.randint(9, (2, size[0] * 4, size[1] * 4)).byte()
    found = planes_of(conditioner.condition(Given(["", ""], maps=maps), size))
    halved = F.one_hot(maps.long(), 9).permute(0, 3, 1, 2).float()
    for _ in range(2):
        halved = F.interpolate(halved, scale_factor=0.5, mode="bilinear")
    weight = conditioner.embedding.weight.T[:, :, None, None]
    torch.testing.assert_close(found, F.conv2d(halved, weight), rtol=1e-5, atol=1e-6)


def test_a_map_that_is_dropped_or_wrong() -> None:
    conditioner = conditioner_of(ConditionerKind.semantic_map, classes=4, planes=2)
    maps = torch.full((2, 8, 8), 3).byte()
    planes = planes_of(conditioner.condition(Given(["", None], maps=maps), (2, 2)))
    assert planes[0].any()
    assert not planes[1].any()
    with pytest.raises(ValueError, match=r"needs label maps: sample\.maps, .* data\.maps"):
        conditioner.prepare(Given([""]), LATENTS)
    colours = label_colours(torch.arange(256).byte().view(1, 16, 16))
    assert len(colours.flatten(2)[0].T.unique(dim=0)) == 256
    assert -1 <= colours.min() < colours.max() <= 1


@tried(
    st.integers(0, 2**40), st.integers(0, 2**40), st.sampled_from([(32, 32), (24, 40), (64, 16)])
)
def test_holes_are_functions_of_seed_epoch_and_sample(
    epoch: int, sample: int, size: tuple[int, int]
) -> None:
    draws = ConditionDraws(3, np.array([epoch, 1]), np.array([sample, 2]))
    holes = draw_holes(2, size, draws)
    assert holes.shape == (2, 1, *size)
    assert {*holes.unique().tolist()} <= {0.0, 1.0}
    alone = draw_holes(1, size, ConditionDraws(3, np.array([epoch]), np.array([sample])))
    assert torch.equal(holes[:1], alone)
    assert alone.any()  # no hole is empty


def test_holes_come_in_all_sizes() -> None:
    shares = draw_holes(600, (64, 64), draws_of(*range(600))).mean((1, 2, 3))
    assert 0.15 < shares.mean() < 0.35
    assert shares.min() >= BOX_SIDE[0] ** 2 / 4
    assert (shares > 0.4).float().mean() > 0.05
    assert (shares < 0.1).float().mean() > 0.05
    centre = draw_holes(2, (64, 48), None)
    assert centre[:, :, 20:44, 12:36].all()
    assert centre.sum() == 2 * 24 * 24


def test_an_image_with_a_hole_is_encoded_beside_it() -> None:
    conditioner = conditioner_of(ConditionerKind.inpainting)
    seen: list[Tensor] = []

    def encode(images: Tensor) -> Tensor:
        seen.append(images)
        return F.avg_pool2d(images, FACTOR)

    images, holes = pictures(2), torch.zeros(2, 1, SIDE, SIDE)
    holes[:, :, 8:16, 4:20] = 1
    given = Given(["", None], images=images, masks=holes)
    planes = planes_of(conditioner.condition(given, LATENTS, encode))
    assert planes.shape == (2, 4, *LATENTS)
    assert not planes[1].any()
    assert torch.equal(seen[0], torch.where(holes > 0, -torch.ones(()), images))
    assert torch.equal(planes[0, 3], F.max_pool2d(holes, FACTOR)[0, 0] * 2 - 1)
    drawn = torch.full((2, 3, SIDE, SIDE), 77).byte()
    pasted = conditioner.paste(drawn, given)
    assert (pasted[:, :, 8:16, 4:20] == 77).all()
    known = np.asarray(as_image(images[0]))
    kept = pasted[0].permute(1, 2, 0).numpy()
    outside: NDArray[np.bool_] = holes[0, 0].numpy() == 0
    assert np.array_equal(kept[outside], known[outside])
    drawn_holes = Given([""] * 2, images=images, draws=draws_of(1, 2))
    assert torch.equal(
        conditioner.prepare(drawn_holes, LATENTS)["holes"],
        draw_holes(2, (SIDE, SIDE), draws_of(1, 2)),
    )
    with pytest.raises(
        ValueError, match=r"sample\.images and sample\.masks, .* data\.store_images"
    ):
        conditioner.prepare(Given([""]), LATENTS)
