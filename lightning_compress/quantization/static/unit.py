"""A unit, a module that is quantized as a whole: where it stands, and for which calls it is traced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_compress.quantization.static.equalize import widen_
from lightning_compress.quantization.static.signature import Signature
from lightning_compress.quantization.static.trace import Trace, trace

_LISTS = ("hooked", "floats", "opaque", "widened")


@dataclass(frozen=True)
class Unit:
    """Describes one module that is traced and quantized as a whole.

    Attributes:
        path: where it stands, without ``_orig_mod``.
        signature: the calls that it is traced for.
        hooked: inner modules (paths in the unit) whose forward hooks must go on firing.
        floats: inner modules (paths in the unit) that stay float by the user's choice.
        opaque: inner layers (paths in the unit) that have a scheme of their own, and are called as they are.
        widened: inner ReLU6 (paths in the unit) that are ReLU in its traced form.
        moved: inner layers (paths in the unit) whose outputs (``out``) or inputs (``in``) equalization or smoothing
            divided by such scales.
    """

    path: str
    signature: Signature
    hooked: tuple[str, ...] = ()
    floats: tuple[str, ...] = ()
    opaque: tuple[str, ...] = ()
    widened: tuple[str, ...] = ()
    moved: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        lists = {name: list(getattr(self, name)) for name in _LISTS}
        moved = {path: dict(scales) for path, scales in self.moved.items()}
        return {"path": self.path, "example": self.signature.example, **lists, "moved": moved}

    @classmethod
    def from_description(cls, plain: dict[str, Any]) -> Unit:
        args, kwargs = plain["example"]
        signature = Signature(tuple(args), kwargs)
        lists = {name: tuple(plain[name]) for name in _LISTS}
        return cls(plain["path"], signature, **lists, moved=plain["moved"])


def trace_unit(module: nn.Module, unit: Unit, training: bool) -> Trace:
    """Trace the module of a unit in evaluation, or as it trains; it isn't changed."""
    found = trace(module, unit.signature, unit.hooked, unit.opaque, training=training)
    widen_(found.graph, unit.widened)
    return found
