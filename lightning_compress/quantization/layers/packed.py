"""Layers whose weights are stored in few bits and computed with in float: linear, convolution, embedding."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_compress.quantization.layers import int4_kernel
from lightning_compress.quantization.layers.packed_weight import PackedWeight
from lightning_compress.quantization.numerics.packing import is_recorded

_BLOCK = 2**20
"""Values that are dequantized at a time: 4 MB of float32."""


def matrix_of(layer: nn.Module) -> Tensor:
    """View a layer's weight as ``(out, in)``: of a convolution ``(out_channels, in_channels / groups * kernel)``."""
    weight: Any = layer.weight
    matrix: Tensor = weight.detach().flatten(1)
    return matrix


def _row_blocks(weight: PackedWeight) -> Iterator[slice]:
    step = max(1, _BLOCK // weight.columns)
    return (slice(start, min(start + step, weight.rows)) for start in range(0, weight.rows, step))


class _Product(torch.autograd.Function):
    """Computes ``x W^T`` with W dequantized block by block, and once more for the gradient: no float W stays for it."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.weight = inputs[1]

    @staticmethod
    def forward(x: Tensor, weight: PackedWeight) -> Tensor:
        return torch.cat([x @ weight.values(rows).to(x.dtype).T for rows in _row_blocks(weight)], dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        [gradient], weight = gradients, ctx.weight
        parts = (gradient[..., rows] @ weight.values(rows).to(gradient.dtype) for rows in _row_blocks(weight))
        total = next(parts)
        for part in parts:
            total += part
        return total, None


def product(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Compute ``x W^T + b`` in the type that autocast wants, else in that of x. Gradients flow to x and b."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    y: Tensor | None = None
    if is_recorded():  # in plain operators, for any number of rows
        y = x @ weight().to(x.dtype).T
    elif 0 < x.numel() <= int4_kernel.FEW * weight.columns and not (x.requires_grad and torch.is_grad_enabled()):
        y = weight.few_rows_product(x)
    if y is None:
        y = _Product.apply(x, weight)  # type: ignore[no-untyped-call]
    assert y is not None
    return y if bias is None else y + bias.to(y.dtype)


class PackedLayer(nn.Module):
    """Holds the packed weight of a float layer (layers that share a weight share this), its bias, and its settings."""

    bias: Tensor | None
    used = frozenset(("weight", "bias"))
    """Names of the float layer's tensors that it takes the place of."""
    _like: Tensor

    def __init__(self, layer: Any, weight: PackedWeight) -> None:
        super().__init__()
        self.weight = weight
        self.shape = layer.weight.shape
        # Follows the model through `.to(dtype)`, as a float weight would.
        self.register_buffer("_like", layer.weight.detach().new_empty(0), persistent=False)
        bias = getattr(layer, "bias", None)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        # The layer without its tensors: stride, padding and the like.
        settings = copy.copy(layer)
        settings._parameters, settings._modules = dict.fromkeys(layer._parameters), {}
        self.__dict__["_settings"] = settings

    def float_value(self, name: str) -> Tensor | None:
        """Return the float layer's ``weight`` as it is stored, or its ``bias``."""
        return self.bias if name == "bias" else self.weight().to(self._like.dtype).view(self.shape)


class PackedLinear(PackedLayer):
    """Computes ``y = x W^T + b`` with a packed W."""

    def forward(self, input: Tensor) -> Tensor:
        return product(input, self.weight, self.bias)


class PackedConv(PackedLayer):
    """Convolves with a packed kernel, which is dequantized as a whole."""

    def forward(self, input: Tensor) -> Tensor:
        kernel = self.weight.values(slice(None)).view(self.shape).to(input.dtype)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        y: Tensor = self.__dict__["_settings"]._conv_forward(input, kernel, bias)
        return y


class PackedEmbedding(PackedLayer):
    """Looks up ``y_i = W[x_i]`` in a packed W, of which only these rows are dequantized."""

    def forward(self, input: Tensor) -> Tensor:
        return self.weight.values(input.flatten()).to(self._like.dtype).view(*input.shape, self.weight.columns)


PACKED: dict[type[nn.Module], type[PackedLayer]] = {
    nn.Linear: PackedLinear,
    nn.Conv1d: PackedConv,
    nn.Conv2d: PackedConv,
    nn.Conv3d: PackedConv,
    nn.Embedding: PackedEmbedding,
}


def packable(layer: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a layer that a packed scheme can take the place of."""
    if type(layer) not in {*PACKED, nn.MultiheadAttention, NonDynamicallyQuantizableLinear}:
        return []
    return [parameter for parameter in layer._parameters.values() if parameter is not None]
