"""Whether two nests of outputs (tuples, dicts, tensors) agree: in structure, in values, in direction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.quantization.outputs import flatten


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


@contextmanager
def outer_outputs(model: nn.Module) -> Iterator[list[tuple[nn.Module, Any]]]:
    """The calls into ``model`` that come from outside of all modules, such as a step's: what is called, and its output.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.ReLU())
        >>> with outer_outputs(model) as outputs:
        ...     _ = model(torch.ones(1, 2)), model[1](torch.ones(3))
        >>> [tuple(output.shape) for _, output in outputs]
        [(1, 2), (3,)]
    """
    outputs, depth = list[tuple[nn.Module, Any]](), 0

    def enter(*_: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal depth
        depth -= 1
        if not depth:
            outputs.append((module, output))

    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    handles = [module.register_forward_pre_hook(enter) for module in modules]
    handles += [module.register_forward_hook(leave, always_call=True) for module in modules]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield outputs
    finally:
        for handle in handles:
            handle.remove()


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
