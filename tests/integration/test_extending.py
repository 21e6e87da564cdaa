"""docs/extending.md, done: what its sections add is found by all that has to know of it."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.conditioning.given import Given
from models.config import DiffusionConfig, PredictionType, SamplerConfig, SamplerName
from models.config.sampling import SAMPLERS, SamplerEntry, Scheduler
from models.diffusers_format import scheduler_config
from models.diffusion.process import Diffusion
from models.diffusion.samplers import sample
from models.diffusion.schedules import NoiseLevel
from tests.support.extending import add_section, blocks_of, files_of
from tests.support.small_metric import add_mean_colour
from tests.support.workshop import CAPTIONS, Workshop, draw_pictures, losses, packed
from trainer.checkpoints.reader import chosen_checkpoint
from trainer.cli import load_config
from trainer.evaluate.job import evaluate
from trainer.export.job import export
from trainer.pipeline import Pipeline
from trainer.plan.comparison import comparison_lines
from trainer.plan.forecast import trace_step
from trainer.plan.job import plan
from trainer.report.job import report
from trainer.runs.history import read_run
from trainer.train.loop import fit

MOST_FILES = {
    "A sampler": 3,
    "A conditioner from captions": 3,
    "A spatial conditioner": 5,
    "A task": 4,
    "A metric": 2,
    "A callback": 2,
}
ONE_GPU = ["plan.gpus_per_node=1"]
MOST_LINES = 40
"""Lines of code in a file, without its imports."""


@pytest.mark.parametrize("section", MOST_FILES)
def test_few_files_are_touched(section: str) -> None:
    assert 2 <= len(files_of(section)) <= MOST_FILES[section]
    assert list(blocks_of(section)) == files_of(section)


@pytest.mark.parametrize("section", MOST_FILES)
def test_little_code_is_written(section: str) -> None:
    for path, code in blocks_of(section).items():
        kept = re.sub(
            r'^from .* import (?:\([^)]*\)|.*)\n|^import .*\n|^ *""".*\n', "", code, flags=re.M
        )
        assert len(re.findall(r"\S\n", kept)) <= MOST_LINES, path


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Packed pictures."""
    return packed(tmp_path_factory.mktemp("pictures"))


def test_a_task_and_a_callback(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_section(monkeypatch, "A task")
    add_section(monkeypatch, "A callback")
    with pytest.raises(ValueError, match=r"task=linear needs train\.precision=fp32"):
        load_config(["+experiment=emoji_linear", "train.precision=bf16"])
    options = ["train.max_steps=40", "eval.every=20"]
    config = shop.config("emoji_linear", *options, run=tmp_path)

    traced = trace_step(config)
    assert traced.sizes.total == 2 * 3 * 4 * 4 * 4 + 4 + 3
    each = 2 * (32 // 4) ** 2 * 4 * 3 * 4 * 4  # flops of either layer in the forward pass
    assert traced.model_flops_per_image == 2 * each + 3 * each  # the input has no gradient
    assert "gradient_checkpointing" not in "".join(comparison_lines(config, traced))

    assert fit(config) == 0
    found = losses(tmp_path)
    assert found[40] < 0.5 * found[1]
    numbers = read_run(tmp_path).series["eval/linear_mse"]
    assert numbers[40] < numbers[20] < numbers[0]

    exported = (tmp_path / "metrics.prom").read_text()
    assert "latent_foundry_step 40\n" in exported
    assert f"latent_foundry_eval_linear_mse {numbers[40]}\n" in exported

    assert report([str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Reconstructions</h2>" in page
    assert "linear_mse" in page


def test_a_metric(shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_section(monkeypatch, "A metric")
    add_mean_colour(monkeypatch)
    options = ["eval.metrics=[coverage]", "eval.features=[mean_colour]"]
    with pytest.raises(ValueError, match=r"eval\.num_samples=1: coverage needs 2 or more"):
        load_config(["+experiment=emoji", "eval.num_samples=1", *options])

    half = tmp_path / "half"  # of the looks that the training images have
    draw_pictures(half, CAPTIONS[:4])
    for folder, bounds in ((shop.folder / "pictures", (0.9, 1)), (half, (0.3, 0.7))):
        run = tmp_path / folder.name
        evaluate(shop.config("emoji", *options, f"eval.images={folder}", run=run))
        (file,) = (run / "evaluations").glob("images_*.json")
        values = json.loads(file.read_text())
        assert bounds[0] <= values["coverage_mean_colour"] <= bounds[1]
        line = {"step": 1, "eval/coverage_mean_colour": values["coverage_mean_colour"]}
        (run / "metrics.jsonl").write_text(f"{json.dumps(line)}\n")
        assert report([str(run)]) == 0
        assert "Coverage (mean colour)" in (run / "report.html").read_text()


def test_a_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    add_section(monkeypatch, "A sampler")
    chosen = ["+experiment=emoji", "sampler=adams_bashforth"]
    with pytest.raises(ValueError, match=r"sampler\.eta=0\.5 needs sampler\.name=ddim: set it to"):
        load_config([*chosen, "sampler.eta=0.5"])
    config = load_config(chosen)
    noise = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = drawn(SamplerName.euler, 1000, noise)
    errors = [
        (drawn(name, 40, noise) - exact).norm() for name in (config.sampler.name, SamplerName.euler)
    ]
    assert errors[0] < 0.5 * errors[1]
    with pytest.raises(ValueError, match=r"sampler\.name=adams_bashforth: diffusers has no such"):
        scheduler_config(config.diffusion, config.sampler)
    solver = SAMPLERS[config.sampler.name].solver
    theirs = Scheduler(name="LMSDiscreteScheduler", knows_pure_noise=False)
    entry = SamplerEntry(solver=solver, uses_eta=True, scheduler=theirs)
    monkeypatch.setitem(SAMPLERS, config.sampler.name, entry)
    assert load_config([*chosen, "sampler.eta=0.5"]).sampler.eta == 0.5
    found = scheduler_config(DiffusionConfig(), config.sampler)
    assert found["_class_name"] == "LMSDiscreteScheduler"
    assert "rescale_betas_zero_snr" not in found


def test_a_conditioner_from_captions(
    monkeypatch: pytest.MonkeyPatch,
    workshop: Workshop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    add_section(monkeypatch, "A conditioner from captions")
    options = ["conditioner=letters", "conditioner.width=32", "unet.context_dim=32"]
    options += ["train.max_steps=2", "eval.every=2", "deepspeed.stage=3", *ONE_GPU]
    for wrong, message in {
        "conditioner.context_length=1": "letters need 2 or more",
        "unet.context_dim=0": "but the conditioner's tokens are 32 wide",
        "data.store_text=true": "data.store_text needs conditioner.kind=text or transformers",
        "eval.clip_score=true": "eval.clip_score needs conditioner.kind=text",
    }.items():
        with pytest.raises(ValueError, match=message):
            workshop.config("emoji", *options, wrong)
    config = workshop.config("emoji", *options, "conditioner.context_length=12", run=tmp_path)
    assert fit(config) == 0
    _, averaged = chosen_checkpoint(config).average("")
    assert averaged["conditioner.embedding.weight"].shape == (28, 32)
    assert list((tmp_path / "samples").glob("*.png"))
    plan(config)
    unet = sum(value.numel() for name, value in averaged.items() if name.startswith("unet."))
    assert f"{unet + 28 * 32:,}\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"^conditioner\.kind=letters: diffusers has no pipeline"):
        export(config)


def test_a_spatial_conditioner(
    monkeypatch: pytest.MonkeyPatch,
    workshop: Workshop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    add_section(monkeypatch, "A spatial conditioner")
    options = ["conditioner=place", "train.max_steps=2", *ONE_GPU]
    with pytest.raises(ValueError, match=r"unet\.in_channels=4 but .* gives 1 more"):
        workshop.config("emoji", *options, "unet.context_dim=0")
    options += ["unet=place", "optim.lr=0.05", "sampler.guidance_scale=2"]
    config = workshop.config("emoji", *options, run=tmp_path)
    assert fit(config) == 0
    _, averaged = chosen_checkpoint(config).average("")
    assert averaged["unet.conv_in.weight"].shape[1] == 5
    pipeline = Pipeline.load(config, chosen_checkpoint(config), torch.device("cpu"))
    left, right, again = (
        pipeline.draw(Given([f"a circle {word}"]), [0], seed=0)
        for word in ("left", "right", "left")
    )
    assert torch.equal(left, again)
    assert not torch.equal(left, right)
    plan(config)
    total = sum(value.numel() for value in averaged.values())
    assert f"{total:,}\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"^unet\.in_channels: diffusers' pipeline concatenates"):
        export(config)


def drawn(name: SamplerName, steps: int, noise: Tensor) -> Tensor:
    """Samples of N(0, 1/4) by its exact denoiser."""

    def predict(latents: Tensor, level: NoiseLevel) -> Tensor:
        return latents * level.signal / (level.signal**2 + 4 * level.noise**2)

    diffusion = Diffusion(DiffusionConfig(prediction_type=PredictionType.sample))
    return sample(predict, diffusion, SamplerConfig(name=name, steps=steps), noise)
