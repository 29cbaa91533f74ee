"""Corrects sizes that a module's code writes or computes from others, such as ``C // heads``, after a cut.

A module whose code does so becomes one of a class that differs in nothing but its forward, under which calls that name
a size of before get the one of now. What is corrected is plain data on the module, so that a checkpoint can hold it.
"""

from __future__ import annotations

import functools
import math
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.proxy import Proxy, TraceError
from torch.overrides import TorchFunctionMode

WRITTEN = "_written_sizes"
"""Where a module keeps its corrections."""

Correction = list[Any]
"""Of a view, ``["view", rank, [[dim, before, now, length], ...], rank, [[dim, before, now], ...]]``: what it takes, and
what it makes. Of a width that parts are taken of, ``["parts", rank, [[dim, before, now]], n, [[end, end now], ...]]``.
A dimension may hold several alike, such as the heads of each sample: before and now are of one, length is of all."""


def set_written_(module: nn.Module, corrections: list[Correction] | None) -> None:
    """Let the sizes that a module's code writes be corrected from now on; with None, or none, as they are written.

    Example:
        >>> class Heads(nn.Module):
        ...     def forward(self, x):
        ...         return x.view(len(x), 4, 8)
        >>> heads = Heads()
        >>> set_written_(heads, [["view", 2, [[1, 32, 24, 24]], 3, [[1, 4, 3]]]])
        >>> heads(torch.ones(2, 24)).shape, type(heads).__name__
        (torch.Size([2, 3, 8]), 'Heads')
    """
    plain = getattr(type(module), "_plain_class", type(module))
    if corrections:
        module.__dict__[WRITTEN] = corrections
        module.__class__ = _corrected(plain)
    else:
        module.__dict__.pop(WRITTEN, None)
        module.__class__ = plain


def corrected_sizes(module: nn.Module) -> set[tuple[int, int]]:
    """Return the sizes that a module's code writes in views, each with the size that replaces it."""
    views = [view for view in vars(module).get(WRITTEN, ()) if view[0] == "view"]
    return {(before, now) for view in views for _, before, now in view[4]}


def _corrected(plain: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass in whose forward sizes are corrected."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(argument, Proxy) for argument in (*args, *kwargs.values())):
            raise TraceError("sizes that its code writes are corrected, for which shapes must be known")
        with _Corrections(self):
            return plain.forward(self, *args, **kwargs)

    return with_forward(plain, forward, WRITTEN, set_written_)


_CLASSES: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}


def with_forward(
    plain: type[nn.Module], forward: Callable[..., Any], key: str, become: Callable[[nn.Module, Any], None]
) -> type[nn.Module]:
    """Return the class that differs from ``plain`` in nothing but its forward.

    What its instances keep under ``key`` makes one of a plain instance by ``become(module, kept)``, after a pickle too.
    """
    if (plain, key) in _CLASSES:
        return _CLASSES[plain, key]

    def reduce(self: nn.Module, protocol: Any) -> Any:
        # Pickle finds classes by their names: that of the user is found, and made into this one again.
        made: Any = plain.__reduce_ex__(self, protocol)
        function, arguments, *state = made
        arguments = tuple(plain if argument is type(self) else argument for argument in arguments)
        return _remade, (function, arguments, become, self.__dict__[key]), *state

    own = {"forward": functools.wraps(plain.forward)(forward), "__reduce_ex__": reduce, "_plain_class": plain}
    names = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    _CLASSES[plain, key] = type(plain.__name__, (plain,), {**own, **names})
    return _CLASSES[plain, key]


def _remade(
    function: Callable[..., nn.Module], arguments: tuple[Any, ...], become: Callable[[nn.Module, Any], None], kept: Any
) -> nn.Module:
    module = function(*arguments)
    become(module, kept)
    return module


class _Corrections(TorchFunctionMode):
    """Replaces sizes in calls by a module's own code, not in those by the modules that it calls."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.corrections: Sequence[Correction] = module.__dict__[WRITTEN]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        correct = _CALLS.get(func)
        if correct is not None and _runs(self.module):
            with torch._C.DisableTorchFunction():
                args, kwargs = correct(self.corrections, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _runs(module: nn.Module) -> bool:
    """Whether ``module`` is the innermost one that is being called; a compiler can't be asked."""
    if torch.compiler.is_compiling():
        return True
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not nn.Module._call_impl.__code__:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is None or frame.f_locals["self"] is module


