"""Layers whose weights are stored in int8 and computed with in float: smaller, not faster."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from lightning_compress.quantization.schemes import WeightOnly


class WeightOnlyLayer(nn.Module):
    """``y = f(x, s Q(W)) + b`` for a linear or convolution layer ``f``, with a scale ``s`` for each output channel.

    Args:
        layer: the float layer; its weight is ``(out_channels, ...)``.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    used = frozenset(("weight", "bias"))
    """Names of the float layer's tensors that it takes the place of."""

    def __init__(self, layer: nn.Linear | _ConvNd) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        scale = weight.abs().flatten(1).amax(dim=1).clamp_min(1e-12).div(127).view(-1, *[1] * (weight.dim() - 1))
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        # The layer without its tensors: stride, padding and the like.
        settings = copy.copy(layer)
        settings._parameters, settings._modules = dict.fromkeys(layer._parameters), {}
        self.__dict__["_settings"] = settings

    @classmethod
    def from_float(cls, layer: nn.Linear | _ConvNd, scheme: WeightOnly) -> WeightOnlyLayer:
        """The weight-only form of a layer, on the CPU."""
        return cls(layer).cpu()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        settings = self.__dict__["_settings"]
        if isinstance(settings, _ConvNd):
            return settings._conv_forward(x, weight, bias)
        return functional.linear(x, weight, bias)
