import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.condition import Condition
from models.conditioning.class_label import ClassLabel
from models.conditioning.conditioner import Conditioner
from models.conditioning.conditioners import build_conditioner, conditioner_class
from models.conditioning.given import Given
from models.conditioning.text import Text, same_weights, text_fingerprint
from models.config import ConditionerConfig, ConditionerKind, TextFeatures
from models.config.conditioning import CONDITIONERS
from tests.support.text_encoders import CLIP, write_clip

SIZE = (8, 8)
CAPTIONS = ["a red heart", "", "flag of France", "cat " * 100]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[ConditionerConfig, open_clip.CLIP]:
    """A random CLIP as open_clip makes it, and the options that load its files."""
    config, clip = write_clip(tmp_path_factory.mktemp("clip"))
    halved = {name: value.half() for name, value in clip.state_dict().items()}
    save_file(halved, Path(config.pretrained).with_name("half.safetensors"))
    return config, clip


def other(config: ConditionerConfig, **options: Any) -> ConditionerConfig:
    fields = ("kind", "model", "pretrained", "features", "num_classes", "width")
    return ConditionerConfig(**({name: getattr(config, name) for name in fields} | options))


def named(config: ConditionerConfig) -> str:
    text = build_conditioner(config)
    assert isinstance(text, Text)
    return text_fingerprint(text)


def pooled(tokens: torch.Tensor, ids: torch.Tensor, clip: open_clip.CLIP) -> torch.Tensor:
    """CLIP's embedding of a text: its end token, projected (Radford et al. 2021, section 2.4)."""
    assert isinstance(clip.text_projection, torch.Tensor)
    return tokens[torch.arange(len(ids)), ids.argmax(dim=-1)] @ clip.text_projection


def tokens_of(config: ConditionerConfig, captions: Sequence[str | None]) -> torch.Tensor:
    """The context of a conditioner that pads nothing."""
    context = build_conditioner(config).condition(Given(captions), SIZE)
    assert context.mask is None
    assert context.tokens is not None
    return context.tokens


@pytest.mark.parametrize("features", [TextFeatures.last, TextFeatures.penultimate])
def test_text_tokens_are_open_clips_hidden_states(
    tiny: tuple[ConditionerConfig, open_clip.CLIP], features: TextFeatures
) -> None:
    config, clip = tiny
    tokens = tokens_of(other(config, features=features), CAPTIONS)
    assert tokens.shape == (4, 12, 32)
    assert tokens.dtype == torch.float32
    ids = open_clip.SimpleTokenizer(context_length=12)(CAPTIONS)
    expected = open_clip.CLIP(**CLIP).eval()
    expected.load_state_dict(clip.state_dict())
    if features is TextFeatures.penultimate:
        del expected.transformer.resblocks[-1]
    torch.testing.assert_close(
        pooled(tokens, ids, expected), expected.encode_text(ids), rtol=1e-4, atol=1e-5
    )


def test_pooled_features_are_open_clips_embeddings(
    tiny: tuple[ConditionerConfig, open_clip.CLIP],
) -> None:
    config, clip = tiny
    pooled_config = other(config, features=TextFeatures.pooled, width=CLIP["embed_dim"])
    tokens = tokens_of(pooled_config, CAPTIONS)
    assert tokens.shape == (4, 1, 16)
    expected = clip.encode_text(open_clip.SimpleTokenizer(context_length=12)(CAPTIONS))
    torch.testing.assert_close(tokens[:, 0], expected)


def test_the_text_conditioner_is_frozen_and_stays_in_evaluation_mode(
    tiny: tuple[ConditionerConfig, open_clip.CLIP],
) -> None:
    conditioner = build_conditioner(tiny[0]).train()
    assert not conditioner.trainable
    assert conditioner.context_dim == 32
    assert not any(module.training for module in conditioner.modules())
    assert not any(parameter.requires_grad for parameter in conditioner.parameters())
    assert not any("visual" in name for name, _ in conditioner.named_parameters())


