"""Composed scenes: a function of seed and number, with boxes, maps and captions that are true."""

import dataclasses
import io
import json
import re
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data.config import DataConfig, SourceConfig, SourceKind
from data.shards.annotations import Box, decode_boxes
from data.shards.codecs import BOXES, MAP
from data.sources.samples import RawSample
from data.sources.scene_captions import Thing, captions_of, relation
from data.sources.scenes import FAR, LEAST_VISIBLE, MOST_EMOJI, NEAR, SceneSource
from tests.support.data_sets import pixels_of

EMOJI = ["turtle", "red heart", "whale", "tomato", "owl", "blue heart", "balloon", "penguin"]
"""With the share below, the last two are kept for validation."""


def config_of(**options: Any) -> DataConfig:
    chosen: dict[str, Any] = {"emoji": EMOJI, "val_share": 0.05, "count": 60} | options
    source = SourceConfig(kind=SourceKind.scenes, **chosen)
    return DataConfig(dir="unused", image_size=48, maps=True, boxes=True, source=source)


@pytest.fixture(scope="module")
def source() -> SceneSource:
    return SceneSource(config_of(val_share=0.05))


@pytest.fixture(scope="module")
def scenes(source: SceneSource) -> list[RawSample]:
    return [source.scene(number) for number in range(60)]


def labels_of(sample: RawSample) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(sample.annotations[MAP])))


def boxes_of(sample: RawSample) -> list[Box]:
    return decode_boxes(sample.annotations[BOXES])


def test_a_scene_is_a_function_of_seed_and_number(
    source: SceneSource, scenes: list[RawSample]
) -> None:
    again = SceneSource(config_of())
    assert again.scene(17) == scenes[17]
    assert list(again) == scenes
    assert again.fingerprint() == source.fingerprint()
    other = SceneSource(config_of(seed=1))
    assert other.scene(17).image != scenes[17].image
    assert other.fingerprint() != source.fingerprint()
    more = SceneSource(config_of(count=10**9))
    assert more.scene(17) == scenes[17]
    assert more.scene(10**9 - 1).image not in {one.image for one in scenes}


def test_the_first_scenes_are_those_that_were_always_drawn(scenes: list[RawSample]) -> None:
    """Draws come from the words of Philox, which numpy guarantees."""
    assert [one.metadata["emoji"] for one in scenes[:4]] == [
        ["turtle", "tomato", "whale", "blue heart"],
        ["owl", "whale"],
        ["tomato"],
        ["tomato", "whale"],
    ]
    assert [round(one.draw, 6) for one in scenes[:2]] == [0.05205, 0.456031]


def test_boxes_are_the_bounds_of_the_visible_pixels(
    source: SceneSource, scenes: list[RawSample]
) -> None:
    for sample in scenes:
        numbers, found = labels_of(sample), boxes_of(sample)
        assert [box.label for box in found] == sample.metadata["emoji"]
        for box in found:
            mine = numbers == source.labels.maps.index(box.label)
            rows, columns = np.flatnonzero(mine.any(1)), np.flatnonzero(mine.any(0))
            bounds = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            np.testing.assert_allclose(box[1:], np.array(bounds) / 48, atol=1e-12)


def test_the_map_says_where_the_grounds_are(source: SceneSource, scenes: list[RawSample]) -> None:
    """A ground has one colour, near its mean; no pixel of an emoji's middle is called a ground."""
    seen = set[str]()
    for sample in scenes:
        numbers, pixels = labels_of(sample), pixels_of(sample.image).astype(int)
        kinds = sample.metadata["background"]
        assert {source.labels.maps[n] for n in np.unique(numbers)} <= {
            *kinds,
            *sample.metadata["emoji"],
        }
        for kind in kinds:
            here = pixels[numbers == source.labels.maps.index(kind)]
            if len(here):
                shade = np.median(here, axis=0)
                assert np.abs(shade - (FAR | NEAR)[kind]).max() <= 11
                assert np.abs(here - shade).max(1).mean() < 12
        seen |= {*kinds}
    assert seen == {*FAR, *NEAR}


