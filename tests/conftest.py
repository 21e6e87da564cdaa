"""What every level of the tests shares."""

import gc
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.support import shared_configs
from tests.support.workshop import Workshop, draw_pictures
from trainer.config import Config
from trainer.pack.job import pack

# Examples may be slow: other programs run on the machine.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow folders first."""
    # Files are handed to the workers in this order, so short files fill the end of the run.
    slowest_first = ("tests/slurm", "tests/integration", "tests/benchmarks", "tests/unit")
    items.sort(key=lambda item: [not item.nodeid.startswith(folder) for folder in slowest_first])


def pytest_collection_finish() -> None:
    """Spare the collector of garbage what was imported: a look at it takes a third of a second."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Generator[None, object, object]:
    value = yield
    if fixturedef.scope != "function" and isinstance(value, Config):
        shared_configs.remember(value)
    return value


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Fail the test that changes a shared config, not the one that happens to run after it."""
    result = yield
    shared_configs.check_unchanged()
    return result


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    from trainer.precompute.job import precompute
    from trainer.train.loop import fit

    shop = Workshop(tmp_path_factory.mktemp("workshop"))
    draw_pictures(shop.folder / "pictures")
    pack(shop.config("emoji"))
    for latent, experiment in ((4, "emoji"), (3, "ffhq_256")):
        run = shop.folder / f"first_stage_{latent}"
        options = [f"autoencoder.latent_channels={latent}", "train.max_steps=2"]
        assert fit(shop.config("emoji_autoencoder", *options, run=run)) == 0
        (run / "autoencoder.safetensors").rename(shop.folder / f"first_stage_{latent}.safetensors")
        precompute(shop.config(experiment))
    return shop
