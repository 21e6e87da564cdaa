"""Random weights for Inception, as torch-fidelity keeps them."""

import io
from pathlib import Path
from typing import Any

import torch
from torch_fidelity import feature_extractor_inceptionv3 as torch_fidelity_inception


def inception_weights(path: Path, seed: int) -> Path:
    """Random weights of torch-fidelity's network, of He's variance, with real batch norms."""

    class Skeleton(torch_fidelity_inception.FeatureExtractorInceptionV3):
        def load_state_dict(
            self, state_dict: Any, strict: bool = True, assign: bool = False
        ) -> Any:
            return super().load_state_dict(state_dict, strict=False, assign=assign)

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    network = Skeleton("skeleton", ["2048"], feature_extractor_weights_path=empty)
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean = 0.1 * torch.randn(module.num_features)
            module.running_var = 1 + 0.2 * torch.rand(module.num_features)
            torch.nn.init.uniform_(module.weight, 0.8, 1.2)
            torch.nn.init.normal_(module.bias, std=0.1)
    torch.nn.init.normal_(network.fc.weight, std=8)  # answers that differ between images
    torch.save(network.state_dict(), path)
    return path
