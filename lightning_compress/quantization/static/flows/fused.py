"""Keeps layers with a fused BatchNorm right where its scale is zero, as in a pruned channel.

Upstream quantizes ``w * gamma / std`` and divides the output by ``gamma / std`` again, which makes NaN of a gamma of
zero. There the weight is quantized as if gamma were 1; the BatchNorm itself, and so the output, keeps its gamma.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def guard_(graph: nn.Module) -> None:
    """Give the fused layers of a prepared ``graph`` the guarded forward; `unguard_` takes it back."""
    for module in graph.modules():
        if isinstance(getattr(module, "bn", None), nn.Module) and hasattr(module, "weight_fake_quant"):
            cls: Any = type(module)
            module.__class__ = _guarded(cls)


def unguard_(graph: nn.Module) -> None:
    """Give the layers their own classes back, by which upstream knows them."""
    for module in graph.modules():
        module.__class__ = getattr(type(module), "_unguarded", type(module))


@cache
def _guarded(cls: Any) -> Any:
    if hasattr(cls, "_unguarded"):
        return cls
    # Convolutions add ReLU around this method; the fused Linear has only `forward`.
    method = "_forward_approximate" if hasattr(cls, "_forward_approximate") else "forward"
    return type(cls.__name__, (cls,), {method: _forward, "_unguarded": cls, "__module__": cls.__module__})


def _forward(self: Any, x: Tensor) -> Tensor:
    gamma = torch.where(self.bn.weight == 0, 1.0, self.bn.weight)
    scale = gamma / torch.sqrt(self.bn.running_var + self.bn.eps)
    weight = self.weight_fake_quant(self.weight * scale.view(-1, *[1] * (self.weight.dim() - 1)))
    y = self._conv_forward(x, weight, None) if hasattr(self, "_conv_forward") else nn.functional.linear(x, weight)
    channels = (1, -1, *[1] * (self.weight.dim() - 2))
    y = y / scale.view(channels)
    return self.bn(y if self.bias is None else y + self.bias.view(channels))  # type: ignore[no-any-return]
