"""The containers of a call and of its result as plain data, so that a file can say where its tensors belong."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor

from lightning_compress.errors import CompressionError

_PLAIN = (int, float, str, bool, type(None))


def described(value: Any, tensors: list[Tensor]) -> Any:
    """Return a nest as plain data, and put its tensors into ``tensors``.

    A tensor is its number; a dict ``{"dict": {key: ...}}``; a tuple ``{"tuple": [...]}``, a list ``{"list": [...]}``;
    anything else ``{"value": ...}``. Named tuples and dataclasses are dicts of their fields.

    Raises:
        CompressionError: it holds what isn't plain.

    Example:
        >>> import torch
        >>> tensors = []
        >>> plain = described({"a": torch.ones(1), "b": (None, torch.ones(2))}, tensors)
        >>> plain
        {'dict': {'a': 0, 'b': {'tuple': [{'value': None}, 1]}}}
        >>> gathered(plain, ["x", "y"])
        {'a': 'x', 'b': (None, 'y')}
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        return len(tensors) - 1
    if dataclasses.is_dataclass(value) and not isinstance(value, Mapping | type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {"dict": {str(key): described(part, tensors) for key, part in value.items()}}
    for kind, name in ((tuple, "tuple"), (list, "list")):
        if isinstance(value, kind):
            return {name: [described(part, tensors) for part in value]}
    if isinstance(value, _PLAIN):
        return {"value": value}
    raise CompressionError(
        "What an exported module takes and gives must be tensors, numbers and text in tuples, lists and dicts. "
        f"Received: {_kind(value)}. Export the module inside that has nothing else, or leave it out by an argument."
    )


def _kind(value: Any) -> str:
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return "a number that the sizes of tensors make, and which a file can't give"
    return f"a {type(value).__name__}"


def gathered(plain: Any, tensors: Sequence[Any]) -> Any:
    """Return the nest that `described` told of, with these ``tensors``."""
    if isinstance(plain, int):
        return tensors[plain]
    [(kind, parts)] = plain.items()
    if kind == "value":
        return parts
    if kind == "dict":
        return {key: gathered(part, tensors) for key, part in parts.items()}
    return {"tuple": tuple, "list": list}[kind](gathered(part, tensors) for part in parts)


def named(plain: Any, parameters: Sequence[str], alone: str = "", taken: Collection[str] = ()) -> tuple[str, ...]:
    """Name the tensors of a nest by their paths in it, in order; each name once.

    Args:
        plain: a call, ``(args, kwargs)``, or any nest.
        parameters: names of positional arguments.
        alone: what all names begin with; empty for a call.
        taken: names of others in the same file.

    Example:
        >>> import torch
        >>> named(described(((torch.ones(1),), {"mask": torch.ones(1)}), []), ["ids"])
        ('ids', 'mask')
        >>> named(described({"a": torch.ones(1), "b": (torch.ones(1),)}, []), [], "output")
        ('a', 'b_0')
    """
    if alone:
        paths = [path or alone for path in _paths(plain, "")]
        return _once([path if not path[0].isdigit() else f"{alone}_{path}" for path in paths], taken)
    args, kwargs = plain["tuple"]
    positional = [
        path
        for name, part in zip([*parameters, *map(str, range(len(args["tuple"])))], args["tuple"], strict=False)
        for path in _paths(part, name if not name.isdigit() else f"input_{name}")
    ]
    return _once([*positional, *_paths(kwargs, "")], taken)


def _once(paths: Sequence[str], taken: Collection[str]) -> tuple[str, ...]:
    """Number the names that are taken."""
    found: list[str] = []
    for path in paths:
        others = (f"{path}_{number}" for number in count(2))
        found.append(next(name for name in chain([path], others) if name not in taken and name not in found))
    return tuple(found)


def _paths(plain: Any, path: str) -> list[str]:
    if isinstance(plain, int):
        return [path]
    [(kind, parts)] = plain.items()
    if kind == "value":
        return []
    items = parts.items() if kind == "dict" else enumerate(parts)
    return [inner for key, part in items for inner in _paths(part, f"{path}_{key}".lstrip("_"))]
