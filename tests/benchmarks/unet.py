"""A training step of our U-Net and of diffusers': `python -m tests.benchmarks.unet`.

The same random weights, inputs and losses; one thread, in turns. `ratio_diffusers_step` is theirs
÷ ours in least processor time, the worst of the rows; operator dispatches, bytes stored for the
backward pass (without the weights) and FLOPs are ours ÷ theirs, the worst of the rows, with SDPA as
a GPU has it. The times are those of what a run on the CPU chooses: SDPA with narrow heads padded.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from models.config import UNetConfig
from models.layers.attention import padded_sdpa_attention, sdpa_attention
from models.layers.blocks import use_attention
from models.unet import UNet2DCondition
from tests.benchmarks.turns import least_seconds
from tests.support.oracles import diffusers_condition, diffusers_unconditional, load_both_ways

ROUNDS = 6
BATCH, SIDE, TOKENS = 4, 32, 77
GEMM_SIDE = 2048
SHOWN_OPERATORS = 6
ROWS = {
    "SD 1 x 0.1": UNetConfig(block_out_channels=[32, 64, 128, 128], context_dim=80),
    "SD 1 x 0.25": UNetConfig(
        block_out_channels=[80, 160, 320, 320], context_dim=192, norm_groups=16
    ),
    "unconditional LDM-4 x 1/7": UNetConfig(
        in_channels=3,
        out_channels=3,
        block_out_channels=[32, 64, 96, 128],
        attention=[False, True, True, True],
        heads=[1, 2, 3, 4],
        context_dim=0,
    ),
}


class Steps(NamedTuple):
    """One network with the forward and backward pass of one training step."""

    network: nn.Module
    forward: Callable[[], Tensor]

    def __call__(self) -> None:
        """The gradients of a squared error."""
        self.network.zero_grad()
        self.forward().square().mean().backward()


class Cost(NamedTuple):
    """What a training step takes, on any device."""

    ops: int
    saved_bytes: int
    flops: int


def main() -> None:
    """A few lines a row, then the JSON."""
    torch.set_num_threads(1)
    costs: list[list[float]] = []
    speeds, gflops = {}, {}
    for name, config in ROWS.items():
        ours, theirs = pair(config)
        use_attention(ours.network, sdpa_attention)
        cost, their_cost = cost_of(ours), cost_of(theirs)
        costs.append([mine / other for mine, other in zip(cost, their_cost, strict=True)])
        use_attention(ours.network, padded_sdpa_attention)
        step_s, their_step_s = least_seconds(ours, theirs, rounds=ROUNDS)
        speeds[name] = their_step_s / step_s
        gflops[name] = cost.flops / step_s / 1e9
        print(
            f"{name}, {BATCH} x {SIDE}x{SIDE}: step {step_s:.3f} s, theirs {their_step_s:.3f} "
            f"({speeds[name]:.3f}x), {gflops[name]:.1f} GFLOP/s\n"
            f"  operators {cost.ops}, theirs {their_cost.ops} ({costs[-1][0]:.3f}x); saved MiB "
            f"{cost.saved_bytes / 2**20:.0f}, theirs {their_cost.saved_bytes / 2**20:.0f} "
            f"({costs[-1][1]:.3f}x); FLOPs {costs[-1][2]:.3f}x\n"
            f"  time: {', '.join(dominant(ours))}",
            flush=True,
        )
    ops, saved_bytes, flops = (max(column) for column in zip(*costs, strict=True))
    figures = {
        "ratio_diffusers_step": min(speeds.values()),
        "ratio_diffusers_step_quarter_width": speeds["SD 1 x 0.25"],
        "ratio_diffusers_ops": ops,
        "ratio_diffusers_saved_bytes": saved_bytes,
        "ratio_diffusers_flops": flops,
        "gflops": gflops["SD 1 x 0.25"],
        "gemm_gflops": gemm_gflops(),
    }
    print(json.dumps({name: float(f"{value:.3g}") for name, value in figures.items()}))


def pair(config: UNetConfig) -> tuple[Steps, Steps]:
    """Ours and theirs, with the same weights and inputs."""
    torch.manual_seed(0)
    ours = UNet2DCondition(config)
    latents = torch.randn(BATCH, config.in_channels, SIDE, SIDE)
    timesteps = torch.linspace(1, 999, BATCH).long()
    if config.context_dim:
        theirs = diffusers_condition(config)
        inputs = (latents, timesteps, torch.randn(BATCH, TOKENS, config.context_dim))
    else:
        theirs = diffusers_unconditional(config, config.block_out_channels[0])
        inputs = (latents, timesteps)
    load_both_ways(ours, theirs)
    return (
        Steps(ours, lambda: ours(*inputs)),
        Steps(theirs.train(), lambda: theirs(*inputs).sample),
    )


def cost_of(step: Steps) -> Cost:
    """Counted over one step."""
    weights = {weight.untyped_storage().data_ptr() for weight in step.network.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = step.forward()
    saved_bytes = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    del output
    with Dispatches() as dispatches:
        step()
    with FlopCounterMode(display=False) as counter:
        step()
    return Cost(dispatches.count, saved_bytes, counter.get_total_flops())


class Dispatches(TorchDispatchMode):
    """Counts the operators that reach a device, views among them."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def dominant(step: Steps) -> list[str]:
    """The operators that take the most time, with their shares."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    return [
        f"{row.key.removeprefix('aten::').strip('_')} {row.self_cpu_time_total / total:.0%}"
        for row in rows[:SHOWN_OPERATORS]
    ]


def gemm_gflops() -> float:
    """What a matrix product alone gets."""
    left, right = torch.randn(2, GEMM_SIDE, GEMM_SIDE)
    (spent_s,) = least_seconds(lambda: left @ right, rounds=ROUNDS)
    return 2 * GEMM_SIDE**3 / spent_s / 1e9


if __name__ == "__main__":
    main()
