"""The cluster that the tests of this folder share, and a project folder on it."""

import os
from collections.abc import Iterator

import pytest

from tests.support.cluster import CannotRunSlurm, Cluster
from tests.support.project import Project, make_clone


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes. Skips where the machine cannot have them; on CI that is a failure."""
    try:
        started = Cluster(tmp_path_factory.mktemp("cluster"), nodes=4)
    except CannotRunSlurm as reason:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"no Slurm cluster here: {reason}")
    try:
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="session")
def project(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(make_clone(tmp_path_factory.mktemp("project")), cluster)
