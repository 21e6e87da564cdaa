"""The lines about a data set on the screen."""

from pathlib import Path

import pytest

from data.shards.manifest import FilterCount, Kind, Manifest
from trainer.pack.summary import print_summary


@pytest.mark.parametrize(
    ("kept", "dropped", "warning"),
    [(0, 3, "drops everything"), (3, 0, "drops nothing"), (0, 0, "drops nothing"), (1, 2, "")],
)
def test_an_idle_filter_is_told(
    capsys: pytest.CaptureFixture[str], kept: int, dropped: int, warning: str
) -> None:
    rules = [FilterCount(rule="width >= 9", kept=kept, dropped=dropped)]
    print_summary("data.val", Path("val"), Manifest(kind=Kind.images, shards=[], filters=rules))
    told = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    words = [f"  warning: filter width >= 9 {warning}: are its name and bounds right?"]
    assert told == (words if warning else [])