Arguments = tuple[Any, dict[str, Any]]


def _reshape(corrections: Sequence[Correction], args: Any, kwargs: dict[str, Any]) -> Arguments:
    x, *rest = args
    written = kwargs.get("shape", kwargs.get("size")) or (rest[0] if isinstance(rest[0], (list, tuple)) else rest)
    if written and isinstance(written[0], torch.dtype):
        return args, kwargs
    return (x, sized(corrections, x, written)), {}


def _unflatten(corrections: Sequence[Correction], args: Any, kwargs: dict[str, Any]) -> Arguments:
    x, dim, sizes = _by_name("input dim sizes", args, kwargs)
    if not isinstance(dim, int):
        return args, kwargs
    dim %= x.dim()
    shape = sized(corrections, x, (*x.shape[:dim], *sizes, *x.shape[dim + 1 :]))
    return (x, dim, tuple(shape[dim : dim + len(sizes)])), {}


def _expand(corrections: Sequence[Correction], args: Any, kwargs: dict[str, Any]) -> Arguments:
    x, *rest = args
    written = kwargs.get("size") or (rest[0] if isinstance(rest[0], (list, tuple)) else rest)
    for view in _views(corrections, x, written):
        meant = _meant(view, written)
        missing = len(meant) - x.dim()
        if all(meant[missing + dim] in (-1, size) for dim, size in enumerate(x.shape) if size != 1):
            return (x, meant), {}
    return args, kwargs


def sized(corrections: Sequence[Correction], x: Tensor, written: Sequence[int]) -> Sequence[int]:
    """Return the sizes of a view of ``x`` after the cut where the code says ``written``."""
    fits = -1 not in written and math.prod(written) == x.numel()
    for view in _views(corrections, x, written):
        meant = _meant(view, written)
        # What fits may be wrong all the same, such as four heads of four where two of eight are left.
        if fits and not _is_long_as(x, view):
            continue
        if x.numel() % math.prod(meant) == 0 if -1 in meant else x.numel() == math.prod(meant):
            return meant
    return written


def _views(corrections: Sequence[Correction], x: Tensor, written: Sequence[int]) -> Iterator[Correction]:
    """Yield the corrections that may be meant by a call, the likeliest first."""
    found = [view for view in corrections if view[0] == "view" and (view[1], view[3]) == (x.dim(), len(written))]
    certain = [view for view in found if _is_long_as(x, view)]
    # Numbers of windows or tokens may be as long as a width: what was written tells the calls apart then.
    yield from sorted(certain, key=lambda view: (not _is_long_as(x, view, whole=True), _unconfirmed(view, written)))
    for view in found:
        if view not in certain and not any(x.shape[dim] % now for dim, _, now, _ in _telling(view)):
            yield view


def _is_long_as(x: Tensor, view: Correction, *, whole: bool = False) -> bool:
    # A length that an export leaves open is none that could be compared.
    rows = view[2] if whole else _telling(view)
    return all(type(x.shape[dim]) is int and x.shape[dim] == length for dim, _, _, length in rows)


def _telling(view: Correction) -> list[list[int]]:
    """Return the dimensions that identify a view: those that shrank. Others, such as windows, differ by call."""
    return [row for row in view[2] if row[1] != row[2]] or view[2]


def _unconfirmed(view: Correction, written: Sequence[int]) -> int:
    return sum(written[dim] == -1 or written[dim] % before != 0 for dim, before, _ in view[4])


def _meant(view: Correction, written: Sequence[int]) -> list[int]:
    """Return the corrected sizes; one that code computes from another cut size is neither the old nor the new."""
    meant = list(written)
    for dim, before, now in view[4]:
        if written[dim] != -1 and written[dim] % before == 0:
            meant[dim] = written[dim] // before * now
        elif written[dim] != -1 and written[dim] % now != 0:
            meant[dim] = now
    return meant


