"""CLIP networks as open_clip makes them, loaded by name or from files."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.conditioning.clip import TextTower, load_clip, text_tower
from models.conditioning.conditioners import build_conditioner, conditioner_class
from models.conditioning.given import Given
from models.config import ConditionerConfig
from models.weights import hub
from tests.support.dead_hub import dead_hub
from tests.support.hostile import write_bomb
from tests.support.text_encoders import CLIP, write_clip

SIZE = (8, 8)
CAPTIONS = ["a red heart", "", "flag of France", "cat " * 100]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[ConditionerConfig, open_clip.CLIP]:
    return write_clip(tmp_path_factory.mktemp("clip"))


def test_load_clip_embeds_images_and_texts_as_open_clip(
    tiny: tuple[ConditionerConfig, open_clip.CLIP],
) -> None:
    config, clip = tiny
    loaded = load_clip(config)
    assert not any(part.training for part in loaded.model.modules())
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    images = torch.randn(2, 3, loaded.image_size, loaded.image_size)
    torch.testing.assert_close(loaded.model.encode_image(images), clip.encode_image(images))
    ids = loaded.tokenizer(CAPTIONS)
    assert ids.shape == (4, 12)
    torch.testing.assert_close(loaded.model.encode_text(ids), clip.encode_text(ids))
    assert loaded.image_mean == open_clip.OPENAI_DATASET_MEAN
    assert loaded.image_std == open_clip.OPENAI_DATASET_STD


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", ".*broken.json is not JSON"),
        ("[1]", ".*broken.json lacks vision_cfg or text_cfg"),
        ('{"embed_dim": 4, "text_cfg": {}}', ".*broken.json lacks vision_cfg or text_cfg"),
        (
            '{"embed_dim": 4, "text_cfg": {"wdth": 4}, "vision_cfg": {}}',
            "open_clip cannot build .*broken.json .*wdth",
        ),
    ],
)
def test_a_broken_model_config_is_named(
    tiny: tuple[ConditionerConfig, open_clip.CLIP], tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^conditioner.model: {message}"):
        load_clip(replace(tiny[0], model=str(path)))


@pytest.mark.parametrize(
    "change",
    [
        {"width": 63},
        {"width": -64},
        {"width": 2**19},
        {"layers": 10**9},
        {"vocab_size": 10**30},
        {"tokenizer_kwargs": {"zz": 1}},
        {"heads": "x"},
        {"heads": 0},
    ],
    ids=str,
)
def test_a_model_config_that_cannot_be_is_refused_before_memory_is_taken(
    tiny: tuple[ConditionerConfig, open_clip.CLIP], tmp_path: Path, change: dict[str, Any]
) -> None:
    config, _ = tiny
    architecture = json.loads(Path(config.model).read_text())
    architecture["text_cfg"] |= change
    path = tmp_path / "other.json"
    path.write_text(json.dumps(architecture))
    with pytest.raises(ValueError, match=r"^conditioner\.model: open_clip cannot build") as caught:
        load_clip(replace(config, model=str(path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 100_000, " " * 2**21], ids=["nested", "large"])
def test_a_model_config_is_bounded(
    tiny: tuple[ConditionerConfig, open_clip.CLIP], tmp_path: Path, text: str
) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=r"^conditioner\.model: .*other\.json is "):
        load_clip(replace(tiny[0], model=str(tmp_path / "other.json")))


def test_a_model_config_named_as_a_built_in_one_is_read_from_its_file(
    tiny: tuple[ConditionerConfig, open_clip.CLIP], tmp_path: Path
) -> None:
    path = tmp_path / "ViT-B-32.json"
    path.write_text(json.dumps(CLIP))
    assert load_clip(replace(tiny[0], model=str(path))).text_width == 32


def test_weights_of_another_context_length_are_refused_not_resized(
    tiny: tuple[ConditionerConfig, open_clip.CLIP], tmp_path: Path
) -> None:
    path = tmp_path / "longer.json"
    text = CLIP["text_cfg"] | {"context_length": 20}
    path.write_text(json.dumps(CLIP | {"text_cfg": text}))
    with pytest.raises(ValueError, match=r"positional_embedding is \[12, 32\], not \[20, 32\]"):
        load_clip(replace(tiny[0], model=str(path)))


def test_a_tag_that_no_hub_serves_fails_after_one_request_and_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = ConditionerConfig(model="ViT-H-14", pretrained="laion2b_s32b_b79k")
    with dead_hub(tmp_path, monkeypatch) as requests, pytest.raises(ValueError) as caught:
        build_conditioner(config)
    assert requests == ["HEAD / HTTP/1.1"]  # the hub's own client would try again for a minute
    message = str(caught.value)
    assert message.startswith("conditioner.pretrained = laion2b_s32b_b79k: cannot download")
    assert "or set conditioner.pretrained to the path of a safetensors file" in message
    assert "\n" not in message


def test_a_pickle_in_disguise_is_refused_and_not_run(
    tiny: tuple[ConditionerConfig, open_clip.CLIP], tmp_path: Path
) -> None:
    path, target = tmp_path / "w.safetensors", tmp_path / "executed"
    write_bomb(path, target)
    with pytest.raises(ValueError, match=r"^conditioner.pretrained: .* no safetensors file"):
        load_clip(replace(tiny[0], pretrained=str(path)))
    assert not target.exists()


@pytest.fixture
def tagged(
    tiny: tuple[ConditionerConfig, open_clip.CLIP], monkeypatch: pytest.MonkeyPatch
) -> tuple[ConditionerConfig, dict[str, Any], list[tuple[str, str]]]:
    """Options that name the tiny weights by a tag, that tag's entry, and what the hub is asked."""
    config, asked = tiny[0], list[tuple[str, str]]()
    entry: dict[str, Any] = {"hf_hub": "someone/tiny/"}

    def fetch(repo: str, name: str) -> Path:
        asked.append((repo, name))
        return Path(config.pretrained)

    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda model: ["small"])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, tag: entry)
    monkeypatch.setattr(hub, "fetch_file", fetch)
    return replace(config, pretrained="small"), entry, asked


