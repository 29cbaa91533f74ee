"""What the tests look at in layers that are quantized one by one."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from lightning_compress.modules.routing import form_of, route_, with_forms
from lightning_compress.quantization.convert import record_of
from lightning_compress.quantization.numerics.scheme import Scheme


def schemes(model: nn.Module) -> dict[str, str]:
    """Path to the scheme of each layer that has one of its own."""
    return {layer["path"]: layer["scheme"]["name"] for layer in (record_of(model) or {})["layers"]}


def count(model: nn.Module, kind: str) -> int:
    """How many modules and forms are of the class with this name."""
    return sum(type(module).__name__ == kind for module in with_forms(model))


def routed(layer: nn.Module, scheme: Scheme) -> Any:
    """A copy of a layer that computes in a scheme's form."""
    twin = copy.deepcopy(layer).eval()
    route_(twin, scheme.form(twin))
    return twin


WEIGHT_ONLY, DYNAMIC = "int8_weight_only", "int8_dynamic"


def rounded(layer: Any) -> tuple[Tensor, Tensor]:
    """The weights that a quantized layer computes with, and the step of each row."""
    weight: Any = form_of(layer).weights["weight"]  # type: ignore[union-attr]
    return weight.values(), weight.scale.float().view(len(weight.scale), -1)
