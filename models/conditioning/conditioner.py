"""The interface of conditioners, which turn captions into the U-Net's condition."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from torch import Tensor, nn
from typing_extensions import override

from models.condition import Condition
from models.config import ConditionerConfig

Captions = Sequence[str | None]
"""The caption of each sample; None: no condition."""
TokenIds = dict[str, Tensor]
"""Captions in numbers, such as token ids and their mask: tensors of B rows. It is a dict, in which
ZeRO stage 3 finds a module's input tensors."""
Size = tuple[int, int]
"""(h, w) of latents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """Shapes and cost of a frozen conditioner, known without its weights."""

    tokens: int = 0
    """Tokens of a sample; 0: no tokens."""
    masked: bool = False
    """Whether the tokens have a mask."""
    parameters: int = 0
    """Frozen weights."""
    flops: int = 0
    """[FLOPs] Multiplications and additions of matrix products, for one sample."""
    not_counted: str = ""
    """Weights and work that `parameters` and `flops` leave out, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelinePart:
    """One folder of diffusers' StableDiffusionPipeline."""

    library: str
    kind: str
    """Class of the library that reads the folder."""
    texts: Mapping[str, str] = field(default_factory=dict[str, str])
    """Content of text files, by name."""
    tensors: Mapping[str, Mapping[str, Tensor]] = field(
        default_factory=dict[str, Mapping[str, Tensor]]
    )
    """Tensors of safetensors files, by name."""


class Conditioner(nn.Module):
    """Turns captions into the U-Net's condition; built from its options, `Conditioner(config)`.

    trainable: whether its parameters are trained with the U-Net. context_dim: width of a token; 0:
    no tokens.
    """

    trainable: bool
    context_dim: int

    @classmethod
    def outline(cls, config: ConditionerConfig) -> Outline:
        """Describe the frozen conditioner of these options without loading weights.

        Raises: ValueError or FileNotFoundError, naming the option, if there is no such network.
        """
        return Outline()

    def tokenize(self, captions: Captions) -> TokenIds:
        """Turn B captions into numbers on the CPU, which `forward` takes in place of captions.

        Training calls it ahead of time, in a thread or a forked process. A conditioner without
        this step returns no tensor; `forward` then gets the captions.

        Raises: ValueError for a caption that the conditioner cannot encode.
        """
        return {}

    def token_ids(self, captions: Captions | TokenIds) -> TokenIds:
        """Return token ids as they are, and those of captions, on the conditioner's device."""
        if isinstance(captions, dict):
            return captions
        device = next(chain(self.parameters(), self.buffers())).device
        return {name: ids.to(device) for name, ids in self.tokenize(captions).items()}

    def forward(self, captions: Captions | TokenIds, size: Size) -> Condition:
        """Encode B captions to a float32 condition of B samples, on the conditioner's device.

        captions: or what `tokenize` makes of them, on the conditioner's device.
        size: (h, w) of the latents, and of planes [B, C, h, w]; tokens do not depend on it.

        Raises: ValueError for a caption that the conditioner cannot encode.
        """
        raise NotImplementedError

    def pipeline_parts(self) -> Mapping[str, PipelinePart] | None:
        """Convert the conditioner to parts of a StableDiffusionPipeline, by the pipeline's names.

        None: the pipeline has no conditioner of this kind.

        Raises: ValueError naming an option that the pipeline does not have.
        """
        return None


class NoConditioner(Conditioner):
    """The empty condition, for an unconditional U-Net."""

    trainable = False
    context_dim = 0

    def __init__(self, config: ConditionerConfig) -> None:
        """config: not used; this kind has no options."""
        super().__init__()

    @override
    def forward(self, captions: Captions | TokenIds, size: Size) -> Condition:
        return Condition()
