"""Dynamic int8 linear layers: int8 weights, activations quantized per token as they come."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.quantization.schemes import DynamicInt8, describe
from lightning_compress.quantization.traced import refuse_to_move

OUTLIER = 6.0
"""A column of activations is an outlier where its largest magnitude exceeds so many times the mean of the columns'."""


class DynamicLinear(nn.Module):
    """``y = (Q(x' / s) Q(W)^T) s + (x - x') W_q^T + b``, where x' is x without its outlier columns.

    ``s = max|x'|`` of each row, and each output channel of W has a scale of its own. Outlier columns, of which large
    transformers have a few, are multiplied in float, or they would leave all others but a few of the 256 steps. The
    kernel (`torch.ops.quantized.linear_dynamic`) quantizes activations per tensor; on rows that were divided by their
    own largest magnitude first, per tensor is per row.

    Args:
        weight: float, ``(out_features, in_features)``.
        bias: ``(out_features,)`` or None.
        reduce_range: 7-bit activations, for CPUs without VNNI.

    References:
        Dettmers et al., "LLM.int8()", 2022 (arXiv:2208.07339), section 3.2; we find outliers by the columns' own
        magnitudes in place of a fixed threshold of 6.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    used = frozenset(("weight", "bias"))
    """Names of the float layer's tensors that it takes the place of."""

    def __init__(self, weight: Tensor, bias: Tensor | None, reduce_range: bool) -> None:
        super().__init__()
        scale = weight.detach().float().abs().amax(dim=1).clamp_min(1e-12) / 127
        self.register_buffer("weight", (weight.detach().float() / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        self.reduce_range = reduce_range
        self._packed: Any = None

    @classmethod
    def from_float(cls, linear: nn.Linear, scheme: DynamicInt8) -> DynamicLinear:
        """The dynamic form of a linear layer, on the CPU."""
        bias = None if linear.bias is None else linear.bias.cpu()
        return cls(linear.weight.cpu(), bias, describe(scheme)["reduce_range"])

    def forward(self, x: Tensor) -> Tensor:
        if self._packed is None:
            self._packed = self.pack(None)  # once the weights have been loaded
        rows = x.float().reshape(-1, x.shape[-1])
        magnitudes = rows.abs()
        columns = magnitudes.amax(dim=0) if len(rows) else magnitudes.new_zeros(x.shape[-1])
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
        product: Tensor = torch.ops.quantized.linear_dynamic(rows / largest, self._packed, self.reduce_range)
        product = product.mul_(largest)
        if broken is not None:
            product.masked_fill_(broken, torch.nan)  # these rows, and no other
        for term in (apart, self.bias):
            if term is not None:
                product += term
        return product.view(*x.shape[:-1], len(self.scale)).to(x.dtype)

    def pack(self, bias: Tensor | None) -> Any:
        """The weights, and a bias, in the kernel's own order."""
        zeros = torch.zeros(len(self.scale), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces the end of the tensors that its kernels still take
            weight = torch._make_per_channel_quantized_tensor(self.weight, self.scale.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(weight, bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        refuse_to_move(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._packed = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}
