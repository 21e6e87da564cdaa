"""Speed and memory of a training step of Stable Diffusion 2's U-Net, without the trainer."""

import importlib.util
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from models.layers.attention import sdpa_attention, xformers_attention
from models.layers.blocks import use_attention
from models.unet import UNet2DCondition
from tests.benchmarks.gpu.rows import read_notes
from tests.benchmarks.gpu.setting import Setting
from trainer.runtime.flops import FlopCounter

TOKENS, BATCH, OTHER_BATCHES = 77, 16, (4, 32, 64)


class Form(NamedTuple):
    """One way to run a step."""

    backend: str
    checkpointing: bool
    channels_last: bool
    batch: int = BATCH

    def __str__(self) -> str:
        layout = "NHWC" if self.channels_last else "NCHW"
        again = ", checkpointing" if self.checkpointing else ""
        return f"{self.backend}, {layout}, {self.batch}{again}"


def measure(setting: Setting) -> None:
    """Note every form, or which package it lacks."""
    for package in ("xformers", "diffusers"):
        if importlib.util.find_spec(package) is None:
            setting.note(package, "left out: not installed")
    for form in forms(setting):
        try:
            step, _ = our_step(setting, form)
            note_step(setting, str(form), form.batch, step)
        except torch.OutOfMemoryError:
            setting.note(f"{form}: img/s", "out of memory")
    if importlib.util.find_spec("diffusers"):
        for layout in (False, True):
            step, _ = their_step(setting, channels_last=layout)
            note_step(setting, f"diffusers, {'NHWC' if layout else 'NCHW'}", BATCH, step)
    note_ratios(setting)


def forms(setting: Setting) -> Iterator[Form]:
    """The forms to compare; on a CPU xformers has no kernels."""
    backends = ["sdpa"]
    if setting.on_gpu and importlib.util.find_spec("xformers"):
        backends.append("xformers")
    for backend, checkpointing, layout in product(backends, (False, True), (True, False)):
        yield Form(backend, checkpointing, layout)
    for batch in OTHER_BATCHES[: 1 if setting.small else None]:
        yield Form("sdpa", checkpointing=False, channels_last=True, batch=batch)


Step = Callable[[], None]


def our_step(setting: Setting, form: Form) -> tuple[Step, nn.Module]:
    config = setting.unet(checkpointing=form.checkpointing)
    with torch.device(setting.device):
        network = UNet2DCondition(config)
    use_attention(network, sdpa_attention if form.backend == "sdpa" else xformers_attention)
    return prepared(setting, network, form.batch, form.channels_last, lambda y: y), network


def their_step(setting: Setting, *, channels_last: bool) -> tuple[Step, nn.Module]:
    from tests.support.oracles import diffusers_condition

    network = diffusers_condition(setting.unet()).to(setting.device)
    return prepared(setting, network, BATCH, channels_last, lambda y: y.sample), network


def prepared(
    setting: Setting,
    network: nn.Module,
    batch: int,
    channels_last: bool,
    output: Callable[[Any], Tensor],
) -> Step:
    """Forward and backward pass of random latents, in the precision of the device."""
    side, batch = (8, 2) if setting.small else (64, batch)
    network.to(setting.dtype).train()
    made: dict[str, Any] = {"device": setting.device, "dtype": setting.dtype}
    latents = torch.randn(batch, 4, side, side, **made)
    if channels_last:
        network.to(memory_format=torch.channels_last)
        latents = latents.contiguous(memory_format=torch.channels_last)
    context = torch.randn(batch, TOKENS, setting.unet().context_dim, **made)
    timesteps = torch.randint(1000, (batch,), device=setting.device)

    def step() -> None:
        network.zero_grad()
        output(network(latents, timesteps, context)).square().mean().backward()

    return step


def note_step(setting: Setting, name: str, batch: int, step: Step) -> None:
    """Images a second, TFLOP/s, memory, kernels and the share of time in which the GPU works."""
    with FlopCounter() as counter:
        step()
    setting.begin_peak()
    (spent_s,) = setting.median_s(step)
    allocated, reserved = setting.peak_gib()
    kernels, busy_s = profiled(setting, step)
    setting.note(f"{name}: img/s", batch / spent_s)
    setting.note(f"{name}: TFLOP/s", counter.flops / spent_s / 1e12)
    setting.note(f"{name}: GiB allocated", allocated)
    setting.note(f"{name}: GiB reserved", reserved)
    setting.note(f"{name}: kernels", kernels)
    setting.note(f"{name}: busy %", 100 * busy_s / spent_s)


def profiled(setting: Setting, step: Step) -> tuple[int, float]:
    """The number of kernels of a step and their seconds; operators on a CPU."""
    kind = ProfilerActivity.CUDA if setting.on_gpu else ProfilerActivity.CPU
    with profile(activities=[kind]) as profiler:
        step()
        setting.synchronize()
    wanted = setting.device.type.upper()
    found: Any = profiler.events()  # torch declares no types for it
    events = [event for event in found or () if event.device_type.name == wanted]
    spent_us = sum(event.self_device_time_total for event in events)
    return len(events), spent_us / 1e6


def note_ratios(setting: Setting) -> None:
    """The headline: what each choice brings at the same micro batch."""
    found = read_notes(setting.notes)
    base = str(Form("sdpa", checkpointing=False, channels_last=True))
    others = {
        "nchw_ratio": str(Form("sdpa", checkpointing=False, channels_last=False)),
        "checkpointing_ratio": str(Form("sdpa", checkpointing=True, channels_last=True)),
        "xformers_ratio": str(Form("xformers", checkpointing=False, channels_last=True)),
        "diffusers_ratio": "diffusers, NHWC",
    }
    rate = found[f"{base}: img/s"]
    setting.note("img_per_s", rate)
    for name, other in others.items():
        theirs = found.get(f"{other}: img/s")
        if not isinstance(rate, str) and isinstance(theirs, float):
            setting.note(name, theirs / rate)


def measure_compiled(setting: Setting) -> None:
    """Note the same step with its blocks compiled, in turns with the eager one."""
    from torch._dynamo.utils import counters

    from trainer.engine.compilation import compile_blocks

    form = Form("sdpa", checkpointing=False, channels_last=True)
    eager, _ = our_step(setting, form)
    step, network = our_step(setting, form)
    compile_blocks(network)
    # the small form runs the same lines, but a compiler takes longer than all of its other rows
    torch.compiler.set_stance("force_eager" if setting.small else "default")
    setting.note("compile_s", setting.seconds(step))
    eager_s, compiled_s = setting.median_s(eager, step)
    setting.note("img_per_s", BATCH / compiled_s)
    setting.note("compiled_ratio", eager_s / compiled_s)
    setting.note("graph_breaks", sum(counters["graph_break"].values()))
