"""Traced forms, and models of uneven ranges."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress.quantization.static.graphs import evaluate_modes_
from lightning_compress.quantization.static.signature import Signature
from lightning_compress.quantization.static.trace import trace


def traced(model: nn.Module, *inputs: Tensor) -> Any:
    """The traced form of a model in evaluation, around the same parameters."""
    graph = trace(model.eval(), Signature(inputs, {})).graph
    evaluate_modes_(graph)
    return graph


def drawn_(model: nn.Module, seed: int) -> nn.Module:
    """Draw the values of a model anew, in the tensors that it has."""
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def relative(expected: Tensor, got: Tensor) -> float:
    """The size of the difference, as a fraction of what was expected."""
    return float((got - expected).detach().norm() / expected.detach().norm())


def spread_(model: nn.Module, seed: int = 0, low: float = 0.1, high: float = 10.0) -> nn.Module:
    """Give channels ranges that are log-uniform in [low, high], and BatchNorms statistics of their own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
                scale = torch.empty(len(module.weight)).uniform_(np.log(low), np.log(high), generator=generator).exp()
                module.weight *= scale.view(-1, *[1] * (module.weight.dim() - 1))
            elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine and module.track_running_stats:
                size = (module.num_features,)
                module.running_mean.copy_(torch.randn(size, generator=generator))
                module.running_var.copy_(torch.rand(size, generator=generator) * 4 + 0.1)
                module.weight.copy_(torch.randn(size, generator=generator))  # either sign
                module.bias.copy_(torch.randn(size, generator=generator))
    return model


def geometric_mean(values: np.ndarray) -> Any:
    return np.exp(np.log(values).mean())
