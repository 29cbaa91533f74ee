"""Checks what a checkpoint holds of a callback against a `TypedDict` that says what it must hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import NoneType
from typing import Any, NotRequired, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

from torch import Tensor

from lightning_compress.errors import CompressionError

STATE_VERSION = 1

_WORDS: dict[Any, str] = {
    int: "a whole number, at least 0",
    float: "a number",
    bool: "True or False",
    str: "a text",
    list: "a list",
    tuple: "a list",
    dict: "a dict",
    Tensor: "a tensor",
}
_ACCEPTED: dict[Any, Any] = {float: float | int, list: list | tuple, tuple: list | tuple}


class SavedState(TypedDict):
    """What a checkpoint holds of every callback that has a state: plain data, and the version of its form."""

    version: int


def check_saved(state: object, form: Any, owner: str) -> None:
    """Raise unless ``state`` is what the `TypedDict` ``form`` says; entries that it doesn't name are ignored.

    Whole numbers count something, so they are at least 0. A tuple stands for a list of that length.

    Args:
        state: what a checkpoint holds of a callback.
        form: made of numbers, texts, tensors, lists and dicts of them, and ``X | None``.
        owner: the callback, for messages.

    Raises:
        CompressionError: something is missing or of another kind, or another version of the package wrote it.

    Example:
        >>> check_saved({"version": 1}, SavedState, "ScheduledPruning")
        >>> check_saved({"version": 2}, SavedState, "ScheduledPruning")
        Traceback (most recent call last):
        lightning_compress.errors.CompressionError: The checkpoint's state of ScheduledPruning must have version 1. \
Received: version=2. Update lightning_compress, or resume with the version that wrote it.
    """
    version = state.get("version") if isinstance(state, dict) else None
    if type(version) is int and version != STATE_VERSION:
        raise CompressionError(
            f"The checkpoint's state of {owner} must have version {STATE_VERSION}. Received: version={version}. "
            "Update lightning_compress, or resume with the version that wrote it."
        )
    for place, must, received in _faults(state, form, ""):
        raise damaged(owner, f"have {must} as `{place}`" if place else f"be {must}", received, version)


def check_bounds(bounds: Iterable[Sequence[int]], owner: str) -> None:
    """Raise unless each window in a state starts before it ends."""
    for start, end in bounds:
        if start >= end:
            raise damaged(owner, "have a start before an end as `bounds`", f"{start} and {end}")


def damaged(owner: str, must: str, received: str, version: object = STATE_VERSION) -> CompressionError:
    """Build the error of a state that no callback has written so."""
    return CompressionError(
        f"The checkpoint's state of {owner} must {must}. Received: {received}, in a state of version {version!r}. "
        "The file is damaged, or something else wrote it: resume from another one, or begin a new fit from its weights "
        "with load_compressed(path, model)."
    )


def _faults(value: Any, form: Any, place: str) -> Iterator[tuple[str, str, str]]:
    """Yield where ``value`` isn't of ``form``, what must be there, and what is."""
    inner = get_args(form)
    if NoneType in inner:
        form, inner = inner[0], get_args(inner[0])
        if value is None:
            return
    kind = dict if is_typeddict(form) else get_origin(form) or form
    if kind is Any:
        return
    fits = isinstance(value, _ACCEPTED.get(kind, kind)) and isinstance(value, bool) == (kind is bool)
    if not fits or (kind is int and value < 0):
        yield place, _WORDS[kind], _shown(value)
    elif is_typeddict(form):
        for name, hint in get_type_hints(form, include_extras=True).items():
            required = get_origin(hint) is not NotRequired
            if name in value:
                hint = hint if required else get_args(hint)[0]
                yield from _faults(value[name], hint, f"{place}.{name}" if place else name)
            elif required:
                yield place, f"a dict with {name!r}", _shown([*value])
    elif kind is dict:
        for key, item in value.items():
            yield from _faults(key, inner[0], place)
            yield from _faults(item, inner[1], f"{place}.{key}")
    elif kind is tuple and len(value) != len(inner):
        yield place, f"a list of {len(inner)}", _shown(value)
    elif kind in (tuple, list):
        for index, item in enumerate(value):
            yield from _faults(item, inner[index] if kind is tuple else inner[0], f"{place}[{index}]")


def _shown(value: Any, longest: int = 60) -> str:
    text = f"a {type(value).__name__}" if isinstance(value, Tensor | dict) else repr(value)
    return text if len(text) <= longest else f"{text[:longest]}..."
