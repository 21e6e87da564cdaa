"""Secrets in options, from pictures to the report: they are in no file and in no output."""

import shutil
from pathlib import Path

import pytest

from tests.support.processes import Ended, run_command
from tests.support.workshop import Workshop

CANARY = "S3cretCanary"
TOKEN = f"hf_{CANARY}abcdefghijkl"


@pytest.fixture
def home(tmp_path: Path, workshop: Workshop) -> Path:
    """A folder with a secret in its name, with pictures and a first stage."""
    home = tmp_path / f"{CANARY}home"
    shutil.copytree(workshop.folder / "pictures", home / "pictures")
    shutil.copy(workshop.folder / "first_stage_4.safetensors", home / "stage.safetensors")
    return home


def run(module: str, home: Path, *words: str) -> Ended:
    """Run a command whose options are in its environment."""
    prompt = f"a cat, {CANARY}prompt"
    return run_command(
        module,
        *words,
        LF_HOME=str(home),
        LF_NAME=f"{CANARY}name",
        LF_PROJECT="an-address",  # W&B has to know it
        LF_PROMPT=prompt,
    )


def options(workshop: Workshop) -> list[str]:
    """Every option of a small run that takes text, from the environment or as a token."""
    places = ("data.latents=", "run.dir=", "data.dir=", "data.source.path=", "autoencoder.weights=")
    base = [word for word in workshop.overrides("emoji") if not word.startswith(places)]
    more = [
        "data.dir=${oc.env:LF_HOME}/data",
        "data.source.path=${oc.env:LF_HOME}/pictures",
        "data.latents=${oc.env:LF_HOME}/data/latents",
        "data.cache.dir=${oc.env:LF_HOME}/cache",
        "autoencoder.weights=${oc.env:LF_HOME}/stage.safetensors",
        "run.dir=${oc.env:LF_HOME}/run",
        "run.name=${oc.env:LF_NAME}",
        "logger.wandb.mode=offline",
        "logger.wandb.project=${oc.env:LF_PROJECT}",
        "eval.prompts=['${oc.env:LF_PROMPT}','https://bob:" + CANARY + "@host/x']",
        "sample.prompts=['${oc.env:LF_PROMPT}','?sig=" + CANARY + "']",
        f"logger.wandb.entity={TOKEN}",
        f"sample.negative_prompt={TOKEN}",
        "data.filters=[{name:kind,allowed:['${oc.env:LF_PROMPT}'],missing:keep}]",
        "train.max_steps=2",
        "plan.gpus_per_node=1",
    ]
    return base + more


def content(path: Path, home: Path) -> bytes:
    """The bytes of a file; those of W&B without the name of the folder that it lies in."""
    found = path.read_bytes()
    is_of_wandb = "wandb" in path.relative_to(home).parts
    return found.replace(str(home).encode(), b"") if is_of_wandb else found


def test_no_command_writes_or_prints_a_secret(workshop: Workshop, home: Path) -> None:
    words = options(workshop)
    said = ""
    for command in ("pack", "precompute", "", "sample", "export", "plan"):
        done = run(f"trainer.{command}".rstrip("."), home, *words)
        assert done.code == 0, done.err
        said += done.said
    # it has no options, and prints the path that was typed
    assert run_command("trainer.report", home / "run").code == 0
    done = run("trainer.sample", home, *words, "checkpoint.load=${oc.env:LF_HOME}/none")
    assert done.code == 1
    said += done.said
    assert "${oc.env:LF_HOME}/none" in done.err
    assert CANARY not in said
    files = [
        path for path in home.rglob("*") if path.is_file() and path.name != "stage.safetensors"
    ]
    assert {path.name for path in files} >= {"config.yaml", "report.html", "README.md", "00000.png"}
    assert [path for path in files if path.suffix == ".wandb"]
    with_secret = [path for path in files if CANARY.encode() in content(path, home)]
    assert with_secret == []
    assert "${oc.env:LF_HOME}/data" in (home / "run" / "config.yaml").read_text()


def test_shards_are_found_by_the_variable_that_named_them(workshop: Workshop, home: Path) -> None:
    """The manifest of tars elsewhere names their folder; only this process's config restores it."""
    words = options(workshop)
    assert run("trainer.pack", home, *words).code == 0
    tars = home / "tars"
    (home / "data" / "train").rename(tars)
    index = ["data.source.kind=webdataset", "data.source.path=${oc.env:LF_HOME}/tars"]
    index += ["data.source.val_share=0", "data.dir=${oc.env:LF_HOME}/indexed", "data.filters=[]"]
    assert run("trainer.pack", home, *words, *index).code == 0
    manifest = home / "indexed" / "train" / "manifest.json"
    assert '"base": "${oc.env:LF_HOME}/tars"' in manifest.read_text()
    assert run("trainer.pack", home, *words, *index, "verify=true").code == 0
    elsewhere = [*index[:1], *index[2:-2], f"data.dir={home / 'indexed'}", "data.filters=[]"]
    plain = [word.replace("${oc.env:LF_HOME}", str(home)) for word in words]
    done = run("trainer.pack", home, *plain, *elsewhere, "verify=true")
    assert done.code == 1
    assert "set data.source.path as it was packed" in done.said
