"""`quantize`: a new quantized model from a float one, no Trainer needed."""

from __future__ import annotations

import copy
import logging
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import chain, islice
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError, invalid
from lightning_compress.modules.agreement import outputs_of
from lightning_compress.modules.call_log import CallLog, record_calls
from lightning_compress.modules.calls import run_example, run_step, way_without_trainer
from lightning_compress.modules.copying import copy_module, copy_tensors
from lightning_compress.modules.isolation import evaluation_mode, isolated_evaluation
from lightning_compress.modules.latency import brief, is_slower, round_ratios
from lightning_compress.modules.outputs import least_cosine, outer_outputs
from lightning_compress.modules.paths import device_of, modules_of
from lightning_compress.quantization.agreement import BATCHES, record_agreement_
from lightning_compress.quantization.convert import convert_, forget_, prepare_, record_of
from lightning_compress.quantization.layers.gptq_calibration import calibrated_weights
from lightning_compress.quantization.layers.per_token import give_tokens_scales_
from lightning_compress.quantization.numerics.scheme import Scheme
from lightning_compress.quantization.plan import make_plan, per_token_line
from lightning_compress.quantization.recipe import Overrides, Recipe
from lightning_compress.quantization.schemes import from_description
from lightning_compress.quantization.static.calibrate import adjusted, calibrate
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
    flow: Literal["auto", "pt2e"] = "auto",
) -> Model:
    """Make a new model with the same interface and weights of 2 to 8 bits; ``model`` is left as it is.

    Args:
        model: any float module; a batch goes through its own ``calibration_step(batch)``, or ``forward``.
        scheme: ``int8_static`` and ``int8_dynamic`` compute in int8, on the CPU; ``int8_weight_only``,
            ``int4_weight_only``, ``nf4`` and ``gptq`` store weights in few bits and compute in float, on the model's
            device. Or a scheme object, or the import path of a class of yours.
        calibration: batches, such as a DataLoader; needed by ``int8_static`` and ``gptq``. A batch is what ``forward``
            takes, or a tuple whose first element is, or a dict whose keys name the parameters of ``forward``.
        calibration_batches: how many of them at most.
        targets: which layers; by default all that the scheme has kernels for.
        overrides: pattern of layers' paths to the scheme that they get instead, any but ``int8_static``; the last
            match wins.
        flow: the way to static int8; there is one, ``pt2e``, through `torch.export`.

    Returns:
        A copy, whose layers that can't be quantized are float still.

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
    lines = [found] if found and recipe.decides_per_token else []
    if batch is not None and device_of(model) == device_of(quantized):
        floats = copy_module(model, list(model.parameters()))
        lines += [line for line in [slower_than_float(floats, quantized, run, batch)] if line]
    if lines:
        _logger.warning("\n  ".join(["quantize:", *lines]))


def own_parameters_(model: nn.Module, shared: Collection[nn.Parameter]) -> None:
    """Give a model that has ``shared`` parameters with another its own, where its quantized layers have left any."""
    keys = {id(parameter) for parameter in shared}
    copies: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in keys:
                setattr(module, name, copy.deepcopy(parameter, copies))  # recurrent layers keep a second list of theirs


def quantize_(
    model: nn.Module,
    recipe: Recipe,
    first: Any,
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], Any] = run_step,
    others: Sequence[Callable[[nn.Module, Any], Any]] = (),
) -> None:
    """Convert a float ``model`` in evaluation mode in place; what it was is kept for `convert.revert_`.

    What ``others`` among the ways of a batch call from outside of a module stays a module of its own. The ``first`` of
    the batches may be None for a scheme that doesn't calibrate, which then looks at what is called with the
    ``example_input_array``, if there is one.
    """
    scheme, log = recipe.scheme, None
    if first is None and recipe.calibrates:
        remedy = "Pass a loader of representative batches."
        raise invalid("calibration", f"be given for {recipe.calibrates[0].name}", None, remedy)
    if scheme.whole:
        _check_float32(model)
    with outer_outputs(model) as expected:
        if first is not None:
            log = dry_run(model, copy_tensors(first), run, keep_inputs=scheme.whole)
            for other in others if scheme.whole else ():
                with suppress(Exception):  # not every step takes what the first one does
                    seen = dry_run(model, copy_tensors(first), other, keep_inputs=False)
                    log.merge(replace(seen, inputs={}))
        elif getattr(model, "example_input_array", None) is not None:
            log = dry_run(model, None, lambda model, _: run_example(model), keep_inputs=False)
    plan = make_plan(model, log, scheme, recipe.targets, recipe.overrides, training=False)
    if log is not None:
        plan.units = [adjusted(model, unit, plan.traces[unit.path], log, scheme) for unit in plan.units]
    fitted = {path: wish for path, wish in plan.layers.items() if wish.fits}
    found = iter(() if first is None else islice(chain([first], batches), recipe.calibration_batches))
    measured = list(islice(found, BATCHES if recipe.calibrates else 1))
    floats = outputs_of(model, measured, run)
    batches, weights = chain(measured, found), dict[str, Any]()
    if fitted:
        batches = list(batches)
        weights = calibrated_weights(model, fitted, batches, run)
    prepare_(model, plan.describe(), plan.traces)
    if plan.units:
        calibrate(model, batches, recipe.calibration_batches, run)
    convert_(model, weights)
    if first is None:
        return
    assert log is not None
    called = set(log.inputs)

    def cosine() -> float:
        with outer_outputs(model) as got:
            _check_runs(model, first, run, called)
        return least_cosine(*([output for _, output in calls] for calls in (expected, got)))

    if recipe.decides_per_token:
        _decide_per_token_(model, cosine)
    else:
        _check_runs(model, first, run, called)
    record_agreement_(model, floats, measured, run)


def _decide_per_token_(model: nn.Module, cosine: Callable[[], float]) -> None:
    """Give those layers of a converted model a scale for each token that need one, where the scheme leaves it open."""
    record = record_of(model)
    assert record is not None
    schemes = {layer["path"]: layer["scheme"] for layer in record["layers"]}
    undecided = [path for path, scheme in schemes.items() if from_description(scheme).decides_per_token]
    for path in give_tokens_scales_(model, undecided, cosine):
        schemes[path]["per_token"] = True


def _check_float32(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise CompressionError(
                f"`model` must be in float32 for static int8. Received: `{name}` in {parameter.dtype}. Call .float()."
            )


def _check_runs(
    model: nn.Module, batch: Any, run: Callable[[nn.Module, Any], Any], before: Collection[str] = ()
) -> None:
    """Raise now if the quantized model can't run, or passes over layers that it called ``before``."""
    try:
        missed = passed_over(model, batch, run, before)
    except Exception as error:
        raise CompressionError(
            f"The quantized model must run on a calibration batch. Received: {type(error).__name__}: {error}. "
            "Code that writes to the weights of a quantized layer can't; exclude that layer from `targets`."
        ) from error
    if missed:
        raise CompressionError(f"The model must call its quantized layers as it called the float ones. {missed}")


