import json
import shutil
import time
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from models.clip import load_clip
from models.conditioners import Text, build_conditioner, fingerprint
from models.config import ConditionerConfig, ConditionerKind, TextFeatures
from tests.unit.models.hostile import write_bomb

CAPTIONS = ["a red heart", "", "flag of France", "cat " * 100]
ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 16,
        "layers": 2,
        "width": 32,
        "head_width": 16,
        "patch_size": 8,
    },
    "text_cfg": {
        "context_length": 12,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 3,
    },
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[ConditionerConfig, open_clip.CLIP]:
    """A random CLIP as open_clip makes it, and the options that load its files."""
    folder: Path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    clip = open_clip.CLIP(**ARCHITECTURE).eval()
    (folder / "tiny.json").write_text(json.dumps(ARCHITECTURE))
    save_file(clip.state_dict(), folder / "tiny.safetensors")
    halved = {name: value.half() for name, value in clip.state_dict().items()}
    save_file(halved, folder / "half.safetensors")
    config = ConditionerConfig(
        model=str(folder / "tiny.json"), pretrained=str(folder / "tiny.safetensors"), width=32
    )
    return config, clip


def other(config: ConditionerConfig, **options) -> ConditionerConfig:
    fields = ("kind", "model", "pretrained", "features", "num_classes", "width")
    return ConditionerConfig(**({name: getattr(config, name) for name in fields} | options))


def named(config: ConditionerConfig) -> str:
    text = build_conditioner(config)
    assert isinstance(text, Text)
    return fingerprint(text)


def pooled(tokens: torch.Tensor, ids: torch.Tensor, clip: open_clip.CLIP) -> torch.Tensor:
    """CLIP's embedding of a text: its end token, projected (Radford et al. 2021, section 2.4)."""
    assert isinstance(clip.text_projection, torch.Tensor)
    return tokens[torch.arange(len(ids)), ids.argmax(dim=-1)] @ clip.text_projection


def tokens_of(config: ConditionerConfig, captions: list[str]) -> torch.Tensor:
    """The context of a conditioner that pads nothing."""
    context = build_conditioner(config)(captions)
    assert context is not None
    assert context.mask is None
    return context.tokens


@pytest.mark.parametrize("features", [TextFeatures.last, TextFeatures.penultimate])
def test_text_tokens_are_open_clips_hidden_states(tiny, features):
    config, clip = tiny
    tokens = tokens_of(other(config, features=features), CAPTIONS)
    assert tokens.shape == (4, 12, 32)
    assert tokens.dtype == torch.float32
    ids = open_clip.SimpleTokenizer(context_length=12)(CAPTIONS)
    expected = open_clip.CLIP(**ARCHITECTURE).eval()
    expected.load_state_dict(clip.state_dict())
    if features is TextFeatures.penultimate:
        del expected.transformer.resblocks[-1]
    torch.testing.assert_close(
        pooled(tokens, ids, expected), expected.encode_text(ids), rtol=1e-4, atol=1e-5
    )


def test_pooled_features_are_open_clips_embeddings(tiny):
    config, clip = tiny
    pooled_config = other(config, features=TextFeatures.pooled, width=ARCHITECTURE["embed_dim"])
    tokens = tokens_of(pooled_config, CAPTIONS)
    assert tokens.shape == (4, 1, 16)
    expected = clip.encode_text(open_clip.SimpleTokenizer(context_length=12)(CAPTIONS))
    torch.testing.assert_close(tokens[:, 0], expected)


def test_the_text_conditioner_is_frozen_and_stays_in_evaluation_mode(tiny):
    conditioner = build_conditioner(tiny[0]).train()
    assert not conditioner.trainable
    assert conditioner.context_dim == 32
    assert not any(module.training for module in conditioner.modules())
    assert not any(parameter.requires_grad for parameter in conditioner.parameters())
    assert not any("visual" in name for name, _ in conditioner.named_parameters())


def test_no_condition_is_the_empty_caption(tiny):
    null, empty, heart = build_conditioner(tiny[0])([None, "", "a red heart"]).tokens
    assert torch.equal(null, empty)
    assert not torch.allclose(null, heart)


def test_half_precision_weights_load_as_fp32(tiny):
    config, _ = tiny
    exact = tokens_of(config, CAPTIONS)
    path = str(Path(config.pretrained).with_name("half.safetensors"))
    halved = tokens_of(other(config, pretrained=path), CAPTIONS)
    assert halved.dtype == torch.float32
    assert not torch.equal(halved, exact)
    torch.testing.assert_close(halved, exact, rtol=0.05, atol=0.05)


def test_the_fingerprint_names_the_text_tower_and_not_its_file(tiny, tmp_path):
    config, clip = tiny
    original = named(config)
    shutil.copy(config.pretrained, tmp_path / "moved.safetensors")
    weights = clip.state_dict()
    visual = {name: value + name.startswith("visual.") for name, value in weights.items()}
    save_file(visual, tmp_path / "visual.safetensors")
    nudged = weights | {"ln_final.bias": weights["ln_final.bias"] + 1e-6}
    save_file(nudged, tmp_path / "nudged.safetensors")
    fewer_heads = {**ARCHITECTURE, "text_cfg": {**ARCHITECTURE["text_cfg"], "heads": 1}}
    (tmp_path / "heads.json").write_text(json.dumps(fewer_heads))
    for name in ("moved", "visual"):
        assert named(other(config, pretrained=str(tmp_path / f"{name}.safetensors"))) == original
    others = [
        other(config, pretrained=str(tmp_path / "nudged.safetensors")),
        other(config, model=str(tmp_path / "heads.json")),
        other(config, features=TextFeatures.penultimate),
    ]
    assert len({original, *map(named, others)}) == 4


