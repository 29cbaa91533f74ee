"""`quantize`: a new quantized model from a float one, no Trainer needed."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from itertools import chain, islice
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from lightning_compress.errors import CompressionError, invalid, nearest
from lightning_compress.modules.call_log import CallLog, record_calls
from lightning_compress.modules.calls import run_example, run_step, way_without_trainer
from lightning_compress.modules.copying import copy_module, copy_tensors
from lightning_compress.modules.isolation import evaluation_mode, isolated_evaluation, isolated_random_state
from lightning_compress.modules.outputs import least_cosine, outer_outputs
from lightning_compress.modules.paths import clean_name, compressible_modules, device_of, is_at_or_below
from lightning_compress.quantization.convert import (
    convert_,
    decide_per_token_,
    forget_,
    prepare_,
    record_of,
)
from lightning_compress.quantization.layers.gptq_calibration import calibrated_weights
from lightning_compress.quantization.layers.plan import Overrides, Weights, check_overrides, packable
from lightning_compress.quantization.schemes import GPTQ, DynamicInt8, Packed, Scheme, StaticInt8, resolve
from lightning_compress.quantization.slower import slower_than_float
from lightning_compress.quantization.static.calibrate import calibrate
from lightning_compress.quantization.static.equalize import adjust_
from lightning_compress.quantization.static.flows import FLOWS, load
from lightning_compress.quantization.static.plan import make_plan, per_token_line
from lightning_compress.quantization.static.signature import canonical
from lightning_compress.quantization.static.unit import Unit
from lightning_compress.structure.change import require_float
from lightning_compress.targets import Targets

_logger = logging.getLogger("lightning_compress")

Model = TypeVar("Model", bound=nn.Module)


def quantize(
    model: Model,
    scheme: str | Scheme = "int8_static",
    calibration: Iterable[Any] | None = None,
    calibration_batches: int = 32,
    targets: Targets | None = None,
    overrides: Overrides | None = None,
    flow: Literal["auto", "fx", "pt2e"] = "auto",
) -> Model:
    """A new model with the same interface whose layers compute in int8, on the CPU; ``model`` is left as it is.

    Args:
        model: any float module; a batch goes through its own ``calibration_step(batch)``, or ``forward``.
        scheme: ``int8_static``, ``int8_dynamic``, ``int8_weight_only``, or a scheme object.
        calibration: batches, such as a DataLoader; needed by ``int8_static``. A batch is what ``forward`` takes, or a
            tuple whose first element is, or a dict whose keys name the parameters of ``forward``.
        calibration_batches: how many of them at most.
        targets: which layers; by default all that the scheme has kernels for.
        overrides: pattern of layers' paths to the scheme that they get instead, ``int8_dynamic`` or
            ``int8_weight_only``; the last match wins.
        flow: what makes static int8: ``fx`` runs int8 kernels at once, ``pt2e`` sees through more code and is compiled
            by inductor at the first call. ``auto`` is ``fx``, and ``pt2e`` where that can quantize nothing.

    Raises:
        CompressionError: bad arguments, no layer that can be quantized, or a model that is quantized already.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
        >>> batches = [torch.randn(8, 16, generator=torch.Generator().manual_seed(0)) for _ in range(4)]
        >>> int8 = quantize(model, "int8_static", calibration=batches, overrides={"2": "int8_weight_only"})
        >>> bool((int8(batches[0]) - model(batches[0])).abs().max() < 0.1)
        True
    """
    recipe = Recipe(scheme, calibration_batches, targets, overrides, flow)
    if isinstance(calibration, Tensor):
        raise invalid("calibration", "be batches", f"a tensor of shape {tuple(calibration.shape)}", "Put it in a list.")
    require_float(model)
    with torch.inference_mode(False):
        shared = recipe.only_read(model)
        twin = copy_module(model, shared) if shared else copy_module(model).cpu()
        batches = iter(calibration if calibration is not None else ())
        first, run = next(batches, None), way_without_trainer(twin)
        if first is not None and recipe.calibrates:
            with isolated_evaluation(twin):
                run(twin, copy_tensors(first))  # what fails before a batch is bound as it should be is no call
        with evaluation_mode(twin):
            quantize_(twin, recipe, first, batches, run)
        forget_(twin)
        own_parameters_(twin, shared)
        _say(model, twin, recipe, first, run)
    return twin


def _say(
    model: nn.Module, quantized: nn.Module, recipe: Recipe, batch: Any, run: Callable[[nn.Module, Any], Any]
) -> None:
    """Log what a user would not expect: layers that need more than their scheme's default, and a form that is slow."""
    found = per_token_line(record_of(quantized) or {})
    lines = [found] if found and recipe.looks else []
    if batch is not None and device_of(model) == device_of(quantized):
        floats = copy_module(model, list(model.parameters()))
        lines += [line for line in [slower_than_float(floats, quantized, run, batch)] if line]
    if lines:
        _logger.warning("\n  ".join(["quantize:", *lines]))


