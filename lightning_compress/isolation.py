"""Runs that leave no trace in the module that is run: containers and numbers that it keeps are put back."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)
_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}


@contextmanager
def attributes_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Give these modules copies of the containers and tensors among its attributes, and its own ones back afterwards.

    Lists that a step appends to, states of metrics, caches and counters are what they were, and what was added is gone.
    Parameters, buffers, hooks and children aren't looked at, nor are objects of other classes.

    Example:
        >>> model = nn.ReLU()
        >>> model.outputs = [1]
        >>> with attributes_kept([model]):
        ...     model.outputs.append(2)
        ...     model.count = 3
        >>> model.outputs, hasattr(model, "count")
        ([1], False)
    """
    memo: dict[int, Any] = {}
    before = [(module, {name: vars(module)[name] for name in _own(module)}) for module in modules]
    try:
        for module, attributes in before:
            vars(module).update({name: _copied(value, memo) for name, value in attributes.items()})
        yield
    finally:
        for module, attributes in before:
            for name in _own(module) - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)


def _own(module: nn.Module) -> set[str]:
    return {name for name in vars(module) if name not in _OF_TORCH}


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        made = value.detach().clone()
        memo[id(value)] = made if value.is_leaf is False else made.requires_grad_(value.requires_grad)
    elif type(value) in _CONTAINERS:
        made = memo[id(value)] = copy.copy(value)
        if isinstance(value, dict):
            made.update({key: _copied(item, memo) for key, item in value.items()})
        elif not isinstance(value, set):
            made.clear()
            made.extend(_copied(item, memo) for item in value)
    else:
        return value
    return memo[id(value)]