def test_load_clip_embeds_images_and_texts_as_open_clip(tiny):
    config, clip = tiny
    loaded = load_clip(config)
    images = torch.randn(2, 3, loaded.image_size, loaded.image_size)
    torch.testing.assert_close(loaded.model.encode_image(images), clip.encode_image(images))
    ids = loaded.tokenizer(CAPTIONS)
    assert ids.shape == (4, 12)
    torch.testing.assert_close(loaded.model.encode_text(ids), clip.encode_text(ids))
    assert loaded.image_mean == open_clip.OPENAI_DATASET_MEAN
    assert loaded.image_std == open_clip.OPENAI_DATASET_STD


def test_built_in_architectures_load_from_local_weights(tmp_path):
    name = "ViT-S-32-alt"
    clip = open_clip.create_model(name)
    save_file(clip.state_dict(), tmp_path / "weights.safetensors")
    config = ConditionerConfig(
        model=name, pretrained=str(tmp_path / "weights.safetensors"), width=256
    )
    assert tokens_of(config, ["a cat"]).shape == (1, 77, 256)


def test_a_pickle_in_disguise_is_refused_and_not_run(tiny, tmp_path):
    path, target = tmp_path / "w.safetensors", tmp_path / "executed"
    write_bomb(path, target)
    with pytest.raises(ValueError, match=r"^conditioner.pretrained: .* no safetensors file"):
        load_clip(other(tiny[0], pretrained=str(path)))
    assert not target.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ""}, "conditioner.model is empty"),
        ({"model": "ViT-Z"}, "conditioner.model: open_clip knows no architecture 'ViT-Z'"),
        ({"model": "ViT-B-16-SigLIP"}, "conditioner.model: the text tower .* is not CLIP's own"),
        ({"model": "lost.json"}, "conditioner.model: no file at lost.json"),
        ({"pretrained": ""}, "conditioner.pretrained is empty"),
        ({"pretrained": "lost.safetensors"}, "conditioner.pretrained: no file at lost"),
        ({"pretrained": "w.pt"}, "conditioner.pretrained = w.pt is no tag of .* and no .safe"),
        (
            {"model": "ViT-H-14", "pretrained": "openai"},
            "= openai is no tag of ViT-H-14 .*laion2b_s32b_b79k",
        ),
        ({"model": "ViT-S-32-alt"}, "conditioner.pretrained: .* holds another network than"),
        ({"width": 64}, "conditioner.width = 64, but last of .*tiny.json is 32 wide"),
    ],
)
def test_wrong_options_are_named(tiny, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build_conditioner(other(tiny[0], **options))


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
def test_a_broken_model_config_is_named(tiny, tmp_path, text, message):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^conditioner.model: {message}"):
        load_clip(other(tiny[0], model=str(path)))


def test_a_model_config_named_as_a_built_in_one_is_read_from_its_file(tiny, tmp_path):
    path = tmp_path / "ViT-B-32.json"
    path.write_text(json.dumps(ARCHITECTURE))
    assert load_clip(other(tiny[0], model=str(path))).text_width == 32


def test_weights_of_another_context_length_are_refused_not_resized(tiny, tmp_path):
    path = tmp_path / "longer.json"
    text = ARCHITECTURE["text_cfg"] | {"context_length": 20}
    path.write_text(json.dumps(ARCHITECTURE | {"text_cfg": text}))
    with pytest.raises(ValueError, match=r"positional_embedding is \[12, 32\], not \[20, 32\]"):
        load_clip(other(tiny[0], model=str(path)))


def test_a_tag_without_a_network_fails_at_once_and_names_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    config = ConditionerConfig(model="ViT-H-14", pretrained="laion2b_s32b_b79k")
    start = time.monotonic()
    with pytest.raises(ValueError) as caught:
        build_conditioner(config)
    assert time.monotonic() - start < 5.0
    message = str(caught.value)
    assert message.startswith("conditioner.pretrained = laion2b_s32b_b79k: cannot download")
    assert "or set conditioner.pretrained to the path of a safetensors file" in message
    assert "\n" not in message


def classes(count: int = 10) -> ConditionerConfig:
    return ConditionerConfig(kind=ConditionerKind.class_label, num_classes=count, width=8)


def test_class_labels_are_rows_of_a_trained_table_and_the_null_class_is_the_last():
    conditioner = build_conditioner(classes())
    assert conditioner.trainable
    assert conditioner.context_dim == 8
    context = conditioner(["0", "9", " 3 ", None]).tokens
    assert context.shape == (4, 1, 8)
    table = dict(conditioner.named_parameters())["embedding.weight"]
    assert table.shape == (11, 8)
    assert torch.equal(context[:, 0], table[[0, 9, 3, 10]])
    context.sum().backward()
    assert table.grad is not None
    assert table.grad.abs().sum(dim=1).nonzero().flatten().tolist() == [0, 3, 9, 10]


@pytest.mark.parametrize("caption", ["10", "-1", "cat", "", "1.0", "²"])
def test_a_caption_that_is_no_class_number_is_named(caption):
    with pytest.raises(ValueError, match="is no class number from 0 to 9"):
        build_conditioner(classes())([caption])


def test_class_labels_need_a_number_of_classes():
    with pytest.raises(ValueError, match=r"^conditioner.num_classes=0"):
        build_conditioner(classes(0))


def test_no_conditioner_has_no_context_and_no_parameters():
    conditioner = build_conditioner(ConditionerConfig(kind=ConditionerKind.none))
    assert conditioner(["a cat", None]) is None
    assert conditioner.context_dim == 0
    assert not conditioner.trainable
    assert not list(conditioner.parameters())