def own_parameters_(model: nn.Module, shared: Collection[nn.Parameter]) -> None:
    """Give a model that has ``shared`` parameters with another its own, where its quantized layers have left any."""
    keys = {id(parameter) for parameter in shared}
    copies: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in keys:
                if id(parameter) not in copies:
                    copies[id(parameter)] = copy.deepcopy(parameter)
                setattr(module, name, copies[id(parameter)])  # recurrent layers keep a second list of theirs


class Recipe:
    """What to quantize with, checked; the arguments are those of `quantize`.

    Raises:
        CompressionError: one of them is wrong.
    """

    def __init__(
        self,
        scheme: str | Scheme,
        calibration_batches: int,
        targets: Targets | None,
        overrides: Overrides | None,
        flow: str,
    ) -> None:
        self.scheme = resolve(scheme)
        if not isinstance(targets, Targets | None):
            raise invalid("targets", "be a Targets", targets, "Write Targets(include=[...]).")
        self.targets = targets
        self.overrides = check_overrides(overrides)
        if flow not in ("auto", *FLOWS):
            raise invalid("flow", f"be one of auto, {', '.join(FLOWS)}", flow, nearest(str(flow), FLOWS))
        if flow != "auto" and not isinstance(self.scheme, StaticInt8):
            raise invalid("flow", "be 'auto' for a scheme that works layer by layer", flow)
        self.flow = flow
        if not isinstance(calibration_batches, int) or calibration_batches < 1:
            raise invalid("calibration_batches", "be at least 1", calibration_batches)
        self.calibration_batches = calibration_batches
        schemes = (self.scheme, *self.overrides.values())
        self.calibrates = [one for one in schemes if isinstance(one, StaticInt8 | GPTQ)]
        self.looks = any(isinstance(one, DynamicInt8) and one.per_token is None for one in schemes)
        self.needs_cpu = not all(isinstance(one, Packed) for one in schemes)

    def only_read(self, model: nn.Module) -> list[nn.Parameter]:
        """Parameters that a copy to be quantized may share with ``model``, so that they aren't in memory twice."""
        if self.needs_cpu:
            return []
        written = {id(layer.weight) for layer in model.modules() if getattr(layer, "max_norm", None) is not None}
        found = (parameter for layer in model.modules() for parameter in packable(layer))
        return [parameter for parameter in found if id(parameter) not in written]


