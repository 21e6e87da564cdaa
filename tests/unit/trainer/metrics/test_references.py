"""Making references: bounded, stopped at any batch, and the same bit for bit after that."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.small_metric import MeanColour
from tests.support.workshop import Workshop, packed
from trainer.cli import load_config
from trainer.config import Config
from trainer.config.choices import Features
from trainer.metrics import references as module
from trainer.metrics.evaluator import build_evaluator
from trainer.metrics.features import FeatureExtractor
from trainer.metrics.references import References, build_references, open_training_images
from trainer.metrics.unfinished import STATE
from trainer.runtime import rng
from trainer.runtime.progress import never
from trainer.runtime.ranks import ALONE

IMAGES, BATCH = 39, 4
ROUNDS = 10


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Packed pictures and nothing else: 39 of them are of the training split."""
    return packed(tmp_path_factory.mktemp("pictures"))


class Clock:
    """Answers whether to stop: yes, or a crash, at one of the questions."""

    def __init__(self, at: int = 0, *, crash: bool = False) -> None:
        self.asked, self._at, self._crash = 0, at, crash

    def __call__(self, phase: str) -> bool:
        assert phase == "making references"
        self.asked += 1
        if self._crash and self.asked == self._at:
            raise KeyboardInterrupt
        return self.asked == self._at


Make = Callable[..., References]


@pytest.fixture
def make(shop: Workshop, tmp_path: Path) -> Make:
    """Gives the references of a start of their own, in a folder of tmp_path."""

    def references(
        folder: str, *options: str, names: Sequence[Features] = (Features.efficientnet_lite0,)
    ) -> References:
        features = f"eval.features=[{','.join(names)}]"
        config = config_of(shop, tmp_path / folder, features, *options)
        extractors = {name: MeanColour(name) for name in names}
        return References(config, ALONE, open_training_images(config, ALONE), extractors)

    return references


