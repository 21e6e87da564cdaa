"""Text encoders of the transformers library: small random ones, saved as it saves them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from models.condition import Condition
from models.conditioning.conditioners import build_conditioner
from models.conditioning.given import Given
from models.conditioning.text import Text, text_fingerprint
from models.conditioning.transformers_text import TransformersText
from models.config import ConditionerConfig, ConditionerKind, TextFeatures
from tests.support.dead_hub import dead_hub
from tests.support.text_encoders import WIDTH, WORDS, bert, write_tokenizer

SIZE = (8, 8)
CAPTIONS = ["a red heart", "", None, "a b c d e f g h i j k l m", "heart"]
TOKENS = 8


def t5() -> Any:
    config = transformers.T5Config(
        d_model=WIDTH, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=10
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def bart() -> Any:
    sizes: dict[str, Any] = {"d_model": WIDTH, "vocab_size": 10, "max_position_embeddings": 16}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 2, f"{part}_ffn_dim": 64, f"{part}_attention_heads": 2}
    return transformers.BartModel(transformers.BartConfig(**sizes)).eval()


NETWORKS = {"bert": bert, "t5": t5, "bart": bart}
"""An encoder, an encoder-decoder with a class for its encoder, and one without."""


@pytest.fixture(scope="module", params=NETWORKS)
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ConditionerConfig, Any]:
    """An encoder in a folder: the options that load it, and the network."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    network = NETWORKS[request.param]()
    network.save_pretrained(folder)
    write_tokenizer(folder)
    encoder = network if request.param == "bert" else network.get_encoder()
    return options(folder), encoder


def options(folder: Path | str, **more: Any) -> ConditionerConfig:
    fields: dict[str, Any] = {
        "width": WIDTH,
        "context_length": TOKENS,
        "pretrained": str(folder),
    }
    return ConditionerConfig(kind=ConditionerKind.transformers, **(fields | more))


def encode(config: ConditionerConfig) -> Condition:
    condition = build_conditioner(config).condition(Given(CAPTIONS), SIZE)
    assert condition.tokens is not None
    assert condition.tokens.dtype == torch.float32
    return condition


def alone(network: Any, caption: str | None) -> Tensor:
    """The tokens of one caption, without any padding."""
    known = {word: number for number, word in enumerate(WORDS)}
    words = [known.get(word, 1) for word in (caption or "").split()][: TOKENS - 2]
    return network(input_ids=torch.tensor([[2, *words, 3]])).last_hidden_state[0]


def test_tokens_are_those_of_the_caption_alone_and_padding_is_masked(
    saved: tuple[ConditionerConfig, Any],
) -> None:
    config, network = saved
    found, masks, _ = encode(config)
    assert found is not None
    assert masks is not None
    assert found.shape == (5, TOKENS, WIDTH)
    assert masks.sum(1).tolist() == [5, 2, 2, 8, 3]
    for tokens, mask, caption in zip(found, masks, CAPTIONS, strict=True):
        expected = alone(network, caption)
        assert mask.tolist() == [True] * len(expected) + [False] * (TOKENS - len(expected))
        torch.testing.assert_close(tokens[mask], expected, rtol=1e-4, atol=1e-5)
        assert not tokens[~mask].any()


def test_an_encoder_in_bf16_says_so_in_its_fingerprint(
    saved: tuple[ConditionerConfig, Any],
) -> None:
    config, _ = saved
    text, exact = build_conditioner(config), encode(config)
    assert isinstance(text, Text)
    name = text_fingerprint(text)
    text.run_in(torch.bfloat16)
    tokens, mask, _ = text.condition(Given(CAPTIONS), SIZE)
    assert tokens is not None
    assert exact.tokens is not None
    assert tokens.dtype == torch.float32
    assert 1e-4 < (tokens - exact.tokens).norm() / exact.tokens.norm() < 0.05
    assert mask is not None
    assert exact.mask is not None
    assert torch.equal(mask, exact.mask)
    assert text_fingerprint(text) == f"{name}:bfloat16"


