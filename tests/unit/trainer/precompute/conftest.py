"""A finished set of latents, and a job of one test that starts from its images."""

import shutil
from pathlib import Path

import pytest

from tests.support.latent_jobs import (
    make_job,
)
from trainer.precompute.job import precompute


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that one task has done in one go."""
    folder = tmp_path_factory.mktemp("job")
    precompute(make_job(folder))
    return folder


@pytest.fixture
def job(finished: Path, tmp_path: Path) -> Path:
    """The folder of the same job, with nothing done."""
    shutil.copytree(finished, tmp_path / "job", ignore=shutil.ignore_patterns("latents"))
    return tmp_path / "job"
