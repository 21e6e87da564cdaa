"""Scenes composed of OpenMoji's drawings: pictures whose boxes, label maps and captions are exact.

A scene has one to five emoji of random places, sizes and depths over a simple background. It is a
function of the seed, of its number and of the options alone.
"""

import difflib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.config import DataConfig
from data.shards.account import Tally
from data.shards.annotations import (
    MAX_MAP_CLASSES,
    Box,
    Labels,
    encode_boxes,
    encode_map,
)
from data.shards.captions import JSON_FIELD
from data.shards.codecs import BOXES, MAP, decode_plain, encode_png
from data.sources.openmoji import LICENCE, check_packages, code_points, drawings, package_versions
from data.sources.samples import Item, RawSample, Source, hash_share, spread
from data.sources.scene_captions import Thing, captions_of

FAR = {"sky": (170, 215, 250), "night sky": (40, 50, 95), "wall": (250, 238, 210)}
"""Backgrounds that fill the picture, and their colours."""
NEAR = {
    "grass": (110, 182, 90),
    "sand": (232, 205, 140),
    "snow": (240, 244, 250),
    "sea": (60, 120, 190),
}
"""Grounds below the horizon, and their colours."""
GROUND_SHARE = 2 / 3
"""Part of the scenes that have a ground."""
HORIZON = (0.5, 0.85)
"""Range of the horizon's height from the top, in parts of the side."""
SHADE = 10
"""Most by which a colour of the background differs from its mean, of 255."""
MOST_EMOJI = 5
SMALLEST, LARGEST = 0.22, 0.75
"""Range of the longer side of an emoji, in parts of the picture's. The largest is divided by the
root of the number of emoji."""
LEAST_VISIBLE = 0.6
"""Part of the pixels of every emoji that no other one covers."""
TRIES = 20
"""Places that are drawn for an emoji; if it hides too much of others at each, it is left out."""
COVERED = 0.03
"""Part of the pixels of an emoji that another one covers, if it is said to be in front."""
CACHE_BYTES = 2**28


