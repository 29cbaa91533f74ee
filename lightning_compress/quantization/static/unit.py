"""A unit, a module that is quantized as a whole: where it stands, and for which calls it is traced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_compress.quantization.static.flows.flow import Signature

_LISTS = ("hooked", "floats", "widened", "unconverted")


@dataclass(frozen=True)
class Unit:
    """Describes one module that is traced and quantized as a whole.

    Attributes:
        path: where it stands, without ``_orig_mod``.
        signature: the calls that it is traced for.
        hooked: inner modules (paths in the unit) whose forward hooks must go on firing.
        floats: inner modules (paths in the unit) that stay float by the user's choice.
        flow: name of the flow that traces it.
        widened: inner ReLU6 (paths in the unit) that are ReLU in its traced form.
        unconverted: inner layers (paths in the unit) that were prepared, and are float in its int8 form all the same:
            their kernels were found wrong when it was converted.
        moved: inner layers (paths in the unit) whose outputs (``out``) or inputs (``in``) equalization or smoothing
            divided by such scales.
    """

    path: str
    signature: Signature
    hooked: tuple[str, ...] = ()
    floats: tuple[str, ...] = ()
    flow: str = "fx"
    widened: tuple[str, ...] = ()
    unconverted: tuple[str, ...] = ()
    moved: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        lists = {name: list(getattr(self, name)) for name in _LISTS}
        moved = {path: dict(scales) for path, scales in self.moved.items()}
        return {"path": self.path, "example": self.signature.example, "flow": self.flow, **lists, "moved": moved}

    @classmethod
    def from_description(cls, plain: dict[str, Any]) -> Unit:
        args, kwargs = plain["example"]
        signature = Signature(tuple(args), kwargs)
        lists = {name: tuple(plain[name]) for name in _LISTS}
        return cls(plain["path"], signature, flow=plain["flow"], **lists, moved=plain["moved"])
