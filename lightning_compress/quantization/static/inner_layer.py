"""A layer of a unit when it is called by itself, past the unit's traced form."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from lightning_compress.modules.routing import Form, StoredWeight, class_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class InnerLayer(Form):
    """Computes a layer as it was written, in float, with the values of its int8 weights.

    Equalization and smoothing divide the outputs of some layers by channel, and let the next take such inputs. Called
    alone, such a layer computes ``s_out f(x / s_in)``, which is what it computed before.

    Args:
        moved: the divisors by channel: ``out`` of the outputs, ``in`` of the inputs; either may be missing.
        weights: of the layer, in int8.
    """

    def __init__(self, moved: Mapping[str, Tensor] = _NOTHING, weights: Mapping[str, StoredWeight] = _NOTHING) -> None:
        super().__init__(weights)
        self.moved = dict(moved)

    def forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if "in" in self.moved and args:
            args = (args[0] / self._along(self.moved["in"], module, args[0]), *args[1:])
        elif "in" in self.moved:
            kwargs["input"] = kwargs["input"] / self._along(self.moved["in"], module, kwargs["input"])
        output = class_of(module).forward(module, *args, **kwargs)
        return output * self._along(self.moved["out"], module, output) if "out" in self.moved else output

    @staticmethod
    def _along(scales: Tensor, module: nn.Module, x: Tensor) -> Tensor:
        """View scales along the channels of ``x``, an input or output."""
        scales = scales.to(x.device, x.dtype)
        if isinstance(module, nn.Linear | nn.LayerNorm):
            return scales
        batched = not isinstance(module, CONVOLUTIONS) or x.dim() == module.weight.dim()
        return scales.view(-1, *[1] * (x.dim() - (2 if batched else 1)))
