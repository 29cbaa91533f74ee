"""GPTQ: rounds a matrix column by column, and lets the columns that are left make up for the error so far."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.errors import CompressionError
from lightning_compress.quantization.numerics import linear

_BATCH = 128
"""Columns whose errors are gathered before the rest of the matrix is updated: one large product for many small ones."""

_MOST_DAMPING = 10.0


def gptq(
    matrix: Tensor,
    hessian: Tensor,
    bits: int,
    block_size: int | None,
    symmetric: bool,
    damping: float = 0.01,
    activation_order: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find codes of ``matrix`` that make the layer's output error ``||X W^T - X W_q^T||^2`` small.

    Each column ``w_i`` is rounded in turn, and the columns after it are moved by ``-(w_i - q_i) / U_ii U_i,j``, where
    ``U`` is the upper Cholesky factor of the inverse of ``H = 2 X^T X``. Scales are found when a block's turn comes,
    from the weights as they have been moved by then; with ``activation_order`` from the float weights, so that every
    block still lies in its place.

    Args:
        matrix: float, ``(..., rows, columns)``; leading dimensions are matrices of their own, such as a convolution's
            groups.
        hessian: ``X^T X`` up to a factor, ``(..., columns, columns)``.
        bits: 2 to 8.
        block_size: values along a row with a scale of their own; None is all of them.
        symmetric: scales and zero points are those of `linear.parameters`.
        damping: added to the Hessian's diagonal, as a fraction of its mean; ten times more until it can be inverted.
        activation_order: round the columns with the largest diagonal first.

    Returns:
        Codes, uint8 of the shape of ``matrix``; scale and zero point, ``(..., rows, n_blocks)``.

    Raises:
        CompressionError: the Hessian isn't finite.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> mixing = torch.randn(32, 32, generator=generator)
        >>> x, w = torch.randn(256, 32, generator=generator) @ mixing, torch.randn(8, 32, generator=generator)
        >>> codes, scale, zero = gptq(w, x.T @ x, bits=3, block_size=None, symmetric=True)
        >>> nearest = linear.quantize(w, *linear.parameters(w, 3, symmetric=True), 3)
        >>> def error(q, scale):
        ...     return (x @ (linear.dequantize(q, scale, 4) - w).T).square().sum()
        >>> bool(error(codes, scale) < 0.8 * error(nearest, linear.parameters(w, 3, symmetric=True)[0]))
        True

    References:
        Frantar et al., "GPTQ", 2022 (arXiv:2210.17323), algorithm 1. A column that no input has reached is rounded to
        the nearest, where the authors' code makes it zero.
    """
    if not hessian.isfinite().all():
        raise CompressionError("`calibration` must be finite. Received: NaN or infinity in the inputs of a layer.")
    columns = matrix.shape[-1]
    size = columns if block_size is None else block_size
    weights = matrix.detach().float().clone()
    hessian = hessian.float().clone()
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    living = diagonal.sum(dim=-1, keepdim=True) / (~dead).sum(dim=-1, keepdim=True).clamp_min(1)
    diagonal.copy_(torch.where(dead, torch.where(living == 0, 1.0, living), diagonal))
    order = None
    if activation_order:
        order = diagonal.argsort(dim=-1, descending=True)
        hessian = hessian.gather(-1, order.unsqueeze(-2).expand_as(hessian))
        hessian = hessian.gather(-2, order.unsqueeze(-1).expand_as(hessian))
    factor = _inverse_factor(hessian, damping)
    scale, zero = (values.squeeze(-1) for values in linear.parameters(linear.blocks(weights, size), bits, symmetric))
    codes = torch.empty_like(weights, dtype=torch.uint8)
    if order is not None:
        weights = _columns(weights, order)
        fixed = [_columns(values, order // size) for values in (scale, zero)]
    for start in range(0, columns, _BATCH):
        stop = min(start + _BATCH, columns)
        errors = weights.new_empty(*weights.shape[:-1], stop - start)
        for i in range(start, stop):
            column = weights[..., i]
            if order is not None:
                s, z = (values[..., i] for values in fixed)
            else:
                block = i // size
                if i % size == 0:
                    # What comes after this batch of columns has not been moved by its errors yet.
                    end = min(i + size, columns)
                    now = weights[..., i:end].clone()
                    now[..., max(stop - i, 0) :] -= errors[..., : i - start] @ factor[..., start:i, max(stop, i) : end]
                    found = linear.parameters(now, bits, symmetric)
                    scale[..., block], zero[..., block] = (values.squeeze(-1) for values in found)
                s, z = scale[..., block], zero[..., block]
            codes[..., i] = q = linear.quantize(column, s, z, bits)
            error = (column - linear.dequantize(q, s, z)) / factor[..., i, i, None]
            weights[..., i:stop] -= error.unsqueeze(-1) * factor[..., None, i, i:stop]
            errors[..., i - start] = error
        weights[..., stop:] -= errors @ factor[..., start:stop, stop:]
    if order is not None:
        codes = _columns(codes, order.argsort(dim=-1))
    return codes, scale, zero


def _columns(matrix: Tensor, index: Tensor) -> Tensor:
    """Return the columns of ``matrix`` ``(..., rows, columns)`` at ``index`` ``(..., columns)``."""
    return torch.gather(matrix, -1, index.unsqueeze(-2).expand(*matrix.shape[:-1], -1))


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return the upper triangular U of ``U^T U = H^-1``; each H is divided by its mean diagonal and damped first."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    hessian /= diagonal.mean(dim=-1)[..., None, None].clone()
    diagonal += damping
    while True:
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if not failed.any():
            inverse = torch.cholesky_inverse(factor)
            del factor
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed.any():
                return torch.as_tensor(upper)
        if damping > _MOST_DAMPING:
            raise CompressionError("`calibration` must give a layer inputs that a Hessian can be made of.")
        diagonal += 9 * damping
        damping *= 10
