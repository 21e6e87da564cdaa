"""Captions by a transformer that is trained with the U-Net (Rombach et al. 2022, section 4.3.1)."""

from typing_extensions import override

from models.condition import Condition
from models.conditioning.clip_tokenizer import ClipTokenizer
from models.conditioning.conditioner import Conditioner, Inputs, Size
from models.conditioning.given import Given
from models.conditioning.token_transformer import TokenTransformer
from models.config import ConditionerConfig


class TextTransformer(Conditioner):
    """Tokens of captions; None is encoded as the empty caption.

    The paper cuts captions by BERT's word pieces. CLIP's byte pairs are here already, need no
    download and spell any text. Captions that are too long are cut; padding after shorter ones is
    attended to, as in the authors' code.
    """

    trainable = True

    def __init__(self, config: ConditionerConfig) -> None:
        """config: context_length, width and layers."""
        super().__init__()
        self.context_dim = config.width
        self.tokenizer = ClipTokenizer(config.context_length)
        self.transformer = TokenTransformer(
            len(self.tokenizer.encoder), config.context_length, config.width, config.layers
        )

    @override
    def prepare(self, given: Given, size: Size) -> Inputs:
        """Tokenize the captions to numbers [B, context_length]."""
        return {"numbers": self.tokenizer([caption or "" for caption in given.captions])}

    @override
    def forward(self, inputs: Inputs, size: Size) -> Condition:
        """Encode to tokens [B, context_length, width]."""
        return Condition(self.transformer(inputs["numbers"]).float())