def test_a_tag_brings_its_activation_and_its_normalisation(
    tiny: tuple[ConditionerConfig, open_clip.CLIP],
    tagged: tuple[ConditionerConfig, dict[str, Any], list[tuple[str, str]]],
) -> None:
    config, entry, _ = tagged
    entry |= {"quick_gelu": True, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    loaded = load_clip(config)
    assert loaded.image_mean == (0.1, 0.2, 0.3)
    assert loaded.image_std == (0.4, 0.5, 0.6)
    quick = open_clip.CLIP(**CLIP, quick_gelu=True).eval()
    quick.load_state_dict(tiny[1].state_dict())
    ids = loaded.tokenizer(CAPTIONS)
    torch.testing.assert_close(loaded.model.encode_text(ids), quick.encode_text(ids))
    assert not torch.allclose(quick.encode_text(ids), tiny[1].encode_text(ids))
    assert loaded.text_architecture == CLIP["text_cfg"] | {"quick_gelu": True}


@pytest.mark.parametrize(
    ("place", "file"),
    [
        ("someone/tiny/", "open_clip_model.safetensors"),
        ("someone/tiny/weights.bin", "weights.safetensors"),
    ],
)
def test_the_weights_of_a_tag_are_the_safetensors_file_of_its_repository(
    place: str,
    file: str,
    tagged: tuple[ConditionerConfig, dict[str, Any], list[tuple[str, str]]],
) -> None:
    config, entry, asked = tagged
    entry["hf_hub"] = place
    load_clip(config)
    assert asked == [("someone/tiny", file)]


def test_a_tag_without_a_repository_is_named(
    tagged: tuple[ConditionerConfig, dict[str, Any], list[tuple[str, str]]],
) -> None:
    config, entry, _ = tagged
    del entry["hf_hub"]
    with pytest.raises(ValueError, match=r"^conditioner.pretrained = small: there is no safetens"):
        load_clip(config)


def test_a_clip_with_a_separate_text_tower_conditions_as_its_own_embedding(
    tmp_path: Path,
) -> None:
    config, clip = write_clip(tmp_path, custom_text=True)
    conditioner = build_conditioner(config)
    tokens = conditioner.condition(Given(CAPTIONS), SIZE).tokens
    assert tokens is not None
    ids = open_clip.SimpleTokenizer(context_length=12)(CAPTIONS)
    ends = tokens[torch.arange(len(ids)), ids.argmax(dim=-1)]
    pooled = ends @ clip.text.text_projection
    torch.testing.assert_close(pooled, clip.encode_text(ids), rtol=1e-4, atol=1e-5)
    outline = conditioner_class(config).outline(config)
    assert outline.parameters == sum(p.numel() for p in conditioner.parameters())


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([False, True]),
    st.integers(1, 3),
    st.integers(1, 90),
    st.integers(2, 50),
    st.integers(1, 5),
    st.sampled_from([4, 12]),
)
def test_a_text_tower_is_counted_as_open_clip_builds_it(
    custom: bool, layers: int, tokens: int, words: int, heads: int, embed_dim: int
) -> None:
    text = {
        "context_length": tokens,
        "vocab_size": words,
        "width": 8 * heads,
        "heads": heads,
        "layers": layers,
    }
    vision = {"image_size": 8, "layers": 1, "width": 64, "patch_size": 8}
    whole = {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text}
    if custom:
        whole["custom_text"] = True
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.json"
        found: list[TextTower] = []
        for options in ({}, {"mlp_ratio": 4.0}):  # with the second, open_clip builds the tower
            file.write_text(json.dumps(whole | {"text_cfg": text | options}))
            found.append(text_tower(str(file)))
    assert found[0] == found[1]
