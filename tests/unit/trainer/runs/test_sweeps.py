"""Tables of sweeps and their Pareto front."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.runs.sweeps import TABLE, SweepTable, TradeOff, pareto_front

FIGURES = st.tuples(st.integers(0, 9), st.integers(0, 9))


@given(st.lists(FIGURES, max_size=12))
def test_the_pareto_front_is_what_nothing_beats(figures: list[tuple[int, int]]) -> None:
    trade_offs = [TradeOff(name=str(n), distance=d, score=s) for n, (d, s) in enumerate(figures)]

    def beaten(trade_off: TradeOff) -> bool:
        return any(
            other.distance <= trade_off.distance
            and other.score >= trade_off.score
            and (other.distance, other.score) != (trade_off.distance, trade_off.score)
            for other in trade_offs
        )

    front = pareto_front(trade_offs)
    best = {
        (trade_off.distance, trade_off.score) for trade_off in trade_offs if not beaten(trade_off)
    }
    assert {(trade_off.distance, trade_off.score) for trade_off in front} == best
    assert len(front) == len(best)


CELLS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@settings(deadline=None)  # files are synced to a disk that other programs use, too
@given(
    st.lists(
        st.tuples(
            st.fixed_dictionaries({"sampler": CELLS, "sampler.steps": CELLS}),
            st.dictionaries(st.sampled_from(["fd_x", "clip_score"]), st.floats(-1e9, 1e9)),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_a_sweep_table_is_read_as_it_was_written(
    rows: list[tuple[dict[str, str], dict[str, Any]]],
) -> None:
    table = SweepTable(rows)
    with TemporaryDirectory() as folder:
        table.save(Path(folder) / TABLE)
        again = SweepTable.load(Path(folder) / TABLE)
    assert again.options == table.options
    assert again.shown() == table.shown()
    lines = table.markdown().splitlines()
    assert len({line.count("|") - line.count(r"\|") for line in lines}) == 1
