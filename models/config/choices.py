"""Choices of the options: of networks, then of diffusion, then of sampling."""

from enum import StrEnum, auto


class ConditionerKind(StrEnum):
    """Conditions of the U-Net.

    none: No condition.
    text: Captions, encoded by a CLIP of open_clip.
    transformers: Captions, encoded by a text encoder of the transformers library.
    class_label: Class numbers, each with a learned token.
    super_resolution: A small picture, beside the latents.
    inpainting: The latents of an image with a hole, and the hole, beside the latents.
    semantic_map: A label map, shrunk by learned planes, beside the latents.
    layout: Labelled boxes, as tokens of a transformer that is trained with the U-Net.
    text_transformer: Captions, as tokens of a transformer that is trained with the U-Net.
    """

    none = auto()
    text = auto()
    transformers = auto()
    class_label = auto()
    super_resolution = auto()
    inpainting = auto()
    semantic_map = auto()
    layout = auto()
    text_transformer = auto()


class Degradation(StrEnum):
    """Ways to make the small picture of an image.

    bicubic: Antialiased bicubic.
    bsr_light: Two blurs, a resize, noise and JPEG in random order (Zhang et al. 2021), in a light
        form.
    """

    bicubic = auto()
    bsr_light = auto()


class TextFeatures(StrEnum):
    """Outputs of a text encoder that go to the U-Net.

    last: All tokens, after the last block.
    penultimate: All tokens, before the last block; for kind=text alone, as in Stable Diffusion 2.
    pooled: One token: CLIP's embedding of the text, or the mean of the tokens (transformers).
    """

    last = auto()
    penultimate = auto()
    pooled = auto()


class AttentionBackend(StrEnum):
    """Implementations of attention.

    auto: xformers where it can train, else sdpa.
    xformers: xformers.ops.memory_efficient_attention.
    sdpa: torch's scaled_dot_product_attention.
    reference: Softmax written out: slow, for comparison.
    """

    auto = "auto"
    xformers = "xformers"
    sdpa = "sdpa"
    reference = "reference"


class AutoencoderKind(StrEnum):
    """First stages, which compress images to latents.

    kl: Continuous latents with a penalty on the KL divergence from N(0, I).
    vq: Latents quantised by a codebook.
    identity: The pixels themselves, without weights: the baseline LDM-1 of Rombach et al. 2022.
    """

    kl = auto()
    vq = auto()
    identity = auto()


class PerceptualFeatures(StrEnum):
    """Networks whose activations the perceptual distance compares.

    vgg16: LPIPS (Zhang et al. 2018), with its authors' channel weights.
    efficientnet_lite0: Equal channel weights; the network comes with the demo extra and needs no
        download.
    """

    vgg16 = auto()
    efficientnet_lite0 = auto()


class DiscriminatorNorm(StrEnum):
    """Normalisation in the discriminator.

    group: Each image by itself: the loss does not depend on micro batch and ranks.
    batch: Over a rank's micro batch, as in the paper: the loss depends on its size.
    """

    group = auto()
    batch = auto()


class NoiseSchedule(StrEnum):
    """Growth of the noise with the timestep; edm and flow are continuous.

    scaled_linear: Square roots of beta grow linearly (Rombach et al. 2022).
    linear: Betas grow linearly (Ho et al. 2020).
    cosine: The signal falls as a cosine (Nichol and Dhariwal 2021).
    edm: Log-normal noise levels (Karras et al. 2022).
    flow: Straight paths to noise, logit-normal times (Esser et al. 2024).
    """

    scaled_linear = auto()
    linear = auto()
    cosine = auto()
    edm = auto()
    flow = auto()


class PredictionType(StrEnum):
    """Targets of the U-Net's output.

    epsilon: The noise (Ho et al. 2020).
    v_prediction: α · noise − σ · latents, for signal α and noise σ (Salimans and Ho 2022).
    sample: The clean latents.
    flow: Noise minus clean latents (Lipman et al. 2023).
    """

    epsilon = auto()
    v_prediction = auto()
    sample = auto()
    flow = auto()


class DiffusionLoss(StrEnum):
    """Errors of the U-Net's output.

    l2: Squared (Ho et al. 2020).
    l1: Absolute, as for churches, layouts, maps and inpainting in the published configs of Rombach
        et al. 2022.
    """

    l2 = auto()
    l1 = auto()


class LatentScaling(StrEnum):
    """Scales of the latents between the first stage and the U-Net.

    auto: The factor of the model that unet.weights or checkpoint.load comes from, if its files tell
        one; else channels.
    channels: Mean 0 and variance 1 in every channel, over the whole training set.
    first_batch: One factor: 1 / standard deviation in the first global batch (Rombach et al. 2022,
        appendix G).
    factor: scaling_factor.
    """

    auto = "auto"
    channels = "channels"
    first_batch = "first_batch"
    factor = "factor"


class LossWeight(StrEnum):
    """Weights of the loss by timestep.

    uniform: 1 at every timestep.
    min_snr: The signal-to-noise ratio, capped (Hang et al. 2023).
    edm: The weight of Karras et al. 2022, table 1.
    """

    uniform = auto()
    min_snr = auto()
    edm = auto()


class SamplerName(StrEnum):
    """Solvers, which turn noise into latents.

    ddim: Song et al. 2021.
    plms: Liu et al. 2022.
    euler: DDIM without fresh noise.
    euler_ancestral: DDIM with fresh noise at each step.
    heun: Karras et al. 2022: second order, two calls of the U-Net a step.
    dpmpp_2m: DPM-Solver++(2M), second order (Lu et al. 2022b).
    unipc: UniPC-2, an error of third order (Zhao et al. 2023).
    """

    ddim = auto()
    plms = auto()
    euler = auto()
    euler_ancestral = auto()
    heun = auto()
    dpmpp_2m = auto()
    unipc = auto()
