"""Weights in 8 bits, symmetric, with a scale for each output channel: what int8 kernels multiply with."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.modules.routing import StoredWeight
from lightning_compress.modules.written import writes_file
from lightning_compress.quantization.numerics.int8 import channel_scales, largest_code
from lightning_compress.quantization.numerics.operators import STORED, stored_values


def in_onnx_export() -> bool:
    """Tell whether a file for ONNX is written: there codes are codes, which the formula in floats would hide."""
    return torch.onnx.is_in_onnx_export() and torch.compiler.is_exporting()


def dequantized(codes: Tensor, scale: Tensor) -> Tensor:
    """Return ``S Q``: integers in the shape of a weight, times a scale for each of its first dimension."""
    if writes_file():
        written: Tensor = STORED(codes, scale)
        return written
    if in_onnx_export():
        zeros = torch.zeros(len(scale), dtype=codes.dtype)  # onnxruntime's linear kernels want them written
        stored, shape = (codes, scale, zeros), codes.shape
        return torch.onnx.ops.symbolic("DequantizeLinear", stored, {"axis": 0}, dtype=scale.dtype, shape=shape)
    return stored_values(codes, scale)


class Int8Weight(StoredWeight):
    """Stores ``W = S Q``: Q int8 in the shape of W, S float32 for each of its output channels, the first dimension.

    Args:
        like: has the shape and type of W.
        codes: int8 in -127 to 127.
        scale: ``(out_channels,)``.

    Example:
        >>> weight = Int8Weight.nearest(torch.tensor([[1.0, -0.5], [0.0, 2.54]]), reduced=False)
        >>> weight.codes.tolist(), weight().tolist()
        ([[127, -64], [0, 127]], [[1.0, -0.5039370059967041], [0.0, 2.5399999618530273]])
    """

    scale: Tensor

    def __init__(self, like: Tensor, codes: Tensor, scale: Tensor) -> None:
        super().__init__(like)
        self.hold_(codes=codes, scale=scale)

    @classmethod
    def nearest(cls, weight: Tensor, reduced: bool) -> Int8Weight:
        """Round ``weight`` to the nearest codes; ``reduced`` leaves them 7 bits, -63 to 63."""
        rows = weight.detach().float().flatten(1)
        scale = channel_scales(rows, largest_code(reduced))
        return cls(weight, (rows / scale[:, None]).round().to(torch.int8).view(weight.shape), scale)

    def values(self) -> Tensor:
        """Return ``S Q``."""
        return dequantized(self.codes, self.scale)


class Rescaled(Int8Weight):
    """Has the codes of another weight, whichever they are, and scales of its own."""

    codes = property(lambda self: self.source.codes)

    def __init__(self, source: Int8Weight, scale: Tensor) -> None:
        StoredWeight.__init__(self, source.codes)
        self.source, self._like = source, source._like
        self.hold_(scale=scale)
