"""Calibration: evens out the ranges of weights first, then lets observers see those of activations on batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_compress.errors import CompressionError
from lightning_compress.modules.call_log import CallLog
from lightning_compress.modules.calls import run_step
from lightning_compress.modules.copying import copy_tensors
from lightning_compress.modules.isolation import isolated_evaluation, isolated_random_state
from lightning_compress.modules.paths import clean_name, compressible_modules, is_at_or_below, modules_of
from lightning_compress.quantization.numerics.int8 import StaticInt8
from lightning_compress.quantization.numerics.scheme import Scheme
from lightning_compress.quantization.static.equalize import adjust_, widen_
from lightning_compress.quantization.static.graphs import copy_graph, evaluate_modes_
from lightning_compress.quantization.static.signature import canonical
from lightning_compress.quantization.static.trace import Trace
from lightning_compress.quantization.static.traced import traced_units
from lightning_compress.quantization.static.unit import Unit


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    limit: int,
    run: Callable[[nn.Module, Any], Any] = run_step,
) -> int:
    """Run up to ``limit`` ``batches`` through a prepared model in evaluation mode; returns how many there were.

    Nothing but observers changes: no gradients, no BatchNorm statistics, no global random state.

    Raises:
        CompressionError: there wasn't a single batch.
    """
    count = 0
    with isolated_evaluation(model), _observing(model):
        for batch in batches:
            if count == limit:
                break
            run(model, copy_tensors(batch))
            count += 1
    if count == 0:
        raise CompressionError("`calibration` must give at least one batch. Received: an empty loader.")
    _check_ranges(model)
    return count


def _check_ranges(model: nn.Module) -> None:
    """Raise where a quantizer saw what has no range."""
    for form in traced_units(model):
        for place in form.places:
            if not form.quantizers[place.name].is_finite():
                path = f"{form.unit.path}.{place.after}".strip(".")
                raise CompressionError(f"`calibration` must be finite. Received: NaN or infinity, seen by `{path}`.")


@contextmanager
def _observing(model: nn.Module) -> Iterator[None]:
    traced = traced_units(model)
    for form in traced:
        form.calibrating = True
    try:
        yield
    finally:
        for form in traced:
            form.calibrating = False


def adjusted(model: nn.Module, unit: Unit, trace: Trace, log: CallLog, scheme: Scheme, training: bool = False) -> Unit:
    """Equalize and smooth the weights of one unit of a model in evaluation, and widen its ``trace``.

    Before ``training`` that is done only where the scheme asks for it; frozen weights stay as they are, and so does
    each ReLU6: what is trained is the same function.
    """
    module = compressible_modules(model)[unit.path]
    inputs = unit.signature.tensors(*canonical(module, *log.inputs[unit.path]))
    assert inputs is not None and isinstance(scheme, StaticInt8)
    equalize, smooth = (not training if asked is None else asked for asked in (scheme.equalize, scheme.smooth))
    if not (equalize or smooth):
        return unit
    # Those of a step in mixed precision are in float32 here.
    inputs = [tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs]
    graph = copy_graph(trace.graph)
    evaluate_modes_(graph)
    owners = Counter(id(parameter) for layer in model.modules() for parameter in layer.parameters(recurse=False))
    fixed = {key for key, count in owners.items() if count > 1}
    fixed |= {
        id(parameter)
        for name, parameter in module.named_parameters()
        if any(is_at_or_below(clean_name(name), path) for path in unit.floats)
    }
    if training:
        fixed |= {id(parameter) for parameter in module.parameters() if not parameter.requires_grad}
    with isolated_random_state():
        relu6, found = adjust_(graph, inputs, fixed, equalize=equalize, smooth=smooth, widen=not training)
    widen_(trace.graph, relu6)
    by_weight = {id(weight): scales for weight, scales in found.items()}
    paths = {path: id(dict(layer._parameters).get("weight")) for path, layer in modules_of(module).items()}
    moved = {path: by_weight[key] for path, key in paths.items() if key in by_weight}
    return replace(unit, widened=tuple(relu6), moved=moved)
