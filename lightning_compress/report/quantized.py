"""How is a model quantized: what stays float and why, and how far is each layer from float?"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_compress.modules.agreement import Run
from lightning_compress.quantization.agreement import rounding_errors
from lightning_compress.quantization.convert import record_of
from lightning_compress.quantization.plan import left_float
from lightning_compress.report.facts import QuantizedFacts


def quantized_facts(model: nn.Module) -> QuantizedFacts | None:
    """Return what was measured when a model was quantized; None for one in float."""
    record = record_of(model)
    if record is None:
        return None
    parted, floats = left_float(record)
    in_parts = {path: f"quantized in parts, {reason}" for path, reason in parted.items()}
    agreement = record.get("agreement") or {}
    return QuantizedFacts({**in_parts, **floats}, _relative(record.get("errors", {})), **agreement)


def with_errors(facts: QuantizedFacts | None, model: nn.Module, inputs: Any, run: Run) -> QuantizedFacts | None:
    """Add the errors of layers that weren't measured when the model was quantized, if its float form is kept.

    Args:
        facts: of the model.
        model: it is left as it is.
        inputs: of a batch.
        run: calls the model, or modules of it, with them.
    """
    if facts is None or facts.errors:
        return facts
    with suppress(Exception):  # it runs otherwise than the form that is measured
        return replace(facts, errors=_relative(rounding_errors(model, inputs, run)))
    return facts


def _relative(squared: Mapping[str, float]) -> dict[str, float]:
    return {layer: error**0.5 for layer, error in squared.items()}
