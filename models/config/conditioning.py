"""Options of the condition, and the table of its kinds.

Checks, training, plans and exports read the table. Pages of options import no torch, so an entry
names its class as `module:name`.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from models.config.choices import ConditionerKind, Degradation, TextFeatures


@dataclass(slots=True, kw_only=True)
class ConditionerConfig:
    """The condition of the U-Net, and its dropout for classifier-free guidance."""

    kind: ConditionerKind = ConditionerKind.text
    """Kind of condition."""
    model: str = ""
    """text: an open_clip architecture, such as ViT-H-14, or the path of a model config in JSON."""
    pretrained: str = ""
    """text: an open_clip tag, such as laion2b_s32b_b79k, or the path of a weights file.
    transformers: a name on the Hugging Face hub, or the path of a folder."""
    features: TextFeatures = TextFeatures.last
    """Output of the text encoder that goes to the U-Net."""
    context_length: int = 77
    """[tokens, ≥ 1, ≤ 10^5] transformers, text_transformer: length of a caption; longer captions
    are cut, shorter ones padded. transformers: the padding is masked."""
    num_classes: int = 0
    """[classes, ≥ 0, ≤ 10^7] class_label: number of classes, without the null class. semantic_map:
    number of classes."""
    width: int = 1024
    """[channels, ≥ 0, ≤ 65536] Width of a token; equals unet.context_dim."""
    layers: int = 16
    """[layers, ≥ 1, ≤ 1000] layout, text_transformer: layers of the transformer."""
    classes: list[str] = field(default_factory=list[str])
    """layout: labels that boxes may have; the place of a label is the number of its class. A run
    keeps them: append new ones only in a new run."""
    planes: int = 3
    """[channels, ≥ 1, ≤ 65536] semantic_map: planes that it adds to the latents."""
    degradation: Degradation = Degradation.bicubic
    """super_resolution: how training makes the small pictures."""
    cond_drop_prob: float = 0.1
    """[share, ≥ 0, ≤ 1] Part of the samples trained with the null condition (Ho and Salimans
    2022)."""


MAP_CLASSES = 256
"""Most classes of a label map, which has 8 bits."""
LAYOUT_VOCABULARY = 8192
"""Tokens of layouts: classes, corners, and the last for padding."""


def any_caption(config: ConditionerConfig, caption: str) -> str:
    """Find no problem in any caption."""
    return ""


def _class_number_problem(config: ConditionerConfig, caption: str) -> str:
    text = caption.strip()
    # int() refuses thousands of digits, and captions come from outside
    if text.isdecimal() and len(text) < 10 and int(text) < config.num_classes:
        return ""
    return (
        f"caption {caption[:40]!r} is no class number from 0 to {config.num_classes - 1}: "
        f"correct the captions, conditioner.num_classes or conditioner.kind"
    )


def _class_label_problems(config: ConditionerConfig) -> Iterator[str]:
    if config.num_classes < 1:
        yield f"conditioner.num_classes={config.num_classes}: set it to the data set's classes"


def _semantic_map_problems(config: ConditionerConfig) -> Iterator[str]:
    if not 1 <= config.num_classes <= MAP_CLASSES:
        yield (
            f"conditioner.num_classes={config.num_classes}: set it to the classes of the label "
            f"maps, 1 to {MAP_CLASSES}"
        )


def _layout_problems(config: ConditionerConfig) -> Iterator[str]:
    if len(config.classes) >= LAYOUT_VOCABULARY:
        yield (
            f"conditioner.classes has {len(config.classes)} labels, and layouts have tokens for "
            f"{LAYOUT_VOCABULARY - 1}"
        )
    for label, count in Counter(config.classes).items():
        if count > 1:
            yield f"conditioner.classes has {label!r} {count} times: each label has one number"


def _transformers_problems(config: ConditionerConfig) -> Iterator[str]:
    if config.features is TextFeatures.penultimate:
        yield "conditioner.features=penultimate is of conditioner.kind=text; use last or pooled"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionerEntry:
    """A kind of condition."""

    conditioner: str
    """Class, a `models.conditioning.conditioner.Conditioner`."""
    has_tokens: bool = True
    """Whether it gives tokens [B, M, conditioner.width]."""
    planes: Callable[[ConditionerConfig, int], int] = lambda config, channels: 0
    """(options, channels of the latents) → channels of the planes beside the latents."""
    reads: tuple[str, ...] = ()
    """Options of the data without which its samples do not have what the condition is made of."""
    stores_text: bool = False
    """Whether data.store_text can store its tokens beside the latents."""
    is_clip: bool = False
    """Whether conditioner.model and conditioner.pretrained name a CLIP, which can score images."""
    caption_problem: Callable[[ConditionerConfig, str], str] = any_caption
    """Caption → the reason why it has no condition; empty for a good one."""
    problems: Callable[[ConditionerConfig], Iterator[str]] = lambda config: iter(())
    """Contradictions between its options: a line for each, with config path and fix."""


CONDITIONERS = {
    ConditionerKind.none: ConditionerEntry(
        conditioner="models.conditioning.conditioner:NoConditioner", has_tokens=False
    ),
    ConditionerKind.text: ConditionerEntry(
        conditioner="models.conditioning.clip_text:ClipText", stores_text=True, is_clip=True
    ),
    ConditionerKind.transformers: ConditionerEntry(
        conditioner="models.conditioning.transformers_text:TransformersText",
        stores_text=True,
        problems=_transformers_problems,
    ),
    ConditionerKind.class_label: ConditionerEntry(
        conditioner="models.conditioning.class_label:ClassLabel",
        caption_problem=_class_number_problem,
        problems=_class_label_problems,
    ),
    ConditionerKind.super_resolution: ConditionerEntry(
        conditioner="models.conditioning.super_resolution:SuperResolution",
        has_tokens=False,
        planes=lambda config, channels: 3,
        reads=("store_images",),
    ),
    ConditionerKind.inpainting: ConditionerEntry(
        conditioner="models.conditioning.inpainting:Inpainting",
        has_tokens=False,
        planes=lambda config, channels: channels + 1,
        reads=("store_images",),
    ),
    ConditionerKind.semantic_map: ConditionerEntry(
        conditioner="models.conditioning.semantic_map:SemanticMap",
        has_tokens=False,
        planes=lambda config, channels: config.planes,
        reads=("maps",),
        problems=_semantic_map_problems,
    ),
    ConditionerKind.layout: ConditionerEntry(
        conditioner="models.conditioning.layout:Layout",
        reads=("boxes",),
        problems=_layout_problems,
    ),
    ConditionerKind.text_transformer: ConditionerEntry(
        conditioner="models.conditioning.text_transformer:TextTransformer"
    ),
}
