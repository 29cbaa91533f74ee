"""Dynamic int8 linear layers: int8 weights, activations quantized as they come."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_compress.modules.routing import Form
from lightning_compress.modules.written import file_kernels, needs_plain_operators
from lightning_compress.quantization.layers.int8_weight import Int8Weight
from lightning_compress.quantization.layers.kernel_cache import KernelCache
from lightning_compress.quantization.numerics.int8 import needs_reduced_range
from lightning_compress.quantization.numerics.operators import DYNAMIC

OUTLIER = 6.0
"""A column of activations is an outlier where its largest magnitude exceeds so many times the mean of the columns'."""

_LEAST, _MOST = 255 * 6.2e-5, torch.finfo(torch.float32).max
"""Between these the kernel resolves the range of a call's activations; its scales don't go below 6.1e-5."""


def in_plain_operators(x: Tensor) -> bool:
    """Tell whether int8 weights are multiplied in float, dequantized, as torch's kernel can't take them.

    It is opaque to whatever compiles or writes down a run, and computes on the CPU alone. Activations aren't quantized
    then, which is as exact as any scale for each token, but not as fast.
    """
    return needs_plain_operators() or x.device.type != "cpu"


def packed_kernel(codes: Tensor, scale: Tensor, bias: Tensor | None) -> Any:
    """Return weights, and a bias, in the kernel's own order; in 7 bits where 8 would overflow."""
    scale = scale.double()
    if codes.abs().amax() > 64 and needs_reduced_range(torch.backends.quantized.engine):
        codes, scale = (codes / 2).round().to(torch.int8), scale * 2
    zeros = torch.zeros(len(scale), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of the tensors that its kernels still take
        weight = torch._make_per_channel_quantized_tensor(codes, scale, zeros, 0)
    return torch.ops.quantized.linear_prepack(weight, None if bias is None else bias.detach().float())


class DynamicProduct(nn.Module):
    """Computes ``y = s_x Q(x / s_x) Q(W)^T s_W + b`` in torch's kernel, `torch.ops.quantized.linear_dynamic`.

    ``s_W`` is a scale for each output channel. ``s_x`` is one for all of x, or ``per_token`` one for each row:
    ``y = (Q(x' / s) Q(W)^T) s + (x - x') W_q^T + b`` with ``s = max|x'|`` of the row, x' being x without its outlier
    columns, of which large transformers have a few: these are multiplied in float, or they would leave all others but
    a few of the 256 steps. Whatever one scale can't hold (values that aren't finite, ranges that are too large or too
    small for the kernel) goes by rows too, so that a row of NaN leaves the others alone.

    Args:
        per_token: a scale for each row.

    References:
        Dettmers et al., "LLM.int8()", 2022 (arXiv:2208.07339), section 3.2; we find outliers by the columns' own
        magnitudes in place of a fixed threshold of 6.
    """

    def __init__(self, per_token: bool = False) -> None:
        super().__init__()
        self.per_token = per_token
        self._kernel, self._kernel_without_bias = KernelCache(), KernelCache()

    def forward(self, x: Tensor, weight: Int8Weight, bias: Tensor | None, rows: slice = slice(None)) -> Tensor:
        """Return the product with some ``rows`` of W, in all calls the same ones, and their bias added."""
        if file_kernels():
            return self._in_file(x.float(), weight, bias, rows).to(x.dtype)
        if in_plain_operators(x):
            return functional.linear(x.float(), weight.values()[rows], None if bias is None else bias.float()).to(
                x.dtype
            )
        if x.dtype == torch.float32 and x.dim() > 1 and not self.per_token and _fits_one_scale(x):
            return self._by_kernel(x, weight, bias, rows)
        flat = x.float().reshape(-1, x.shape[-1])
        if not len(flat):
            return x.new_empty(*x.shape[:-1], len(weight.scale[rows]))
        by = self._by_kernel if not self.per_token and _fits_one_scale(flat) else self._by_rows
        return by(flat, weight, bias, rows).view(*x.shape[:-1], -1).to(x.dtype)

    def _in_file(self, x: Tensor, weight: Int8Weight, bias: Tensor | None, rows: slice) -> Tensor:
        """Compute as the kernel of a file's runtime does; it has no columns apart, as these depend on values."""
        codes, scale, rounds = weight.codes[rows], weight.scale[rows], file_kernels() == "onnxruntime"
        bias = None if bias is None else bias.float()
        product: Tensor
        if not (rounds and self.per_token):
            product = DYNAMIC(x, codes, scale, bias, rounds)
            return product
        largest = x.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        product = DYNAMIC(x / largest, codes, scale, None, rounds) * largest
        return product if bias is None else product + bias

    def _by_kernel(self, x: Tensor, weight: Int8Weight, bias: Tensor | None, rows: slice) -> Tensor:
        kernel = self._kernel.made(
            (weight.codes, weight.scale), [bias], lambda: packed_kernel(weight.codes[rows], weight.scale[rows], bias)
        )
        product: Tensor = torch.ops.quantized.linear_dynamic.default(x, kernel)
        return product

    def _by_rows(self, x: Tensor, weight: Int8Weight, bias: Tensor | None, rows: slice) -> Tensor:
        codes, scale = weight.codes[rows], weight.scale[rows]
        kernel = self._kernel_without_bias.made(
            (weight.codes, weight.scale), [], lambda: packed_kernel(codes, scale, None)
        )
        magnitudes = x.abs()
        columns = magnitudes.amax(dim=0)
        broken = None
        if not columns.isfinite().all():
            broken = ~x.isfinite().all(dim=1, keepdim=True)
            x = x.masked_fill(broken, 0.0)
            magnitudes = x.abs()
            columns = magnitudes.amax(dim=0)
        outliers = (columns > OUTLIER * columns.mean()).nonzero().flatten()
        apart = None
        if len(outliers):
            apart = x[:, outliers] @ (codes[:, outliers] * scale[:, None]).T
            x, magnitudes = x.index_fill(1, outliers, 0.0), magnitudes.index_fill_(1, outliers, 0.0)
        largest = magnitudes.amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        # Of rows that were divided by their own largest magnitude, one scale for all is one for each.
        product: Tensor = torch.ops.quantized.linear_dynamic(x / largest, kernel)
        product = product.mul_(largest)
        if broken is not None:
            product.masked_fill_(broken, torch.nan)  # these rows, and no other
        for term in (apart, None if bias is None else bias.detach()):
            if term is not None:
                product += term
        return product


def _fits_one_scale(rows: Tensor) -> bool:
    if not rows.numel():
        return False
    low, high = torch.aminmax(rows)
    spread: float = max(high.item(), 0.0) - min(low.item(), 0.0)
    return _LEAST <= spread <= _MOST


class DynamicLinear(Form):
    """Computes a linear layer as `DynamicProduct` does, with the layer's own bias."""

    def __init__(self, weight: Int8Weight, per_token: bool = False) -> None:
        super().__init__({"weight": weight})
        self.product = DynamicProduct(per_token)

    def forward(self, module: Any, input: Tensor) -> Tensor:
        self.bind_(module)
        product: Tensor = self.product(input, self.weights["weight"], module._parameters["bias"])
        return product