def quantize_(
    model: nn.Module,
    recipe: Recipe,
    first: Any,
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], Any] = run_step,
) -> None:
    """Convert ``model`` in place; what it was stays aside for `forms.revert_`.

    Args:
        model: float, in evaluation mode.
        recipe: what to quantize with.
        first: the first calibration batch; may be None for a dynamic scheme, which then looks at what is called with
            the ``example_input_array``, if there is one.
        batches: the rest of them.
        run: how a batch goes through the model.
    """
    scheme, log = recipe.scheme, None
    if first is None and recipe.calibrates:
        remedy = "Pass a loader of representative batches."
        raise invalid("calibration", f"be given for {recipe.calibrates[0].name}", None, remedy)
    if isinstance(scheme, StaticInt8):
        _check_float32(model)
    with outer_outputs(model) as expected:
        if first is not None:
            log = dry_run(model, copy_tensors(first), run, keep_inputs=isinstance(scheme, StaticInt8))
        elif getattr(model, "example_input_array", None) is not None:
            log = dry_run(model, None, lambda model, _: run_example(model), keep_inputs=False)
    plan = make_plan(model, log, scheme, recipe.targets, recipe.overrides, recipe.flow, training=False)
    if isinstance(scheme, StaticInt8) and log is not None:
        plan.units = [adjusted(model, unit, log, scheme) for unit in plan.units]
    fitted = {path: one for path, one in plan.layers.items() if isinstance(one, GPTQ)}
    batches = chain([first], batches)
    weights: Weights = {}
    if fitted:
        batches = list(islice(batches, recipe.calibration_batches))
        weights = calibrated_weights(model, fitted, batches, run)
    prepare_(model, plan, scheme, training=False)
    if plan.units:
        calibrate(model, batches, recipe.calibration_batches, run)
    convert_(model, weights)
    if first is not None:

        def cosine() -> float:
            with outer_outputs(model) as got:
                _check_runs(model, first, run)
            return least_cosine(*([output for _, output in calls] for calls in (expected, got)))

        decide_per_token_(model, cosine)


def _check_float32(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise CompressionError(
                f"`model` must be in float32 for static int8. Received: `{name}` in {parameter.dtype}. Call .float()."
            )


def _check_runs(model: nn.Module, batch: Any, run: Callable[[nn.Module, Any], Any]) -> None:
    """Raise now if the quantized model can't run; code that reads a layer's weights finds none there."""
    try:
        with isolated_evaluation(model), torch.compiler.set_stance("force_eager"):
            run(model, copy_tensors(batch))
    except Exception as error:
        raise CompressionError(
            f"The quantized model must run on a calibration batch. Received: {type(error).__name__}: {error}. "
            "Code that reads the weights of a quantized layer can't; exclude that layer from `targets`."
        ) from error


def adjusted(model: nn.Module, unit: Unit, log: CallLog, scheme: StaticInt8, training: bool = False) -> Unit:
    """Equalize and smooth the weights of one unit of a model in evaluation, as far as `fx` can trace it.

    Before ``training`` frozen weights stay as they are, and so does each ReLU6: what is trained is the same function.
    """
    module = compressible_modules(model)[unit.path]
    inputs = unit.signature.tensors(*canonical(module, *log.inputs[unit.path]))
    assert inputs is not None
    inputs = [one.float() if one.is_floating_point() else one for one in inputs]  # of a step in mixed precision
    try:
        graph = load("fx").trace(module, unit.signature, ()).graph
    except Exception:  # as with any tracing of a user's forward
        return unit
    assert isinstance(graph, GraphModule)
    owners = Counter(id(one) for layer in model.modules() for one in layer.parameters(recurse=False))
    kept = {key for key, count in owners.items() if count > 1}
    kept |= {
        id(one)
        for name, one in module.named_parameters()
        if any(is_at_or_below(clean_name(name), path) for path in unit.floats)
    }
    if training:
        kept |= {id(one) for one in module.parameters() if not one.requires_grad}
    widen = unit.flow == "fx" and not training
    with isolated_random_state():
        relu6 = adjust_(graph, inputs, kept, equalize=scheme.equalize, smooth=scheme.smooth, widen=widen)
    return replace(unit, widened=tuple(relu6))


def dry_run(
    model: nn.Module, batch: Any, run: Callable[[nn.Module, Any], Any] = run_step, keep_inputs: bool = True
) -> CallLog:
    """What one look at the model calls in evaluation."""
    with isolated_evaluation(model):
        return record_calls(model, lambda: run(model, batch), keep_inputs)
