"""Removed channels as a change of a module's structure: see `StructuralChange`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_compress.channels.cutting.record import by_shapes, fits, record_of, take_widths_
from lightning_compress.structure.change import Record, StructuralChange


class ChannelRemoval:
    """The widths of a module that has lost channels."""

    key = "channels"
    is_float = True

    def record(self, module: nn.Module) -> Record | None:
        return record_of(module) or None

    def infer(self, module: nn.Module, state: Mapping[str, Any]) -> Record | None:
        return by_shapes(module, state) or None

    def same(self, module: nn.Module, record: Record | None) -> bool:
        return fits(module, dict(record or {}))

    def apply_(self, module: nn.Module, record: Record) -> None:
        take_widths_(module, dict(record))

    def revert_(self, module: nn.Module) -> None:
        take_widths_(module, {})

    def strip_(self, module: nn.Module) -> None:
        """Nothing: a narrow module in a file is narrow."""

    def finish_(self, module: nn.Module) -> None:
        """Nothing: a narrow module serves as it is."""

    def forget_(self, module: nn.Module) -> None:
        """Nothing: what left is gone."""

    def extra_state(self, module: nn.Module, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {}

    def load_extra_(self, module: nn.Module, states: Sequence[dict[str, Any]], entry: Record) -> None:
        """Nothing: all tensors are the user's."""

    def sync_(self, copied: nn.Module, module: nn.Module) -> None:
        """Nothing: averaged copies are cut when the module is."""

    def replaces_average(self, record: Record) -> bool:
        return False

    def check(self, record: Record, use: str) -> None:
        """Nothing: narrowed modules are trained and compressed like others."""


CHANGE: StructuralChange = ChannelRemoval()
