"""Resizes a parameter and all that rides on it, and says which state of an optimizer can follow a change of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

Kept = Mapping[int, Tensor]
"""What stays of a tensor: dimension to the indices along it, in ascending order."""


def take(tensor: Tensor, kept: Kept) -> Tensor:
    """The slices of a tensor that stay, in its memory format.

    Example:
        >>> take(torch.arange(6).view(2, 3), {1: torch.tensor([0, 2])}).tolist()
        [[0, 2], [3, 5]]
    """
    taken = tensor.detach()
    for dim, indices in kept.items():
        taken = taken.index_select(dim, indices.to(tensor.device))
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if layout is not None and tensor.is_contiguous(memory_format=layout):
        return taken.contiguous(memory_format=layout)
    return taken


@dataclass(frozen=True)
class Cut:
    """A removal of channels, for all that rides on a module's tensors.

    Attributes:
        kept: name of each tensor that shrank to what stayed of it.
        numbers: ``path.name`` of other numbers that follow, with their new values.
        changes: each parameter that shrank, with its shape before and what stayed.
    """

    kept: Mapping[str, Kept]
    numbers: Mapping[str, int]
    changes: Mapping[Tensor, tuple[torch.Size, Kept]]

    def below(self, path: str) -> Cut:
        """What of it concerns the module at ``path``, by the names that things have in that."""
        prefix = f"{path}." if path else ""
        kept = {name.removeprefix(prefix): dims for name, dims in self.kept.items() if name.startswith(prefix)}
        numbers = {name.removeprefix(prefix): value for name, value in self.numbers.items() if name.startswith(prefix)}
        return Cut(kept, numbers, self.changes)

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor that lies along the one called ``name``, cut like it."""
        return take(tensor, self.kept[name]) if name in self.kept else tensor


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
def resize_(tensor: Tensor, kept: Kept) -> None:
    """Keep only some slices of a parameter or buffer, and of its gradient.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3, 2))
        >>> resize_(weight, {0: torch.tensor([0, 2])})
        >>> weight.shape
        torch.Size([2, 2])
    """
    gradient = take(tensor.grad, kept) if tensor.is_leaf and tensor.grad is not None else None
    assign_(tensor, take(tensor, kept))
    if gradient is not None:
        tensor.grad = gradient


def with_inner(optimizers: Iterable[Optimizer]) -> list[Optimizer]:
    """Optimizers, and those that they step in turn (as SAM and Lookahead do), each state once.

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
            ahead += [one for one in held if isinstance(one, Optimizer) and id(one.state) not in found]
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
        shapes = {one: stale.get(one, one.shape) for params in groups for one in params}
        if not stale.keys() & shapes.keys() or lies_along(optimizer, shapes, means_follow):
            continue
        totals = {sum(shapes[one].numel() for one in params) for params in [*groups, list(shapes)] if len(params) > 1}
        for key, state in list(optimizer.state.items()):
            if key not in shapes or any(_is_vector(leaf, totals) for leaf in pytree.tree_leaves(state)):
                optimizer.state.clear()
                anew.add(type(optimizer).__name__)
                break
            if key in stale:
                del optimizer.state[key]
                anew.add(type(optimizer).__name__)
    return sorted(anew)


def lies_along(
    optimizer: Optimizer, shapes: Mapping[Tensor, torch.Size] | None = None, means_follow: bool = False
) -> bool:
    """Whether all that an optimizer remembers are numbers, and tensors that lie along the parameter they stand for.

    Args:
        optimizer: whose state it is.
        shapes: of its parameters, where the state knows others than they have.
        means_follow: see `forget_`.
    """
    if shapes is None:
        shapes = {one: one.shape for group in optimizer.param_groups for one in group["params"]}
    return all(
        _rides(leaf, shapes[key], means_follow) if key in shapes else not isinstance(leaf, Tensor) or leaf.numel() <= 1
        for key, state in optimizer.state.items()
        for leaf in pytree.tree_leaves(state)
    )


def _is_vector(leaf: Any, sizes: Collection[int]) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() == 1 and leaf.numel() in sizes


def resize_state_(optimizers: Iterable[Optimizer], changes: Mapping[Tensor, tuple[torch.Size, Kept]]) -> list[str]:
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
        >>> kept = {0: torch.tensor([1])}
        >>> resize_(weight, kept)
        >>> resize_state_([optimizer], {weight: (torch.Size([3]), kept)})
        []
        >>> optimizer.state[weight]["momentum_buffer"]
        tensor([1.])
    """
    optimizers = with_inner(optimizers)
    anew = forget_(optimizers, {parameter: before for parameter, (before, _) in changes.items()})
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer._numel_cache = None
        for parameter, (before, kept) in changes.items():
            if state := optimizer.state.get(parameter):
                optimizer.state[parameter] = cut_state(dict(state), before, kept) or {}
    return anew


def cut_state(state: dict[str, Any], before: torch.Size, kept: Kept) -> dict[str, Any] | None:
    """What an optimizer remembers of one parameter, cut with it; None if its layout isn't known."""
    if not all(_rides(leaf, before) for leaf in pytree.tree_leaves(state)):
        return None
    cut: dict[str, Any] = pytree.tree_map(lambda leaf: _cut(leaf, before, kept), state)
    return cut


def _rides(leaf: Any, shape: torch.Size, means: bool = False) -> bool:
    """Whether a piece of state is a number, or lies along the parameter."""
    if not isinstance(leaf, Tensor) or leaf.numel() <= 1:
        return True
    # Codes of few bits, and what a subclass of tensors holds, can't be multiplied or cut as they are.
    plain = type(leaf) in (Tensor, nn.Parameter) and leaf.is_floating_point() and leaf.layout == torch.strided
    along = leaf.dim() == len(shape) and all(mine in (1, size) for mine, size in zip(leaf.shape, shape, strict=True))
    means = means and any(leaf.shape == shape[:dim] + shape[dim + 1 :] for dim in range(len(shape)))
    return plain and (along or means)


def _cut(leaf: Any, shape: torch.Size, kept: Kept) -> Any:
    if not isinstance(leaf, Tensor) or leaf.dim() != len(shape):
        return leaf
    return take(leaf, {dim: indices for dim, indices in kept.items() if leaf.shape[dim] == shape[dim]})
