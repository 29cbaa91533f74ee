"""How far a quantized model is from float on the same batches, and which layers have the largest part in it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from typing import Any

from torch import nn

from lightning_compress.messages import named
from lightning_compress.modules.agreement import Agreement, Run, outputs_of
from lightning_compress.modules.copying import copy_tensors
from lightning_compress.modules.isolation import isolated_evaluation
from lightning_compress.modules.paths import modules_of
from lightning_compress.modules.routing import form_before
from lightning_compress.quantization.convert import record_of
from lightning_compress.quantization.static.errors import layer_errors
from lightning_compress.quantization.static.traced import Traced

BATCHES = 8
"""On so many batches the agreement is measured, at most: they are run twice more."""
LEAST = 0.98
"""A cosine below it is worth a warning."""
_WORST = 3


def record_agreement_(model: nn.Module, expected: Sequence[Sequence[Any]], batches: Sequence[Any], run: Run) -> None:
    """Measure how far a model is from the ``expected`` outputs of its float self, and write it into its record.

    Warns below `LEAST` of static int8, and names the layers whose outputs rounding changes most. Few bits are the
    user's choice.
    """
    record = record_of(model)
    assert record is not None
    agreement = Agreement.of(expected, outputs_of(model, batches, run))
    record["agreement"] = asdict(agreement)
    if not record["units"]:
        return
    with suppress(Exception):  # of a step of the user's, which another batch may suit
        record["errors"] = rounding_errors(model, batches[0], run)
    if agreement.cosine < LEAST:
        worst = sorted(record.get("errors", {}), key=lambda path: -record["errors"][path])[:_WORST]
        of_layers = f" Rounding changes most what {named(worst)} give." if worst else ""
        warnings.warn(
            f"The quantized model is far from the float one: {agreement}.{of_layers} Exclude such layers in `targets`, "
            "calibrate with StaticInt8(observer='histogram'), or train it so (QuantizationAwareTraining).",
            stacklevel=2,
        )


def rounding_errors(model: nn.Module, batch: Any, run: Run) -> dict[str, float]:
    """Return by static int8 layer ``|y' - y|^2 / |y|^2``, where y' is y rounded; of those whose float form is kept."""
    errors: dict[str, float] = {}
    with isolated_evaluation(model), ExitStack() as hooks:
        for path, module in modules_of(model).items():
            if isinstance(form := form_before(module), Traced) and form.graph is not None:
                watch = _watch(path, form, errors)
                hooks.enter_context(module.register_forward_pre_hook(watch, with_kwargs=True))
        run(model, copy_tensors(batch))
    return errors


def _watch(path: str, form: Traced, errors: dict[str, float]) -> Callable[..., None]:
    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (tensors := form.unit.signature.of_call(module, args, kwargs)) is not None:
            errors.update({f"{path}.{name}".strip("."): error for name, error in layer_errors(form, tensors).items()})

    return watch
