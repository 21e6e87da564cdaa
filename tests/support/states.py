"""Records of checkpoints, for tests that save tensors without a run."""

from dataclasses import replace

from data.order.cursor import VERSION, Cursor
from trainer.checkpoints.state import RunState

EMPTY_CURSOR = Cursor(
    version=VERSION, manifest_hash="", seed=0, lanes=1, block=1, global_batch=1, samples=0
)


def run_state(step: int, *averages: str, **changes: object) -> RunState:
    """The record of a run of one module that has done nothing but `step` steps."""
    state = RunState(
        step=step,
        averages=list(averages),
        images_seen=0,
        task={},
        config={},
        evaluated=True,
        wandb_id="",
        adam_steps={"": step},
        metrics={},
        cursor=EMPTY_CURSOR,
        finite={},
        spikes={},
        quarantine=[],
        meter={},
        world_size=1,
    )
    return replace(state, **changes)