def config_of(shop: Workshop, folder: Path, *options: str) -> Config:
    fixed = ["eval.features=[efficientnet_lite0]", f"eval.batch_size={BATCH}"]
    return shop.config("emoji", *fixed, f"eval.references={folder}", *options)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of finished references; there is nothing else."""
    assert not [path for path in folder.iterdir() if path.is_dir()]
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("crash", [False, True])
@pytest.mark.parametrize("at", [2, 7, ROUNDS])
def test_a_making_that_is_ended_goes_on_and_gives_the_same_bits(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, crash: bool
) -> None:
    monkeypatch.setattr(module, "SAVE_EVERY_S", 0.0 if crash else 1e9)
    assert make("whole").load_or_make(never)
    ended = Clock(at, crash=crash)
    if crash:
        with pytest.raises(KeyboardInterrupt):
            make("parts").load_or_make(ended)
    else:
        assert not make("parts").load_or_make(ended)
    assert not list((tmp_path / "parts").glob("*.json"))
    again = Clock()
    assert make("parts").load_or_make(again)
    assert again.asked == ROUNDS - (at - 1), "what was saved is not made again"
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_a_making_may_be_stopped_at_every_batch(make: Make, tmp_path: Path) -> None:
    assert make("whole").load_or_make(never)
    starts = 1
    while not make("parts").load_or_make(Clock(2)):
        starts += 1
    assert starts == ROUNDS
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("rows_0_24.safetensors", flip_a_byte),
        ("rows_0_24.safetensors", Path.unlink),
        (STATE, flip_a_byte),
        (STATE, lambda path: path.write_bytes(path.read_bytes()[:100])),
        (STATE, Path.unlink),
    ],
)
def test_damaged_parts_are_not_built_upon(
    make: Make, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    assert make("whole").load_or_make(never)
    assert not make("parts").load_or_make(Clock(7))
    (unfinished,) = (tmp_path / "parts").iterdir()
    assert sorted(path.name for path in unfinished.iterdir()) == [STATE, "rows_0_24.safetensors"]
    damage(unfinished / name)
    again = Clock()
    assert make("parts").load_or_make(again)
    assert again.asked == ROUNDS
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_parts_of_other_batches_are_not_built_upon(make: Make, tmp_path: Path) -> None:
    assert not make("parts").load_or_make(Clock(3))
    again = Clock()
    assert make("parts", "eval.batch_size=8").load_or_make(again)
    assert again.asked == 5


def test_references_that_were_stopped_at_different_places_end_together(
    make: Make, tmp_path: Path
) -> None:
    both = [Features.efficientnet_lite0, Features.dinov2]
    assert make("whole", names=both).load_or_make(never)
    assert not make("parts").load_or_make(Clock(7))
    assert not make("parts", names=both).load_or_make(Clock(4))
    again = Clock()
    assert make("parts", names=both).load_or_make(again)
    assert again.asked == ROUNDS - 3
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_few_images_are_drawn_and_the_features_of_fewer_are_kept(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ROWS", 7)
    assert make("all", "eval.reference_samples=0").load_or_make(never)
    few = make("few", "eval.reference_samples=20")
    assert few.load_or_make(never)
    assert few.loaded[Features.efficientnet_lite0].moments.count == 20
    rows = few.loaded[Features.efficientnet_lite0].rows
    assert rows.shape == (7, 3)
    assert not make("parts", "eval.reference_samples=20").load_or_make(Clock(4))
    assert make("parts", "eval.reference_samples=20").load_or_make(never)
    assert content(tmp_path / "parts") == content(tmp_path / "few")
    (file,) = (tmp_path / "all").glob("*.safetensors")
    monkeypatch.setattr(module, "MAX_ROWS", 50)
    whole = make("every", "eval.reference_samples=0")
    assert whole.load_or_make(never)
    every = whole.loaded[Features.efficientnet_lite0].rows
    assert len(every) == IMAGES
    (other,) = (tmp_path / "every").glob("*.safetensors")
    assert torch.equal(load_file(file)["outer"], load_file(other)["outer"])
    gaps = torch.cdist(rows, every).min(1).values
    assert gaps.max() < 1e-6, "the rows kept are those of training images"


def test_a_bound_over_the_data_set_takes_all_under_the_same_name(
    make: Make, tmp_path: Path
) -> None:
    for number in (0, IMAGES, 50_000):
        references = make("same", f"eval.reference_samples={number}")
        assert references.load_or_make(never)
        assert references.about()["num_samples"] == IMAGES
    assert len(content(tmp_path / "same")) == 2


def test_the_default_is_bounded_and_papers_say_so_where_they_take_all() -> None:
    assert load_config(["+experiment=laion_512"]).eval.reference_samples == 50_000
    for name in ("ffhq_256", "churches_256", "imagenet_256"):
        assert load_config([f"+experiment={name}"]).eval.reference_samples == 0


@pytest.mark.parametrize(
    ("options", "kept", "chosen"),
    [
        (["eval.reference_samples=0"], IMAGES, False),
        (["eval.reference_samples=0"], IMAGES - 1, True),
        (["eval.reference_samples=9"], IMAGES, True),
    ],
)
def test_only_references_of_chosen_images_depend_on_the_draws(
    make: Make, monkeypatch: pytest.MonkeyPatch, options: list[str], kept: int, chosen: bool
) -> None:
    monkeypatch.setattr(module, "MAX_ROWS", kept)

    def names() -> tuple[dict[str, object], Path]:
        references = make("a", *options)
        return references.about(), references._source(Features.efficientnet_lite0).path(Path())

    before = names()
    monkeypatch.setattr(rng, "CHOICE_STREAM", "another")
    after = names()
    assert [old != new for old, new in zip(before, after, strict=True)] == [chosen, chosen]


def test_building_an_evaluator_makes_nothing(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*inputs: object) -> None:
        raise AssertionError("an image was read or embedded")

    monkeypatch.setattr(FeatureExtractor, "forward", forbidden)
    monkeypatch.setattr(module, "read_images", forbidden)
    config = config_of(shop, tmp_path / "references", f"run.dir={tmp_path / 'run'}")
    build_evaluator(config, ALONE)
    build_references(config, ALONE)
    assert not (tmp_path / "references").exists()


def test_damaged_references_are_noticed_before_a_training(shop: Workshop, tmp_path: Path) -> None:
    config = config_of(shop, tmp_path / "references")
    assert build_references(config, ALONE).load_or_make(never)
    build_evaluator(config, ALONE)
    (file,) = (tmp_path / "references").glob("*.safetensors")
    flip_a_byte(file)
    with pytest.raises(ValueError, match=r"is not what .* describes: delete it"):
        build_evaluator(config, ALONE)
    shutil.rmtree(tmp_path / "references")
    build_evaluator(config, ALONE)


def test_references_in_a_store_are_refused(make: Make, shop: Workshop) -> None:
    config = config_of(shop, Path("unused"))
    config.eval.references = "s3://bucket/references"
    with pytest.raises(ValueError, match=r"eval\.references=s3://.*on a disk that all ranks see"):
        build_references(config, ALONE).load_or_make(never)


def test_the_images_are_drawn_by_the_seed(make: Make) -> None:
    found = [make("a", "eval.reference_samples=9", f"eval.seed={seed}") for seed in (0, 1)]
    chosen = [references._choose()[0] for references in found]
    assert all(len(np.unique(numbers)) == 9 for numbers in chosen)
    assert not np.array_equal(chosen[0], chosen[1])
