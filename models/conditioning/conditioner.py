"""The interface of conditioners, which turn what samples give into the U-Net's condition."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain

from torch import Tensor, nn
from typing_extensions import override

from models.condition import Condition
from models.conditioning.given import Given
from models.config import ConditionerConfig

Inputs = dict[str, Tensor]
"""What samples give in numbers, such as token ids and their mask: tensors of B rows. It is a dict,
in which ZeRO stage 3 finds a module's input tensors."""
Size = tuple[int, int]
"""(h, w) of latents."""
Encode = Callable[[Tensor], Tensor]
"""Images [B, 3, H, W] in [-1, 1] → their normalised latents [B, C, h, w]."""


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
    """Makes the U-Net's condition; built from its options, `Conditioner(config)`.

    trainable: whether its parameters are trained with the U-Net. context_dim: width of a token; 0:
    no tokens.
    """

    trainable: bool
    context_dim: int
    images: tuple[str, ...] = ()
    """Names of inputs that `prepare` makes as images, and of which `forward` gets the latents."""

    @classmethod
    def outline(cls, config: ConditionerConfig) -> Outline:
        """Describe the frozen conditioner of these options without loading weights.

        Raises: ValueError or FileNotFoundError, naming the option, if there is no such network.
        """
        return Outline()

    def prepare(self, given: Given, size: Size) -> Inputs:
        """Turn what B samples give into numbers on the CPU, the input of `forward`.

        size: (h, w) of the latents. Training calls it ahead of time, in a thread or a forked
        process. Samples whose caption is None get the null condition.

        Raises: ValueError for samples that the conditioner cannot encode.
        """
        raise NotImplementedError

    def forward(self, inputs: Inputs, size: Size) -> Condition:
        """Encode B samples to a float32 condition, on the conditioner's device.

        inputs: from `prepare` and `encoded`, on the conditioner's device.
        size: (h, w) of the latents, and of planes [B, C, h, w]; tokens do not depend on it.
        """
        raise NotImplementedError

    def encoded(self, inputs: Inputs, encode: Encode) -> Inputs:
        """Return inputs with the latents of their images, by the frozen first stage."""
        return {
            name: encode(tensor) if name in self.images else tensor
            for name, tensor in inputs.items()
        }

    def picture(self, given: Given, size: Size) -> Tensor:
        """Show a condition that is made of images, label maps or boxes: [B, 3, H, W] in [-1, 1].

        size: (h, w) of the latents.
        """
        raise NotImplementedError

    def paste(self, drawn: Tensor, given: Given) -> Tensor:
        """Put the pixels that the condition fixes into drawn images [B, 3, H, W] uint8."""
        return drawn

    def condition(self, given: Given, size: Size, encode: Encode | None = None) -> Condition:
        """Prepare and encode B samples.

        size: (h, w) of the latents. encode: the first stage, for a conditioner with `images`.
        Raises: ValueError as `prepare`.
        """
        inputs = self.prepare(given, size)
        if inputs:
            device = next(chain(self.parameters(), self.buffers())).device
            inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        return self(inputs if encode is None else self.encoded(inputs, encode), size)

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
    def prepare(self, given: Given, size: Size) -> Inputs:
        return {}

    @override
    def forward(self, inputs: Inputs, size: Size) -> Condition:
        return Condition()
