"""Every experiment composes; every mistake gets one line that names the path."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from trainer.checks import explain
from trainer.cli import load_config
from trainer.config import Config

ROOT = Path(__file__).parents[3]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments_compose_and_are_named_after_their_file(experiment: str):
    config = load_config([f"+experiment={experiment}"])
    assert config.run.experiment == experiment
    assert config.run.dir == f"runs/{experiment}/{config.run.name}"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", "optim.lrr is no option (did you mean optim.lr?)"),
        ("+optim.lrr=1", "optim.lrr is no option (did you mean optim.lr?)"),
        ("++train.bach=1", "train.bach is no option"),
        ("+trian=1", "trian is no option (did you mean train?)"),
        ("optim.lr=fast", "optim.lr: Value 'fast'"),
        ("optim.lr=???", "no value for optim.lr"),
        ("train.micro_batch_size=7", "train.micro_batch_size=7"),
        ("data.lanes=5", "data.lanes=5 does not divide train.global_batch_size"),
        ("data.image_size=66", "data.image_size=66"),
        ("data.image_size=72", "unet.block_out_channels"),
        ("deepspeed.stage=4", "deepspeed.stage=4"),
        ("unet.heads=[1]", "unet.heads needs 3 entries"),
        ("unet.in_channels=3", "unet.in_channels=3 but autoencoder.latent_channels=4"),
        ("unet.context_dim=64", "unet.context_dim=64"),
        ("diffusion.prediction_type=epsilon", "diffusion.zero_terminal_snr"),
        ("diffusion.schedule=flow", "diffusion.zero_terminal_snr rescales betas"),
        ("diffusion.beta_end=2", "diffusion needs 0 < beta_start <= beta_end < 1"),
        ("sampler.steps=0", "sampler.steps=0"),
        ("sampler.eta=0.5", "sampler.eta=0.5 needs sampler.name=ddim"),
        ("sampler.guidance_interval=[0.8,0.2]", "sampler.guidance_interval=[0.8, 0.2]"),
        ("sample.strength=0", "sample.strength=0"),
        ("ema.decays=[]", "ema.decays and ema.sigma_rels are both empty"),
        ("ema.decays=[0.9,0.9]", "ema.decays=[0.9, 0.9] names an average twice"),
        ("ema.decays=[1]", "ema.decays=[1.0] must lie in [0, 1)"),
        ("ema.sigma_rels=[0.3]", "ema.sigma_rels=[0.3] must lie in (0, 0.28]"),
        ("ema.snapshot_every=5", "ema.snapshot_every=5 needs two widths"),
        ("ema.reconstruct.sigma_rel=1", "ema.reconstruct.sigma_rel=1.0 must lie in (0, 0.28]"),
        ("checkpoint.keep=0", "checkpoint.keep=0 must be at least 1"),
        ("checkpoint.keep_every=700", "checkpoint.keep_every=700 is no multiple"),
        ("precompute.task=1", "precompute.task=1"),
        ("data.source.val_share=1.5", "data.source.val_share=1.5"),
        ("precompute.batch_size=0", "precompute.batch_size=0 must be at least 1"),
        ("data.workers=-1", "data.workers=-1 must be at least 0"),
        ("data.filters=[{name:width}]", "data.filters[0] (width) needs either min, max or both"),
        ("data.filters=[{name:width,min:3,max:2}]", "data.filters[0] (width): min=3.0 is over"),
        ("unet=nothing", "unet/nothing"),
        ("conditioner.kind=smell", "conditioner.kind"),
    ],
)
def test_mistakes_are_named(override: str, words: str):
    with pytest.raises((HydraException, OmegaConfBaseException, ValueError)) as caught:
        load_config(["+experiment=emoji", override])
    line = explain(caught.value)
    assert words in line
    assert "\n" not in line


def test_all_contradictions_are_listed_at_once():
    with pytest.raises(ValueError, match=r"data\.lanes=5.*unet\.heads"):
        load_config(["+experiment=emoji", "data.lanes=5", "unet.heads=[1]"])


@pytest.mark.parametrize("every", [0, 700])
def test_the_best_checkpoint_must_be_saved_when_it_is_evaluated(every: int):
    options = ["+experiment=emoji", "checkpoint.best=eval/fd_inception", f"eval.every={every}"]
    with pytest.raises(ValueError, match=r"checkpoint\.best=eval/fd_inception needs eval\.every"):
        load_config(options)


def test_stored_text_is_of_one_caption():
    with pytest.raises(ValueError, match=r"data\.store_text keeps .* set data\.store_text=false"):
        load_config(["+experiment=emoji", "data.store_text=true", "data.captions=json"])


def test_a_negative_prompt_needs_guidance():
    options = ["+experiment=emoji", "sample.negative_prompt=a face", "sampler.guidance_scale=1"]
    with pytest.raises(ValueError, match=r"sample\.negative_prompt .* sampler\.guidance_scale=1"):
        load_config(options)


def test_a_mixture_is_of_latents():
    mixture = "data.mixture=[{latents: somewhere, weight: 1}]"
    load_config(["+experiment=emoji", mixture])
    with pytest.raises(ValueError, match=r"data\.mixture is of latents, but task=autoencoder"):
        load_config(["+experiment=emoji_autoencoder", mixture])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["deepspeed.stage=3"], r"deepspeed\.stage=3 .*use deepspeed\.stage=2"),
        (["data.image_size=16"], r"autoencoder\.loss\.discriminator\.layers=3 leaves nothing"),
        (["autoencoder.loss.discriminator.layers=0"], r"autoencoder\.loss\.discriminator needs"),
        (["autoencoder.codebook_revival=1"], r"codebook_revival needs autoencoder\.codebook_decay"),
        (
            ["autoencoder.codebook_decay=0.9", "autoencoder.weights=x"],
            r"autoencoder\.weights has no counts",
        ),
    ],
)
def test_first_stages_that_cannot_be_trained_are_refused(overrides: list[str], words: str):
    gan = ["+experiment=emoji_autoencoder", "autoencoder.loss.gan_weight=0.5"]
    load_config(gan)
    with pytest.raises(ValueError, match=words):
        load_config([*gan, *overrides])


def test_published_first_stages_have_the_papers_loss():
    for name, weight in (("kl_f4", 0.5), ("vq_f4", 0.75)):
        loss = load_config(["+experiment=imagenet_256", f"autoencoder={name}"]).autoencoder.loss
        assert (loss.gan_weight, loss.gan_start_step, loss.kl_weight) == (weight, 50_001, 1e-6)
        assert loss.perceptual_weight == 1.0


def test_bf16_without_zero_is_refused():
    options = ["+experiment=emoji", "train.precision=bf16", "deepspeed.stage=0"]
    with pytest.raises(ValueError, match=r"deepspeed\.stage=0 with train\.precision=bf16"):
        load_config(options)


def test_no_experiment_says_so():
    with pytest.raises(ValueError, match=r"add \+experiment=NAME"):
        load_config([])


def test_the_batch_must_divide_among_the_launched_ranks_of_a_training(
    monkeypatch: pytest.MonkeyPatch,
):
    with pytest.raises(ValueError, match=r"x 3 rank\(s\)"):
        load_config(["+experiment=emoji"], ranks=3)
    monkeypatch.setenv("WORLD_SIZE", "3")
    options = ("+experiment=emoji", "--cfg", "job")
    assert "x 3 rank(s)" in command(*options).stderr
    assert "num_samples" in command(*options, module="trainer.evaluate").stdout


def command(*words: str, module: str = "trainer") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_1():
    done = command("+experiment=emoji", "optim.lrr=1")
    assert done.returncode == 1
    assert done.stderr == "error: optim.lrr is no option (did you mean optim.lr?)\n"


def crash(config: Config) -> None:
    raise RuntimeError("connection to rank 3 lost")


def test_a_crash_is_a_stack_trace_and_exit_code_70():
    script = (
        "import sys\n"
        "from trainer.cli import main\n"
        "sys.argv = ['x', '+experiment=emoji']\n"
        f"main('{__name__}:crash')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 70
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("RuntimeError: connection to rank 3 lost\n")


def test_cfg_prints_the_tree_and_refuses_a_wrong_one():
    done = command("+experiment=laion_512", "--cfg", "job")
    assert done.returncode == 0
    assert "global_batch_size: 2048" in done.stdout
    wrong = command("+experiment=laion_512", "--cfg", "job", "unet.heads=[1]")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: unet.heads")


@pytest.mark.parametrize(
    "module",
    ["trainer", "trainer.pack", "trainer.precompute", "trainer.evaluate", "trainer.sample"],
)
def test_nothing_heavy_is_imported_before_the_config_is_checked(module: str):
    script = (
        "import runpy, sys\n"
        "sys.argv = ['x', '+experiment=emoji', 'optim.lrr=1']\n"
        "try:\n"
        f"    runpy.run_module({module!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print(end)\n"
        "print(sorted({'torch', 'deepspeed', 'webdataset', 'wandb'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-2].startswith("error: optim.lrr is no option")
    assert done.stdout.splitlines()[-1] == "[]"
