"""Stable Diffusion 2's U-Net at full size with the weights of diffusers', against it."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from models.layers.attention import sdpa_attention
from models.layers.blocks import use_attention
from models.unet import UNet2DCondition
from tests.benchmarks.full_size import results
from tests.benchmarks.gpu.setting import Setting

TOKENS = 77
Results = Mapping[str, Tensor]


def measure(setting: Setting) -> None:
    """Note the largest errors, relative to the largest value of a tensor."""
    from tests.support.oracles import diffusers_condition, load_both_ways

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    config = setting.unet()
    torch.manual_seed(0)
    side = 8 if setting.small else 32
    theirs, ours = diffusers_condition(config), UNet2DCondition(config)
    load_both_ways(ours, theirs)
    use_attention(ours, sdpa_attention)
    inputs = torch.randn(1, 4, side, side), torch.randn(1, TOKENS, config.context_dim)
    timesteps = torch.tensor([500], device=setting.device)
    calls: dict[str, tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]] = {
        "ours": (ours, lambda x, c: ours(x, timesteps, c)),
        "theirs": (theirs, lambda x, c: theirs(x, timesteps, c).sample),
    }
    found = {name: run(*call, inputs, torch.float32, setting) for name, call in calls.items()}
    exact = found["theirs"]
    output, gradients = errors(found["ours"], exact)
    setting.note("fp32_output_error", output)
    setting.note("fp32_gradient_error", gradients)
    setting.note("gradients", len(exact) - 1)
    in_bf16 = {name: run(*call, inputs, torch.bfloat16, setting) for name, call in calls.items()}
    distances = {name: errors(one, exact) for name, one in in_bf16.items()}
    for name, (output, gradients) in distances.items():
        setting.note(f"bf16_output_error_{name}", output)
        setting.note(f"bf16_gradient_error_{name}", gradients)
    setting.note("bf16_output_ratio", distances["ours"][0] / distances["theirs"][0])


def run(
    network: nn.Module,
    call: Callable[[Tensor, Tensor], Tensor],
    inputs: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    setting: Setting,
) -> Results:
    """Output and gradients in a precision, on the CPU; the network leaves the device again."""
    network.to(setting.device, dtype).zero_grad()
    found = results(network, call, *(each.to(setting.device, dtype) for each in inputs))
    found = {name: each.detach().cpu().float() for name, each in found.items()}
    network.zero_grad()
    network.cpu()
    return found


def errors(found: Results, exact: Results) -> tuple[float, float]:
    """Of the output, and the worst of the gradients."""
    largest = max(each.abs().max() for name, each in exact.items() if name != "output")

    def error(name: str) -> float:
        least = 0.0 if name == "output" else 0.02 * float(largest)
        scale = exact[name].abs().max().clamp(min=least)
        return float((found[name] - exact[name]).abs().max() / scale)

    return error("output"), max(error(name) for name in exact.keys() - {"output"})
