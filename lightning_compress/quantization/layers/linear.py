"""Dynamic int8 linear layers: int8 weights, activations quantized as they come."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.quantization.numerics.int8 import needs_reduced_range, refuse_to_move

OUTLIER = 6.0
"""A column of activations is an outlier where its largest magnitude exceeds so many times the mean of the columns'."""

_LEAST, _MOST = 255 * 6.2e-5, torch.finfo(torch.float32).max
"""Between these the kernel resolves the range of a call's activations; its scales don't go below 6.1e-5."""


class DynamicLinear(nn.Module):
    """Computes ``y = s_x Q(x / s_x) Q(W)^T s_W + b`` in torch's kernel, `torch.ops.quantized.linear_dynamic`.

    ``s_W`` is a scale for each output channel. ``s_x`` is one for all of x, or ``per_token`` one for each row:
    ``y = (Q(x' / s) Q(W)^T) s + (x - x') W_q^T + b`` with ``s = max|x'|`` of the row, x' being x without its outlier
    columns, of which large transformers have a few: these are multiplied in float, or they would leave all others but
    a few of the 256 steps. Whatever one scale can't hold (values that aren't finite, ranges that are too large or too
    small for the kernel) goes by rows too, so that a row of NaN leaves the others alone.

    Args:
        weight: float, ``(out_features, in_features)``.
        bias: ``(out_features,)`` or None.
        reduce_range: 7-bit weights, for CPUs without VNNI.
        per_token: a scale for each row.

    References:
        Dettmers et al., "LLM.int8()", 2022 (arXiv:2208.07339), section 3.2; we find outliers by the columns' own
        magnitudes in place of a fixed threshold of 6.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    used = frozenset(("weight", "bias"))
    """Names of the float layer's tensors that it takes the place of."""

    def __init__(self, weight: Tensor, bias: Tensor | None, reduce_range: bool, per_token: bool = False) -> None:
        super().__init__()
        scale = weight.detach().float().abs().amax(dim=1).clamp_min(1e-12) / (63 if reduce_range else 127)
        self.register_buffer("weight", (weight.detach().float() / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        self.per_token = per_token
        self._packed: dict[str, Any] = {}

    @classmethod
    def from_float(cls, linear: nn.Linear, reduce_range: bool, per_token: bool = False) -> DynamicLinear:
        """Return the dynamic form of a linear layer, on the CPU."""
        bias = None if linear.bias is None else linear.bias.cpu()
        return cls(linear.weight.cpu(), bias, reduce_range, per_token)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32 and x.dim() > 1 and not self.per_token and self._fits_one_scale(x):
            return self._by_kernel(x)
        rows = x.float().reshape(-1, x.shape[-1])
        if not len(rows):
            return x.new_empty(*x.shape[:-1], len(self.scale))
        fits = not self.per_token and self._fits_one_scale(rows)
        product = self._by_kernel(rows) if fits else self._by_rows(rows)
        return product.view(*x.shape[:-1], -1).to(x.dtype)

    def _by_kernel(self, x: Tensor) -> Tensor:
        if "bias" not in self._packed:
            self._packed["bias"] = self.pack(self.bias)  # once the weights have been loaded
        product: Tensor = torch.ops.quantized.linear_dynamic.default(x, self._packed["bias"])
        return product

    @staticmethod
    def _fits_one_scale(rows: Tensor) -> bool:
        if not rows.numel():
            return False
        low, high = torch.aminmax(rows)
        spread: float = max(high.item(), 0.0) - min(low.item(), 0.0)
        return _LEAST <= spread <= _MOST

    def _by_rows(self, rows: Tensor) -> Tensor:
        if "no bias" not in self._packed:
            self._packed["no bias"] = self.pack(None)
        magnitudes = rows.abs()
        columns = magnitudes.amax(dim=0)
        broken = None
        if not columns.isfinite().all():
            broken = ~rows.isfinite().all(dim=1, keepdim=True)
            rows = rows.masked_fill(broken, 0.0)
            magnitudes = rows.abs()
            columns = magnitudes.amax(dim=0)
        outliers = (columns > OUTLIER * columns.mean()).nonzero().flatten()
        apart = None
        if len(outliers):
            apart = rows[:, outliers] @ (self.weight[:, outliers] * self.scale[:, None]).T
            rows, magnitudes = rows.index_fill(1, outliers, 0.0), magnitudes.index_fill_(1, outliers, 0.0)
        largest = magnitudes.amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        # Of rows that were divided by their own largest magnitude, one scale for all is one for each.
        product: Tensor = torch.ops.quantized.linear_dynamic(rows / largest, self._packed["no bias"])
        product = product.mul_(largest)
        if broken is not None:
            product.masked_fill_(broken, torch.nan)  # these rows, and no other
        for term in (apart, self.bias):
            if term is not None:
                product += term
        return product

    def float_value(self, name: str) -> Tensor | None:
        """Return the float layer's ``weight`` as it is stored, or its ``bias``."""
        return self.bias if name == "bias" else self.weight * self.scale[:, None]

    def pack(self, bias: Tensor | None) -> Any:
        """Return the weights, and a bias, in the kernel's own order; in 7 bits where 8 would overflow."""
        codes, scale = self.weight, self.scale.double()
        if codes.abs().amax() > 64 and needs_reduced_range(torch.backends.quantized.engine):
            codes, scale = (codes / 2).round().to(torch.int8), scale * 2
        zeros = torch.zeros(len(scale), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces the end of the tensors that its kernels still take
            weight = torch._make_per_channel_quantized_tensor(codes, scale, zeros, 0)
        return torch.ops.quantized.linear_prepack(weight, bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        refuse_to_move(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._packed = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": {}}
