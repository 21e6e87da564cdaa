"""Every experiment composes; every mistake gets one line that names the path."""

import pytest
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from tests.support.paths import ROOT
from trainer.checks import explain
from trainer.cli import load_config

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments_compose_and_are_named_after_their_file(experiment: str) -> None:
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
        ("~optim.lrr", "optim.lrr is no option (did you mean optim.lr?)"),
        ("~optim.lr", "optim.lr cannot be deleted: give it a value; it must be a number > 0"),
        ("smapler@unet=ddim", "smapler is no option (did you mean sampler?)"),
        ("optim=adam", "optim is a section and takes no value: set one of its options, such as"),
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
        ("diffusion.beta_end=2", "diffusion.beta_end=2.0 must be a number > 0 and < 1"),
        ("diffusion.beta_start=0.5", "diffusion.beta_start=0.5 is over beta_end=0.012"),
        ("sampler.steps=0", "sampler.steps=0"),
        ("sampler.eta=0.5", "sampler.eta=0.5 needs sampler.name=ddim"),
        ("sampler.guidance_interval=[0.8,0.2]", "sampler.guidance_interval=[0.8, 0.2]"),
        ("sample.strength=0", "sample.strength=0"),
        ("sample.height=72", "sample.height=72 is no multiple of 16 (first stage 4, times 4 for"),
        ("sample.width=7", "; 16 is"),
        ("ema.decays=[]", "ema.decays and ema.sigma_rels are both empty"),
        ("ema.decays=[0.9,0.9]", "ema.decays=[0.9, 0.9] names an average twice"),
        ("ema.decays=[1]", "ema.decays=[1.0] must be a list of numbers ≥ 0 and < 1"),
        ("ema.sigma_rels=[0.3]", "ema.sigma_rels=[0.3] must be a list of numbers > 0 and ≤ 0.28"),
        ("ema.snapshot_every=5", "ema.snapshot_every=5 needs two widths"),
        ("ema.decays=[0.9999999,0.99999991]", "names an average twice"),
        (
            "train.log_every=0",
            "train.log_every=0 must be an integer ≥ 1 and ≤ 10^9 [optimizer steps]",
        ),
        ("train.max_steps=-5", "train.max_steps=-5 must be an integer ≥ 1 and"),
        ("optim.lr=0", "optim.lr=0.0 must be a number > 0 and ≤ 1000"),
        ("optim.lr=nan", "optim.lr=nan must be a number > 0 and ≤ 1000"),
        ("optim.betas=[0.9]", "optim.betas=[0.9] must be a list of 2 numbers ≥ 0 and < 1"),
        ("optim.betas=[0.9,1.5]", "optim.betas=[0.9, 1.5] must be a list of 2 numbers"),
        ("guards.spike_factor=1", "guards.spike_factor=1.0 must be a number 0 or > 1 and"),
        ("run.seed=18446744073709551616", "must be an integer ≥ 0 and < 2^64"),
        ("checkpoint.keep_every=700", "checkpoint.keep_every=700 is no multiple"),
        ("precompute.task=1", "precompute.task=1"),
        ("data.source.val_share=1.5", "data.source.val_share=1.5"),
        ("data.filters=[{name:width}]", "data.filters[0] (width) needs either min, max or both"),
        ("data.filters=[{name:width,min:3,max:2}]", "data.filters[0] (width): min=3.0 is over"),
        ("unet=sd3", "unet=sd3 is none of emoji, layout, "),
        ("unet=sd3", "(did you mean sd"),
        ("sampler.name=ddimm", "sampler.name=ddimm is none of ddim, "),
        ("eval.features=[incepton]", "(did you mean inception?)"),
        ("plan.gpu=a100", "plan.gpu=a100 is none of a100_40gb, "),
        ("plan.gpu=h100_80g", "(did you mean h100_80gb?)"),
        ("plan.gpu=H200", "(did you mean h200_141gb?)"),
        ("plan.gpu=rtx40", "(did you mean rtx4090_24gb?)"),
        ("+experimnt=emoji", "experimnt is no option (did you mean experiment?)"),
        ("optim.lr=null", "optim.lr: null is no value; it must be a number > 0"),
        ("train.max_steps=1e4", "could not be converted to Integer; it must be an integer ≥ 1"),
        ("data.filters=[{name:width,min:true}]", "data.filters[].min: Value 'True' of type"),
        ("data.filters=[{nmae:width}]", "data.filters[].nmae is no option (did you mean"),
        ("data.filters=[{nmae:width}]", "data.filters[].name?)"),
        ("data.flip=maybe", "it must be true or false"),
        ("run.name=", "run.name= must be a text that is not empty"),
        ("conditioner.kind=smell", "conditioner.kind"),
    ],
)
def test_mistakes_are_named(override: str, words: str) -> None:
    with pytest.raises((HydraException, OmegaConfBaseException, ValueError)) as caught:
        load_config(["+experiment=emoji", override])
    line = explain(caught.value)
    assert words in line
    assert "\n" not in line


