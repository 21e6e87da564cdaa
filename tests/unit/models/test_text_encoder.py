"""Text encoders of the transformers library: small random ones, saved as it saves them."""

import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from models.attention import Context
from models.conditioners import Text, TransformersText, build_conditioner, fingerprint
from models.config import ConditionerConfig, ConditionerKind, TextFeatures

CAPTIONS = ["a red heart", "", None, "a b c d e f g h i j k l m", "heart"]
TOKENS, WIDTH = 8, 32
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "heart", "b", "c", "d"]


def write_tokenizer(folder: Path, words: list[str] = WORDS, ends: str = "[CLS] $A [SEP]") -> None:
    """Words, and unknown ones, between the marks of an encoder."""
    backend = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [(word, words.index(word)) for word in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single=ends, special_tokens=marks)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(folder)


def bert(**options: Any) -> Any:
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "vocab_size": 10, "max_position_embeddings": 16}
    return transformers.BertModel(transformers.BertConfig(**sizes), **options).eval()


def t5() -> Any:
    config = transformers.T5Config(
        d_model=WIDTH, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=10
    )
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.fixture(scope="module", params=["bert", "t5"])
def saved(request, tmp_path_factory) -> tuple[ConditionerConfig, Any]:
    """An encoder in a folder: the options that load it, and the network."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    network = bert() if request.param == "bert" else t5()
    network.save_pretrained(folder)
    write_tokenizer(folder)
    encoder = network if request.param == "bert" else network.get_encoder()
    return options(folder), encoder


def options(folder: Path | str, **more: Any) -> ConditionerConfig:
    fields = {"width": WIDTH, "context_length": TOKENS, "pretrained": str(folder)}
    return ConditionerConfig(kind=ConditionerKind.transformers, **(fields | more))


def encode(config: ConditionerConfig) -> Context:
    context = build_conditioner(config)(CAPTIONS)
    assert context.tokens.dtype == torch.float32
    return context


def alone(network: Any, caption: str | None) -> Tensor:
    """The tokens of one caption, without any padding."""
    known = {word: number for number, word in enumerate(WORDS)}
    words = [known.get(word, 1) for word in (caption or "").split()][: TOKENS - 2]
    return network(input_ids=torch.tensor([[2, *words, 3]])).last_hidden_state[0]


def test_tokens_are_those_of_the_caption_alone_and_padding_is_masked(saved):
    config, network = saved
    context = encode(config)
    assert context.tokens.shape == (5, TOKENS, WIDTH)
    assert context.mask is not None
    assert context.mask.sum(1).tolist() == [5, 2, 2, 8, 3]
    for tokens, mask, caption in zip(context.tokens, context.mask, CAPTIONS, strict=True):
        expected = alone(network, caption)
        assert mask.tolist() == [True] * len(expected) + [False] * (TOKENS - len(expected))
        torch.testing.assert_close(tokens[mask], expected, rtol=1e-4, atol=1e-5)
        assert not tokens[~mask].any()


def test_pooled_features_are_the_mean_of_the_tokens(saved):
    config, network = saved
    context = encode(options(config.pretrained, features=TextFeatures.pooled))
    assert context.mask is None
    expected = torch.stack([alone(network, caption).mean(0) for caption in CAPTIONS])
    torch.testing.assert_close(context.tokens[:, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("features", [TextFeatures.last, TextFeatures.pooled])
def test_stored_tokens_bring_their_mask_back(saved, features):
    conditioner = build_conditioner(options(saved[0].pretrained, features=features)).train()
    assert isinstance(conditioner, Text)
    assert not any(module.training for module in conditioner.modules())
    assert not any(parameter.requires_grad for parameter in conditioner.parameters())
    tokens, mask = conditioner(CAPTIONS)
    restored = conditioner.restore(tokens.half().float())
    torch.testing.assert_close(restored.tokens, tokens, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(restored.mask, mask)
    assert (mask is None) == (features is TextFeatures.pooled)


def named(config: ConditionerConfig) -> str:
    conditioner = build_conditioner(config)
    assert isinstance(conditioner, TransformersText)
    return fingerprint(conditioner)


def test_the_fingerprint_names_the_encoder_and_not_its_folder(tmp_path):
    network = bert()
    changed = {"lacks the pooler": bert(add_pooling_layer=False), "nudged": bert()}
    changed["lacks the pooler"].load_state_dict(network.state_dict(), strict=False)
    changed["nudged"].load_state_dict(network.state_dict())
    with torch.no_grad():
        changed["nudged"].embeddings.LayerNorm.bias[0] += 1e-6
    for name, one in {"original": network, "other words": network, **changed}.items():
        one.save_pretrained(tmp_path / name)
        write_tokenizer(tmp_path / name, [*WORDS[:-1], "e"] if name == "other words" else WORDS)
    original = options(tmp_path / "original")
    assert named(original) == named(original) == named(options(tmp_path / "lacks the pooler"))
    others = [
        options(tmp_path / "nudged"),
        options(tmp_path / "other words"),
        options(tmp_path / "original", context_length=9),
        options(tmp_path / "original", features=TextFeatures.pooled),
    ]
    assert len({named(original), *map(named, others)}) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pretrained": ""}, "^conditioner.pretrained is empty: set it to the name of a text enc"),
        ({"pretrained": "/lost"}, "^conditioner.pretrained: no folder at /lost"),
        ({"width": 64}, r"^conditioner.width = 64, but last of .* is 32 wide"),
        ({"context_length": 17}, "^conditioner.context_length = 17 is more than the 16 tokens"),
        ({"context_length": 0}, "^conditioner.context_length=0 must be positive"),
        ({"features": TextFeatures.penultimate}, "^conditioner.features=penultimate is of"),
    ],
)
def test_wrong_options_are_named(saved, change, message):
    fields = {"pretrained": saved[0].pretrained} | change
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build_conditioner(options(fields.pop("pretrained"), **fields))


def test_a_folder_that_is_no_whole_encoder_is_named(tmp_path):
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


def test_a_tokenizer_that_makes_nothing_of_no_words_is_named(tmp_path):
    bert().save_pretrained(tmp_path)
    write_tokenizer(tmp_path, ends="$A")
    with pytest.raises(ValueError, match=r"^conditioner.pretrained: .* nothing of the empty capt"):
        build_conditioner(options(tmp_path))


def test_a_name_without_a_network_fails_at_once_and_names_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(ValueError) as caught:
        build_conditioner(options("google/flan-t5-xl"))
    assert time.monotonic() - start < 5.0
    message = str(caught.value)
    assert message.startswith("conditioner.pretrained = google/flan-t5-xl: cannot download it (")
    assert "or set conditioner.pretrained to the path of a folder" in message
    assert "\n" not in message
