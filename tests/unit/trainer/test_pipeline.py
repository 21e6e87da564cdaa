"""Drawing with small random networks: what an image depends on, and what it does not."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from typing_extensions import override

from data.shards.transforms import square
from models.condition import Condition
from models.conditioning.conditioner import Conditioner, Inputs, Size
from models.conditioning.conditioners import build_conditioner
from models.conditioning.given import Given
from models.first_stage.autoencoder import AutoencoderKL, build_autoencoder
from models.latent_diffusion import LatentDiffusion, LatentScale
from models.unet import UNet2DCondition
from tests.support.workshop import NETWORKS
from trainer import pipeline as module
from trainer.cli import load_config
from trainer.config import Config
from trainer.pictures.png import to_uint8
from trainer.pipeline import Pipeline, cast_networks
from trainer.sample.job import draw, read_image

CLASSES = [
    "conditioner.kind=class_label",
    "conditioner.num_classes=4",
    "eval.clip_score=false",
    "sampler.steps=4",
]
PICTURE = torch.linspace(-0.9, 0.9, 3 * 32 * 32).reshape(3, 32, 32).sin()


def config_of(*overrides: str) -> Config:
    return load_config(["+experiment=emoji", *NETWORKS, *CLASSES, *overrides])


def pipeline_of(*overrides: str) -> tuple[Pipeline, AutoencoderKL]:
    config = config_of(*overrides)
    torch.manual_seed(0)
    module = LatentDiffusion(UNet2DCondition(config.unet), None)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    autoencoder = AutoencoderKL(config.autoencoder)
    scale = LatentScale(mean=[0.1, -0.2, 0.0, 0.3], std=[0.5, 0.4, 0.6, 0.5])
    conditioner = build_conditioner(config.conditioner)
    device = torch.device("cpu")
    return Pipeline(config, module, conditioner, autoencoder, scale, device), autoencoder


def test_a_pipeline_moves_no_network_that_it_is_given() -> None:
    config, scale = config_of(), LatentScale(mean=[0.0] * 4, std=[1.0] * 4)
    module = LatentDiffusion(UNet2DCondition(config.unet), None)
    conditioner = build_conditioner(config.conditioner)
    autoencoder = AutoencoderKL(config.autoencoder)

    def state() -> list[tuple[bool, torch.device]]:
        networks = (module, conditioner, autoencoder)
        return [(network.training, next(network.parameters()).device) for network in networks]

    before = state()
    Pipeline(config, module, conditioner, autoencoder, scale, torch.device("meta"))
    assert state() == before


def distance(one: Tensor, other: Tensor) -> float:
    return (one.float() - other.float()).abs().mean().item()


@pytest.mark.parametrize(
    "sampler", ["ddim", "plms", "euler", "euler_ancestral", "heun", "dpmpp_2m", "unipc"]
)
@pytest.mark.parametrize("diffusion", ["stable_diffusion", "edm", "flow"])
def test_a_picture_depends_on_its_seed_and_not_on_its_batch(sampler: str, diffusion: str) -> None:
    pipeline, _ = pipeline_of(
        f"sampler={sampler}", f"diffusion={diffusion}", "diffusion.zero_terminal_snr=false"
    )
    images = pipeline.draw(Given(["0", "1", "2"]), [4, 5, 6], seed=1)
    assert images.shape == (3, 3, 32, 32)
    alone = pipeline.draw(Given(["1"]), [5], seed=1)
    assert distance(images[1:2], alone) < 0.1
    assert distance(images[1:2], pipeline.draw(Given(["1"]), [6], seed=1)) > 1.0
    assert distance(images[1:2], pipeline.draw(Given(["1"]), [5], seed=2)) > 1.0


def test_little_strength_keeps_the_picture() -> None:
    pipeline, autoencoder = pipeline_of(
        "sampler.steps=100", "diffusion=flow", "diffusion.zero_terminal_snr=false"
    )
    with torch.inference_mode():
        kept = to_uint8(autoencoder.decode(autoencoder.encode(PICTURE[None])[:, 0]))
    distances = [
        distance(pipeline.draw(Given(["0"]), [0], 0, init_image=PICTURE, strength=strength), kept)
        for strength in (0.01, 0.1, 0.3)
    ]
    assert distances == sorted(distances)
    assert distances[0] < 0.2 * distances[2]


def test_a_negative_prompt_takes_the_place_of_no_condition() -> None:
    pipeline, _ = pipeline_of()
    with torch.no_grad():
        embedding = pipeline.conditioner.get_parameter("embedding.weight")
        embedding[3] = embedding[4]  # class 3 is now what no condition is
    plain = pipeline.draw(Given(["1"]), [0], 0)
    assert torch.equal(plain, pipeline.draw(Given(["1"]), [0], 0, negative_prompt="3"))
    assert not torch.equal(plain, pipeline.draw(Given(["1"]), [0], 0, negative_prompt="2"))


def test_a_picture_is_read_as_training_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "tall.png"
    Image.new("RGB", (32, 48), (255, 0, 51)).save(path)
    for size in ((32, 32), (16, 64)):
        picture = read_image(str(path), size)
        expected = torch.tensor([1.0, -1.0, -0.6])[:, None, None].expand(3, *size)
        torch.testing.assert_close(picture, expected)
    png = Image.effect_noise((50, 40), 90).convert("RGB")
    png.save(path)
    trained = torch.tensor(square(png, 32)).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(read_image(str(path), (32, 32)), trained)


class Seen(Conditioner):
    """Gives one plane, the row number, and keeps the sizes that it is asked for."""

    trainable = False
    context_dim = 0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("here", torch.zeros(()))
        self.sizes: set[Size] = set()

    @override
    def prepare(self, given: Given, size: Size) -> Inputs:
        return {"rows": torch.zeros(len(given.captions))}

    @override
    def forward(self, inputs: Inputs, size: Size) -> Condition:
        self.sizes.add(size)
        rows = torch.linspace(-1, 1, size[0])[:, None].expand(len(inputs["rows"]), 1, *size)
        return Condition(planes=rows)


def test_pictures_have_any_size_that_the_networks_halve() -> None:
    options = ["conditioner.kind=none", "unet.context_dim=0"]
    config = config_of(*options)
    config.unet.in_channels += 1
    pipeline, seen = pipeline_of(*options)[0], Seen()
    module = LatentDiffusion(UNet2DCondition(config.unet), None)
    pipeline._module, pipeline.conditioner = module, seen
    wide = pipeline.draw(Given(["", ""]), [4, 5], seed=1, size=(16, 48))
    assert wide.shape == (2, 3, 16, 48)
    assert seen.sizes == {(4, 12)}
    assert distance(wide[1:], pipeline.draw(Given([""]), [5], seed=1, size=(16, 48))) < 0.1
    assert torch.equal(
        *(pipeline.draw(Given([""]), [5], 1, size=size) for size in (None, (32, 32)))
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"sample\.init_image.*No such file.*none\.png"),
        (b"GIF89a", r"sample\.init_image: .*none\.png: image cannot be decoded"),
    ],
)
def test_what_is_no_picture_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "none.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        draw(config_of("sample.prompts=['1']", f"sample.init_image={path}"))


def test_images_are_decoded_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, autoencoder = pipeline_of()
    whole = pipeline.draw(Given(["0", "1", "2"]), [4, 5, 6], seed=1)
    sizes: list[int] = []

    def decode(latents: Tensor) -> Tensor:
        sizes.append(len(latents))
        return AutoencoderKL.decode(autoencoder, latents)

    monkeypatch.setattr(autoencoder, "decode", decode)
    monkeypatch.setattr(module, "slice_size", lambda each, device: 2)
    sliced = pipeline.draw(Given(["0", "1", "2"]), [4, 5, 6], seed=1)
    assert sizes == [2, 1]
    assert distance(whole, sliced) < 0.01


def test_networks_in_bf16_draw_nearly_the_same_from_an_fp32_sampler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline, _ = pipeline_of()
    exact = pipeline.draw(Given(["0", "1"]), [4, 5], seed=1)
    networks = pipeline._module, pipeline._autoencoder
    monkeypatch.setattr(module, "inference_dtype", lambda *_: torch.bfloat16)
    cast_networks(pipeline._config, torch.device("cpu"), *networks)
    assert {one.dtype for network in networks for one in network.parameters()} == {torch.bfloat16}
    states: list[torch.dtype] = []
    rounded = pipeline.draw(
        Given(["0", "1"]),
        [4, 5],
        seed=1,
        on_step=lambda step, latents: states.append(latents.dtype),
    )
    assert set(states) == {torch.float32}
    assert 0 < distance(exact, rounded) < 3.0
    started = pipeline.draw(Given(["0"]), [4], seed=1, init_image=PICTURE, strength=0.5)
    assert started.shape == (1, 3, 32, 32)


def test_a_first_stage_with_a_codebook_keeps_fp32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "inference_dtype", lambda *_: torch.bfloat16)
    config = config_of("autoencoder.kind=vq", "autoencoder.num_embeddings=16")
    first_stage = build_autoencoder(config.autoencoder)
    cast_networks(config, torch.device("cpu"), first_stage)
    assert {one.dtype for one in first_stage.parameters()} == {torch.float32}