class SceneSource(Source):
    """Scenes of emoji; the drawings are those of `OpenMojiSource` without skin tones.

    data.source.val_share of the scenes are for validation. The same share of the emoji, chosen by a
    hash of their concepts, is in no scene for training.
    Raises: ValueError that names the missing packages, or an option that cannot be.
    """

    licence = LICENCE

    def __init__(self, config: DataConfig) -> None:
        check_packages("scenes")
        self._source, self._members = config.source, (config.maps, config.boxes)
        self.image_size, self.left_alone = config.image_size, Tally()
        self._files = _choose(config.source.emoji)
        self._names = list(self._files)
        self.labels = Labels([*FAR, *NEAR, *self._names], self._names)
        if config.maps and len(self.labels.maps) > MAX_MAP_CLASSES:
            raise ValueError(
                f"data.maps: {len(self._names)} emoji and {len(FAR) + len(NEAR)} backgrounds are "
                f"over the {MAX_MAP_CLASSES} classes of a map; name some in data.source.emoji"
            )
        self._seen = [name for name in self._names if not self._is_held_out(name)]
        if not self._seen:
            raise ValueError(
                "data.source.emoji: all are kept for validation; name more, or lower "
                "data.source.val_share"
            )
        side = 2 * config.image_size  # larger than any emoji
        self._sprite = lru_cache(max(CACHE_BYTES // (4 * side**2), 1))(self._draw_sprite)

    def _is_held_out(self, name: str) -> bool:
        from data.sources.emoji_names import concept

        return hash_share(concept(name)) < self._source.val_share

    def fingerprint(self) -> str:
        """Hash the options, and the versions of the packages that decide pixels or captions."""
        source = self._source
        options = [self.image_size, source.seed, source.count, source.val_share, *self._members]
        parts = [package_versions(), options, self._names]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def classes(self) -> Sequence[str]:
        """Return none: scenes have captions, and classes of boxes and maps."""
        return ()

    def __len__(self) -> int:
        return self._source.count

    @property
    def images(self) -> int:
        """Number of scenes."""
        return len(self)

    def sample(self, number: int) -> Iterator[Item]:
        """Yield about `number` of the scenes, spread evenly."""
        return map(self.scene, spread(range(len(self)), number))

    def __iter__(self) -> Iterator[Item]:
        return map(self.scene, range(len(self)))

    def scene(self, number: int) -> RawSample:
        """Compose the scene of a number ≥ 0."""
        source, side = self._source, self.image_size
        share = hash_share(f"scene {source.seed} {number}")
        draws = _Draws(source.seed, number)
        pool = self._names if share < source.val_share else self._seen
        background = _draw_background(side, draws)
        wanted = min(1 + draws.below(MOST_EMOJI), len(pool))
        names = draws.choose(pool, wanted)
        stage = _Stage(side, background)
        for name in names:
            stage.add(name, self._sprite, LARGEST / wanted**0.5, draws)
        things, labels = stage.things(), stage.labels(self.labels.maps)
        captions = captions_of(things, background.kinds, draws.below)
        members = {MAP: encode_map(labels), BOXES: encode_boxes(one.box for one in things)}
        maps, boxes = self._members
        asked = [MAP] * maps + [BOXES] * boxes
        return RawSample(
            name=f"scene {number}",
            draw=share,
            extension="png",
            image=encode_png(stage.picture),
            caption=captions[0],
            width=side,
            height=side,
            metadata={
                JSON_FIELD: captions,
                "emoji": stage.names,
                "held_out": sum(map(self._is_held_out, stage.names)),
                "background": background.kinds,
            },
            annotations={member: members[member] for member in asked},
        )

    def _draw_sprite(self, name: str) -> Image.Image:
        """Draw an emoji on a transparent ground, without its margins."""
        from resvg_py import svg_to_bytes

        side = 2 * self.image_size
        raster = svg_to_bytes(
            svg_path=str(self._files[name]), width=side, height=side, skip_system_fonts=True
        )
        image = decode_plain(bytes(raster), "RGBA")
        return image.crop(image.getbbox())


def _choose(wanted: Sequence[str]) -> dict[str, Path]:
    """Return the drawings of the emoji of these names; of all without a skin tone if none is given.

    Raises: ValueError for a name that no emoji has, or that is given twice.
    """
    from data.sources.emoji_names import plain_name, tones

    known: dict[str, Path] = {}
    for file in drawings():
        codes = code_points(file.stem)
        name = plain_name(codes)
        if name is not None and not tones(codes):
            known.setdefault(name, file)
    for number, name in enumerate(wanted):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"data.source.emoji: {name!r} is no emoji{hint}")
        if name in wanted[:number]:
            raise ValueError(f"data.source.emoji: {name!r} is named twice")
    return {name: known[name] for name in wanted} if wanted else known


class _Draws:
    """Random numbers of one scene: words of Philox (Salmon et al. 2011), one after the other."""

    def __init__(self, seed: int, number: int) -> None:
        self._philox = np.random.Philox(key=[seed, number])

    def between(self, low: float, high: float) -> float:
        """Draw from [low, high)."""
        return low + (high - low) * (int(self._philox.random_raw()) >> 11) * 2.0**-53

    def below(self, count: int) -> int:
        """Draw from 0 to count - 1."""
        return int(self.between(0, count))

    def choose(self, items: Sequence[str], count: int) -> list[str]:
        """Choose different items, in random order."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(count)]


class _Background:
    """The ground of a scene: its picture, and the kinds that it shows, the far one first."""

    def __init__(self, picture: Image.Image, kinds: list[str], horizon: int) -> None:
        self.picture, self.kinds, self.horizon = picture, kinds, horizon


def _draw_background(side: int, draws: _Draws) -> _Background:
    far = draws.choose(list(FAR), 1)
    near = draws.choose(list(NEAR), 1) if draws.between(0, 1) < GROUND_SHARE else []
    horizon = round(draws.between(*HORIZON) * side) if near else side
    pixels = np.empty((side, side, 3), np.uint8)
    for rows, kinds in ((slice(horizon), far), (slice(horizon, side), near)):
        for kind in kinds:
            colour = [*(FAR | NEAR)[kind]]
            shades = (channel + draws.between(-SHADE, SHADE) for channel in colour)
            pixels[rows] = [min(max(round(shade), 0), 255) for shade in shades]
    return _Background(Image.fromarray(pixels), [*far, *near], horizon)


class _Stage:
    """A scene while emoji are added, each in front of the earlier ones."""

    def __init__(self, side: int, background: _Background) -> None:
        self.names: list[str] = []
        """Of the emoji, the farthest first."""
        self.picture = background.picture.copy()
        self._background, self._side = background, side
        self._masks: list[NDArray[np.bool_]] = []
        """Pixels of each emoji, [side, side], also where others hide it."""

    def add(
        self, name: str, sprite_of: Callable[[str], Image.Image], largest: float, draws: _Draws
    ) -> None:
        """Add an emoji, if there is a place where it does not hide too much of the others.

        largest: bound of its longer side, in parts of the picture's.
        """
        for _ in range(TRIES):
            sprite = sprite_of(name)
            scale = draws.between(SMALLEST, largest) * self._side / max(sprite.size)
            width, height = (max(round(length * scale), 1) for length in sprite.size)
            place = draws.below(self._side - width + 1), draws.below(self._side - height + 1)
            sprite = sprite.resize((width, height), Image.Resampling.LANCZOS)
            mask = np.zeros((self._side, self._side), bool)
            inside = np.asarray(sprite)[..., 3] >= 128
            mask[place[1] : place[1] + height, place[0] : place[0] + width] = inside
            masks = [*self._masks, mask]
            if mask.any() and min(map(_share_visible, masks, _visible(masks))) >= LEAST_VISIBLE:
                self._masks = masks
                self.names.append(name)
                self.picture.paste(sprite, place, sprite)
                return

    def things(self) -> list[Thing]:
        """Return the emoji with the boxes around their visible pixels."""
        return [
            Thing(
                _box(name, seen),
                {
                    self.names[other]
                    for other in range(number)
                    if (mask & self._masks[other]).sum() >= COVERED * self._masks[other].sum()
                },
            )
            for number, (name, mask, seen) in enumerate(
                zip(self.names, self._masks, _visible(self._masks), strict=True)
            )
        ]

    def labels(self, classes: Sequence[str]) -> NDArray[np.uint8]:
        """Draw the label map: [side, side]; classes: names by number."""
        kinds, horizon = self._background.kinds, self._background.horizon
        numbers = np.empty((self._side, self._side), np.uint8)
        numbers[:horizon], numbers[horizon:] = classes.index(kinds[0]), classes.index(kinds[-1])
        for name, seen in zip(self.names, _visible(self._masks), strict=True):
            numbers[seen] = min(classes.index(name), MAX_MAP_CLASSES - 1)
        return numbers


def _visible(masks: Sequence[NDArray[np.bool_]]) -> list[NDArray[np.bool_]]:
    """Remove from each mask the pixels of those in front of it, which come later."""
    seen: list[NDArray[np.bool_]] = []
    covered = np.zeros_like(masks[0])
    for mask in reversed(masks):
        seen.append(mask & ~covered)
        covered = covered | mask
    return seen[::-1]


def _share_visible(mask: NDArray[np.bool_], seen: NDArray[np.bool_]) -> float:
    return float(seen.sum() / mask.sum())


def _box(name: str, seen: NDArray[np.bool_]) -> Box:
    """Return the smallest box around the visible pixels."""
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    height, width = seen.shape
    return Box(
        name,
        columns[0].item() / width,
        rows[0].item() / height,
        (columns[-1].item() + 1) / width,
        (rows[-1].item() + 1) / height,
    )