def test_all_contradictions_are_listed_at_once() -> None:
    with pytest.raises(ValueError, match=r"data\.lanes=5.*unet\.heads"):
        load_config(["+experiment=emoji", "data.lanes=5", "unet.heads=[1]"])


@pytest.mark.parametrize("every", [0, 700])
def test_the_best_checkpoint_must_be_saved_when_it_is_evaluated(every: int) -> None:
    options = ["+experiment=emoji", "checkpoint.best=eval/fd_inception", f"eval.every={every}"]
    with pytest.raises(ValueError, match=r"checkpoint\.best=eval/fd_inception needs eval\.every"):
        load_config(options)


def test_a_rate_that_the_batch_makes_too_large_is_refused() -> None:
    options = ["+experiment=emoji", "optim.lr=40"]
    load_config(options)
    with pytest.raises(ValueError, match=r"optim\.scale_lr multiplies optim\.lr=40\.0 by train\."):
        load_config([*options, "optim.scale_lr=true"])


def test_a_negative_prompt_needs_guidance() -> None:
    options = ["+experiment=emoji", "sample.negative_prompt=a face", "sampler.guidance_scale=1"]
    with pytest.raises(ValueError, match=r"sample\.negative_prompt .* sampler\.guidance_scale=1"):
        load_config(options)


def test_a_mixture_is_of_latents() -> None:
    mixture = "data.mixture=[{latents: somewhere, weight: 1}]"
    load_config(["+experiment=emoji", mixture])
    with pytest.raises(ValueError, match=r"data\.mixture is of latents, but task=autoencoder"):
        load_config(["+experiment=emoji_autoencoder", mixture])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["deepspeed.stage=3"], r"deepspeed\.stage=3 .*use deepspeed\.stage=2"),
        (["data.image_size=16"], r"autoencoder\.loss\.discriminator\.layers=3 leaves nothing"),
        (["autoencoder.codebook_revival=1"], r"codebook_revival needs autoencoder\.codebook_decay"),
        (
            ["autoencoder.codebook_decay=0.9", "autoencoder.weights=x"],
            r"autoencoder\.weights has no counts",
        ),
    ],
)
def test_first_stages_that_cannot_be_trained_are_refused(overrides: list[str], words: str) -> None:
    gan = ["+experiment=emoji_autoencoder", "autoencoder.loss.gan_weight=0.5"]
    load_config(gan)
    with pytest.raises(ValueError, match=words):
        load_config([*gan, *overrides])


def test_pixels_have_the_channels_of_an_image_and_no_weights() -> None:
    pixels = ["autoencoder=identity", "autoencoder.weights="]
    wide = ["unet.in_channels=3", "unet.out_channels=3"]
    config = load_config(["+experiment=emoji", *pixels, *wide])
    assert config.autoencoder.downsample_factor == 1
    for override, words in (
        ("autoencoder.weights=x", r"autoencoder\.weights: autoencoder\.kind=identity has none"),
        ("autoencoder.in_channels=1", r"latent_channels=3: .* autoencoder\.in_channels=1"),
    ):
        with pytest.raises(ValueError, match=words):
            load_config(["+experiment=emoji", *pixels, *wide, override])
    with pytest.raises(ValueError, match=r"autoencoder\.kind=identity has nothing to train"):
        load_config(["+experiment=emoji_autoencoder", *pixels])


def test_published_first_stages_have_the_papers_loss() -> None:
    for name, weight in (("kl_f4", 0.5), ("vq_f4", 0.75)):
        loss = load_config(["+experiment=imagenet_256", f"autoencoder={name}"]).autoencoder.loss
        assert (loss.gan_weight, loss.gan_start_step, loss.kl_weight) == (weight, 50_001, 1e-6)
        assert loss.perceptual_weight == 1.0


def test_bf16_without_zero_is_refused() -> None:
    options = ["+experiment=emoji", "train.precision=bf16", "deepspeed.stage=0"]
    with pytest.raises(ValueError, match=r"deepspeed\.stage=0 with train\.precision=bf16"):
        load_config(options)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["experiment=emoji"],
            "experiment=emoji: nothing is chosen yet, so write +experiment=emoji",
        ),
        (["+experiment=emojii"], "experiment=emojii is none of churches_256, emoji, "),
        (["+experiment=emojii"], "(did you mean emoji?)"),
        (["+experiment=laion512"], "(did you mean laion_512?)"),
        (["+experiment="], "experiment= is none of churches_256, "),
    ],
)
def test_a_wrong_choice_of_an_experiment_gets_a_hint(words: list[str], line: str) -> None:
    with pytest.raises(HydraException) as caught:
        load_config(words)
    assert line in explain(caught.value)


def test_no_experiment_says_so() -> None:
    with pytest.raises(ValueError, match=r"add \+experiment=NAME"):
        load_config([])


def test_the_batch_must_divide_among_the_ranks_of_a_training() -> None:
    with pytest.raises(ValueError, match="into 3 ranks"):
        load_config(["+experiment=emoji"], ranks=3)
