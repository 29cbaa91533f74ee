"""How does a parameter change its size, and with it what an optimizer remembers of it?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

KeptIndices = Mapping[int, Tensor]
"""What stays of a tensor: dimension to the indices along it, in ascending order."""


def take(tensor: Tensor, kept_indices: KeptIndices) -> Tensor:
    """Return the slices of a tensor that stay, in its memory format.

    Example:
        >>> take(torch.arange(6).view(2, 3), {1: torch.tensor([0, 2])}).tolist()
        [[0, 2], [3, 5]]
    """
    taken = tensor.detach()
    for dim, indices in kept_indices.items():
        taken = taken.index_select(dim, indices.to(tensor.device))
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if layout is not None and tensor.is_contiguous(memory_format=layout):
        return taken.contiguous(memory_format=layout)
    return taken


@dataclass(frozen=True)
class Cut:
    """A removal of channels, for all that follows a module's tensors.

    Attributes:
        kept_indices: name of each tensor that shrank to what stayed of it.
        attributes: ``path.name`` of numbers that follow, such as ``out_channels``, with their new values.
        changes: each parameter that shrank, with its shape before and what stayed.
    """

    kept_indices: Mapping[str, KeptIndices]
    attributes: Mapping[str, int]
    changes: Mapping[Tensor, tuple[torch.Size, KeptIndices]]

    def below(self, path: str) -> Cut:
        """Return what of it concerns the module at ``path``, by the names that things have in that."""
        prefix = f"{path}." if path else ""

        def inside(named: Mapping[str, Any]) -> dict[str, Any]:
            return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}

        return Cut(inside(self.kept_indices), inside(self.attributes), self.changes)

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """Cut a tensor that lies along the one called ``name`` like that."""
        return take(tensor, self.kept_indices[name]) if name in self.kept_indices else tensor


@torch.no_grad()
def assign_(tensor: Tensor, value: Tensor) -> None:
    """Give a parameter or buffer other data, of any shape; it stays the same object, with its hooks."""
    if tensor.is_inference():
        with torch.inference_mode():
            tensor.set_(value.clone())  # type: ignore[call-overload]
        return
    if tensor.is_leaf:
        tensor.grad = None
    elif not tensor._is_view():
        tensor.detach_()  # what it was computed from has another shape now
    # By way of another dtype: only that makes autograd forget the shape that it knew.
    tensor.data = torch.empty(0, dtype=torch.float64 if tensor.dtype != torch.float64 else torch.float32)
    tensor.data = value


@torch.no_grad()
def resize_(tensor: Tensor, kept_indices: KeptIndices) -> None:
    """Keep only some slices of a parameter or buffer, and of its gradient.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3, 2))
        >>> resize_(weight, {0: torch.tensor([0, 2])})
        >>> weight.shape
        torch.Size([2, 2])
    """
    gradient = take(tensor.grad, kept_indices) if tensor.is_leaf and tensor.grad is not None else None
    assign_(tensor, take(tensor, kept_indices))
    if gradient is not None:
        tensor.grad = gradient


def with_inner(optimizers: Iterable[Optimizer]) -> list[Optimizer]:
    """List optimizers, and those that they step in turn (as SAM and Lookahead do), each state once.

    Example:
        >>> outer, inner = (torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]) for _ in range(2))
        >>> outer.base_optimizer = inner
        >>> with_inner([outer]) == [outer, inner]
        True
    """
    found: dict[int, Optimizer] = {}
    ahead = list(optimizers)
    while ahead:
        optimizer = ahead.pop(0)
        if found.setdefault(id(optimizer.state), optimizer) is optimizer:
            held = list(vars(optimizer).values())
            held += [part for parts in held if isinstance(parts, list | tuple) for part in parts]
            ahead += [part for part in held if isinstance(part, Optimizer) and id(part.state) not in found]
    return list(found.values())


def forget_(
    optimizers: Iterable[Optimizer], stale: Mapping[Tensor, torch.Size], means_follow: bool = False
) -> list[str]:
    """Let optimizers start anew where they remember ``stale`` parameters in a way that can't follow what these became.

    What follows is state along the parameter: numbers, and real tensors of its shape or of one that broadcasts to it.
    An optimizer keeps it so for all its parameters, or counts as one that doesn't: a factor that has a square weight's
    shape by chance is no moment. What parameters share, as the history of LBFGS, is forgotten as a whole.

    Args:
        optimizers: whose state it is; those that they wrap are meant too.
        stale: parameters that were changed, with their shapes as the state knows them.
        means_follow: whether tensors that lack a dimension of the parameter's follow too, as means over it (factored
            second moments) do where only values changed.

    Returns:
        Names of the optimizers that start anew for some parameter.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2, 3))
        >>> optimizer = torch.optim.LBFGS([weight])
        >>> _ = optimizer.step(lambda: weight.square().sum())
        >>> optimizer.state[weight]["factor"] = torch.eye(2)
        >>> forget_([optimizer], {weight: weight.shape}), dict(optimizer.state)
        (['LBFGS'], {})
    """
    anew = set()
    for optimizer in with_inner(optimizers):
        groups = [group["params"] for group in optimizer.param_groups]
        shapes = {parameter: stale.get(parameter, parameter.shape) for params in groups for parameter in params}
        if not stale.keys() & shapes.keys() or lies_along(optimizer, shapes, means_follow):
            continue
        totals = {sum(shapes[key].numel() for key in params) for params in [*groups, list(shapes)] if len(params) > 1}
        leaves = [leaf for leaf in pytree.tree_leaves(list(optimizer.state.values())) if isinstance(leaf, Tensor)]
        shared = any(leaf.dim() == 1 and leaf.numel() in totals for leaf in leaves)
        shared = shared or any(key not in shapes for key in optimizer.state)
        for key in [key for key in optimizer.state if shared or key in stale]:
            del optimizer.state[key]
            anew.add(type(optimizer).__name__)
    return sorted(anew)


def lies_along(
    optimizer: Optimizer, shapes: Mapping[Tensor, torch.Size] | None = None, means_follow: bool = False
) -> bool:
    """Whether all that an optimizer remembers are numbers, and tensors that lie along the parameter they stand for.

    The state may know other ``shapes`` of parameters than they have; ``means_follow`` is that of `forget_`.
    """
    if shapes is None:
        shapes = {parameter: parameter.shape for group in optimizer.param_groups for parameter in group["params"]}
    return all(
        _follows(leaf, shapes.get(key, torch.Size()), means_follow)  # of no parameter: numbers alone
        for key, state in optimizer.state.items()
        for leaf in pytree.tree_leaves(state)
    )


def resize_state_(
    optimizers: Iterable[Optimizer], changes: Mapping[Tensor, tuple[torch.Size, KeptIndices]]
) -> list[str]:
    """Cut what optimizers remember of parameters with the same indices.

    State of the parameter's shape, or of a shape that broadcasts to it (Adafactor's rows and columns), goes on; numbers
    stay; anything else is of no known layout, so the optimizer starts anew for that parameter.

    Args:
        optimizers: whose state it is.
        changes: each resized parameter to its shape before and what stayed.

    Returns:
        Names of the optimizers that start anew for some parameter.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> kept_indices = {0: torch.tensor([1])}
        >>> resize_(weight, kept_indices)
        >>> resize_state_([optimizer], {weight: (torch.Size([3]), kept_indices)})
        []
        >>> optimizer.state[weight]["momentum_buffer"]
        tensor([1.])
    """
    optimizers = with_inner(optimizers)
    anew = forget_(optimizers, {parameter: before for parameter, (before, _) in changes.items()})
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer._numel_cache = None
        for parameter, (before, kept_indices) in changes.items():
            if state := optimizer.state.get(parameter):
                optimizer.state[parameter] = cut_state(dict(state), before, kept_indices) or {}
    return anew


def cut_state(state: dict[str, Any], before: torch.Size, kept_indices: KeptIndices) -> dict[str, Any] | None:
    """Cut what an optimizer remembers of one parameter like it; return None if its layout isn't known."""
    if not all(_follows(leaf, before) for leaf in pytree.tree_leaves(state)):
        return None

    def cut(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() != len(before):
            return leaf
        return take(leaf, {dim: indices for dim, indices in kept_indices.items() if leaf.shape[dim] == before[dim]})

    return {name: pytree.tree_map(cut, value) for name, value in state.items()}


def _follows(leaf: Any, shape: torch.Size, means: bool = False) -> bool:
    """Whether a piece of state is a number, or lies along a parameter of this shape."""
    if not isinstance(leaf, Tensor) or leaf.numel() <= 1:
        return True
    # Codes of few bits, and what a subclass of tensors holds, can't be multiplied or cut as they are.
    plain = type(leaf) in (Tensor, nn.Parameter) and leaf.is_floating_point() and leaf.layout == torch.strided
    along = leaf.dim() == len(shape) and all(have in (1, size) for have, size in zip(leaf.shape, shape, strict=True))
    means = means and any(leaf.shape == shape[:dim] + shape[dim + 1 :] for dim in range(len(shape)))
    return plain and (along or means)