def test_no_condition_is_the_empty_caption(tiny: tuple[ConditionerConfig, open_clip.CLIP]) -> None:
    null, empty, heart = tokens_of(tiny[0], [None, "", "a red heart"])
    assert torch.equal(null, empty)
    assert not torch.allclose(null, heart)


def test_half_precision_weights_load_as_fp32(
    tiny: tuple[ConditionerConfig, open_clip.CLIP],
) -> None:
    config, _ = tiny
    exact = tokens_of(config, CAPTIONS)
    path = str(Path(config.pretrained).with_name("half.safetensors"))
    halved = tokens_of(other(config, pretrained=path), CAPTIONS)
    assert halved.dtype == torch.float32
    assert not torch.equal(halved, exact)
    torch.testing.assert_close(halved, exact, rtol=0.05, atol=0.05)


def test_the_fingerprint_names_the_text_tower_and_not_its_file(
    tiny: tuple[ConditionerConfig, open_clip.CLIP], tmp_path: Path
) -> None:
    config, clip = tiny
    original = named(config)
    shutil.copy(config.pretrained, tmp_path / "moved.safetensors")
    weights = clip.state_dict()
    visual = {name: value + name.startswith("visual.") for name, value in weights.items()}
    save_file(visual, tmp_path / "visual.safetensors")
    nudged = weights | {"ln_final.bias": weights["ln_final.bias"] + 1e-6}
    save_file(nudged, tmp_path / "nudged.safetensors")
    fewer_heads = {**CLIP, "text_cfg": {**CLIP["text_cfg"], "heads": 1}}
    (tmp_path / "heads.json").write_text(json.dumps(fewer_heads))
    for name in ("moved", "visual"):
        assert named(other(config, pretrained=str(tmp_path / f"{name}.safetensors"))) == original
    others = [
        other(config, pretrained=str(tmp_path / "nudged.safetensors")),
        other(config, model=str(tmp_path / "heads.json")),
        other(config, features=TextFeatures.penultimate),
    ]
    assert len({original, *map(named, others)}) == 4


@pytest.mark.parametrize("features", [TextFeatures.penultimate, TextFeatures.pooled])
def test_a_text_tower_in_bf16_says_so_in_its_fingerprint(
    tiny: tuple[ConditionerConfig, open_clip.CLIP], features: TextFeatures
) -> None:
    width = CLIP["embed_dim"] if features is TextFeatures.pooled else 32
    config = other(tiny[0], features=features, width=width)
    text = build_conditioner(config)
    assert isinstance(text, Text)
    exact, name = tokens_of(config, CAPTIONS), named(config)
    text.run_in(torch.bfloat16)
    assert {parameter.dtype for parameter in text.parameters()} == {torch.bfloat16}
    tokens = text.condition(Given(CAPTIONS), SIZE).tokens
    assert tokens is not None
    assert tokens.dtype == torch.float32
    assert 1e-4 < (tokens - exact).norm() / exact.norm() < 0.05
    assert text_fingerprint(text) == f"{name}:bfloat16"
    assert same_weights(text_fingerprint(text), name)
    assert not same_weights(text_fingerprint(text), named(tiny[0]))


