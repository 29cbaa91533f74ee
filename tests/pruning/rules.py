"""Pruning rules as a user would write them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils import prune


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
