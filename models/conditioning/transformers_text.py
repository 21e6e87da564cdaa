"""Text encoders of the transformers library, by name or from a folder, as conditioners."""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from models.condition import Condition
from models.conditioning.captions import bounded
from models.conditioning.conditioner import Inputs, Outline, Size
from models.conditioning.given import Given
from models.conditioning.text import Text
from models.config import ConditionerConfig, TextFeatures
from models.weights import hub

LOCAL_FOLDER_HINT = (
    "or set conditioner.pretrained to the path of a folder with its config.json, model.safetensors "
    "and tokenizer"
)
UNSTABLE_SETTINGS = ("transformers_version", "_name_or_path", "architectures", "dtype")
"""Settings of a config that do not change the network's output."""


class TransformersText(Text):
    """Any text encoder of the transformers library, such as T5's (Saharia et al. 2022)."""

    @classmethod
    @override
    def outline(cls, config: ConditionerConfig) -> Outline:
        """Describe the shapes alone; the size of the encoder is written in its files."""
        pooled = config.features is TextFeatures.pooled
        return Outline(
            tokens=1 if pooled else config.context_length,
            masked=not pooled,
            not_counted="the text encoder's weights and work: its size is written in its files",
        )

    def __init__(self, config: ConditionerConfig) -> None:
        encoder = load_text_encoder(config)
        architecture = encoder.architecture | {"context_length": config.context_length}
        super().__init__(config, encoder.width, architecture)
        self.context_length = config.context_length
        self.tokenizer = encoder.tokenizer
        self.encoder: Any = encoder.model
        self._check_tokenizer()

    @override
    @torch.no_grad()
    def forward(self, inputs: Inputs, size: Size) -> Condition:
        """Encode to [B, T, width]; T is conditioner.context_length, or 1 for pooled features.

        A pooled token is the mean of the tokens (Reimers and Gurevych 2019, section 3).
        """
        mask = inputs["mask"]
        states = self.encoder(input_ids=inputs["ids"], attention_mask=mask.long()).last_hidden_state
        tokens = states.float().masked_fill(~mask[:, :, None], 0.0)
        if self.features is TextFeatures.pooled:
            return Condition(tokens.sum(1, keepdim=True) / mask.sum(1)[:, None, None])
        return Condition(tokens, mask)

    @override
    def prepare(self, given: Given, size: Size) -> Inputs:
        """Return ids [B, T] int64 and mask [B, T] bool."""
        found = self.tokenizer(
            [bounded(caption or "", self.context_length) for caption in given.captions],
            padding="max_length",
            truncation=True,
            max_length=self.context_length,
            return_tensors="pt",
        )
        return {"ids": found["input_ids"], "mask": found["attention_mask"].bool()}

    def _check_tokenizer(self) -> None:
        longest = self.tokenizer.model_max_length
        if self.context_length > longest:
            raise ValueError(
                f"conditioner.context_length = {self.context_length} is more than the {longest} "
                f"tokens that conditioner.pretrained takes"
            )
        try:
            mask = self.prepare(Given([None]), (1, 1))["mask"]
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"conditioner.pretrained: its tokenizer cannot pad ({reason}): choose another"
            ) from error
        if not mask.any():
            raise ValueError(
                "conditioner.pretrained: its tokenizer gives no token for the empty caption, which "
                "is the null condition: choose another"
            )


class TextEncoder:
    """A frozen text encoder with its tokenizer.

    model: (input_ids, attention_mask), two of [B, T] → last_hidden_state [B, T, width].
    tokenizer: captions → input_ids and attention_mask.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.model.config.hidden_size

    @cached_property
    def architecture(self) -> dict[str, Any]:
        """Settings of the network, and SHA-256 of its vocabulary in hex: JSON values."""
        settings = json.loads(self.model.config.to_json_string(use_diff=True))
        vocabulary = json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        return {
            "settings": {k: v for k, v in settings.items() if k not in UNSTABLE_SETTINGS},
            "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest(),
        }


def load_text_encoder(config: ConditionerConfig) -> TextEncoder:
    """Load the text encoder at `config.pretrained`, frozen, in fp32 on the CPU.

    Of an encoder-decoder it takes the encoder. It reads weights from safetensors, never from a
    pickle, and runs no code from the folder.

    Raises: ValueError or FileNotFoundError, naming the option, if there is no such encoder.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "conditioner.kind=transformers needs a library: pip install 'latent-foundry[text]'"
        ) from error
    library: Any = transformers  # without types where it matters here
    folder = _folder(config.pretrained)
    given = {"local_files_only": True, "trust_remote_code": False}
    try:
        settings = library.AutoConfig.from_pretrained(folder, **given)
        tokenizer = library.AutoTokenizer.from_pretrained(folder, **given)
        # this mapping gives T5's encoder without its decoder, for example
        has_encoder = type(settings) in library.MODEL_FOR_TEXT_ENCODING_MAPPING
        auto = library.AutoModelForTextEncoding if has_encoder else library.AutoModel
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
    # the pooler, which many files lack, is not used
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
