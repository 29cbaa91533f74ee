"""Criteria: how much a single weight matters. A criterion is one pure function and its line in the table `CRITERIA`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Criterion:
    """Scores single weights; the lowest scores are pruned first.

    Args:
        score: ``score(weight)`` gives the scores of one layer's weights when masks grow, a floating-point tensor of
            their shape. With ``needs_gradients`` it is ``score(weight, gradient, last)``, called in float32 before each
            optimizer step with its own ``last`` result, zeros at first.
        signed: whether scores are ranked as they are, the most negative first, and not by their magnitude.
        needs_gradients: whether scores are carried along from step to step, in one more tensor of the weights' size.

    Example:
        >>> relative = Criterion(lambda weight: weight.abs() / weight.abs().sum())
        >>> relative.score(torch.tensor([1.0, -3.0]))
        tensor([0.2500, 0.7500])
    """

    score: Callable[..., Tensor]
    signed: bool = False
    needs_gradients: bool = False


def magnitude(weight: Tensor) -> Tensor:
    """Score by magnitude, ``|w|``: return the weight itself, as scores are ranked by their magnitude.

    References:
        Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015 (arXiv:1506.02626).
    """
    return weight


def lamp(weight: Tensor) -> Tensor:
    """Score by a magnitude that compares between layers: ``w_i^2 / sum_j w_j^2`` over all j with ``|w_j| >= |w_i|``.

    The largest weight of every layer scores 1, so no layer is emptied while another has weights to spare. As
    sorting is slow on a CPU, the sum counts all squares with the same exponent and seven leading bits too in layers of
    more than 4,096 weights there, which keeps the order within a layer.

    Args:
        weight: one layer's weights, any shape.

    Returns:
        Scores in [0, 1] of the same shape, float32.

    Example:
        >>> lamp(torch.tensor([3.0, -4.0, 0.0]))
        tensor([0.3600, 1.0000, 0.0000])

    References:
        Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", 2021 (arXiv:2010.07611), equation 6.
    """
    squares = weight.detach().float().square().flatten()
    if len(squares) > _SORTED and squares.device.type == "cpu":
        return _lamp_by_bins(squares).view(weight.shape)
    squares, order = squares.sort()
    remaining = squares.flip(0).cumsum(0, dtype=torch.double).flip(0)
    scores = torch.empty_like(squares)
    scores[order] = (squares / remaining.clamp(min=torch.finfo(torch.double).tiny)).float()
    return scores.view(weight.shape)


_SORTED = 1 << 12
_CHUNK = 1 << 19
"""Weights that are looked at together: few enough to stay in a CPU's cache."""


def _lamp_by_bins(squares: Tensor) -> Tensor:
    """Compute `lamp` in place, with one denominator for all squares that share their upper 16 bits."""
    sums = torch.zeros(1 << 15, dtype=torch.double)
    for part in squares.split(_CHUNK):
        sums += torch.bincount(_upper_bits(part), weights=part, minlength=len(sums))
    remaining = sums.flip(0).cumsum(0).flip(0).float().clamp(min=torch.finfo(torch.float).tiny)
    for part in squares.split(_CHUNK):
        part.div_(remaining[_upper_bits(part)])
    return squares


def _upper_bits(squares: Tensor) -> Tensor:
    # The bits of a non-negative float, read as an integer, are ordered as the float is. NaN may have a sign.
    return squares.view(torch.int32).bitwise_right_shift(16).bitwise_and_((1 << 15) - 1)


def taylor(weight: Tensor, gradient: Tensor, score: Tensor) -> Tensor:
    """Score by what the loss would change by without the weight, to first order: ``s <- 0.9 s + 0.1 |w g|``.

    References:
        Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019 (arXiv:1906.10771), equation 8, there
        squared, which ranks alike for one batch; the average with momentum 0.9 is the paper's.
    """
    return torch.lerp(score, (weight * gradient).abs(), 0.1)


def movement(weight: Tensor, gradient: Tensor, score: Tensor) -> Tensor:
    """Score by movement away from zero, summed over the steps so far: ``s <- s - w g``.

    A weight that the loss pushes towards zero scores below zero, however large it is.

    References:
        Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020 (arXiv:2005.07683), equation 6; its
        constant learning rate changes no rank.
    """
    return score - weight * gradient


CRITERIA = {
    "l1_unstructured": Criterion(magnitude),
    "magnitude": Criterion(magnitude),
    "lamp": Criterion(lamp),
    "taylor": Criterion(taylor, needs_gradients=True),
    "movement": Criterion(movement, signed=True, needs_gradients=True),
}
