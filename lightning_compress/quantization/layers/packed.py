"""Layers whose weights are stored in few bits and computed with in float: linear, convolution, embedding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_compress.modules.routing import Form
from lightning_compress.modules.written import needs_plain_operators
from lightning_compress.quantization.layers import int4_kernel
from lightning_compress.quantization.layers.packed_weight import PackedWeight

_BLOCK = 2**20
"""Values that are dequantized at a time: 4 MB of float32."""


def _row_blocks(weight: PackedWeight, rows: slice) -> Iterator[slice]:
    step = max(1, _BLOCK // weight.columns)
    first, last, _ = rows.indices(weight.rows)
    return (slice(start, min(start + step, last)) for start in range(first, last, step))


class _Product(torch.autograd.Function):
    """Computes ``x W^T`` with W dequantized block by block, and once more for the gradient: no float W stays for it."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.weight, ctx.rows = inputs[1:]

    @staticmethod
    def forward(x: Tensor, weight: PackedWeight, rows: slice) -> Tensor:
        blocks = _row_blocks(weight, rows)
        return torch.cat([x @ weight.values_of(block).to(x.dtype).T for block in blocks], dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        [gradient], weight = gradients, ctx.weight
        first, _, _ = ctx.rows.indices(weight.rows)
        parts = (
            gradient[..., rows.start - first : rows.stop - first] @ weight.values_of(rows).to(gradient.dtype)
            for rows in _row_blocks(weight, ctx.rows)
        )
        total = next(parts)
        for part in parts:
            total += part
        return total, None, None


def product(x: Tensor, weight: PackedWeight, bias: Tensor | None, rows: slice = slice(None)) -> Tensor:
    """Compute ``x W^T + b`` with some ``rows`` of W and their bias. Gradients flow to x and b.

    Its type is the one that autocast wants, else that of x.
    """
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    y: Tensor | None = None
    if (written := weight.product_in_file(x, rows, bias)) is not None:
        return written
    if needs_plain_operators():
        # In plain operators, for any number of rows: without the kernel, and with all of W in float at a time.
        y = x @ weight.values_of(rows).to(x.dtype).T
    elif 0 < x.numel() <= int4_kernel.FEW * weight.columns and not (x.requires_grad and torch.is_grad_enabled()):
        y = weight.few_rows_product(x, rows)
    if y is None:
        y = _Product.apply(x, weight, rows)  # type: ignore[no-untyped-call]
    assert y is not None
    return y if bias is None else y + bias.to(y.dtype)


class PackedLinear(Form):
    """Computes ``y = x W^T + b`` with a packed W and the layer's own bias."""

    weights: Mapping[str, PackedWeight]  # type: ignore[assignment]

    def __init__(self, weights: Mapping[str, PackedWeight]) -> None:
        super().__init__(weights)
        self.weights["weight"].tile_()

    def forward(self, module: Any, input: Tensor) -> Tensor:
        self.bind_(module)
        return product(input, self.weights["weight"], module._parameters["bias"])


class PackedConv(Form):
    """Convolves with a packed kernel, which is dequantized as a whole, and the layer's own bias and settings."""

    def forward(self, module: Any, input: Tensor) -> Tensor:
        self.bind_(module)
        weight: Any = self.weights["weight"]
        bias = None if module.bias is None else module.bias.to(input.dtype)
        y: Tensor = module._conv_forward(input, weight.values().view(weight.shape).to(input.dtype), bias)
        return y


class PackedEmbedding(Form):
    """Looks up ``y_i = W[x_i]`` in a packed W, of which only these rows are dequantized."""

    def forward(self, module: Any, input: Tensor) -> Tensor:
        self.bind_(module)
        weight: Any = self.weights["weight"]
        rows: Tensor = weight.values_of(input.flatten()).to(weight._like.dtype)
        return rows.view(*input.shape, weight.columns)


PACKED: dict[type[nn.Module], type[Form]] = {
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
