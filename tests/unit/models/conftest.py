import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out, not skip, what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    out = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]
