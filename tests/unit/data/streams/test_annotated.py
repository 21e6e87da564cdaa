"""Label maps and boxes in batches: they follow their samples through flips, ranks and faults."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from data.config import DataConfig
from data.shards.codecs import BOXES, MAP
from data.streams.stream import Batch, Randomness, Stream
from tests.support.annotated import annotations, boxes_of, map_of, name_classes
from tests.support.data_sets import DataSet
from tests.support.stream_sets import assert_same, by_sample
from tests.support.streams import images, joined, latents, take

Open = Callable[..., Stream]
Make = Callable[..., DataConfig]


@pytest.fixture(params=[images, latents], ids=["images", "latents"])
def opened(request: pytest.FixtureRequest) -> Open:
    return request.param


@pytest.fixture
def make(opened: Open, image_set: DataSet, latent_set: DataSet) -> Make:
    """A factory of annotated sets of the stream's kind."""

    def annotated(**options: Any) -> DataConfig:
        asked = {"more": annotations, "maps": True, "boxes": True} | options
        config = image_set(**asked) if opened is images else latent_set(flip=True, **asked)
        name_classes(config.train if opened is images else config.latents)
        return config

    return annotated


def assert_annotated(batch: Batch, flips: Any = None) -> None:
    flips = np.zeros(len(batch.keys), bool) if flips is None else flips
    maps = batch.arrays["map"]
    assert (maps.dtype, maps.shape[1:]) == (torch.uint8, (8, 8))
    for row, key in enumerate(batch.keys):
        expected, boxes = map_of(int(key)), boxes_of(int(key))
        if flips[row]:
            expected, boxes = expected[:, ::-1], [box.mirrored() for box in boxes]
        np.testing.assert_array_equal(maps[row].numpy(), expected)
        assert batch.boxes[row] == boxes


def test_every_sample_has_its_own(opened: Open, make: Make) -> None:
    config = make()
    for batch in take(opened(config), 4):
        assert_annotated(batch)
    assert_annotated(opened(config).read(np.arange(20)))


def test_flips_move_both(opened: Open, make: Make) -> None:
    for batch in take(opened(make(), Randomness(flip=by_sample)), 4):
        flips = by_sample(batch.epoch, batch.index)
        assert flips.any()
        assert_annotated(batch, flips)


def test_ranks_and_resumed_runs_see_the_same(opened: Open, make: Make) -> None:
    config = make()
    alone = take(opened(config, Randomness(flip=by_sample)), 4)
    ranks = [
        take(opened(config, Randomness(flip=by_sample), rank=rank, world=2, micro_batch=1), 2, 2)
        for rank in range(2)
    ]
    for parts, whole in zip(zip(*ranks, strict=True), alone[2:], strict=True):
        assert_same(joined(list(parts)), whole)


def test_workers_change_nothing(image_set: DataSet) -> None:
    config = image_set(more=annotations, maps=True, boxes=True, workers=2)
    name_classes(config.train)
    for batch in take(images(config), 2):
        assert_annotated(batch)


@pytest.mark.parametrize("member", [MAP, BOXES])
@pytest.mark.parametrize("damaged", [b"damaged", None, "class"])
def test_a_bad_one_costs_its_sample_alone(
    opened: Open, make: Make, member: str, damaged: bytes | str | None
) -> None:
    def more(number: int) -> dict[str, bytes]:
        found = annotations(number)
        if number == 5:
            unknown = annotations(number, 4)[MAP], b'[{"label": "ant", "box": [0, 0, 1, 1]}]'
            if damaged is None:
                del found[member]
            else:
                found[member] = unknown[member != MAP] if isinstance(damaged, str) else damaged
        return found

    stream = opened(make(more=more, max_rejected_share=0.1))
    for batch in take(stream, 6):
        assert "000000005" not in batch.keys
        assert_annotated(batch)
    assert [item.key for item in stream.quarantine.rejected] == ["000000005"]
    assert member in stream.quarantine.rejected[0].reason


def test_nothing_is_read_that_is_not_asked_for(opened: Open, make: Make) -> None:
    (batch,) = take(opened(make(maps=False, boxes=False)), 1)
    assert "map" not in batch.arrays
    assert batch.boxes == []
    (batch,) = take(opened(make(maps=False)), 1)
    assert "map" not in batch.arrays
    assert len(batch.boxes) == 8


@pytest.mark.parametrize("option", ["maps", "boxes"])
def test_a_set_without_them_is_refused(image_set: DataSet, option: str) -> None:
    config = image_set(**{option: True})
    with pytest.raises(ValueError, match=rf"^data\.{option}: data\.train has none; set data\."):
        images(config)