def test_every_number_of_emoji_comes_and_all_are_visible(
    source: SceneSource, scenes: list[RawSample]
) -> None:
    counts = [len(sample.metadata["emoji"]) for sample in scenes]
    assert set(counts) == set(range(1, MOST_EMOJI + 1))
    for sample in scenes:
        assert len(set(sample.metadata["emoji"])) == len(sample.metadata["emoji"])
        for box in boxes_of(sample):
            mine = labels_of(sample) == source.labels.maps.index(box.label)
            assert mine.sum() > 20 * LEAST_VISIBLE


def test_scenes_for_training_do_without_the_emoji_kept_for_validation() -> None:
    source = SceneSource(config_of(val_share=0.3))
    scenes = [source.scene(number) for number in range(80)]
    train = [one for one in scenes if one.draw >= 0.3]
    val = [one for one in scenes if one.draw < 0.3]
    used = {name for one in train for name in one.metadata["emoji"]}
    kept = set(EMOJI) - used
    assert {"balloon", "penguin"} <= kept
    assert used
    assert all(one.metadata["held_out"] == 0 for one in train)
    for one in val:
        assert one.metadata["held_out"] == len(kept & set(one.metadata["emoji"]))
    assert any(one.metadata["held_out"] for one in val)
    assert 0.15 < len(val) / len(scenes) < 0.45


WORDS = "|".join(re.escape(name) for name in EMOJI)
RELATION = re.compile(
    rf"an? ({WORDS}) (left of|right of|above|below|in front of|behind) (?:an?|the) ({WORDS})"
)
OPPOSITE = {"left of": "right of", "above": "below", "in front of": "behind"}


def test_captions_are_true(scenes: list[RawSample]) -> None:
    told = set[str]()
    for sample in scenes:
        boxes = {box.label: Thing(box, set()) for box in boxes_of(sample)}
        captions = sample.metadata["captions"]
        assert sample.caption == captions[0]
        assert set(boxes) == {name for name in EMOJI if name in captions[0]}
        depth = sample.metadata["emoji"].index
        for one, word, other in (found for text in captions for found in RELATION.findall(text)):
            told.add(word)
            if word in ("in front of", "behind"):
                assert (depth(one) > depth(other)) == (word == "in front of")
            else:
                assert relation(boxes[one], boxes[other]) == word
        if len(boxes) > 1:
            assert len(RELATION.findall(captions[0])) == len(boxes) - 1
    assert told == {*OPPOSITE, *OPPOSITE.values()}


def test_a_turtle_left_of_a_red_heart() -> None:
    turtle = Thing(Box("turtle", 0.1, 0.4, 0.3, 0.6), {"red heart"})
    heart = Thing(Box("red heart", 0.5, 0.5, 0.9, 0.9), set())
    owl = Thing(Box("owl", 0.1, 0.1, 0.2, 0.2), set())

    def first(count: int) -> int:
        return 0

    assert captions_of([turtle, heart, owl], ["sky", "sand"], first) == [
        "a turtle left of a red heart, with an owl above the turtle",
        "a red heart right of a turtle, with an owl above the turtle",
        "a turtle left of a red heart, with an owl above the turtle, sand below sky",
        "a turtle, a red heart and an owl",
        "a turtle in front of a red heart",
        "a red heart behind a turtle",
    ]
    assert captions_of([owl], ["wall"], first) == [
        "an owl on the left",
        "an owl on the left, wall",
        "an owl, wall",
        "owl",
    ]


@pytest.mark.parametrize(
    ("emoji", "share", "message"),
    [
        (["turtel"], 0.0, r"data\.source\.emoji: 'turtel' is no emoji; did you mean turtle"),
        (["owl", "owl"], 0.0, r"data\.source\.emoji: 'owl' is named twice"),
        (["balloon"], 0.05, r"data\.source\.emoji: all are kept for validation"),
        ([], 0.0, r"data\.maps: 1\d\d\d emoji and 7 backgrounds are over the 256 classes"),
    ],
)
def test_emoji_that_cannot_be_are_named(emoji: list[str], share: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SceneSource(config_of(emoji=emoji, val_share=share))


def test_all_emoji_make_scenes_without_maps() -> None:
    config = dataclasses.replace(config_of(emoji=[]), maps=False)
    sample = SceneSource(config).scene(3)
    assert list(sample.annotations) == [BOXES]
    assert json.loads(sample.annotations[BOXES])
    assert len(SceneSource(config).labels.boxes) > 1500
