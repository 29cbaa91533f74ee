"""Holds what a trace notes for its reader: costs, and sizes that may have been written."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

Factors = tuple[Tensor, ...]
"""The labels of a tensor: int64 tensors, each of the tensor's rank and of size 1 along dimensions that don't matter."""


@dataclass(frozen=True)
class Size:
    """A size that the module at ``path`` wrote into a view or a split, and the labels that it counts."""

    path: str
    size: int
    labels: Tensor


@dataclass(frozen=True)
class Written:
    """A call by the module at ``path`` whose code may write sizes: a view, or parts that are taken of a width.

    Attributes:
        path: of the module that ran.
        shape: of the tensor.
        factors: its labels; where parts are taken, of the width that they are parts of.
        view: the shape and the labels of what comes out of a view; None where parts are taken.
        ends: places where parts end.
    """

    path: str
    shape: tuple[int, ...]
    factors: Factors
    view: tuple[tuple[int, ...], Factors] | None = None
    ends: tuple[int, ...] = ()
