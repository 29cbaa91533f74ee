"""Fits in few bits, and what the tests look at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import (
    QuantizationAwareTraining,
    WeightOnly,
)
from lightning_compress.modules.routing import form_of
from lightning_compress.quantization.layers.fake_quantizers import FakeQuantized
from lightning_compress.quantization.layers.packed_weight import PackedWeight


def qat(bits: int = 4, group_size: int | None = None, **kwargs: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(WeightOnly(bits, group_size), **kwargs)


def packed(module: nn.Module) -> dict[str, Any]:
    """The matrices that are held in few bits, by the paths of their layers."""
    return {
        path: weight
        for path, inner in module.named_modules()
        if (form := form_of(inner)) is not None
        for weight in form.weights.values()
        if isinstance(weight, PackedWeight)
    }


def trained_in_few_bits(module: nn.Module) -> list[str]:
    """The layers with torchao's fake-quantizer."""
    return [path for path, inner in module.named_modules() if isinstance(form_of(inner), FakeQuantized)]


def rounded(matrix: Tensor, bits: int, group_size: int | None) -> Tensor:
    """Groups rounded as torchao's symmetric fake-quantizer does, one at a time.

    The scale comes from the largest magnitude; torchao multiplies by its reciprocal, which is bfloat16 as it is.
    """
    out = torch.zeros_like(matrix)
    step = group_size or matrix.shape[1]
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for i in range(matrix.shape[0]):
        for j in range(0, matrix.shape[1], step):
            group = matrix[i, j : j + step]
            if group.any():
                scale = (group.abs().max() / ((high - low) / 2)).to(torch.bfloat16)
                codes = (group * (1.0 / scale).float()).round().clamp(low, high)
                out[i, j : j + step] = codes * scale.float()
    return out
