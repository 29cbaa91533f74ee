"""The weights of layers with a fused BatchNorm: what range they have, and how those of a scale of zero stay right.

Upstream quantizes ``w * gamma / std`` and divides the output by ``gamma / std`` again, which makes NaN of a gamma of
zero, as in a pruned channel. There the weight is quantized as if gamma were 1; the BatchNorm itself, and so the
output, keeps its gamma.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import enable_observer
from torch.nn.modules.batchnorm import _BatchNorm


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


def observe_weights_(prepared: nn.Module, anew: bool = False) -> None:
    """Let every weight's fake-quantizer see its weight once: its range has its shape before anything copies it.

    ``anew`` forgets what it saw before, so that the range is that of the weight as it is now: averaged, frozen or
    masked.
    """
    with torch.no_grad():
        for module in prepared.modules():
            fake_quantize = getattr(module, "weight_fake_quant", None)
            if not isinstance(fake_quantize, nn.Module) or not isinstance(getattr(module, "weight", None), Tensor):
                continue
            if anew:
                fake_quantize.activation_post_process.reset_min_max_vals()  # type: ignore[operator, union-attr]
                fake_quantize.apply(enable_observer)
            fake_quantize(_folded_weight(module))


def _folded_weight(module: nn.Module) -> Tensor:
    """Return the weight that will be quantized: with the BatchNorm that was fused into the layer."""
    weight, bn = module.weight, getattr(module, "bn", None)
    assert isinstance(weight, Tensor)
    if not isinstance(bn, _BatchNorm) or bn.running_var is None:
        return weight
    scale = (bn.running_var + bn.eps).rsqrt() * (1.0 if bn.weight is None else bn.weight)
    return weight * scale.view(-1, *[1] * (weight.dim() - 1))
