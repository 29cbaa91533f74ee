"""`quantize`: a new int8 model from a float one, no Trainer needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_compress.errors import CompressionError, invalid
from lightning_compress.inputs import run_step
from lightning_compress.quantization.calibrate import calibrate, evaluating
from lightning_compress.quantization.calls import CallLog, copy_module, quiet_random_state, record_calls
from lightning_compress.quantization.dynamic import linears
from lightning_compress.quantization.forms import convert_, forget_, form_of, make_dynamic_, prepare_
from lightning_compress.quantization.schemes import DynamicInt8, Scheme, StaticInt8, resolve
from lightning_compress.quantization.units import plan_units
from lightning_compress.targets import Targets

Model = TypeVar("Model", bound=nn.Module)


def quantize(
    model: Model,
    scheme: str | Scheme = "int8_static",
    calibration: Iterable[Any] | None = None,
    calibration_batches: int = 32,
    targets: Targets | None = None,
) -> Model:
    """A new model with the same interface whose layers compute in int8, on the CPU; ``model`` is left as it is.

    Args:
        model: any float module; called as ``model(*args)`` by the rule of `example_call`, or by its own
            ``calibration_step(batch)``.
        scheme: ``int8_static``, ``int8_dynamic``, or a scheme object.
        calibration: batches, such as a DataLoader; needed by ``int8_static``. A batch is what ``forward`` takes, or a
            tuple whose first element is, or a dict whose keys name the parameters of ``forward``.
        calibration_batches: how many of them at most.
        targets: which layers; by default all that the scheme has kernels for.

    Raises:
        CompressionError: bad arguments, no layer that can be quantized, or a model that is quantized already.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
        >>> batches = [torch.randn(8, 16, generator=torch.Generator().manual_seed(0)) for _ in range(4)]
        >>> int8 = quantize(model, "int8_static", calibration=batches)
        >>> bool((int8(batches[0]) - model(batches[0])).abs().max() < 0.1)
        True
    """
    scheme = resolve(scheme)
    check_batches(calibration_batches)
    if form_of(model) != "float":
        raise CompressionError(f"`model` must be a float model. Received: one that is {form_of(model)} already.")
    twin = copy_module(model).cpu()
    batches = iter(calibration or ())
    first = next(batches, None)
    with torch.inference_mode(False), evaluating(twin):
        quantize_(twin, scheme, first, batches, calibration_batches, targets)
    forget_(twin)
    return twin


def quantize_(
    model: nn.Module,
    scheme: Scheme,
    first: Any,
    batches: Iterable[Any],
    calibration_batches: int,
    targets: Targets | None = None,
    run: Callable[[nn.Module, Any], Any] = run_step,
) -> None:
    """Convert ``model`` in place; what it was stays aside for `forms.revert_`.

    Args:
        model: float, in evaluation mode.
        scheme: static or dynamic int8.
        first: the first calibration batch; may be None for a dynamic scheme and a model with ``example_input_array``.
        batches: the rest of them.
        calibration_batches: how many at most.
        targets: which layers.
        run: how a batch goes through the model.
    """
    if isinstance(scheme, DynamicInt8):
        chosen, floats = linears(model, targets)
        if first is not None or getattr(model, "example_input_array", None) is not None:
            called = dry_run(model, first, run).inputs
            floats |= {path: "it isn't called, its weights are read" for path in chosen if path not in called}
            chosen = [path for path in chosen if path in called]
        if not chosen:
            raise nothing_to_quantize(floats)
        make_dynamic_(model, chosen, scheme, floats)
        return
    assert isinstance(scheme, StaticInt8)
    if first is None:
        raise invalid("calibration", "be given for a static scheme", None, "Pass a loader of representative batches.")
    plan = plan_units(model, dry_run(model, first, run), scheme, targets, training=False)
    if not plan.units:
        raise nothing_to_quantize(plan.floats)
    prepare_(model, plan, scheme, training=False)
    calibrate(model, chain([first], batches), calibration_batches, run)
    convert_(model)


def dry_run(model: nn.Module, batch: Any, run: Callable[[nn.Module, Any], Any] = run_step) -> CallLog:
    """What one look at the model calls, in its present mode; draws nothing from the global random state."""
    with torch.no_grad(), quiet_random_state():
        return record_calls(model, lambda: run(model, batch))


def check_batches(calibration_batches: int) -> None:
    """Raise unless at least one batch is to calibrate."""
    if calibration_batches < 1:
        raise invalid("calibration_batches", "be at least 1", calibration_batches)


def nothing_to_quantize(floats: dict[str, str]) -> CompressionError:
    """The error of a model in which no layer can be quantized, with the reasons."""
    reasons = "; ".join(f"{path or 'the module'}: {reason}" for path, reason in list(floats.items())[:5])
    return CompressionError(
        "The model must have a layer that the scheme can quantize. Received: none. "
        f"{reasons or 'It has no convolution or linear layer'}."
    )
