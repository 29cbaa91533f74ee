"""Labels of tensors: which atom each place of each dimension belongs to."""

from __future__ import annotations

from torch import Tensor

Factors = tuple[Tensor, ...]
"""The labels of a tensor: atoms, int64, each of the tensor's rank and of size 1 along dimensions that don't matter."""


def spread(size: int, labels: Tensor, dim: int, rank: int) -> Tensor:
    """DisjointSets ``(size,)`` as a factor of a tensor with ``rank`` dimensions."""
    shape = [1] * rank
    shape[dim] = size
    return labels.reshape(shape)


def varying(factor: Tensor) -> tuple[int, ...]:
    """The dimensions that have a say in a factor."""
    return tuple(dim for dim, size in enumerate(factor.shape) if size > 1)


def compressed(factor: Tensor) -> Tensor:
    """A factor without the dimensions along which it is constant."""
    for dim, size in enumerate(factor.shape):
        if size > 1:
            first = factor.narrow(dim, 0, 1)
            if bool((factor == first).all()):
                factor = first
    return factor


def clusters(factors: list[Tensor]) -> list[set[int]]:
    """The dimensions of factors that share dimensions, each set once."""
    clusters: list[set[int]] = []
    for factor in factors:
        mine = set(varying(factor))
        for cluster in [cluster for cluster in clusters if cluster & mine]:
            clusters.remove(cluster)
            mine |= cluster
        if mine:
            clusters.append(mine)
    return clusters


def first_along(factor: Tensor, dim: int) -> Tensor:
    """The atoms along one dimension, at the first place of all others."""
    return factor.movedim(dim, 0).reshape(factor.shape[dim], -1)[:, 0]
