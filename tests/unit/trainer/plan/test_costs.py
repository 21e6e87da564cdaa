"""Times of a step, against sums done by hand."""

from dataclasses import replace

import pytest

from tests.support.plans import small
from trainer.plan.costs import (
    Work,
    optimizer_s,
    ring_bytes,
    step_time,
)
from trainer.plan.forecast import make_forecast, trace_step
from trainer.plan.machine import machine_of


def work(stage: int, *, times: int = 1, overlaps: bool = False, weight_bytes: int = 2) -> Work:
    """The work of 10^9 parameters in `times` micro batches, without launches."""
    return Work(
        stage=stage,
        flops=1e15,
        operators=0,
        optimizer_operators=0,
        parameters=10**9,
        weight_bytes=weight_bytes,
        grad_accum_steps=times,
        averages=1,
        read_bytes=0,
        overlaps=overlaps,
    )


def test_collectives_move_what_rings_do() -> None:
    config = small("emoji", "plan.nodes=4", "plan.gpus_per_node=1", "plan.network_gbit_per_s=80")
    # four ranks all-reduce 10 GB over 10 GB/s, of which collectives reach 0.8: 2 x 3/4 x 10 GB
    assert machine_of(config).ring_s(2 * 10e9) == pytest.approx(1.5 / 0.8)
    assert [ring_bytes(stage, work(stage, times=3)) for stage in (1, 2, 3)] == [6e9, 14e9, 18e9]
    alone = replace(config, plan=replace(config.plan, nodes=1))
    assert machine_of(alone).ring_s(1e9) == 0


def test_the_optimizer_moves_ninety_bytes_for_a_parameter_as_deepspeed_does_it() -> None:
    machine = machine_of(small("emoji"))
    whole = optimizer_s(machine, work(1)) * machine.gpu.memory_gb_per_s
    assert whole == pytest.approx(90)  # GB, for 10^9 parameters
    # fp32 without DeepSpeed's partitions: AdamW reads 16 bytes and writes 12, the average 12
    plain = optimizer_s(machine, work(0, weight_bytes=4)) * machine.gpu.memory_gb_per_s
    assert plain == pytest.approx(40)


def test_launches_floor_the_time_of_small_micro_batches() -> None:
    config = small("emoji")
    machine = machine_of(config)
    many = replace(work(1, times=3), operators=1000)
    time = step_time(machine, many, store_gib_per_s=1)
    assert time.launch_s == pytest.approx(3 * 1000 * machine.launch_s)
    none = step_time(machine, work(1, times=3), store_gib_per_s=1)
    assert time.total_s - none.total_s == pytest.approx(time.launch_s)


def test_cards_and_software_have_their_own_rates() -> None:
    config = small("emoji", "plan.gpu=h100_80gb", "train.precision=bf16", "deepspeed.stage=1")
    eager = machine_of(config)
    compiled = machine_of(replace(config, train=replace(config.train, compile=True)))
    assert eager.mfu < compiled.mfu
    assert eager.launch_s > compiled.launch_s
    chosen = machine_of(replace(config, plan=replace(config.plan, mfu=0.5, gpus_per_node=8)))
    assert chosen.mfu == 0.5
    # a DGX H100 has eight ports of 400 Gbit/s
    assert chosen.network_gbit_per_s == 3200


def test_offloading_moves_the_optimizer_to_the_host() -> None:
    config = small("emoji", "deepspeed.stage=2")
    traced = trace_step(config)
    kept = make_forecast(config, traced)
    away = replace(config, deepspeed=replace(config.deepspeed, offload_optimizer=True))
    offloaded = make_forecast(away, traced)
    moved = kept.memory.optimizer + kept.memory.ema
    assert offloaded.memory.peak == kept.memory.peak - moved
    # master weights, two moments, one average and the gradient
    assert offloaded.memory.host == 4 * traced.sizes.total * 5
    assert offloaded.time.optimizer_s > kept.time.optimizer_s


@pytest.mark.parametrize(
    ("stage", "reduced_gb", "passes"),
    # stages 0 and 1 reduce once, in the last backward pass; 2 in each; 3 beside all passes
    [(0, 4, 2 / 3 / 3), (1, 4, 2 / 3 / 3), (2, 12, 2 / 3), (3, 18, 1)],
)
@pytest.mark.parametrize("gbit_per_s", [8.0, 8e5])
def test_communication_hides_behind_the_passes_it_runs_beside(
    stage: int, reduced_gb: float, passes: float, gbit_per_s: float
) -> None:
    config = small("emoji", "plan.nodes=2", f"plan.network_gbit_per_s={gbit_per_s}")
    machine = machine_of(config)
    time = step_time(machine, work(stage, times=3, overlaps=True), store_gib_per_s=1)
    reduced_s = machine.ring_s(reduced_gb * 1e9)
    assert time.hidden_s == pytest.approx(min(reduced_s, passes * time.compute_s))
    shown = time.communication_s - time.hidden_s
    assert time.total_s == pytest.approx(time.compute_s + shown + time.optimizer_s)
    apart = step_time(machine, work(stage, times=3), store_gib_per_s=1)
    assert apart.hidden_s == 0
