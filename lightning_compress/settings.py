"""How was an object made? The arguments that it was given, as plain data that YAML can say."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

_NOT_GIVEN = object()


def given_arguments(kind: type, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a constructor that differ from its defaults, as `plain` says them.

    Example:
        >>> class Tool:
        ...     def __init__(self, size: int, name: str = "plain") -> None: ...
        >>> given_arguments(Tool, (3,), {"name": "plain"})
        {'size': 3}
    """
    try:
        signature = inspect.signature(kind.__init__)  # type: ignore[misc]
        bound = signature.bind(None, *args, **kwargs)
    except (TypeError, ValueError):  # the constructor itself will say so
        return {}
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    named = {name: plain(value) for name, value in list(bound.arguments.items())[1:]}
    return {name: value for name, value in named.items() if value != plain(defaults.get(name, _NOT_GIVEN))}


def plain(value: Any) -> Any:
    """Return a value as YAML says it: of an object its class, of a configuration also what differs from the defaults.

    Example:
        >>> from lightning_compress.targets import Targets
        >>> plain([1, Targets(include=["head"])])
        [1, {'class_path': 'lightning_compress.Targets', 'init_args': {'include': ['head']}}]
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, type):
        return path_of(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    described: dict[str, Any] = {"class_path": path_of(type(value))}
    if is_dataclass(value):
        shown = [part for part in fields(value) if part.init and part.repr]
        said = {part.name: (plain(getattr(value, part.name)), plain(_default(part))) for part in shown}
        named = {name: chosen for name, (chosen, default) in said.items() if chosen != default}
        described |= {"init_args": named} if named else {}
    return described


def _default(part: Field[Any]) -> Any:
    return part.default if part.default_factory is MISSING else part.default_factory()


def path_of(kind: type) -> str:
    """Return the import path of a class; of a public one of this package the short path."""
    room, _, inner = kind.__module__.partition(".")
    return f"{room if room == 'lightning_compress' and inner else kind.__module__}.{kind.__qualname__}"
