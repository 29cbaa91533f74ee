"""Removed channels as a change of a module's structure: see `StructuralChange`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_compress.channels.cutting.record import by_shapes, fits, record_of, take_widths_
from lightning_compress.structure.change import Record, StructuralChange


class ChannelRemoval(StructuralChange):
    """The widths of a module that has lost channels. A narrow module serves, and is saved, as it is."""

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


CHANGE = ChannelRemoval()
