"""What a model puts out, whatever it wraps it in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.distributions import Distribution


def tensors_in(output: Any, _seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor in an output: in containers, in fields and attributes of objects, at any depth.

    Example:
        >>> import torch
        >>> [leaf.item() for leaf in tensors_in({"a": torch.tensor(1), "b": [torch.tensor(2), "c"]})]
        [1, 2]
    """
    seen = set() if _seen is None else _seen
    if isinstance(output, Tensor):
        yield output
        return
    if output is None or isinstance(output, (str, bytes, int, float, complex, type)) or id(output) in seen:
        return
    seen.add(id(output))
    if isinstance(output, Mapping):
        parts: Any = output.values()
    elif isinstance(output, (list, tuple, set, frozenset)):
        parts = output
    elif dataclasses.is_dataclass(output):
        parts = [getattr(output, field.name, None) for field in dataclasses.fields(output)]
    else:
        slots = [name for kind in type(output).__mro__ for name in getattr(kind, "__slots__", ())]
        parts = [*getattr(output, "__dict__", {}).values(), *(getattr(output, name, None) for name in slots)]
        if not isinstance(output, Distribution) and callable(output):
            return
    for part in parts:
        yield from tensors_in(part, seen)
