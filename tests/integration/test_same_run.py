"""A run goes on as the run that it was, and its weights are drawn from as they were trained."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.latent_jobs import folder_hashes
from tests.support.processes import start
from tests.support.workshop import Workshop, losses
from trainer.checkpoints.reader import encode_manifest, manifest_entry
from trainer.config import Config
from trainer.ema.job import reconstruct
from trainer.evaluate.job import evaluate
from trainer.export.job import export
from trainer.plan.job import plan
from trainer.sample.job import draw
from trainer.train.loop import fit

TRAIN = ["train.max_steps=2", "data.flip=false", "ema.sigma_rels=[0.05,0.1]"]
SNAPSHOTS = "ema.snapshot_every=1"
MORE = "train.max_steps=3"


@pytest.fixture(scope="module")
def trained(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    assert fit(workshop.config("emoji", *TRAIN, SNAPSHOTS, run=run)) == 0
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("unet.block_out_channels=[8,16]", r"unet\.block_out_channels was \[16,32\], is \[8,16\]"),
        ("unet.block_out_channels=[32,32]", r"unet\.block_out_channels was \[16,32\], is"),
        ("unet.attention=[false,false]", r"unet\.attention was \[false,true\], is \[false,false\]"),
        ("unet.heads=[1,4]", r"unet\.heads was \[1,2\], is \[1,4\]"),
        ("unet.layers_per_block=2", r"unet\.layers_per_block was 1, is 2"),
        ("diffusion.loss=l1", r"diffusion\.loss was l2, is l1"),
        ("diffusion.loss_weight=min_snr", r"diffusion\.loss_weight was uniform, is min_snr"),
        ("conditioner.features=penultimate", r"conditioner\.features was last, is penultimate"),
        ("run.seed=1", r"run\.seed was 0, is 1"),
        ("train.global_batch_size=4", r"train\.global_batch_size was 8, is 4"),
        ("data.lanes=4", r"data\.lanes was 2, is 4"),
        ("ema.sigma_rels=[0.05]", r"ema\.sigma_rels was \[0\.05,0\.1\], is \[0\.05\]"),
    ],
)
def test_another_run_is_refused_in_a_line_and_nothing_changes(
    change: str, said: str, workshop: Workshop, run: Path
) -> None:
    before = folder_hashes(run)
    overrides = [*TRAIN, MORE, change]
    with pytest.raises(ValueError, match=rf"^run\.dir: .*step_00000002 .*{said}") as raised:
        fit(workshop.config("emoji", *overrides, run=run))
    assert "\n" not in str(raised.value)
    assert folder_hashes(run) == before


def test_other_data_are_refused(workshop: Workshop, run: Path) -> None:
    config = workshop.config("emoji", *TRAIN, MORE, run=run)
    config.data.mixture = []
    latents = shutil.copytree(config.data.latents, run.parent / "latents")
    manifest = latents / "manifest.json"
    content = json.loads(manifest.read_bytes())
    content["shards"][0]["sha256"] = "0" * 64
    content.pop("hash")
    manifest.write_text(json.dumps(content))
    config.data.latents = str(latents)
    with pytest.raises(ValueError, match=r"^data\.latents"):
        fit(config)


def test_meant_changes_are_told_once_in_the_output_the_history_and_wandb(
    workshop: Workshop, run: Path
) -> None:
    unused = run.parent / "unused.safetensors"
    changes = ["optim.lr=5e-4", f"unet.weights={unused}", "logger.wandb.mode=offline"]
    ended = start(workshop.overrides("emoji", *TRAIN, SNAPSHOTS, MORE, *changes, run=run)).finish()
    assert ended.code == 0, ended.said
    (line,) = re.findall(r"^changed since step 2: (.*)$", ended.out, re.M)
    names = [change.partition(" was ")[0] for change in line.split("; ")]
    assert sorted(names) == ["optim.lr", "train.max_steps", "unet.weights"]
    assert "optim.lr was 0.001, is 0.0005" in line
    events = [json.loads(text) for text in (run / "history.jsonl").read_text().splitlines()]
    assert [(event["what"], event["step"]) for event in events] == [("start", 0), ("resume", 2)]
    assert events[1]["changed"]["optim.lr"] == {"old": 0.001, "new": 0.0005}
    assert events[1]["changed"]["unet.weights"] == {"old": "", "new": str(unused)}
    (record,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"changed" in record.read_bytes()


def test_a_checkpoint_with_other_tensors_than_its_config_is_refused(
    workshop: Workshop, run: Path
) -> None:
    config = workshop.config("emoji", *TRAIN, MORE, run=run)
    folder = run / "checkpoints" / "step_00000002"
    tensors = load_file(folder / "rank_00000_000.safetensors")
    name = "exp_avg/unet.conv_in.bias"

    def rewrite(changed: dict[str, torch.Tensor]) -> None:
        path = folder / "rank_00000_000.safetensors"
        save_file(changed, path)
        manifest = json.loads((folder / "manifest.json").read_bytes())
        manifest["files"][path.name] = manifest_entry(path)
        (folder / "manifest.json").write_bytes(encode_manifest(manifest))

    for changed, said in (
        (
            tensors | {name: torch.zeros(15)},
            r"is \[15\], and in this config's network it is \[16\]",
        ),
        ({key: value for key, value in tensors.items() if key != name}, "is missing"),
        (tensors | {"exp_avg/more": torch.zeros(1)}, "exp_avg/more is .* has no place"),
    ):
        rewrite(changed)
        with pytest.raises(ValueError, match=rf"^run\.dir: .*step_00000002.*{said}"):
            fit(config)
    rewrite(tensors)
    assert fit(config) == 0
    assert sorted(losses(run)) == [1, 2, 3]


MODELS = [
    (["unet.heads=[1,4]"], "unet.heads was [1,2], is [1,4]"),
    (
        ["diffusion.prediction_type=epsilon", "diffusion.zero_terminal_snr=false"],
        "diffusion.prediction_type was v_prediction, is epsilon",
    ),
    (["conditioner.features=penultimate"], "conditioner.features was last, is penultimate"),
]


@pytest.mark.parametrize(("change", "said"), MODELS)
@pytest.mark.parametrize("command", [draw, evaluate, export, reconstruct])
def test_no_command_takes_the_weights_for_another_model(
    command: Callable[[Config], None],
    change: list[str],
    said: str,
    workshop: Workshop,
    trained: Path,
) -> None:
    before = folder_hashes(trained)
    prompts = ["sample.prompts=[a red circle]"]
    config = workshop.config("emoji", *TRAIN, SNAPSHOTS, *prompts, *change, run=trained)
    with pytest.raises(ValueError, match=rf"^run\.dir: .*{re.escape(said)}"):
        command(config)
    assert folder_hashes(trained) == before


def test_a_plan_says_that_the_run_folder_holds_another_run(
    workshop: Workshop, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = [*TRAIN, SNAPSHOTS, "plan.gpus_per_node=1"]
    plan(workshop.config("emoji", *here, run=trained))
    assert "warning" not in capsys.readouterr().err
    plan(workshop.config("emoji", *here, "unet.heads=[1,4]", run=trained))
    assert "unet.heads was [1,2], is [1,4]" in capsys.readouterr().err


def test_weights_of_frozen_networks_may_move_but_not_change(
    workshop: Workshop, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = workshop.config("emoji", *TRAIN, SNAPSHOTS, MORE, run=run)
    config.sample.prompts, config.sample.out = ["a red circle"], str(tmp_path / "samples")
    moved = tmp_path / "moved.safetensors"
    shutil.copy(config.conditioner.pretrained, moved)
    config.conditioner.pretrained = str(moved)
    draw(config)
    assert "conditioner.pretrained was" in capsys.readouterr().err
    assert fit(config) == 0
    assert "conditioner.pretrained was" in capsys.readouterr().out

    tensors = load_file(moved)
    tensors["token_embedding.weight"] = tensors["token_embedding.weight"] + 1
    other = tmp_path / "other.safetensors"
    save_file(tensors, other)
    config.conditioner.pretrained = str(other)
    with pytest.raises(ValueError, match=r"another text encoder: conditioner\.pretrained was"):
        draw(config)
    config.train.max_steps = 4
    with pytest.raises(ValueError, match=r"^conditioner\.pretrained: the weights of this run had"):
        fit(config)
