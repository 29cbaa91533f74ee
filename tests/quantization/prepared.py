"""What tests look at in prepared and int8 modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_compress.modules.routing import form_of
from lightning_compress.quantization import Scheme
from lightning_compress.quantization.convert import prepare_
from lightning_compress.quantization.plan import make_plan
from lightning_compress.quantization.quantize import dry_run
from lightning_compress.quantization.static.graphs import int8_layers as int8_operators
from lightning_compress.quantization.static.inner_layer import InnerLayer
from lightning_compress.quantization.static.int8_unit import Int8Unit
from lightning_compress.quantization.static.rounding import ActivationQuantizer, WeightQuantizer
from lightning_compress.quantization.static.traced import Traced


def fake_quantizers(module: nn.Module) -> dict[str, nn.Module]:
    kinds = ActivationQuantizer, WeightQuantizer
    return {path: inner for path, inner in form_modules(module).items() if isinstance(inner, kinds)}


def form_modules(module: nn.Module) -> dict[str, nn.Module]:
    """The modules inside of forms, under the paths of the modules that compute in them."""
    return {
        f"{path}.{name}".strip("."): inner
        for path, routed in module.named_modules()
        if (form := form_of(routed)) is not None
        for name, inner in form.named_modules()
        if "_reference" not in name
    }


def int8_layers(module: nn.Module) -> list[str]:
    """Paths of the layers that are static int8."""
    forms = {path: form_of(inner) for path, inner in module.named_modules()}
    return [path for path, form in forms.items() if isinstance(form, InnerLayer | Int8Unit) and form.weights]


def trained_layers(module: nn.Module) -> set[str]:
    """Paths of the layers whose weights are rounded to int8 while they train."""
    forms = {path: form_of(inner) for path, inner in module.named_modules()}
    units = {path: form for path, form in forms.items() if isinstance(form, Traced)}
    return {
        f"{path}.{layer}".strip(".")
        for path, form in units.items()
        for layer in int8_operators(form.trace.graph, form.unit.floats).values()
    }


def prepare_for_training_(model: nn.Module, batch: Any, scheme: Scheme) -> None:
    """Prepare a model as a fit does, by one batch."""
    plan = make_plan(model, dry_run(model, batch), scheme, None, {}, training=True)
    prepare_(model, plan.describe(), plan.traces)


class At(Callback):
    """Calls back at a hook, with (trainer, module)."""

    def __init__(self, **hooks: Callable[[L.Trainer, Any], Any]) -> None:
        for name, function in hooks.items():
            setattr(self, name, lambda trainer, module, *_, function=function, **__: function(trainer, module))