def passed_over(model: nn.Module, batch: Any, run: Callable[[nn.Module, Any], Any], before: Collection[str]) -> str:
    """Say which quantized layers of those called ``before`` a run doesn't call any more; empty if it calls all."""
    record, modules, called = record_of(model) or {}, modules_of(model), set[str]()
    parts = (*record.get("units", ()), *record.get("layers", ()))
    paths = {part["path"] for part in parts if part["path"] in before}
    with ExitStack() as hooks, isolated_evaluation(model), torch.compiler.set_stance("force_eager"):
        for path in paths:
            hooks.enter_context(modules[path].register_forward_pre_hook(lambda *_, path=path: called.add(path)))
        run(model, copy_tensors(batch))
    if not (missed := sorted(paths - called)):
        return ""
    return (
        f"Received: `{missed[0]}` left out. `type(layer)` is another class now: ask by `isinstance`, or exclude that "
        "layer from `targets`."
    )


def dry_run(
    model: nn.Module, batch: Any, run: Callable[[nn.Module, Any], Any] = run_step, keep_inputs: bool = True
) -> CallLog:
    """Record what a run of the model calls in evaluation."""
    with isolated_evaluation(model):
        return record_calls(model, lambda: run(model, batch), keep_inputs)


def slower_than_float(
    floats: nn.Module,
    quantized: nn.Module,
    run: Callable[[nn.Module, Any], Any],
    batch: Any,
    *,
    fixed_rounds: bool = False,
) -> str:
    """Return a line for the log and the report if ``quantized`` takes longer than ``floats``; empty if it doesn't.

    Both take turns for about 0.3 s, 4 calls of each at least, or as many whatever they take, where other processes must
    follow. What can't be put back afterwards, such as lists that grow, changes. Forms that are compiled at their first
    call aren't timed.
    """
    found = _ratios(floats, quantized, run, batch, fixed_rounds)
    if found is None or not is_slower(found):
        return ""
    return (
        f"slower than float here: a batch takes {statistics.median(found):.2f} times as long in the quantized form "
        f"(the median of {len(found)} rounds in turns)"
    )


def time_ratio(
    before: nn.Module, after: nn.Module, run: Callable[[nn.Module, Any], Any], batch: Any, *, fixed_rounds: bool = False
) -> float | None:
    """Return how many times as long as in ``before`` a batch takes in ``after``, None if that can't be timed.

    See `slower_than_float`.
    """
    found = _ratios(before, after, run, batch, fixed_rounds)
    return None if found is None else statistics.median(found)


def _ratios(
    before: nn.Module, after: nn.Module, run: Callable[[nn.Module, Any], Any], batch: Any, fixed_rounds: bool
) -> tuple[float, ...] | None:
    for record in (record_of(before) or {}, record_of(after) or {}):
        if record.get("units") and record["scheme"]["engine"] == "inductor":
            return None
    try:
        return round_ratios(before, after, lambda model: run(model, copy_tensors(batch)), **brief(fixed_rounds))
    except Exception as error:  # it is the user's; to be timed is no reason to fail
        _logger.debug("The quantized model wasn't timed: %s", error)
        return None
