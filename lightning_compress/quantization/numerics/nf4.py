"""NF4: non-linear quantization to 16 quantiles of the normal distribution, with a scale for each block of values."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

_LEAST = 1024
"""A scale so many times below the median of its block of scales is stored as that part of the median."""

SCALE_BLOCK = 256
"""Scales that are quantized with one step and offset."""


def _quantiles() -> Tensor:
    """Return the 16 values in order: 7 quantiles below zero, zero, and 8 above, divided by the largest.

    ``offset`` is QLoRA's: the quantiles run from ``1 - offset`` to ``offset``, as those of 0 and 1 are infinite. It is
    the mean of ``1 - 1/32`` and ``1 - 1/30``.
    """
    offset = torch.tensor(1 - (1 / 32 + 1 / 30) / 2, dtype=torch.float64).item()
    above = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([-below, torch.zeros(1, dtype=torch.float64), above.flip(0)])
    return (values / values.abs().max()).float()


NF4_VALUES = _quantiles()
"""The 16 values that an NF4 code stands for, from -1 to 1."""

_MIDDLES = (NF4_VALUES[1:] + NF4_VALUES[:-1]) / 2


def nf4_codes(values: Tensor, absmax: Tensor) -> Tensor:
    """Return the index of the nearest of `NF4_VALUES` to each ``R / absmax``.

    Args:
        values: ``(..., block_size)``.
        absmax: the scale of each block, ``(..., 1)``, positive.

    Returns:
        uint8, of the shape of ``values``.

    Example:
        >>> nf4_codes(torch.tensor([-2.0, -0.01, 0.9, 2.0]), torch.tensor([2.0])).tolist()
        [0, 7, 12, 15]

    References:
        Dettmers et al., "QLoRA", 2023 (arXiv:2305.14314), section 3 and appendix E.
    """
    return torch.bucketize(values / absmax, _MIDDLES.to(values.device), out_int32=True).to(torch.uint8)


def nf4_values(codes: Tensor, absmax: Tensor) -> Tensor:
    """Return ``R = absmax * NF4_VALUES[Q]``, in float32.

    Example:
        >>> nf4_values(torch.tensor([0, 7, 15]), torch.tensor([2.0])).tolist()
        [-2.0, 0.0, 2.0]
    """
    values = NF4_VALUES.to(codes.device).index_select(0, codes.flatten().int())
    return values.view(codes.shape).mul_(absmax)


def scale_codes(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize scales too: return them as 8-bit codes, with an offset and a step for each `SCALE_BLOCK` of them.

    ``Q = round((ln A - offset) / step)``, in the logarithm: one outlier among the scales, which would leave a linear
    step too coarse for its neighbours, costs them little.

    Args:
        absmax: ``(n,)``, of blocks in the order in which they are stored; those of zeros may be zero.

    Returns:
        Codes, uint8 ``(n,)``; offset and step, float32 ``(ceil(n / SCALE_BLOCK),)`` each.

    Example:
        >>> codes, offset, step = scale_codes(torch.tensor([0.5, 1.0, 1000.0]))
        >>> scale_values(codes, offset, step).div(torch.tensor([0.5, 1.0, 1000.0])).sub(1).abs().max().item() < 0.02
        True

    References:
        Dettmers et al., 2023 (arXiv:2305.14314), section 3, "Double Quantization", which takes 8-bit floats of the
        scales less their mean.
    """
    logs = absmax.float().log()
    grouped = functional.pad(logs, (0, -len(logs) % SCALE_BLOCK), value=torch.nan).view(-1, SCALE_BLOCK)
    # Zeros need no scale, and next to nothing none of its own: neither stretches the range of the others.
    grouped = grouped.masked_fill(grouped == -torch.inf, torch.nan)
    floor = grouped.nanmedian(dim=1).values - math.log(_LEAST)
    known, nothing = ~grouped.isnan(), math.log(torch.finfo(torch.float32).tiny)
    high = torch.where(known, grouped, -torch.inf).amax(dim=1).clamp_min(nothing)
    offset = torch.where(known, grouped, torch.inf).amin(dim=1).maximum(floor.nan_to_num(nothing)).minimum(high)
    grouped = torch.where(known, grouped, offset[:, None])
    step = (high - offset).div_(255).clamp_min_(1e-9)
    codes = (grouped - offset[:, None]).div_(step[:, None]).round_().clamp_(0, 255)
    return codes.view(-1)[: len(absmax)].to(torch.uint8), offset, step


def scale_values(codes: Tensor, offset: Tensor, step: Tensor) -> Tensor:
    """Return ``A = exp(offset + step Q)``, with an offset and a step for each code or for each block of codes."""
    if offset.shape != codes.shape:
        offset, step = (values.repeat_interleave(SCALE_BLOCK)[: len(codes)] for values in (offset, step))
    return torch.exp(offset.float() + step.float() * codes)
