"""How is a model quantized: what stays float and why, and how far is each layer from float?"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import nn

from lightning_compress.distillation.calling import call
from lightning_compress.modules.paths import device_of
from lightning_compress.quantization.agreement import rounding_errors
from lightning_compress.quantization.convert import record_of
from lightning_compress.quantization.plan import left_float
from lightning_compress.report.facts import QuantizedFacts
from lightning_compress.report.inputs import to_device


def quantized_facts(model: nn.Module, example_inputs: Any = None) -> QuantizedFacts | None:
    """Return what is known of a quantized model; None for one in float.

    Args:
        model: any.
        example_inputs: on which the errors of layers are measured, unless they are known already.
    """
    record = record_of(model)
    if record is None:
        return None
    parted, floats = left_float(record)
    errors: dict[str, float] = record.get("errors", {})
    if not errors and example_inputs is not None:
        inputs = to_device(example_inputs, device_of(model))
        with suppress(Exception):  # it runs otherwise than the form that is measured
            errors = rounding_errors(model, inputs, call)
    agreement = record.get("agreement") or {}
    return QuantizedFacts(
        floats={**{path: f"quantized in parts, {reason}" for path, reason in parted.items()}, **floats},
        errors={layer: error**0.5 for layer, error in errors.items()},
        **agreement,
    )
