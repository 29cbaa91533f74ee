"""Linear quantization, ``Q = round(R / S) + Z``, with a scale and a zero point for each block of values.

Everything here works on blocks in the last dimension; `blocks` makes them. One block for a whole tensor is per-tensor
quantization, one for each row per-channel quantization.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def blocks(matrix: Tensor, block_size: int | None) -> Tensor:
    """Cut the rows of a matrix into blocks; the last one is filled up with zeros.

    Args:
        matrix: ``(..., rows, columns)``.
        block_size: values in a block; None makes one of each row.

    Returns:
        ``(..., rows, n_blocks, block_size)``, a view where nothing has to be filled up.

    Example:
        >>> blocks(torch.arange(6.0).view(1, 6), 4).tolist()
        [[[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 0.0, 0.0]]]
    """
    size = matrix.shape[-1] if block_size is None else block_size
    missing = -matrix.shape[-1] % size
    padded = functional.pad(matrix, (0, missing)) if missing else matrix
    cut: Tensor = padded.unflatten(-1, (-1, size))
    return cut


def parameters(values: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return the scale ``S`` and zero point ``Z`` of each block, such that all of it is covered and zero is a code.

    Symmetric: ``Z = 2^(bits-1)`` and ``S = max(max(R) / (2^(bits-1) - 1), -min(R) / 2^(bits-1))``. Asymmetric:
    ``S = (max(R, 0) - min(R, 0)) / (2^bits - 1)`` and ``Z = round(-min(R, 0) / S)``. A scale is rounded up to
    bfloat16, in which it is stored: it has the range of float32 in 16 bits, and codes are found with the rounded scale,
    so that the error stays below half a step.

    Args:
        values: ``(..., block_size)``, finite.
        bits: 2 to 8.
        symmetric: one zero point for all.

    Returns:
        Scale and zero point, ``(..., 1)`` each, in float32.

    Example:
        >>> scale, zero = parameters(torch.tensor([-8.0, 3.0, 7.0]), 4, symmetric=True)
        >>> scale.item(), zero.item()
        (1.0, 8.0)

    References:
        Jacob et al., 2018 (arXiv:1712.05877), equation 1; Krishnamoorthi, 2018 (arXiv:1806.08342), sections 2.1, 2.2.
    """
    values = values.float()
    high = values.amax(dim=-1, keepdim=True).clamp_min(0.0)
    low = values.amin(dim=-1, keepdim=True).clamp_max(0.0)
    half = 2 ** (bits - 1)
    if symmetric:
        scale = bfloat16_above(torch.maximum(high / (half - 1), -low / half))
        return scale, torch.full_like(scale, half)
    scale = bfloat16_above((high - low) / (2 * half - 1))
    return scale, (-low / scale).round_()


def fitted_parameters(values: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Fit `parameters`: if symmetric and below 4 bits, shrink the scale to where a block's squared error is least.

    The largest values are clipped then. With 4 bits and more, or zero points, a language model gained nothing by it.

    Example:
        >>> values = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
        >>> def error(scale, zero):
        ...     return (dequantize(quantize(values, scale, zero, 2), scale, zero) - values).square().sum()
        >>> bool(error(*fitted_parameters(values, 2, True)) < 0.5 * error(*parameters(values, 2, True)))
        True
    """
    scale, zero = parameters(values, bits, symmetric)
    if bits >= 4 or not symmetric:
        return scale, zero
    best, least = scale, torch.full_like(scale, torch.inf)
    for part in torch.linspace(1.0, 0.4, 25).tolist():
        tried = bfloat16_above(scale * part)
        error = dequantize(quantize(values, tried, zero, bits), tried, zero).sub_(values).square_()
        error = error.sum(dim=-1, keepdim=True)
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best, zero


def bfloat16_above(scale: Tensor) -> Tensor:
    """Return the least bfloat16 that isn't below each scale, as float32; that of a block of zeros is tiny, not zero."""
    tiny, largest = torch.finfo(torch.bfloat16).tiny, torch.finfo(torch.bfloat16).max
    # A positive float32 with its lower half of bits at zero is a bfloat16, and as integers they are in order.
    bits = (scale.float().contiguous().view(torch.int32) + 0xFFFF) & -0x10000
    return bits.view(torch.float32).clamp(tiny, largest)


def quantize(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return ``Q = clamp(round(R / S) + Z, 0, 2^bits - 1)``.

    Args:
        values: ``R``.
        scale: ``S``, of a shape that broadcasts to it.
        zero: ``Z``, likewise.
        bits: 2 to 8.

    Returns:
        Codes as uint8, of the shape of ``values``.

    Example:
        >>> quantize(torch.tensor([-9.0, -0.6, 0.0, 2.4]), torch.tensor(1.0), torch.tensor(8.0), bits=4).tolist()
        [0, 7, 8, 10]
    """
    return (values / scale).round_().add_(zero).clamp_(0, 2**bits - 1).to(torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return ``R = S (Q - Z)``, in the type of ``scale``.

    Example:
        >>> dequantize(torch.tensor([0, 7, 10]), torch.tensor(0.5), torch.tensor(8.0)).tolist()
        [-4.0, -0.5, 1.0]
    """
    return codes.to(scale.dtype).sub_(zero).mul_(scale)