def test_built_in_architectures_load_from_local_weights(tmp_path: Path) -> None:
    name = "ViT-S-32-alt"
    clip = open_clip.create_model(name)
    save_file(clip.state_dict(), tmp_path / "weights.safetensors")
    config = ConditionerConfig(
        model=name, pretrained=str(tmp_path / "weights.safetensors"), width=256
    )
    assert tokens_of(config, ["a cat"]).shape == (1, 77, 256)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ""}, "conditioner.model is empty"),
        ({"model": "ViT-Z"}, "conditioner.model: open_clip knows no architecture 'ViT-Z'"),
        ({"model": "ViT-B-16-SigLIP"}, "conditioner.model: the text tower .* is not CLIP's own"),
        ({"model": "coca_ViT-B-32"}, "conditioner.model: the text tower .* is not CLIP's own"),
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
def test_wrong_options_are_named(
    tiny: tuple[ConditionerConfig, open_clip.CLIP], options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build_conditioner(other(tiny[0], **options))


def classes(count: int = 10) -> ConditionerConfig:
    return ConditionerConfig(kind=ConditionerKind.class_label, num_classes=count, width=8)


def test_class_labels_are_rows_of_a_trained_table_and_the_null_class_is_the_last() -> None:
    conditioner = build_conditioner(classes())
    assert conditioner.trainable
    assert conditioner.context_dim == 8
    context = conditioner.condition(Given(["0", "9", " 3\x1f", None]), SIZE).tokens
    assert context is not None
    assert context.shape == (4, 1, 8)
    table = dict(conditioner.named_parameters())["embedding.weight"]
    assert table.shape == (11, 8)
    assert torch.equal(context[:, 0], table[[0, 9, 3, 10]])
    context.sum().backward()
    assert table.grad is not None
    assert table.grad.abs().sum(dim=1).nonzero().flatten().tolist() == [0, 3, 9, 10]


@given(st.text(st.characters(categories=None)) | st.from_regex(r"\d{1,3}"))
@settings(max_examples=200)
def test_every_caption_is_a_class_or_has_a_problem(caption: str) -> None:
    conditioner = ClassLabel(classes())
    problem = CONDITIONERS[ConditionerKind.class_label].caption_problem(classes(), caption)
    if problem:
        with pytest.raises(ValueError, match="is no class number"):
            conditioner.condition(Given([caption]), SIZE)
    else:
        conditioner.condition(Given([caption]), SIZE)


@pytest.mark.parametrize("caption", ["10", "-1", "cat", "", "1.0", "²", "9" * 2**20])
def test_a_caption_that_is_no_class_number_is_named(caption: str) -> None:
    with pytest.raises(ValueError, match="is no class number from 0 to 9"):
        build_conditioner(classes()).condition(Given([caption]), SIZE)


def test_class_labels_need_a_number_of_classes() -> None:
    with pytest.raises(ValueError, match=r"^conditioner.num_classes=0"):
        build_conditioner(classes(0))


def test_no_conditioner_has_an_empty_condition_and_no_parameters() -> None:
    conditioner = build_conditioner(ConditionerConfig(kind=ConditionerKind.none))
    assert conditioner.condition(Given(["a cat", None]), SIZE) == Condition()
    assert conditioner.context_dim == 0
    assert not conditioner.trainable
    assert not list(conditioner.parameters())


@pytest.mark.parametrize("features", TextFeatures)
def test_the_outline_of_a_text_tower_is_that_of_the_loaded_one(
    tiny: tuple[ConditionerConfig, open_clip.CLIP], features: TextFeatures
) -> None:
    width = CLIP["embed_dim"] if features is TextFeatures.pooled else 32
    config = other(tiny[0], features=features, width=width)
    outline, conditioner = conditioner_class(config).outline(config), build_conditioner(config)
    # the counter knows no formula of the CPU's fused attention
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tokens, mask, planes = conditioner.condition(Given(["a red heart"]), SIZE)
    assert tokens is not None
    assert (mask, planes) == (None, None)
    parameters = sum(parameter.numel() for parameter in conditioner.parameters())
    assert outline.parameters == parameters
    assert outline.tokens == tokens.shape[1]
    # the tower projects its output, which only pooled features need
    assert outline.flops == counter.get_total_flops() or features is not TextFeatures.pooled
    assert outline.flops == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert not outline.not_counted


def test_every_kind_has_an_entry_whose_class_exists() -> None:
    assert list(CONDITIONERS) == list(ConditionerKind)
    for kind in ConditionerKind:
        assert issubclass(conditioner_class(ConditionerConfig(kind=kind)), Conditioner)


def test_only_clip_is_a_part_of_a_pipeline() -> None:
    assert build_conditioner(classes()).pipeline_parts() is None
