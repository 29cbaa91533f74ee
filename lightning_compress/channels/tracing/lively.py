"""Gives a copy of a model values by which every part of it shows in what comes out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


@torch.no_grad()
def enliven_(model: nn.Module) -> None:
    """Draw values for tensors that are constant: weights that begin at zero, scales at one, biases, fresh statistics.

    Args:
        model: a copy; the same values are drawn each time.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = nn.init.zeros_(layer.weight)
        >>> enliven_(layer)
        >>> bool((layer.weight != 0).all())
        True
    """
    generator = torch.Generator().manual_seed(0)
    statistics = {id(norm.running_mean): norm for norm in model.modules() if isinstance(norm, _NormBase)}
    for tensor in (*model.parameters(), *(norm.running_mean for norm in statistics.values())):
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and _is_constant(tensor):
            drawn = torch.empty(tensor.shape).uniform_(0.5, 1.5, generator=generator)
            if not tensor.any():
                drawn *= torch.randint(2, tensor.shape, generator=generator) * 2 - 1
            fan_in = tensor[0].numel() if tensor.dim() > 1 else 1
            tensor.copy_(drawn * (-1 if tensor.any() and tensor.flatten()[0] < 0 else 1) / fan_in**0.5)


def _is_constant(tensor: Tensor) -> bool:
    return bool(tensor.numel() and tensor.isfinite().all() and (tensor == tensor.flatten()[0]).all())
