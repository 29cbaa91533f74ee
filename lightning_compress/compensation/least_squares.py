"""Fits a layer's weight to outputs: with a ridge towards what it was, and on a mask.

Rows are ``x (groups, n, columns)`` and ``y (groups, n, rows)``, weights ``(groups, rows, columns)``. All fits are
centred, so that a bias ``mean(y) - V mean(x)`` follows. Where there are fewer rows than columns, nothing of columns
squared is made.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_compress.errors import CompressionError


def ridge(x: Tensor, y: Tensor, weight: Tensor, strength: float, centred: bool = True) -> Tensor:
    """Return the weight that fits ``y`` best and is drawn to ``weight``.

    It makes ``||V x - y||^2 + l ||V - W||^2`` least: ``V = W + R'X (X'X + l I)^-1`` with ``X = x - mean(x)``,
    ``R = y - mean(y) - X W'``, and ``l`` the ``strength`` times the mean of the diagonal of ``X'X``. Where no bias
    follows, rows aren't ``centred``.

    Raises:
        CompressionError: rows aren't finite.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x, w = torch.randn(1, 64, 8, generator=generator), torch.randn(1, 3, 8, generator=generator)
        >>> bool(((ridge(x, x @ w.mT, torch.zeros_like(w), 1e-6)) - w).abs().max() < 1e-4)
        True
    """
    x, y = _finite(x, centred), _finite(y, centred)
    left = y - x @ weight.mT
    lam = strength * x.square().sum((1, 2)) / x.shape[2]
    if not bool((lam > 0).any()):
        return weight.clone()
    lam = lam.clamp_min(float(lam.max()) * 1e-6)  # a group that is always zero
    if x.shape[1] < x.shape[2]:
        return weight + (x.mT @ _solve(x @ x.mT, lam, left)).mT
    return weight + _solve(x.mT @ x, lam, x.mT @ left).mT


def _solve(matrix: Tensor, lam: Tensor, right: Tensor) -> Tensor:
    shifted = matrix.double()
    shifted.diagonal(dim1=1, dim2=2).add_(lam.double()[:, None])
    solved: Tensor = torch.linalg.solve(shifted, right.double())
    return solved.float()


def _finite(rows: Tensor, centred: bool) -> Tensor:
    if not bool(rows.isfinite().all()):
        raise CompressionError("`calibration` must be finite. Received: NaN or infinity in the inputs of a layer.")
    return rows - rows.mean(1, keepdim=True) if centred else rows


def on_mask(
    x: Tensor, goal: Tensor, mask: Tensor, strength: float = 0.1, steps: int = 8, centred: bool = True
) -> Tensor:
    """Return the weight with zeros outside of ``mask`` that is nearest to ``goal`` in what it puts out.

    It makes ``tr (V - T)(X'X + l I)(V - T)'`` small, by ``steps`` of conjugate gradients on all rows at once, with
    gradients times the mask, preconditioned by the diagonal.

    Args:
        x: rows.
        goal: ``T``, what the weight would be without a mask: see `ridge`.
        mask: bool, of its shape; False where it is zero.
        strength: see `ridge`.
        steps: of conjugate gradients.
        centred: see `ridge`.

    References:
        Frantar and Alistarh, "SparseGPT", 2023 (arXiv:2301.00774), equation 2, solves the same problem column by
        column; these steps need no inverse.
    """
    x = _finite(x, centred)
    lam = (strength * x.square().sum((1, 2)) / x.shape[2]).view(-1, 1, 1)
    product = _product(x, lam)
    scale = (x.square().sum(1, keepdim=True) + lam).clamp_min(torch.finfo(torch.float32).tiny)
    fitted = goal * mask
    left = product(goal - fitted) * mask
    direction = towards = left / scale
    size = (left * towards).sum(2, keepdim=True)
    for _ in range(steps):
        image = product(direction) * mask
        step = size / (direction * image).sum(2, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        fitted, left = fitted + step * direction, left - step * image
        towards = left / scale
        before, size = size, (left * towards).sum(2, keepdim=True)
        direction = towards + size / before.clamp_min(torch.finfo(torch.float32).tiny) * direction
    return fitted


def _product(x: Tensor, lam: Tensor) -> Callable[[Tensor], Tensor]:
    """Return ``V -> V (X'X + l I)``."""
    if x.shape[1] < x.shape[2]:
        return lambda v: (v @ x.mT) @ x + lam * v
    square = x.mT @ x
    return lambda v: v @ square + lam * v
