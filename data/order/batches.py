"""Divide a global batch among ranks, micro batches and lanes."""

from dataclasses import dataclass


def batch_problems(
    global_batch: int, *, ranks: int = 1, micro_batch: int = 1, lanes: int = 1
) -> list[str]:
    """Return one line for each batch size that does not divide: the option, the cause and the fix.

    global_batch: samples of an optimizer step; micro_batch: samples of a rank's forward pass.
    The global batch must be a multiple of micro_batch x ranks, and of lanes.
    """
    if min(global_batch, micro_batch, lanes) < 1:
        return ["train.global_batch_size, train.micro_batch_size and data.lanes must be positive"]
    problems: list[str] = []
    own = global_batch // ranks
    if global_batch % ranks:
        problems.append(
            f"train.global_batch_size={global_batch} does not divide into {ranks} ranks: "
            f"set it to a multiple, such as {(own + 1) * ranks}"
        )
    elif own % micro_batch:
        fitting = next(size for size in range(min(own, micro_batch), 0, -1) if own % size == 0)
        problems.append(
            f"train.global_batch_size={global_batch} does not divide into "
            f"train.micro_batch_size={micro_batch} x {ranks} rank{'s' * (ranks > 1)}: "
            f"set train.micro_batch_size={fitting}"
        )
    if global_batch % lanes:
        problems.append(
            f"data.lanes={lanes} does not divide train.global_batch_size={global_batch}"
        )
    return problems


def check_batch(global_batch: int, *, ranks: int = 1, micro_batch: int = 1, lanes: int = 1) -> None:
    """Check that the batch sizes divide.

    Raises: ValueError with all lines of `batch_problems`.
    """
    problems = batch_problems(global_batch, ranks=ranks, micro_batch=micro_batch, lanes=lanes)
    if problems:
        raise ValueError("; ".join(problems))


def grad_accum_steps(global_batch: int, *, ranks: int, micro_batch: int) -> int:
    """Return the number of micro batches of an optimizer step on one rank."""
    return global_batch // (ranks * micro_batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The part of every global batch that one rank trains.

    Raises: ValueError where the batch sizes do not divide.
    """

    seed: int
    """Seed of the run."""
    rank: int = 0
    world: int = 1
    """Number of ranks that share the global batch."""
    global_batch: int
    """Samples of an optimizer step, over all ranks."""
    micro_batch: int
    """Samples of one forward and backward pass of a rank."""

    def __post_init__(self) -> None:
        check_batch(self.global_batch, ranks=self.world, micro_batch=self.micro_batch)

    @property
    def samples(self) -> int:
        """Samples of an optimizer step on this rank."""
        return self.global_batch // self.world

    @property
    def grad_accum_steps(self) -> int:
        """Micro batches of an optimizer step on this rank."""
        return grad_accum_steps(self.global_batch, ranks=self.world, micro_batch=self.micro_batch)
