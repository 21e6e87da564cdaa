"""What tests on a GPU share. They run without the conftest above, which needs every dependency."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def device() -> torch.device:
    """The GPU; a machine without one skips all tests of this folder, and counts them."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", 0)
