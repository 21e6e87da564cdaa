"""Loading of text encoders by the transformers library, by name or from a folder."""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from models import hub
from models.config import ConditionerConfig

LOCAL_FOLDER_HINT = (
    "or set conditioner.pretrained to the path of a folder with its config.json, model.safetensors "
    "and tokenizer"
)
UNSTABLE_SETTINGS = ("transformers_version", "_name_or_path", "architectures", "dtype")
"""Of a config, what says nothing of what the network computes."""


class TextEncoder:
    """A frozen encoder with its tokenizer.

    model: takes input_ids and attention_mask [B, T], gives last_hidden_state [B, T, width].
    tokenizer: captions to both.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @property
    def width(self) -> int:
        """Width of a token."""
        return self.model.config.hidden_size

    @cached_property
    def architecture(self) -> dict[str, Any]:
        """Options of the network and the hash of its vocabulary, JSON values."""
        settings = json.loads(self.model.config.to_json_string(use_diff=True))
        vocabulary = json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        return {
            "settings": {k: v for k, v in settings.items() if k not in UNSTABLE_SETTINGS},
            "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest(),
        }


def load_text_encoder(config: ConditionerConfig) -> TextEncoder:
    """The encoder at `config.pretrained`, frozen, in fp32 on the CPU.

    Of an encoder-decoder the encoder. Weights come from safetensors, never from a pickle, and no
    code that comes with them is run. Raises ValueError or FileNotFoundError, naming the option,
    when it cannot be had.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "conditioner.kind=transformers needs a library: pip install 'latent-foundry[text]'"
        ) from error
    folder = _folder(config.pretrained)
    given = {"local_files_only": True, "trust_remote_code": False}
    try:
        settings = transformers.AutoConfig.from_pretrained(folder, **given)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **given)
        # T5's encoder alone, for example, where T5 has a decoder, too
        encoders = transformers.MODEL_FOR_TEXT_ENCODING_MAPPING
        auto: Any = transformers.AutoModel
        if type(settings) in encoders:
            auto = transformers.AutoModelForTextEncoding
        model, found = auto.from_pretrained(
            folder,
            config=settings,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **given,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(
            f"conditioner.pretrained: transformers finds no text encoder in {folder} ({reason})"
        ) from error
    # A summary of the whole text that nothing here reads, and that many files lack.
    missing = sorted(name for name in found["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ValueError(
            f"conditioner.pretrained: the weights in {folder} lack {missing[0]}: they are those of "
            f"another network than config.json describes"
        )
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    return TextEncoder(model.eval().requires_grad_(False), tokenizer)


def _folder(pretrained: str) -> Path:
    if not pretrained:
        raise ValueError(
            "conditioner.pretrained is empty: set it to the name of a text encoder on the "
            f"Hugging Face hub, {LOCAL_FOLDER_HINT}"
        )
    path = Path(pretrained).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or len(path.parts) > 2 or pretrained.startswith((".", "~")):
        raise FileNotFoundError(
            f"conditioner.pretrained: no folder at {pretrained}: correct the path"
        )
    try:
        return hub.fetch_encoder(pretrained)
    except OSError as error:
        raise ValueError(
            f"conditioner.pretrained = {pretrained}: cannot download it ({error}): download it on "
            f"a machine with a network, {LOCAL_FOLDER_HINT}"
        ) from error
