"""Today's code reads what version 0.1.0 wrote: tests/fixtures/README.md says what, and how."""

import hashlib
import json
import runpy
import shutil
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from data.streams.stream import Stream
from models.conditioning.conditioners import build_conditioner
from models.conditioning.given import Given
from models.first_stage.autoencoder import load_autoencoder
from tests.support.latent_jobs import folder_hashes
from tests.support.oracles import diffusers
from tests.support.paths import ROOT
from trainer.checkpoints.reader import chosen_checkpoint
from trainer.cli import load_config
from trainer.config import Config
from trainer.pipeline import load_trained
from trainer.runtime.ranks import ALONE
from trainer.streams import open_images, open_latents

FIXTURES = ROOT / "tests" / "fixtures"
OPTIONS = (FIXTURES / "options.txt").read_text().split()
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema.decay_0.5")
FIRST_STAGE = ["autoencoder.weights=", "data.store_text=false", "eval.features=[]"]
CAPTIONS = ["a red box 0", "a blue box 2"]
LATENTS = torch.linspace(-2, 2, 2 * 2 * 8 * 8).view(2, 2, 8, 8)
TIMESTEPS = torch.tensor([10, 900])
NOISE = 1e-5
"""Of other kernels and processors."""

Command = Callable[..., str]


def overrides(folder: Path, run: str = "run") -> list[str]:
    """The options of a run whose files were copied to `folder`."""
    experiment = "emoji_autoencoder" if run == "first_stage" else "emoji"
    own = FIRST_STAGE if run == "first_stage" else []
    copied = [f"data.dir={folder / 'data'}", f"run.dir={folder / run}"]
    return [f"+experiment={experiment}", *OPTIONS, *own, *copied]