def _split(corrections: Sequence[Correction], args: Any, kwargs: dict[str, Any]) -> Arguments:
    x, sizes, dim = _by_name("tensor split_size_or_sections dim", args, kwargs)
    places, before = _places_now(corrections, x, dim)
    if not places:
        return args, kwargs
    whole = [sizes] * (before // sizes) if isinstance(sizes, int) else list(sizes)
    ends = [sum(whole[: end + 1]) for end in range(len(whole))]
    if not whole or ends[-1] != before or any(end not in places for end in ends):
        return args, kwargs
    now = [places[end] for end in ends]
    return (x, [end - start for start, end in zip([0, *now], now, strict=False)], dim), {}


_ALIASES = {"split_size": "split_size_or_sections", "self": "tensor", "indices": "split_size_or_sections"}


def _by_name(names: str, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """Return arguments by their names; a ``dim`` is 0 unless it is given."""
    named = {_ALIASES.get(name, name): argument for name, argument in kwargs.items()}
    given = {"dim": 0, **dict(zip(names.split(), args, strict=False)), **named}
    return [given.get(name) for name in names.split()]


def _tensor_split(corrections: Sequence[Correction], args: Any, kwargs: dict[str, Any]) -> Arguments:
    x, ends, dim = _by_name("tensor split_size_or_sections dim", args, kwargs)
    places, _ = _places_now(corrections, x, dim)
    if not isinstance(ends, (list, tuple)) or any(end not in places for end in ends):
        return args, kwargs
    return (x, tuple(places[end] for end in ends), dim), {}


def _narrow(corrections: Sequence[Correction], args: Any, kwargs: dict[str, Any]) -> Arguments:
    x, dim, start, length = _by_name("input dim start length", args, kwargs)
    places, _ = _places_now(corrections, x, dim)
    if isinstance(start, Tensor) or start not in places or start + length not in places:
        return args, kwargs
    return (x, dim, places[start], places[start + length] - places[start]), {}


def _item(corrections: Sequence[Correction], args: Any, kwargs: dict[str, Any]) -> Arguments:
    x, index = args
    items = list(index) if isinstance(index, tuple) else [index]
    if not any(isinstance(item, slice) and (item.start or item.stop) for item in items):
        return args, kwargs
    taken = [_dims_of(item) for item in items]
    dim = 0
    for place, (item, dims) in enumerate(zip(items, taken, strict=True)):
        if item is Ellipsis:
            dim += x.dim() - sum(taken)
        elif isinstance(item, slice) and item.step in (None, 1):
            places, before = _places_now(corrections, x, dim)
            ends = [end + before if isinstance(end, int) and end < 0 else end for end in (item.start, item.stop)]
            if all(end is None or end in places for end in ends):
                items[place] = slice(*(None if end is None else places[end] for end in ends))
        dim += dims
    return (x, tuple(items)), {}


def _dims_of(item: Any) -> int:
    """Return how many dimensions an item of an index takes."""
    if isinstance(item, Tensor) and item.dtype == torch.bool:
        return item.dim()
    return int(item is not None and item is not Ellipsis)


def _places_now(corrections: Sequence[Correction], x: Any, dim: int) -> tuple[dict[int, int], int]:
    """Return where the ends of parts lie now, by where they lay before, and the width before."""
    dim = dim % x.dim() if x.dim() else 0
    for correction in corrections:
        if correction[0] == "parts" and correction[1] == x.dim():
            [(place, before, now)] = correction[2]
            if (place, now) == (dim, x.shape[dim]):
                return {0: 0, **dict(map(tuple, correction[4])), before: now}, before
    return {}, 0


_CALLS: dict[Any, Callable[[Sequence[Correction], Any, dict[str, Any]], Arguments]] = {
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), _reshape),
    **dict.fromkeys((Tensor.unflatten, torch.unflatten), _unflatten),
    **dict.fromkeys((Tensor.split, torch.split, Tensor.split_with_sizes, torch.split_with_sizes), _split),
    **dict.fromkeys((Tensor.tensor_split, torch.tensor_split), _tensor_split),
    **dict.fromkeys((Tensor.narrow, torch.narrow), _narrow),
    **dict.fromkeys((Tensor.__getitem__, operator.getitem), _item),
    Tensor.expand: _expand,
}
WRITES = frozenset(_CALLS)
"""Calls whose sizes can be corrected."""
