"""Finds tensors that modules keep as plain attributes: caches, tables, folded weights, in containers too."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.modules.paths import clean_name
from lightning_compress.modules.resizing import KeptIndices

MARK = ":"
"""Before the attribute in such a tensor's name, as in ``encoder.:cache['cpu']``, which no parameter can have."""

_OF_TORCH = frozenset(vars(nn.Module()))


def cached_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that modules keep as attributes or in lists, tuples and dicts, by name.

    Example:
        >>> model = nn.ReLU()
        >>> model.table, model.cache = torch.ones(3), {"cpu": [torch.ones(2)]}
        >>> list(cached_tensors(model))
        [':table', ":cache['cpu'][0]"]
    """
    seen = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    found = {}
    for path, module in model.named_modules():
        prefix = f"{clean_name(path)}." if path else ""
        for attribute, value in list(vars(module).items()):
            if attribute not in _OF_TORCH and attribute != "_removed_channels":
                for key, tensor in _leaves(value, 3):
                    if id(tensor) not in seen and tensor.numel() > 1 and tensor.layout == torch.strided:
                        seen.add(id(tensor))
                        found[f"{prefix}{MARK}{attribute}{key}"] = tensor
    return found


def _leaves(value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield "", value
    elif depth and isinstance(value, (dict, list, tuple, deque)):
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            for rest, tensor in _leaves(item, depth - 1):
                yield f"[{key!r}]{rest}".replace(".", "·"), tensor


def kinds_of(model: nn.Module) -> set[tuple[type[nn.Module], str]]:
    """Return class and name of attributes that hold such tensors, but for weights that a hook computes."""
    modules = {clean_name(path): module for path, module in model.named_modules()}
    found = set()
    for path, _, attribute in (name.rpartition(MARK) for name in map(_container, cached_tensors(model))):
        module = modules[path.removesuffix(".")]
        if not any(name.startswith(f"{attribute}_") for name in module._parameters):
            found.add((type(module), attribute))
    return found


def empty_(model: nn.Module, kind: tuple[type[nn.Module], str], *, delete: bool = False) -> None:
    """Empty an attribute of all modules of a class, as it was before the first run, or delete it."""
    for module in model.modules():
        if type(module) is kind[0] and kind[1] in vars(module):
            value = vars(module)[kind[1]]
            if isinstance(value, (dict, list, deque)):
                value.clear()
            elif delete:
                del vars(module)[kind[1]]
            else:
                vars(module)[kind[1]] = None


def is_cached(name: str) -> bool:
    """Whether a name is that of such a tensor."""
    return name.rpartition(".")[2].startswith(MARK)


def present(model: nn.Module, kept: Mapping[str, KeptIndices]) -> dict[str, KeptIndices]:
    """Adapt a plan to such tensors as a model keeps now: these come and go.

    Entries of one container are alike, so that those for other sizes of inputs shrink too.
    """
    found = {name: dims for name, dims in kept.items() if not is_cached(name)}
    tensors = cached_tensors(model) if len(found) < len(kept) else {}
    for name, tensor in tensors.items():
        alike = [other for other in kept if is_cached(other) and _container(other) == _container(name)]
        for other in sorted(alike, key=lambda other: other != name):
            dims = kept[other]
            if all(dim < tensor.dim() and _fits(tensor, tensors.get(other), dim, dims[dim]) for dim in dims):
                found[name] = dims
                break
    return found


def _fits(tensor: Tensor, planned: Tensor | None, dim: int, indices: Tensor) -> bool:
    if planned is None:
        return len(indices) < tensor.shape[dim] > int(indices.max())
    return planned.dim() == tensor.dim() and planned.shape[dim] == tensor.shape[dim]


def _container(name: str) -> str:
    return name.partition("[")[0]


def forget_(model: nn.Module) -> None:
    """Empty what ``functools.lru_cache`` keeps of a model's methods, and of functions beside its classes."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    own = [kind for kind in kinds if kind.__module__.partition(".")[0] not in ("torch", "builtins")]
    files = {kind.__module__ for kind in own} & sys.modules.keys()
    for scope in (*map(vars, own), *map(vars, model.modules()), *(vars(sys.modules[file]) for file in files)):
        for held in list(scope.values()):
            value: Any = held.__func__ if isinstance(held, staticmethod | classmethod | MethodType) else held
            if type(value).__name__ == "_lru_cache_wrapper":
                value.cache_clear()
