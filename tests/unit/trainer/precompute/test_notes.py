"""Remarks on samples that were taken all the same reach the manifests of images and of latents."""

import json
from pathlib import Path

import pytest

from data.shards.codecs import CUT_OFF
from data.shards.colours import BROKEN_PROFILE
from data.shards.manifest import Manifest
from tests.support.latent_jobs import job_config, write_first_stage
from tests.support.pictures import BROKEN, encoded, scene
from trainer.cli import load_config
from trainer.pack.job import pack
from trainer.precompute.job import precompute


def test_broken_profiles_and_cut_off_jpegs_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "pictures"
    source.mkdir()
    large = scene().resize((300, 300))
    whole = encoded(large, "JPEG")
    pictures = {
        "sound": whole,
        "cut": whole[: len(whole) // 2],
        "profile": encoded(large, "JPEG", icc_profile=BROKEN),
    }
    for name, payload in pictures.items():
        (source / f"{name}.jpg").write_bytes(payload)
        (source / f"{name}.txt").write_text(name)
    options = [
        "data.source.kind=folder",
        f"data.source.path={source}",
        "data.source.val_share=0",
        "data.pixels.truncated=fill",
    ]
    config = job_config(tmp_path, *options)
    write_first_stage(Path(config.autoencoder.weights), config)
    pack(config)
    precompute(config)
    for folder in (config.data.train, config.data.latents):
        manifest = Manifest.load(folder, option="x")
        assert (manifest.samples, manifest.noted) == (3, {CUT_OFF: 1, BROKEN_PROFILE: 1})
    assert capsys.readouterr().out.count(f"  noted 1: {CUT_OFF}") == 2
    document = json.loads((Path(config.data.train) / "manifest.json").read_text())
    del document["noted"]  # as 0.1.0 wrote it
    (Path(config.data.train) / "manifest.json").write_text(json.dumps(document))
    assert Manifest.load(config.data.train, option="x").noted == {}
    assert load_config(["+experiment=emoji"]).data.pixels.truncated == "reject"