def test_pooled_features_are_the_mean_of_the_tokens(saved: tuple[ConditionerConfig, Any]) -> None:
    config, network = saved
    tokens, mask, _ = encode(options(config.pretrained, features=TextFeatures.pooled))
    assert tokens is not None
    assert mask is None
    expected = torch.stack([alone(network, caption).mean(0) for caption in CAPTIONS])
    torch.testing.assert_close(tokens[:, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("features", [TextFeatures.last, TextFeatures.pooled])
def test_stored_tokens_bring_their_mask_back(
    saved: tuple[ConditionerConfig, Any], features: TextFeatures
) -> None:
    conditioner = build_conditioner(options(saved[0].pretrained, features=features)).train()
    assert isinstance(conditioner, Text)
    assert not any(module.training for module in conditioner.modules())
    assert not any(parameter.requires_grad for parameter in conditioner.parameters())
    tokens, mask, _ = conditioner.condition(Given(CAPTIONS), SIZE)
    assert tokens is not None
    dropped = torch.tensor([True, False, False, True, False])
    restored = conditioner.restore(tokens.half().float(), dropped)
    expected, expected_mask, _ = conditioner.condition(Given([None, "", None, None, "heart"]), SIZE)
    torch.testing.assert_close(restored.tokens, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(restored.mask, expected_mask)
    assert (mask is None) == (features is TextFeatures.pooled)


def named(config: ConditionerConfig) -> str:
    conditioner = build_conditioner(config)
    assert isinstance(conditioner, TransformersText)
    return text_fingerprint(conditioner)


def test_the_fingerprint_names_the_encoder_and_not_its_folder(tmp_path: Path) -> None:
    network = bert()
    changed = {"lacks the pooler": bert(add_pooling_layer=False), "nudged": bert()}
    changed["lacks the pooler"].load_state_dict(network.state_dict(), strict=False)
    changed["nudged"].load_state_dict(network.state_dict())
    with torch.no_grad():
        changed["nudged"].embeddings.LayerNorm.bias[0] += 1e-6
    for name, one in {"original": network, "other words": network, **changed}.items():
        one.save_pretrained(tmp_path / name)
        write_tokenizer(tmp_path / name, [*WORDS[:-1], "e"] if name == "other words" else WORDS)
    shutil.copytree(tmp_path / "original", tmp_path / "by another version")
    path = tmp_path / "by another version" / "config.json"
    settings = json.loads(path.read_text())
    others = {"transformers_version": "5.99.0", "architectures": ["BertForMaskedLM"]}
    path.write_text(json.dumps(settings | others | {"dtype": "float16"}))
    original = options(tmp_path / "original")
    assert named(original) == named(options(tmp_path / "by another version"))
    assert named(original) == named(original) == named(options(tmp_path / "lacks the pooler"))
    different = [
        options(tmp_path / "nudged"),
        options(tmp_path / "other words"),
        options(tmp_path / "original", context_length=9),
        options(tmp_path / "original", features=TextFeatures.pooled),
    ]
    assert len({named(original), *map(named, different)}) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pretrained": ""}, "^conditioner.pretrained is empty: set it to the name of a text enc"),
        ({"pretrained": "/lost"}, "^conditioner.pretrained: no folder at /lost"),
        ({"pretrained": "./lost"}, "^conditioner.pretrained: no folder at ./lost"),
        ({"pretrained": "~/lost"}, "^conditioner.pretrained: no folder at ~/lost"),
        ({"pretrained": "lost/by/far"}, "^conditioner.pretrained: no folder at lost/by/far"),
        ({"width": 64}, r"^conditioner.width = 64, but last of .* is 32 wide"),
        ({"context_length": 17}, "^conditioner.context_length = 17 is more than the 16 tokens"),
        ({"context_length": 0}, "^conditioner.context_length=0 must be an integer ≥ 1"),
        ({"features": TextFeatures.penultimate}, "^conditioner.features=penultimate is of"),
    ],
)
def test_wrong_options_are_named(
    saved: tuple[ConditionerConfig, Any], change: dict[str, Any], message: str
) -> None:
    fields = {"pretrained": saved[0].pretrained} | change
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build_conditioner(options(fields.pop("pretrained"), **fields))


def test_a_folder_that_is_no_whole_encoder_is_named(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    network = bert()
    network.config.save_pretrained(tmp_path)
    found = r"^conditioner.pretrained: transformers finds no text encoder in .*model.safetensors"
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=found):  # a pickle is no weights file here
        build_conditioner(options(tmp_path))
    weights = network.state_dict()
    del weights["encoder.layer.1.output.dense.bias"]
    network.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"lack encoder.layer.1.output.dense.bias"):
        build_conditioner(options(tmp_path))


def test_a_tokenizer_that_gives_no_token_for_the_empty_caption_is_named(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    write_tokenizer(tmp_path, ends="$A")
    with pytest.raises(ValueError, match=r"^conditioner.pretrained: .* no token for the empty"):
        build_conditioner(options(tmp_path))


def test_a_name_that_no_hub_serves_fails_after_one_request_and_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with dead_hub(tmp_path, monkeypatch) as requests, pytest.raises(ValueError) as caught:
        build_conditioner(options("google/flan-t5-xl"))
    assert requests == ["HEAD / HTTP/1.1"]  # the hub's own client would try again for a minute
    message = str(caught.value)
    assert message.startswith("conditioner.pretrained = google/flan-t5-xl: cannot download it (")
    assert "or set conditioner.pretrained to the path of a folder" in message
    assert "\n" not in message


@pytest.mark.parametrize("features", [TextFeatures.last, TextFeatures.pooled])
def test_the_outline_of_an_encoder_has_its_shapes(
    saved: tuple[ConditionerConfig, Any], features: TextFeatures
) -> None:
    config = options(saved[0].pretrained, features=features)
    tokens, mask, planes = build_conditioner(config).condition(Given(CAPTIONS), SIZE)
    outline = TransformersText.outline(config)
    assert tokens is not None
    assert outline.tokens == tokens.shape[1]
    assert outline.masked == (mask is not None)
    assert planes is None
    assert "its size is written in its files" in outline.not_counted
