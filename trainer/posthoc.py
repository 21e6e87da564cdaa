"""An average of any width, made after the training (Karras et al. 2024, section 3.2)."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from trainer.averages import PowerFunction, Profile, average_kind, combination, relative_error
from trainer.checkpoint import FOLDERS, Checkpoint, open_checkpoint
from trainer.checkpoint_writer import CheckpointWriter
from trainer.config import Config
from trainer.distributed import ALONE
from trainer.retention import EVERYTHING
from trainer.snapshots import snapshot_folder

PREFIX = "sigma_rel_"


def reconstruct(config: Config) -> None:
    """Write the average of width ema.reconstruct.sigma_rel at the run's newest snapshot.

    It is a checkpoint of this one average, for checkpoint.load of evaluate, sample and export.
    Raises: FileNotFoundError naming ema.snapshot_every where the run has no snapshots.
    """
    snapshots = list(_snapshots(config))
    if not snapshots:
        raise FileNotFoundError(
            f"no snapshots in {snapshot_folder(config)}: train with ema.sigma_rels=[0.05,0.1] and "
            f"ema.snapshot_every={max(1, config.train.max_steps // 32)}"
        )
    last = snapshots[-1]
    sources = [
        (snapshot, name, Profile(snapshot.state["updates"], float(name.removeprefix(PREFIX))))
        for snapshot in snapshots
        for name in snapshot.state["averages"]
    ]
    profiles = [profile for *_, profile in sources]
    average = PowerFunction(config.ema.reconstruct.sigma_rel)
    wanted = Profile(last.state["updates"], average.sigma_rel)
    factors = combination(profiles, wanted).tolist()
    kind = average_kind(average.name)

    with ExitStack() as stack:
        readers = {snapshot.path: stack.enter_context(snapshot.reading()) for snapshot in snapshots}
        parameters = last.shapes(average_kind(last.state["averages"][0]))

        def tensors() -> Iterator[tuple[str, str, Tensor]]:
            for parameter in tqdm(parameters, average.name, unit="tensor", disable=None):
                total = torch.zeros(parameters[parameter], dtype=torch.float64)
                for factor, (snapshot, name, _) in zip(factors, sources, strict=True):
                    stored = readers[snapshot.path](average_kind(name), parameter)
                    total.add_(stored.double(), alpha=factor)
                yield kind, parameter, total.float()

        writer = CheckpointWriter(
            Path(config.ema.reconstruct.out) / average.name, ALONE, EVERYTHING, last.step
        )
        num_bytes = 4 * sum(shape.numel() for shape in parameters.values())
        kept = last.tensors("buffer")["buffer"]
        buffers = {f"buffer/{name}": value for name, value in kept.items()}
        about = last.state | {"averages": [average.name]}
        writer.save(last.step, tensors(), num_bytes, buffers, about)
        writer.finish()
    print(
        f"{average.name} after step {last.step}, of {len(snapshots)} snapshots; its profile is "
        f"within {relative_error(profiles, wanted):.2%} of the true one\n"
        f"use it with checkpoint.load={writer.path(last.step)}"
    )


def _snapshots(config: Config) -> Iterator[Checkpoint]:
    """The undamaged ones, oldest first; a damaged one is named and done without."""
    for path in sorted(snapshot_folder(config).glob(FOLDERS)):
        try:
            yield open_checkpoint(path)
        except ValueError as error:
            print(f"warning: {error}; going on without it", file=sys.stderr, flush=True)
