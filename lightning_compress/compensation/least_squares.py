"""Fits a layer's weight to outputs: with a ridge towards what it was, and on a mask.

Rows are ``x (groups, n, columns)`` and ``y (groups, n, rows)``, weights ``(groups, rows, columns)``. All fits are
centred, so that a bias ``mean(y) - V mean(x)`` follows. Where there are fewer rows than columns, nothing of columns
squared is made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_compress.errors import CompressionError


def all_finite(rows: Tensor) -> bool:
    """Whether there is no NaN or infinity in a tensor, without another one of its size.

    Example:
        >>> all_finite(torch.ones(3)), all_finite(torch.tensor([0.0, torch.nan])), all_finite(torch.ones(0))
        (True, False, True)
    """
    return not rows.numel() or bool(torch.stack(rows.aminmax()).isfinite().all())


class LeastSquares:
    """Holds the inputs that weights are fitted on, and what all such fits share.

    Args:
        x: rows.
        centred: whether a bias follows; else the rows stay as they are.

    Raises:
        CompressionError: rows aren't finite.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x, w = torch.randn(1, 64, 8, generator=generator), torch.randn(1, 3, 8, generator=generator)
        >>> [found] = LeastSquares(x).ridges(x @ w.mT, torch.zeros_like(w), [1e-6])
        >>> bool((found - w).abs().max() < 1e-4)
        True
    """

    def __init__(self, x: Tensor, centred: bool = True) -> None:
        self._centred = centred
        self._x = x = self._checked(x)
        self._sums = x.square().sum(1, keepdim=True)
        self._square = None if x.shape[1] < x.shape[2] else x.mT @ x

    def ridges(self, y: Tensor, weight: Tensor, strengths: Sequence[float]) -> list[Tensor]:
        """Return the weights that fit ``y`` best and are drawn to ``weight``, one for each strength.

        They make ``||V x - y||^2 + l ||V - W||^2`` least: ``V = W + R'X (X'X + l I)^-1`` with ``X = x - mean(x)``,
        ``R = y - mean(y) - X W'``, and ``l`` the strength times the mean of the diagonal of ``X'X``.

        Raises:
            CompressionError: ``y`` isn't finite.
        """
        x, left = self._x, self._checked(y) - self._x @ weight.mT
        mean = self._sums.mean((1, 2))
        if not bool((mean > 0).any()):
            return [weight.clone() for _ in strengths]
        mean = mean.clamp_min(float(mean.max()) * 1e-6)  # a group that is always zero
        if self._square is None:
            square = x @ x.mT
            return [weight + (x.mT @ _solve(square, strength * mean, left)).mT for strength in strengths]
        right = x.mT @ left
        return [weight + _solve(self._square, strength * mean, right).mT for strength in strengths]

    def on_mask(self, goal: Tensor, mask: Tensor, strength: float = 0.1, steps: int = 8) -> Tensor:
        """Return the weight with zeros outside of ``mask`` that is nearest to ``goal`` in what it puts out.

        It makes ``tr (V - T)(X'X + l I)(V - T)'`` small, by ``steps`` of conjugate gradients on all rows at once, with
        gradients times the mask, preconditioned by the diagonal.

        Args:
            goal: ``T``, what the weight would be without a mask: see `ridges`.
            mask: bool, of its shape; False where it is zero.
            strength: see `ridges`.
            steps: of conjugate gradients.

        References:
            Frantar and Alistarh, "SparseGPT", 2023 (arXiv:2301.00774), equation 2, solves the same problem column by
            column; these steps need no inverse.
        """
        lam = strength * self._sums.mean(2, keepdim=True)
        scale = (self._sums + lam).clamp_min(torch.finfo(torch.float32).tiny)
        fitted = goal * mask
        left = self._product(goal - fitted, lam) * mask
        direction = towards = left / scale
        size = (left * towards).sum(2, keepdim=True)
        for _ in range(steps):
            image = self._product(direction, lam) * mask
            step = size / (direction * image).sum(2, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            fitted, left = fitted + step * direction, left - step * image
            towards = left / scale
            before, size = size, (left * towards).sum(2, keepdim=True)
            direction = towards + size / before.clamp_min(torch.finfo(torch.float32).tiny) * direction
        return fitted

    def _product(self, v: Tensor, lam: Tensor) -> Tensor:
        """Return ``V (X'X + l I)``."""
        return ((v @ self._x.mT) @ self._x if self._square is None else v @ self._square) + lam * v

    def _checked(self, rows: Tensor) -> Tensor:
        if not all_finite(rows):
            raise CompressionError("`calibration` must be finite. Received: NaN or infinity in the inputs of a layer.")
        return rows - rows.mean(1, keepdim=True) if self._centred else rows


def _solve(matrix: Tensor, lam: Tensor, right: Tensor) -> Tensor:
    shifted = matrix.double()
    shifted.diagonal(dim1=1, dim2=2).add_(lam.double()[:, None])
    solved: Tensor = torch.linalg.solve(shifted, right.double())
    return solved.float()
