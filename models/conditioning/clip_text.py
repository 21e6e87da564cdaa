"""The text tower of a CLIP as a conditioner, and as a part of diffusers' pipelines."""

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from models.condition import Condition
from models.conditioning.clip import load_clip, text_tower
from models.conditioning.conditioner import Inputs, Outline, PipelinePart, Size
from models.conditioning.given import Given
from models.conditioning.text import Text
from models.config import ConditionerConfig, TextFeatures

TEXT_OPTIONS = {"context_length", "vocab_size", "width", "heads", "layers", "quick_gelu"}
"""Options of open_clip's text tower that CLIPTextModel has, too."""
TEXT_RULES = [
    (r"^token_embedding", "embeddings.token_embedding"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_1\.", ".layer_norm1."),
    (r"\.ln_2\.", ".layer_norm2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^ln_final\.", "final_layer_norm."),
]
NOT_IN_CLIP_TEXT_MODEL = ("logit_scale", "logit_bias", "text_projection")
START, END, PADDING = "<|startoftext|>", "<|endoftext|>", "<|padding|>"


class ClipText(Text):
    """The text tower of a CLIP by open_clip (Rombach et al. 2022, section 3.3).

    Padding is not masked, as in Stable Diffusion: the tower was trained with padding.
    """

    @classmethod
    @override
    def outline(cls, config: ConditionerConfig) -> Outline:
        """Count the text tower of `conditioner.model`."""
        tower = text_tower(config.model)
        return Outline(
            tokens=1 if config.features is TextFeatures.pooled else tower.tokens,
            parameters=tower.parameters,
            flops=tower.flops,
        )

    def __init__(self, config: ConditionerConfig) -> None:
        clip = load_clip(config)
        pooled = config.features is TextFeatures.pooled
        super().__init__(
            config, clip.embed_dim if pooled else clip.text_width, clip.text_architecture
        )
        self.tokenizer = clip.tokenizer
        self.clip: Any = clip.model
        del self.clip.visual

    @override
    def prepare(self, given: Given, size: Size) -> Inputs:
        """Return ids [B, T] int64."""
        return {"ids": self.tokenizer([caption or "" for caption in given.captions])}

    @override
    @torch.no_grad()
    def forward(self, inputs: Inputs, size: Size) -> Condition:
        """Encode to [B, T, width]; T is the tower's context length, or 1 for pooled features."""
        ids = inputs["ids"]
        if self.features is TextFeatures.pooled:
            return Condition(self.clip.encode_text(ids)[:, None].float())
        states = self.clip.forward_intermediates(
            text=ids,
            text_indices=2 if self.features is TextFeatures.penultimate else 1,
            normalize_intermediates=True,
            intermediates_only=True,
        )
        return Condition(states["text_intermediates"][0].float())

    @override
    def pipeline_parts(self) -> Mapping[str, PipelinePart]:
        """Write the tower as transformers' CLIPTextModel, and its tokenizer.

        Raises: ValueError naming an option of the tower that CLIPTextModel lacks.
        """
        config = json.dumps(_text_encoder_config(self), indent=2) + "\n"
        return {
            "text_encoder": PipelinePart(
                library="transformers",
                kind="CLIPTextModel",
                texts={"config.json": config},
                tensors={"model.safetensors": _text_encoder_weights(self)},
            ),
            "tokenizer": PipelinePart(
                library="transformers", kind="CLIPTokenizer", texts=_tokenizer_files(self)
            ),
        }


def _text_encoder_config(text: ClipText) -> dict[str, Any]:
    """Return config.json of CLIPTextModel.

    Raises: ValueError naming an option of the tower that CLIPTextModel lacks.
    """
    if text.features is TextFeatures.pooled:
        raise ValueError("conditioner.features=pooled: diffusers' pipeline attends to all tokens")
    options, tokenizer = text.architecture, text.tokenizer
    if unknown := sorted(options.keys() - TEXT_OPTIONS):
        raise ValueError(
            f"conditioner.model: transformers' CLIPTextModel has no {', '.join(unknown)}"
        )
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": options["vocab_size"],
        "hidden_size": options["width"],
        "intermediate_size": 4 * options["width"],
        "num_attention_heads": options["heads"],
        "num_hidden_layers": options["layers"] - (text.features is TextFeatures.penultimate),
        "max_position_embeddings": options["context_length"],
        "hidden_act": "quick_gelu" if options["quick_gelu"] else "gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": tokenizer.encoder["<start_of_text>"],
        "eos_token_id": tokenizer.encoder["<end_of_text>"],
        "pad_token_id": 0,
    }


def _text_encoder_weights(text: ClipText) -> dict[str, Tensor]:
    """Rename the tensors to CLIPTextModel's; features=penultimate drops the last block."""
    tower = getattr(text.clip, "text", text.clip)
    without_last = text.features is TextFeatures.penultimate
    skipped = f"encoder.layers.{text.architecture['layers'] - 1}." if without_last else None
    found: dict[str, Tensor] = {}
    for name, tensor in tower.state_dict().items():
        if name in NOT_IN_CLIP_TEXT_MODEL:
            continue
        for pattern, replacement in TEXT_RULES:
            name = re.sub(pattern, replacement, name)
        if skipped and name.startswith(skipped):
            continue
        if ".attn.in_proj_" in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                split = name.replace(".attn.in_proj_", f".self_attn.{letter}_proj.")
                found[f"text_model.{split}"] = part.contiguous()
        else:
            found[f"text_model.{name}"] = tensor
    return found


def _tokenizer_files(text: ClipText) -> dict[str, str]:
    """Return the text files of CLIPTokenizer, by name."""
    special = {"<start_of_text>": START, "<end_of_text>": END}
    tokenizer = text.tokenizer
    vocabulary = {special.get(token, token): number for token, number in tokenizer.encoder.items()}
    # open_clip pads with token 0, "!"; the padding gets a name that no caption contains
    vocabulary[PADDING] = 0
    merges = [" ".join(pair) for pair in tokenizer.bpe_ranks]
    options = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": tokenizer.context_length,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": PADDING,
    }
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "tokenizer_config.json": json.dumps(options, indent=2),
    }
