"""Small random text encoders, saved as open_clip and the transformers library save them."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from models.config import ConditionerConfig

WIDTH = 32
CLIP: dict[str, Any] = {
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
        "width": WIDTH,
        "heads": 2,
        "layers": 3,
    },
}
"""Options of open_clip's network."""
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "heart", "b", "c", "d"]


def write_clip(folder: Path, **more: Any) -> tuple[ConditionerConfig, Any]:
    """A CLIP as open_clip makes it, and the options that load its files; more: of the network."""
    architecture = CLIP | more
    torch.manual_seed(0)
    separate = more.get("custom_text", False)
    options = {name: value for name, value in architecture.items() if name != "custom_text"}
    clip = (open_clip.CustomTextCLIP if separate else open_clip.CLIP)(**options).eval()
    (folder / "tiny.json").write_text(json.dumps(architecture))
    save_file(clip.state_dict(), folder / "tiny.safetensors")
    model, pretrained = str(folder / "tiny.json"), str(folder / "tiny.safetensors")
    return ConditionerConfig(model=model, pretrained=pretrained, width=WIDTH), clip


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
