"""Compute an average of any width after the training (Karras et al. 2024, section 3.2)."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.storage.lease import NAME, take
from trainer.checkpoints.identity import check_draw
from trainer.checkpoints.reader import Checkpoint, average_kind, open_checkpoint
from trainer.checkpoints.retention import EVERYTHING
from trainer.checkpoints.writer import CheckpointWriter
from trainer.config import Config
from trainer.engine.averages import Profile, combination, power_function, relative_error
from trainer.runs.paths import SNAPSHOTS, checkpoints_in
from trainer.runtime.ranks import ALONE

PREFIX = "sigma_rel_"


def reconstruct(config: Config) -> None:
    """Write the average of width ema.reconstruct.sigma_rel at the run's newest snapshot.

    The result is a checkpoint with this average alone; evaluate, sample and export load it by
    checkpoint.load.
    Raises: FileNotFoundError that names ema.snapshot_every, if the run has no snapshots; ValueError
    if they are of another model than the config's.
    """
    snapshots = list(_snapshots(config))
    if not snapshots:
        raise FileNotFoundError(
            f"no snapshots in {Path(config.run.dir) / SNAPSHOTS}: train with "
            f"ema.sigma_rels=[0.05,0.1] ema.snapshot_every={max(1, config.train.max_steps // 32)}"
        )
    _check(config, snapshots)
    last = snapshots[-1]
    sources = [(snapshot, name) for snapshot in snapshots for name in snapshot.state.averages]
    profiles = [_profile(snapshot, name) for snapshot, name in sources]
    average = power_function(config.ema.reconstruct.sigma_rel)
    wanted = Profile(last.snapshot.updates, config.ema.reconstruct.sigma_rel)
    factors = combination(profiles, wanted).tolist()
    kind = average_kind(average.name)

    with ExitStack() as stack:
        readers = {snapshot.path: stack.enter_context(snapshot.reading()) for snapshot in snapshots}
        parameters = last.shapes(average_kind(last.state.averages[0]))

        def tensors() -> Iterator[tuple[str, str, Tensor]]:
            for parameter in tqdm(parameters, average.name, unit="tensor", disable=None):
                total = torch.zeros(parameters[parameter], dtype=torch.float64)
                for factor, (snapshot, name) in zip(factors, sources, strict=True):
                    stored = readers[snapshot.path](average_kind(name), parameter)
                    total.add_(stored.double(), alpha=factor)
                yield kind, parameter, total.float()

        folder = Path(config.ema.reconstruct.out) / average.name
        stack.enter_context(take(folder / NAME, "choose another ema.reconstruct.out"))
        writer = CheckpointWriter(folder, ALONE, EVERYTHING, last.step)
        num_bytes = 4 * sum(shape.numel() for shape in parameters.values())
        kept = last.tensors("buffer")["buffer"]
        buffers = {f"buffer/{name}": value for name, value in kept.items()}
        state = replace(last.snapshot, averages=[average.name])
        writer.save(last.step, tensors(), num_bytes, buffers, state)
        writer.finish()
    print(
        f"{average.name} after step {last.step}, of {len(snapshots)} snapshots; its profile is "
        f"within {relative_error(profiles, wanted):.2%} of the exact one\n"
        f"use it with checkpoint.load={writer.path(last.step)}"
    )


def _profile(snapshot: Checkpoint, average: str) -> Profile:
    """The weights of past steps in an average, of which `average` names the width."""
    return Profile(snapshot.snapshot.updates, float(average.removeprefix(PREFIX)))


def _check(config: Config, snapshots: Sequence[Checkpoint]) -> None:
    """Check that all snapshots are of the config's model, and have tensors of the same shapes.

    Raises: ValueError naming the snapshot that is of another model.
    """
    last = snapshots[-1]
    wanted = last.shapes(average_kind(last.state.averages[0]))
    for snapshot in snapshots:
        told = check_draw(config, snapshot.state.config, snapshot.path, "run.dir")
        if told and snapshot is last:
            print(f"warning: {told}", file=sys.stderr, flush=True)
        for name in snapshot.state.averages:
            if snapshot.shapes(average_kind(name)) != wanted:
                raise ValueError(
                    f"run.dir: the tensors of {name} in {snapshot.path} are not those of "
                    f"{last.path}: remove the one of another network"
                )


def _snapshots(config: Config) -> Iterator[Checkpoint]:
    """Yield the snapshots, oldest first; print the names of damaged ones and skip them."""
    for path in checkpoints_in(Path(config.run.dir) / SNAPSHOTS).values():
        try:
            yield open_checkpoint(path)
        except ValueError as error:
            print(f"warning: {error}; going on without it", file=sys.stderr, flush=True)