def sha256(tensors: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def assert_expected(found: Tensor, name: str, every: int = 1) -> None:
    expected = torch.tensor(EXPECTED[name])
    torch.testing.assert_close(found.flatten()[::every], expected, rtol=0, atol=NOISE)


@pytest.fixture
def past(tmp_path: Path) -> Path:
    """A copy of the files, so that nothing can change them."""
    return shutil.copytree(FIXTURES, tmp_path / "past")


@pytest.fixture
def config() -> Config:
    return load_config(overrides(FIXTURES))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `python -m MODULE WORDS` in this process and returns what it prints."""

    def run(module: str, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", [module, *words])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__")
        assert not ended.value.code
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", ["images", "latents"])
def test_streams_give_the_same_batches(name: str, config: Config) -> None:
    stream: Stream = (
        open_images(config, ALONE, "train") if name == "images" else open_latents(config, ALONE)
    )
    steps = stream.steps(0)
    found = [batch for _ in range(len(EXPECTED[name]) // 2) for batch in next(steps)]
    steps.close()
    assert [
        {
            "epoch": batch.epoch.tolist(),
            "index": batch.index.tolist(),
            "keys": batch.keys,
            "captions": batch.captions,
            "sha256": sha256(batch.arrays),
        }
        for batch in found
    ] == EXPECTED[name]


def test_data_sets_are_sound_and_complete(past: Path, command: Command) -> None:
    before = folder_hashes(past)
    command("trainer.pack", *overrides(past), "verify=true")
    output = command("trainer.precompute", *overrides(past))
    assert "nothing to do: all 2 shards" in output
    assert folder_hashes(past) == before


@pytest.mark.parametrize("run", ["run", "first_stage"])
def test_checkpoints_hold_the_same_tensors(run: str) -> None:
    checkpoint = chosen_checkpoint(load_config(overrides(FIXTURES, run)))
    assert checkpoint.step == 3
    found = {kind: sha256(tensors) for kind, tensors in checkpoint.tensors(*KINDS).items()}
    assert found == EXPECTED["tensors"][run]


@pytest.mark.parametrize("run", ["run", "first_stage"])
def test_training_goes_on_with_weights_moments_and_averages(
    run: str, past: Path, command: Command
) -> None:
    old = load_file(past / run / "checkpoints" / "step_00000003" / "rank_00000_000.safetensors")
    log = (past / run / "metrics.jsonl").read_text().splitlines()
    # at this learning rate a step leaves weights as they are
    more = ["optim.lr=1e-30", "train.max_steps=4", "checkpoint.keep=2"]
    assert "going on from" in command("trainer", *overrides(past, run), *more)

    config = load_config([*overrides(past, run), *more])
    checkpoint = chosen_checkpoint(config)
    assert checkpoint.step == 4
    kinds = checkpoint.tensors(*KINDS)
    assert sum(map(len, kinds.values())) == len(old)
    for name, weight in kinds["weight"].items():
        assert torch.equal(weight, old[f"weight/{name}"])
        average = old[f"ema.decay_0.5/{name}"].lerp(weight, 1 - averaging(updates=4))
        torch.testing.assert_close(kinds["ema.decay_0.5"][name], average)
        # the square of a gradient adds to what is left of the second moment
        left = config.optim.betas[1] * old[f"exp_avg_sq/{name}"]
        assert (kinds["exp_avg_sq"][name] >= left * (1 - 1e-5)).all()
    # a training and a job had measured the same: 0.1.0 kept both lines
    log = list(dict.fromkeys(log))
    lines = (past / run / "metrics.jsonl").read_text().splitlines()
    assert lines[: len(log)] == log
    assert {json.loads(line)["step"] for line in lines[len(log) :]} == {4}


def averaging(updates: int) -> float:
    """The decay of `ema.decays=[0.5]` at an update."""
    return min(0.5, updates / (9 + updates))


def test_networks_compute_the_same(config: Config) -> None:
    text = build_conditioner(config.conditioner)
    module, scale = load_trained(config, chosen_checkpoint(config), text)
    with torch.no_grad():
        condition = text.condition(Given(CAPTIONS), (8, 8))
        assert condition.tokens is not None
        assert_expected(condition.tokens, "tokens")
        assert_expected(module(LATENTS, TIMESTEPS, condition), "predicted", every=5)
        autoencoder = load_autoencoder(config.autoencoder)
        assert_expected(autoencoder.decode(scale.denormalise(LATENTS)), "decoded", every=31)


def test_diffusers_computes_the_same_from_the_export() -> None:
    pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(
        FIXTURES / "export", local_files_only=True
    )
    ids = pipeline.tokenizer(CAPTIONS, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        tokens = pipeline.text_encoder(ids)[0]
        assert_expected(tokens, "tokens")
        predicted = pipeline.unet(LATENTS, TIMESTEPS, tokens).sample
        assert_expected(predicted, "predicted", every=5)
        assert_expected(pipeline.vae.decode(LATENTS).sample, "decoded", every=31)


def test_the_export_draws_the_pictures_of_its_checkpoint(past: Path, command: Command) -> None:
    words = [*overrides(past), "sample.prompts=[a_red_box,a_blue_box]"]
    for name, export in (("ours", ""), ("theirs", str(past / "export"))):
        command("trainer.sample", *words, f"sample.out={past / name}", f"sample.export={export}")
    ours, theirs = (
        [np.asarray(Image.open(past / name / f"{number:05d}.png"), np.int16) for number in (0, 1)]
        for name in ("ours", "theirs")
    )
    assert np.abs(np.stack(ours) - np.stack(theirs)).max() <= 1
    assert np.std(ours) > 5


def test_a_reference_of_features_is_compared_with_and_not_made_again(
    past: Path, command: Command
) -> None:
    with tarfile.open(past / "data" / "train" / "000000.tar") as shard:
        pictures = [member for member in shard.getmembers() if member.name.endswith(".png")]
        shard.extractall(past / "shard", pictures, filter="data")
    (record,) = (past / "run" / "evaluations").glob("images_shard_*.json")
    expected = json.loads(record.read_text())
    record.unlink()
    references = folder_hashes(past / "data" / "references")
    command("trainer.evaluate", *overrides(past), f"eval.images={past / 'shard'}")
    (record,) = (past / "run" / "evaluations").glob("images_shard_*.json")
    found = json.loads(record.read_text())
    assert found["num_samples"] == expected["num_samples"] == 3
    assert found["fd_open_clip"] == pytest.approx(expected["fd_open_clip"], rel=0.01)
    assert folder_hashes(past / "data" / "references") == references


def test_the_report_shows_the_log_the_evaluation_and_the_sweep(
    past: Path, command: Command
) -> None:
    command("trainer.report", str(past / "run"))
    page = (past / "run" / "report.html").read_text()
    (table,) = (past / "run" / "sweeps").glob("*/table.parquet")
    _, sweep = page.split("<h2>Sweep")
    for row in pq.read_table(table).to_pylist():
        assert f"<td>{row['fd_open_clip']:.4g}</td>" in sweep
        assert f">{row['sampler.guidance_scale']}</text>" in sweep, "the plot lacks an option"
    (record,) = (past / "run" / "evaluations").glob("step_00000003_*.json")
    assert f"{json.loads(record.read_text())['clip_score']:.3g}" in page
    assert "Finished" in page
