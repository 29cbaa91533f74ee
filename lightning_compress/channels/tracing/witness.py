"""Compares runs of a model and of a narrower copy: the second takes the decisions of the first.

An order of scores, a threshold or an argmax falls otherwise where two numbers nearly tie, and all that follows is
another matter then. So the second run takes the decisions of the first, and what it would decide by is compared.
"""

from __future__ import annotations

import math
from collections import deque
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_compress.channels.tracing.deterministic import deterministic
from lightning_compress.channels.tracing.groups import Run
from lightning_compress.modules.outputs import states_given_back, tensors_in

Sample = tuple[torch.Size, Tensor]
"""The shape of a tensor, and some thousand of its elements."""

_NO_DECISIONS = ("dropout", "max_pool")


class Witness(TorchDispatchMode):
    """Records what a run computes on its way, and decides.

    Args:
        first: the witness of another run, whose decisions are taken; by default none.

    Attributes:
        points: what decisions are made by, and what linear and convolution layers put out, by operator or path.
        outputs: what comes out.
    """

    def __init__(self, first: Witness | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.points: dict[Any, list[Sample]] = {}
        self.outputs: list[Tensor] = []
        self._made: dict[Any, list[Any]] = {}
        self._given = {key: deque(made) for key, made in first._made.items()} if first else {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if _is_float(out):
            return out
        floats = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if _is_float(leaf)]
        if func._schema.is_mutable or not floats or not any(map(_decides, pytree.tree_leaves(out))):
            return out
        if any(word in func._schema.name for word in _NO_DECISIONS):
            return out
        key = func, tuple(leaf.shape for leaf in floats)
        self.points.setdefault(key, []).extend(map(_sample, floats))
        if given := self._given.get(key):
            out = pytree.tree_map(_taken, out, given.popleft())
        self._made.setdefault(key, []).append(pytree.tree_map_only(Tensor, torch.clone, out))
        return out

    @property
    def decides(self) -> bool:
        """Whether the run made any decision."""
        return bool(self._made)

    def see(self, path: str, layer: nn.Module, inputs: Any, out: Any) -> None:
        """Record the output of a layer."""
        self.points.setdefault(path, []).extend(map(_sample, tensors_in(out)))

    def distance(self, other: Witness) -> float:
        """Return the greatest relative difference among all tensors that both have in the same shape."""
        pairs = list(zip(self.outputs, other.outputs, strict=True))
        for key, samples in self.points.items():
            both = zip(samples, other.points.get(key, []), strict=False)
            pairs += [(values, values_there) for (shape, values), (there, values_there) in both if shape == there]
        return max((distance(*pair) for pair in pairs), default=0.0)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _decides(leaf: Any) -> bool:
    return leaf is not None and not _is_float(leaf)


def _taken(own: Any, given: Any) -> Any:
    """Return the decision that was given, but a run's own numbers, if there are as many of them."""
    return own if _is_float(own) and own.shape == given.shape else given


def _sample(tensor: Tensor) -> Sample:
    flat = tensor.detach().reshape(-1)
    return tensor.shape, flat[:: max(1, flat.numel() // 4096) | 1].clone()


def distance(tensor: Tensor, other: Tensor) -> float:
    """Return the greatest difference, relative to the other's greatest value; of whole numbers, how many differ.

    Example:
        >>> distance(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0])), distance(torch.arange(4), torch.arange(4))
        (0.25, 0.0)
    """
    if not tensor.numel():
        return 0.0
    if not _is_float(tensor):
        return float((tensor != other).double().mean())
    tensor, other = (torch.view_as_real(x.cpu()) if x.is_complex() else x.cpu().double() for x in (tensor, other))
    finite = tensor.isfinite()
    if not torch.equal(finite, other.isfinite()):
        return math.inf
    tensor, other = tensor[finite], other[finite]
    return float((tensor - other).abs().max() / other.abs().max().clamp(min=1e-6)) if len(tensor) else 0.0


def witnessed(run: Run, model: nn.Module, first: Witness | None = None, *, wide: bool = False) -> Witness:
    """Run a model, taking the decisions of another run, and return what it computed."""
    witness = Witness(first)
    with ExitStack() as hooks, states_given_back(model) as states, deterministic(wide=wide), witness:
        for path, layer in model.named_modules():
            if isinstance(layer, nn.Linear | _ConvNd):
                hooks.enter_context(layer.register_forward_hook(partial(witness.see, path)))
        outputs = list(tensors_in(run(model), set(states)))
    witness.outputs = [leaf if leaf.layout == torch.strided else leaf.to_dense() for leaf in outputs]
    return witness
