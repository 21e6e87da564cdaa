"""Stable Diffusion 1's U-Net at full size, ours against diffusers': is it the same function?

`python -m tests.benchmarks.full_size`: the same random weights in fp32, a batch of one, the output
and the gradients of all 686 weights and of both inputs. One network at a time, 10 GiB in all: the
other's results wait in a file. An error is the largest difference in a tensor ÷ the largest value
there; for gradients not less than 0.02 of the largest of all, as in the tests, for sums of many
large terms that cancel are not exact to their own size.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.layers.attention import sdpa_for
from models.layers.blocks import use_attention
from models.unet import UNet2DCondition
from tests.support.oracles import diffusers_condition
from tests.support.unet_files import described_unet

SIDE, TOKENS = 32, 77


def main() -> None:
    """One line of JSON."""
    config = described_unet("sd1")
    torch.manual_seed(0)
    inputs = torch.randn(1, 4, SIDE, SIDE), torch.randn(1, TOKENS, config.context_dim)
    timesteps = torch.tensor([500])
    theirs = diffusers_condition(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:  # norms, too, which begin as ones and zeros
                parameter += 0.1 * torch.randn(parameter.shape)
    with torch.device("meta"):
        ours = UNet2DCondition(config)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    use_attention(ours, sdpa_for(torch.device("cpu")))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "theirs.safetensors"
        save_file(results(theirs, lambda x, c: theirs(x, timesteps, c).sample, *inputs), path)
        theirs.zero_grad()
        print(json.dumps(compare(results(ours, lambda x, c: ours(x, timesteps, c), *inputs), path)))


def results(
    network: nn.Module, run: Callable[[Tensor, Tensor], Tensor], *inputs: Tensor
) -> dict[str, Tensor]:
    """Output, and gradients of weights and inputs, by name."""
    latents, context = (x.clone().requires_grad_() for x in inputs)
    output = run(latents, context)
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    (output * probe).sum().backward()
    leaves = {
        "input latents": latents,
        "input context": context,
        **dict(network.named_parameters()),
    }
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert len(gradients) == len(leaves)
    return {"output": output.detach()} | gradients


def compare(ours: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """The largest errors."""
    errors = {}
    with safe_open(path, "pt") as theirs:
        assert set(theirs.keys()) == ours.keys()
        largest = max(theirs.get_tensor(name).abs().max() for name in ours.keys() - {"output"})
        for name, found in ours.items():
            expected = theirs.get_tensor(name)
            least = 0.0 if name == "output" else 0.02 * largest
            scale = expected.abs().max().clamp(min=least)
            errors[name] = ((found - expected).abs().max() / scale).item()
    output_error = errors.pop("output")
    worst = max(errors, key=errors.__getitem__)
    return {
        "output_error": float(f"{output_error:.2g}"),
        "gradient_error": float(f"{errors[worst]:.2g}"),
        "worst_gradient": worst,
        "tensors": len(errors),
    }


if __name__ == "__main__":
    main()
