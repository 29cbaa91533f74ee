"""The contract of a change to a module's structure, and the stack in which several such changes lie."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import Any

from torch import nn

Record = Mapping[str, Any]
"""What a change did, as plain data. Names of parameters that it froze, if any, stand under ``frozen``."""

ORDER = ("channels", "quantization")
"""The stack, from the bottom up: the weights of narrowed layers are quantized, and not the other way round.

The room of a change has its key as its name, and the change itself as ``CHANGE`` in a file ``change.py``.
"""


class StructuralChange:
    """Says how one technique changes a module's structure, and how the change survives a checkpoint.

    What isn't abstract does nothing by default.

    Attributes:
        key: the change's entry in a checkpoint, and its place in `ORDER`.
        is_float: whether the weights that it leaves are the user's float weights.
    """

    key: str
    is_float: bool

    @abstractmethod
    def record(self, module: nn.Module) -> Record | None:
        """Return what was done to ``module``; None if nothing was."""

    def infer(self, module: nn.Module, state: Mapping[str, Any]) -> Record | None:
        """Return the record that follows from the shapes of a plain state dict; None if they are those of ``module``.

        Raises:
            CompressionError: the shapes alone don't tell.
        """
        return None

    @abstractmethod
    def same(self, module: nn.Module, record: Record | None) -> bool:
        """Tell whether ``module`` has the structure of ``record`` as far as loading cares."""

    @abstractmethod
    def apply_(self, module: nn.Module, record: Record) -> None:
        """Give a module that lacks this change the structure of ``record``; its weights are loaded afterwards.

        Raises:
            CompressionError: the module isn't the one that the record tells of.
        """

    @abstractmethod
    def revert_(self, module: nn.Module) -> None:
        """Take the change back, with the values that the module had; adapters are merged.

        Raises:
            CompressionError: these values are gone.
        """

    def strip_(self, module: nn.Module) -> None:
        """Remove what the change put on ``module`` itself, a module of a copy; values don't matter."""

    def finish_(self, module: nn.Module) -> None:
        """Bring ``module`` into the form that serves: convert what was prepared, merge adapters.

        Raises:
            CompressionError: it can't be done yet.
        """

    def forget_(self, module: nn.Module) -> None:
        """Drop what `revert_` would need, since the change is final."""

    def extra_state(self, module: nn.Module) -> dict[str, Any]:
        """Return what must be kept beside the weights, as parts of our entry."""
        return {}

    def load_extra_(self, module: nn.Module, entry: Record) -> None:
        """Take what `extra_state` put into the entry."""

    def settle_(self, module: nn.Module) -> None:
        """Make what the first call of a module that was loaded would make, as a call that is compiled can't."""

    def sync_(self, copied: nn.Module, module: nn.Module) -> None:
        """Bring an averaged copy of a module in line with it."""

    def replaces_average(self, record: Record) -> bool:
        """Tell whether the weights are those that serve: then a file drops an average of float weights."""
        return False

    def check(self, record: Record, use: str) -> None:
        """Raise if a module or file with this record can't be used so.

        Args:
            record: of the module, or of the file.
            use: ``fit``, the weights of a file are to be trained; ``train``, those of a module; ``float``, a module is
                to be compressed, and must be float.
        """


@cache
def changes() -> tuple[StructuralChange, ...]:
    """Load all changes, from the bottom of the stack up, by their names, since their rooms stand above this one."""
    return tuple(import_module(f"lightning_compress.{key}.change").CHANGE for key in ORDER)


def recorded(module: nn.Module) -> Iterator[tuple[StructuralChange, Record]]:
    """Yield the changes that were made to ``module``, from the bottom up, with their records."""
    for change in changes():
        if (record := change.record(module)) is not None:
            yield change, record


def in_entry(entry: Mapping[str, Any]) -> Iterator[tuple[StructuralChange, Record]]:
    """Yield the changes in a checkpoint's entry, from the bottom up, with their records."""
    return ((change, entry[change.key]) for change in changes() if change.key in entry)


def require_float(module: nn.Module, use: str = "float") -> None:
    """Raise unless ``module`` has float weights of its own.

    Args:
        module: any.
        use: ``train`` if it may be quantized by a technique that reverts itself in a fit.

    Raises:
        CompressionError: a change has taken them; its remedy is named.
    """
    for change in changes():
        if not change.is_float and (record := change.record(module)) is not None:
            change.check(record, use)


def is_float(module: nn.Module) -> bool:
    """Tell whether ``module`` has float weights of its own, narrowed or not."""
    return all(change.is_float or change.record(module) is None for change in changes())


def is_converted(module: nn.Module) -> bool:
    """Tell whether a change has left ``module`` in the form that serves, which isn't trained any more."""
    return any(change.replaces_average(record) for change, record in recorded(module))


def to_float_(module: nn.Module) -> None:
    """Revert those changes of ``module`` that take its float weights.

    Raises:
        CompressionError: its float weights are gone.
    """
    for change in reversed(changes()):
        if not change.is_float:
            change.revert_(module)


def match_(module: nn.Module, entry: Mapping[str, Any]) -> None:
    """Give ``module`` the structure of a checkpoint's entry.

    From the top of the stack down to the first change that differs all are reverted; from there those of the entry
    are applied.

    Raises:
        CompressionError, RuntimeError: the entry is of another module.
    """
    stack = changes()
    first = [*(change.same(module, entry.get(change.key)) for change in stack), False].index(False)
    for change in reversed(stack[first:]):
        change.revert_(module)
    for change in stack[first:]:
        if change.key in entry:
            change.apply_(module, entry[change.key])
