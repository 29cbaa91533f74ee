"""Prunes one layer by what it is given, and re-solves what stays of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_compress.compensation.guard import Samples
from lightning_compress.compensation.in_order import Visit
from lightning_compress.compensation.layer_rows import matrix_of, weight_from
from lightning_compress.compensation.least_squares import LeastSquares
from lightning_compress.compensation.sampling import sample_rows
from lightning_compress.pruning.methods import Calibrated, pruned
from lightning_compress.pruning.smallest import take_smallest

RIDGE = 0.1
"""How strongly weights are drawn to what they were, as a part of the mean of the Hessian's diagonal."""


@dataclass(frozen=True)
class LayerRows:
    """What a layer of the fitted model is given, and what it is to put out, at some positions of all calls.

    Attributes:
        layer: of the fitted model.
        inputs: ``(groups, n, columns)``.
        outputs: ``(groups, n, rows)``.
        squares: of the inputs for the calibration's own samples, summed: ``(groups, 1, columns)``.
    """

    layer: Any
    inputs: Tensor
    outputs: Tensor
    squares: Tensor

    @classmethod
    def of(cls, visit: Visit, samples: Samples, generator: torch.Generator) -> LayerRows:
        """Take rows of a visit: see `sample_rows`."""
        x, y, batches = sample_rows(visit, visit.calls, generator)
        return cls(visit.fitted, x, y, samples.are_own(batches).to(x)[None] @ x.square())

    def centred(self) -> tuple[Tensor, Tensor]:
        """Take the means out, where a bias can make up for them."""
        if self.layer.bias is None:
            return self.inputs, self.outputs
        return tuple(rows - rows.mean(1, keepdim=True) for rows in (self.inputs, self.outputs))  # type: ignore[return-value]


@dataclass(frozen=True)
class LayerFit:
    """A layer's new mask and weight as a matrix, and a bias for each of its places.

    Attributes:
        mask: False where pruned, in the layout of the weight.
        plain: the old weight under the mask.
        fitted: the re-solved weight; None where nothing is to be re-solved.
        biases: that go with it, None for a layer without.
    """

    mask: Tensor
    plain: Tensor
    fitted: Tensor | None
    biases: Sequence[Tensor | None]


@torch.no_grad()
def fit_layer(places: Sequence[LayerRows], mask: Tensor, count: int, method: Calibrated, dim: int) -> LayerFit:
    """Choose ``count`` weights of a layer that are zero, and re-solve the others.

    Args:
        places: where the layer stands: its own rows, and those of layers whose weight is the same.
        mask: False where it is pruned already.
        count: of all elements that are zero afterwards.
        method: says whether others are re-solved, and by which pattern weights go.
        dim: with a pattern, the weight's input dimension.
    """
    layer = places[0].layer
    before = matrix_of(layer)
    weight = before.float()
    centred = [place.centred() for place in places]
    x, y = (torch.cat(rows, 1) if len(places) > 1 else rows[0] for rows in zip(*centred, strict=True))
    solver = LeastSquares(x, centred=False) if method.refits else None
    goal = weight if solver is None else solver.ridges(y, weight, [RIDGE])[0]
    squares = torch.stack([place.squares for place in places]).sum(0)
    chosen = _choose(layer, goal.abs() * squares.sqrt(), mask, count, method, dim)
    stays = matrix_of(layer, chosen)
    if solver is None:
        return LayerFit(chosen, before * stays, None, [None] * len(places))
    fitted = solver.on_mask(goal, stays, RIDGE)
    biases = [
        None
        if place.layer.bias is None
        else (place.outputs.mean(1, keepdim=True) - place.inputs.mean(1, keepdim=True) @ fitted.mT).flatten()
        for place in places
    ]
    return LayerFit(chosen, before * stays, fitted, biases)


def _choose(layer: Any, scores: Tensor, mask: Tensor, count: int, method: Calibrated, dim: int) -> Tensor:
    """Take the lowest scores of every row, as many as of the others or one more, until ``count`` are zero."""
    missing = count - pruned([mask])
    if missing <= 0:
        return mask
    may = mask
    if method.pattern is not None:
        may = mask & method.pattern.smallest(weight_from(layer, scores), mask, dim)
        if missing >= int(torch.count_nonzero(may)):
            return mask & ~may
    free = matrix_of(layer, may)
    gone = ~matrix_of(layer, mask)
    order = scores.masked_fill(~free, torch.inf).masked_fill(gone, -torch.inf).argsort(2)
    ranks = torch.empty_like(order).scatter_(
        2, order, torch.arange(order.shape[2], device=order.device).expand_as(order)
    )
    keys = ranks + scores / (scores.max() * 1.001).clamp_min(torch.finfo(torch.float32).tiny)
    [taken] = take_smallest([weight_from(layer, keys)], [mask], missing, [may], signed=True)
    return taken


def write_(layer: Any, matrix: Tensor) -> None:
    """Give a layer a weight; where it has a weight norm, as direction and magnitude."""
    weight = weight_from(layer, matrix)
    if "weight" in layer._parameters:
        layer.weight.data.copy_(weight)
    else:
        originals = layer.parametrizations.weight
        magnitude = originals.original0.data
        dims = [dim for dim, size in enumerate(magnitude.shape) if size == 1] if magnitude.dim() else None
        length = torch.linalg.vector_norm(weight, dim=dims, keepdim=True).view_as(magnitude)
        # What is silent keeps its direction: that of nothing is no number.
        originals.original1.data.copy_(torch.where(length > 0, weight, originals.original1))
        magnitude.copy_(length)
