"""Options of an evaluation."""

from dataclasses import dataclass, field

from models.config import PerceptualFeatures
from trainer.config.choices import Dinov2Size, Features, InceptionResize, Metric


@dataclass(slots=True, kw_only=True)
class EvalConfig:
    """The evaluation protocol: its hash is logged with every number."""

    every: int = 0
    """[optimizer steps, ≥ 0, ≤ 10^9] Interval of evaluations while training, from the untrained
    network at step 0 on, and one at the end; 0: no evaluation."""
    num_samples: int = 2048
    """[samples, ≥ 1, ≤ 10^8] Samples to draw and measure."""
    batch_size: int = 64
    """[samples, ≥ 1, ≤ 10^6] Samples that a rank draws at once."""
    seed: int = 0
    """[1, ≥ 0, < 2^64] Seed of the samples' noise, which depends on (seed, sample number) alone."""
    tf32: bool = False
    """Draw with TF32 on a GPU where networks compute in fp32: faster, with factors of 10 bits.
    Features are always exact."""
    features: list[Features] = field(default_factory=lambda: [Features.inception])
    """Feature networks. Every metric is computed on each."""
    metrics: list[Metric] = field(default_factory=lambda: [Metric.frechet])
    """Metrics on features."""
    clip_score: bool = False
    """Measure the CLIP score of samples and their prompts."""
    reference_samples: int = 50_000
    """[samples, ≥ 0, ≤ 10^9] Largest number of training images to compare with, chosen by
    eval.seed; 0: all. The features of 50,000, the number of FID-50k, take minutes of a GPU."""
    references: str = "${data.dir}/references"
    """[not empty] Local folder for the features of training images. `trainer.reference`, or else
    the first evaluation, computes them once."""
    inception_weights: str = ""
    """Path of torch-fidelity's Inception weights; empty: download them."""
    inception_resize: InceptionResize = InceptionResize.tensorflow
    """Resizing of images to Inception's input."""
    dinov2_size: Dinov2Size = Dinov2Size.large
    """Size of DINOv2."""
    dinov2_weights: str = ""
    """Path of DINOv2's weights, from its authors or timm; empty: download them."""
    clip_model: str = ""
    """open_clip's architecture for the CLIP score and open_clip features; empty: the
    conditioner's."""
    clip_pretrained: str = ""
    """Weights of eval.clip_model, by tag or path; empty: the conditioner's."""
    perceptual_features: PerceptualFeatures = PerceptualFeatures.vgg16
    """super_resolution, inpainting: network of the perceptual distance from the image."""
    perceptual_weights: str = ""
    """Path of torchvision's weights of VGG16; empty: download them."""
    kid_subset_size: int = 1000
    """[samples, ≥ 2, ≤ 10^6] Size of the 100 random subsets over which KID is averaged."""
    images: str = ""
    """Folder of images that `trainer.evaluate` measures instead of a checkpoint's samples."""
    keep_samples: bool = False
    """Write the samples that `trainer.evaluate` measures as PNGs."""
    prompts: list[str] = field(default_factory=list[str])
    """Prompts, or class numbers, of the grid of samples."""
