"""Reads a checkpoint whatever else it holds, and runs no code from it.

Besides weights, Lightning pickles a module's hyperparameters and its callbacks' states, and these may be objects of any
class. What torch reads with ``weights_only=True`` is read; in place of everything else stands an object that does
nothing, and is left out in the end.
"""

from __future__ import annotations

import pickle
import warnings
from _compat_pickle import IMPORT_MAPPING
from typing import Any

import torch
from torch._weights_only_unpickler import _get_allowed_globals

_SHOWN = 8


class _Frozen(type):
    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"The file sets `{name}` of a class.")


class _Unknown(metaclass=_Frozen):
    """Stands for an object of a class that isn't read: accepts whatever a pickle does to it, and keeps nothing."""

    kind = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def append(self, item: Any) -> None:
        """Ignore what a pickle adds to a list."""

    extend = add = append


class _Known(metaclass=_Frozen):
    """Calls a function that torch takes for safe. A pickle holds this class alone, so that it can't change torch's."""

    kind = ""
    function: Any = None
    dtype = torch.uint8  # of an untyped storage, which is the one class that torch asks for something

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        try:
            return cls.function(*args, **kwargs)
        except Exception:  # most likely it was given something unknown
            return _unknown(cls.kind)()


def _unknown(kind: str) -> Any:
    return type("Unknown", (_Unknown,), {"kind": kind})


def _plain_tensor(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """Build a plain tensor in place of one of a subclass, or with attributes."""
    return function(*args)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        kind = f"{IMPORT_MAPPING.get(module, module)}.{name}"  # `torch.save` writes some in the words of Python 2
        # By the whole name, so that no path leads from something known to one of its attributes.
        known = _get_allowed_globals().get(kind)
        if known is None:
            return _unknown(kind)
        if not callable(known):
            return known
        if kind == "torch._tensor._rebuild_from_type_v2":
            known = _plain_tensor
        return type("Known", (_Known,), {"kind": kind, "function": staticmethod(known)})


class _Pickle:
    """Serves `torch.load` as its ``pickle_module``."""

    Unpickler = _Unpickler

    @staticmethod
    def load(file: Any, **kwargs: Any) -> Any:
        return _Unpickler(file, **kwargs).load()


def read_inert(path: str, reader: str) -> tuple[Any, dict[str, str]]:
    """Read a file on the CPU, without objects of classes that torch doesn't read with ``weights_only=True``.

    Warns once, in the name of ``reader``, if anything is left out.

    Returns:
        The content; and what was left out, by its place in the content, with its class.
    """
    with warnings.catch_warnings():
        # torch warns of its own storages and kinds of tensors, and of classes whose source it doesn't find.
        warnings.filterwarnings("ignore", message=".*(TypedStorage|quantize_per_tensor|retrieve source code).*")
        try:
            return torch.load(path, map_location="cpu", weights_only=True), {}
        except pickle.UnpicklingError:
            pickle_module: Any = _Pickle
            content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=pickle_module)
    left_out: dict[str, str] = {}
    if _drop_unknown_(content, "", left_out, {}):
        content = None
    shown = [f"`{place}` ({kind})" if place else kind for place, kind in left_out.items()]
    more = f", and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    warnings.warn(
        f"{reader} reads weights and plain data alone, and runs no code from a file. Left out of {str(path)!r}: "
        f"{', '.join(shown[:_SHOWN])}{more}.",
        stacklevel=3,
    )
    return content, left_out


def _drop_unknown_(tree: Any, place: str, left_out: dict[str, str], seen: dict[int, bool]) -> bool:
    """Take what is unknown out of dicts, and tell whether ``tree`` itself is unknown. A pickle may hold itself."""
    kind = tree if isinstance(tree, type) else type(tree)
    if issubclass(kind, _Unknown | _Known):
        left_out[place] = kind.kind
        return True
    if id(tree) in seen or not isinstance(tree, dict | list | tuple | set):
        return seen.get(id(tree), False)
    seen[id(tree)] = False
    if isinstance(tree, dict):
        for key, value in list(tree.items()):
            inner = f"{place}.{key}" if place else str(key)
            if _drop_unknown_(key, inner, left_out, seen) or _drop_unknown_(value, inner, left_out, seen):
                del tree[key]
    else:
        unknown = [item for item in tree if _drop_unknown_(item, place, left_out, seen)]
        seen[id(tree)] = bool(unknown)
    return seen[id(tree)]
