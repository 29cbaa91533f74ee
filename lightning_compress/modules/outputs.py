"""Outputs of a model as a flat list of tensors and a structure, whatever containers they came in; and back."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils import _pytree as pytree

_VARIABLE = (Tensor, Proxy, torch.SymInt, torch.SymFloat, torch.SymBool)
"""What a call computes; all other leaves are constants of the structure."""


@dataclass(frozen=True)
class Structure:
    """Containers, with a place for each tensor. Two are equal if they have the same types, keys and constants.

    Attributes:
        kind: what the container is; of a leaf, None for a tensor and a tuple around any other value.
        children: the structures of what it holds.
        like: what a container is made from that torch's pytrees don't know.
    """

    kind: Any
    children: tuple[Structure, ...] = ()
    like: Any = field(default=None, compare=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Structure:
        return self

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        """The containers with ``tensors`` in their places."""
        return self._rebuild(iter(tensors))

    def _rebuild(self, tensors: Iterator[Any]) -> Any:
        if self.kind is None:
            return next(tensors)
        if isinstance(self.kind, tuple):
            return self.kind[0]
        values = [child._rebuild(tensors) for child in self.children]
        return _filled(self.like, values) if self.like is not None else pytree.tree_unflatten(values, self.kind)


def flatten(output: Any) -> tuple[list[Any], Structure]:
    """The tensors of ``output``, in order, and the structure that `Structure.rebuild` puts them into.

    It sees into what torch's pytrees know, any other mapping, and dataclasses.

    Example:
        >>> from collections import OrderedDict
        >>> tensors, structure = flatten(OrderedDict(out=torch.ones(1), aux=(None, torch.zeros(1))))
        >>> structure.rebuild([2, 3])
        OrderedDict([('out', 2), ('aux', (None, 3))])
    """
    tensors: list[Any] = []
    return tensors, _structure(output, tensors)


def _structure(value: Any, tensors: list[Any]) -> Structure:
    if isinstance(value, _VARIABLE):
        tensors.append(value)
        return Structure(None)
    values, spec = pytree.tree_flatten(value, is_leaf=lambda inner: inner is not value)
    if not spec.is_leaf():
        return Structure(spec, tuple(_structure(each, tensors) for each in values))
    if not isinstance(value, Mapping) and (not dataclasses.is_dataclass(value) or isinstance(value, type)):
        return Structure((value,))
    keys, names, values = _parts(value)
    children = tuple(_structure(each, tensors) for each in values)
    return Structure(_Kind(type(value), keys, names), children, _filled(value, [None] * len(values)))


@dataclass(frozen=True)
class _Kind:
    """A mapping or dataclass that torch's pytrees don't know."""

    type: type
    keys: tuple[Any, ...]
    names: tuple[str, ...]


def _parts(value: Any) -> tuple[tuple[Any, ...], tuple[str, ...], list[Any]]:
    """The keys of a mapping, the names of its attributes (some keep their items there too), and the values of both."""
    keys = tuple(value) if isinstance(value, Mapping) else ()
    if not hasattr(value, "__dict__"):
        names = tuple(each.name for each in dataclasses.fields(value)) if dataclasses.is_dataclass(value) else ()
    else:
        names = () if vars(value) is value else tuple(vars(value))
    return keys, names, [*(value[key] for key in keys), *(getattr(value, name) for name in names)]


def _filled(like: Any, values: Sequence[Any]) -> Any:
    """A copy of ``like`` with these values as its parts."""
    made = copy.copy(like)
    keys, names, _ = _parts(like)
    for key, value in zip(keys, values, strict=False):
        made[key] = value
    for name, value in zip(names, values[len(keys) :], strict=True):
        object.__setattr__(made, name, value)
    return made


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
