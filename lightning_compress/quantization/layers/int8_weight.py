"""Weights in 8 bits, symmetric, with a scale for each output channel: what int8 kernels multiply with."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.modules.routing import StoredWeight


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
        scale = rows.abs().amax(dim=1).clamp_min(1e-12) / (63 if reduced else 127)
        return cls(weight, (rows / scale[:, None]).round().to(torch.int8).view(weight.shape), scale)

    def values(self) -> Tensor:
        scale, decomposed = self.scale, torch.ops.quantized_decomposed
        if torch.onnx.is_in_onnx_export() and hasattr(decomposed, "dequantize_per_channel"):
            # What else computes floats of codes is computed while a file is written, and floats stand in it.
            options = torch.zeros_like(scale, dtype=torch.int8), 0, -127, 127, torch.int8
            return decomposed.dequantize_per_channel(self.codes, scale, *options)  # type: ignore[no-any-return]
        return self.codes * scale.view(-1, *(1,) * (self.codes.dim() - 1))
