"""Pruning rules and criteria as a user would write them."""

from __future__ import annotations

import random

import numpy
import torch
from torch import Tensor
from torch.nn.utils import prune

from lightning_compress.pruning.criteria import Criterion


class LargestFirst(prune.BasePruningMethod):
    """Takes `amount` of the largest magnitudes: the opposite of what anyone wants."""

    PRUNING_TYPE = "unstructured"

    def __init__(self, amount: int) -> None:
        self.amount = amount

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        mask = default_mask.clone()
        mask.view(-1)[t.abs().flatten().topk(self.amount).indices] = 0
        return mask


class EveryOther(prune.BasePruningMethod):
    """Fixes its sparsity itself."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        mask = default_mask.clone()
        mask.view(-1)[::2] = 0
        return mask


class LastRows(prune.BasePruningMethod):
    """Structured, with units of its own choosing."""

    PRUNING_TYPE = "structured"

    def __init__(self, amount: int, dim: int) -> None:
        self.amount, self.dim = amount, dim

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        mask = default_mask.clone()
        rows = mask.movedim(self.dim, 0)
        rows[len(rows) - self.amount :] = 0
        return mask


class Noisy(prune.BasePruningMethod):
    """Draws from the global generators."""

    PRUNING_TYPE = "unstructured"

    def __init__(self, amount: int) -> None:
        self.amount = amount

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        mask = default_mask.clone()
        mask.view(-1)[torch.randperm(t.numel())[: self.amount]] = 0
        return mask


class Nameless(prune.BasePruningMethod):
    def __init__(self, amount: int) -> None:
        self.amount = amount

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        return default_mask


class Fails(prune.BasePruningMethod):
    PRUNING_TYPE = "unstructured"

    def __init__(self, amount: int) -> None:
        self.amount = amount

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        raise RuntimeError("a rule of the user's fails")


def squares(weight: Tensor) -> Tensor:
    return weight.square()


VALUES = Criterion(Tensor.clone, signed=True)


def products(weight: Tensor, gradient: Tensor, last: Tensor) -> Tensor:
    return last + (weight * gradient).abs()


def noise(weight: Tensor, scale: float = 1.0) -> Tensor:
    return scale * torch.rand_like(weight)


def noise_of_all(weight: Tensor) -> Tensor:
    return weight.abs() + random.random() + torch.from_numpy(numpy.random.rand(*weight.shape))


def two(weight: Tensor, gradient: Tensor) -> Tensor:
    return weight * gradient


def total(weight: Tensor) -> Tensor:
    return weight.sum()


def signs(weight: Tensor) -> Tensor:
    return weight > 0


def nothing(weight: Tensor) -> None:
    return None
