"""Whether two nests of outputs (tuples, dicts, tensors) agree: in structure, in values, in direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.modules.outputs import flatten


def cosine(expected: Any, got: Any) -> float:
    """Cosine similarity of all floats in two nests of outputs; 1 where there are none, or nothing but zeros."""
    a, b = (
        torch.cat([leaf.float().flatten() for leaf in floats] or [torch.zeros(1)])
        for floats in (
            [leaf for leaf in flatten(tree)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            for tree in (expected, got)
        )
    )
    if not a.isfinite().all() or not a.any():
        return 1.0
    return F.cosine_similarity(a, b, dim=0).nan_to_num(-1.0).item()


def same_structure(expected: Any, got: Any) -> bool:
    """Whether two nests of outputs have the same containers, shapes and kinds of numbers."""
    (tensors, structure), (others, other_structure) = flatten(expected), flatten(got)
    return structure == other_structure and all(
        tensor.shape == other.shape and tensor.is_floating_point() == other.is_floating_point()
        for tensor, other in zip(tensors, others, strict=True)
    )


def same_outputs(expected: Any, got: Any, tolerance: float = 1e-3) -> bool:
    """Whether two nests of outputs agree: integers exactly, floats to a ``tolerance`` (folded BatchNorm rounds)."""
    return same_structure(expected, got) and all(
        _close(leaf, other, tolerance) if leaf.is_floating_point() else torch.equal(leaf, other)
        for leaf, other in zip(flatten(expected)[0], flatten(got)[0], strict=True)
    )


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    a, b = a.float(), b.float()
    scale = a.abs().nan_to_num(0.0, 0.0, 0.0).amax().item() if a.numel() else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * max(scale, 1e-3), equal_nan=True)


def least_cosine(expected: Sequence[Any], got: Sequence[Any]) -> float:
    """The least `cosine` of two runs' outputs, call by call; scalars such as losses have no direction to compare.

    Example:
        >>> least_cosine([torch.ones(2), torch.ones(())], [torch.tensor([1.0, 0.0]), -torch.ones(())])
        0.7071067690849304
    """
    pairs = [
        (one, other)
        for one, other in zip(expected, got, strict=False)
        if any(tensor.numel() > 1 for tensor in flatten(one)[0])
    ]
    return min((cosine(*pair) for pair in pairs), default=1.0)
