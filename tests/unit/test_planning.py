"""docs/planning.md: its tables are those of the code, its constants fitted to published rows."""

import pytest

from docs.compare_published import (
    BEGIN,
    END,
    PAGE,
    Network,
    fit,
    fit_launches,
    ratios,
    read_rows,
    section,
    trace_networks,
)
from trainer.config.gpus import gpu_table


@pytest.fixture(scope="module")
def networks() -> dict[int, Network]:
    return trace_networks()


def test_the_tables_are_those_of_the_plan(networks: dict[int, Network]) -> None:
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    assert rest.partition(END)[0] == section(networks)


def test_the_constants_of_cards_are_fitted_to_the_published_rows(
    networks: dict[int, Network],
) -> None:
    rows, table = read_rows("groups"), gpu_table()
    for (kind, software), mfu in fit(rows, networks).items():
        for card, rates in table["cards"].items():
            if card.startswith(f"{kind}_"):
                assert rates["mfu"][software] == round(mfu, 2), (card, software)
    for software, time_us in fit_launches(rows, networks).items():
        assert table["launch_us"][software] == round(time_us)


def test_predictions_are_near_the_published_rows(networks: dict[int, Network]) -> None:
    held = [ratio for ratio in ratios(read_rows("groups"), networks) if ratio is not None]
    errors = sorted(abs(ratio - 1) for ratio in held)
    assert len(errors) >= 60
    assert errors[len(errors) // 2] <= 0.15
    assert errors[-1] <= 0.35
