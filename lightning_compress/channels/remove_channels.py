"""`plan_removal` decides which channels go, before anything is touched; `remove_channels_` takes them out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_compress.channels.compensate import Compensation, fitted_narrow, take_fits_
from lightning_compress.channels.cutting.cut import check_shapes, cut_
from lightning_compress.channels.planning.importance import carry_scores_
from lightning_compress.channels.planning.output_changes import output_changes
from lightning_compress.channels.planning.plan import RemovalPlan
from lightning_compress.channels.planning.recipe import LEAST, SCOPE, make_recipe
from lightning_compress.channels.planning.search import make_plan
from lightning_compress.channels.tracing.deterministic import deterministic
from lightning_compress.channels.tracing.find_groups import find_groups
from lightning_compress.channels.tracing.groups import Run
from lightning_compress.channels.tracing.verify import Subject
from lightning_compress.compensation.runner import Runner
from lightning_compress.errors import CompressionError, invalid
from lightning_compress.modules.calls import Call, bind_batch, bind_example, samples_in, way_without_trainer
from lightning_compress.modules.copying import copy_module, copy_tensors
from lightning_compress.modules.resizing import Cut, resize_state_
from lightning_compress.structure.change import require_float
from lightning_compress.targets import Scope, Targets

_logger = logging.getLogger("lightning_compress")

CALIBRATION_BATCHES = 32


def plan_removal(
    model: nn.Module,
    inputs: Any = None,
    *,
    channels: float | None = None,
    params: float | None = None,
    macs: float | None = None,
    latency: float | None = None,
    importance: str | None = None,
    scope: Scope = SCOPE,
    targets: Targets | None = None,
    overrides: Mapping[str, float] | None = None,
    min_layer_channels: float = LEAST,
    round_to: int | None = None,
    seed: int = 0,
    blocks: bool = False,
    calibration: Iterable[Any] | None = None,
    calibration_batches: int = CALIBRATION_BATCHES,
) -> RemovalPlan:
    """Decide which channels, neurons, heads and hidden widths of ``model`` go, so that a budget is met.

    The model is traced on a copy, so that what hangs together goes together: the layers of a residual sum, a
    convolution and its BatchNorm, the rows of queries, keys and values of a head. What must keep its size is found
    too, and stays: outputs, what meets the inputs, what the code writes as a number. Each group is tried on a copy:
    without its channels the model computes what it computes with zeros in their place.

    Args:
        model: any module; nothing of it is changed.
        inputs: example inputs of the real shape: a tensor, a tuple of arguments, a dict of keywords; by default the
            model's ``example_input_array``, or the first batch of ``calibration``.
        channels: budget: the fraction of the channels that remains.
        params: budget: the fraction of the parameters that remains.
        macs: budget: the fraction of the multiply-accumulates on ``inputs`` that remains.
        latency: budget: the fraction of the time of a run on ``inputs`` that remains, measured here and now.
        importance: ``l1``, ``l2``, ``batchnorm``, ``taylor`` (call ``loss.backward()`` before), ``fpgm``, ``random``,
            ``outputs`` (measured on ``calibration``), or the import path of your own function: see `Importance`. By
            default ``outputs`` with ``calibration``, else ``l1``.
        scope: ``global`` ranks the channels of all layers together, but leaves no layer less than 3/4 of what it would
            keep if all lost the same fraction, or less where that misses the budget. ``layer`` takes the same fraction.
        targets: which layers; by default all that can lose channels and are trained. A width that a norm spans
            (LayerNorm, GroupNorm) is cut only if ``include`` names one of its layers exactly, as that is approximate.
        overrides: pattern of layers' paths to the fraction of their channels that remains; the last match wins.
        min_layer_channels: no layer keeps a smaller fraction of its channels.
        round_to: keep a multiple of this in each layer; by default of 8 in layers of 32 channels and more, or of less
            where that misses the budget.
        seed: of ``importance="random"``.
        blocks: whether residual blocks may leave whole too, those without which the outputs for the first batches of
            ``calibration``, or for ``inputs``, change least: pass real samples. Their inputs, or zeros, take their
            places.
        calibration: batches of what the model will be given, as for `quantize`: by them channels are chosen whose loss
            changes the outputs least.
        calibration_batches: how many of them at most.

    Returns:
        The plan; print it, then apply it with `remove_channels_`.

    Raises:
        CompressionError: bad arguments, or nothing can be removed; the reasons are listed.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> plan = plan_removal(model, torch.ones(1, 8), channels=0.5)
        >>> print(plan)
        0  16 -> 8
        stays whole: `2`: an output
        channels: 16 -> 8 (0.500)
        params: 178 -> 90 (0.506)
        macs per sample: 160 -> 80 (0.500)
        >>> remove_channels_(model, plan)
        >>> model
        Sequential(
          (0): Linear(in_features=8, out_features=8, bias=True)
          (1): ReLU()
          (2): Linear(in_features=8, out_features=2, bias=True)
        )
    """
    recipe = make_recipe(channels, params, macs, latency, importance, scope, targets or Targets(), overrides,
                         min_layer_channels, round_to, seed, blocks, calibration is not None)  # fmt: skip
    check_module(model)
    runner = Runner(model, way_without_trainer(model))
    batches = take_batches(calibration, calibration_batches)
    args, kwargs = _example(model, inputs, batches)
    with torch.inference_mode(False):
        measured = partial(_outputs, runner, batches[:_MEASURED]) if batches else None
        subject = Subject(model, runs_of(model, args, kwargs), copy_module, samples_in((args, kwargs)), measured)
        groups = find_groups(subject)
    carried = dict[str, Tensor]()
    if recipe.importance.needs_batches:
        carried = output_changes(runner, groups.all, batches, seed)
    if recipe.importance.needs_gradients:
        carry_scores_(model, groups.all, recipe.importance, carried)
        if not carried:
            raise CompressionError(
                f"`importance={importance!r}` must have gradients. Received: none. Call loss.backward() before."
            )
    return make_plan(subject, groups, recipe, carried)


def _outputs(runner: Runner, batches: Sequence[Any], twin: nn.Module) -> list[Any]:
    twin.eval()
    return [runner.run(twin, copy_tensors(batch)) for batch in batches]


_MEASURED = 2
"""So many batches tell how much the outputs change without a block: the model runs on them once for each trial."""


def take_batches(calibration: Iterable[Any] | None, count: int) -> list[Any]:
    """Take the first batches of a calibration.

    Raises:
        CompressionError: it is a tensor, or there is no batch.
    """
    if calibration is None:
        return []
    if isinstance(calibration, Tensor) or not isinstance(calibration, Iterable):
        raise invalid("calibration", "be batches", type(calibration).__name__, "Put a tensor in a list.")
    if type(count) is not int or count < 1:
        raise invalid("calibration_batches", "be a whole number, at least 1", count)
    if not (batches := list(islice(calibration, count))):
        raise invalid("calibration", "give at least one batch", "an empty loader")
    return batches


def _example(model: nn.Module, inputs: Any, batches: Sequence[Any]) -> Call:
    example = getattr(model, "example_input_array", None) if inputs is None else inputs
    if example is not None:
        return bind_example(example, next((parameter.device for parameter in model.parameters()), None))
    if not batches:
        raise invalid("inputs", "be example inputs", None, "Pass a tensor, or set model.example_input_array.")
    return bind_batch(model, batches[0])[0]


def check_module(model: nn.Module) -> None:
    """Raise for a module whose channels can't be followed at all."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise CompressionError(f"`model` must be of Python code. Received: {path or 'a model'} that is scripted.")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise CompressionError(
                f"`{name}` must have its shape. Received: a lazy layer that hasn't run yet. Run one forward pass."
            )
    require_float(model)


def runs_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Run]:
    """Evaluation, and training too if the model runs in it: both must go on working."""

    def evaluate(twin: nn.Module) -> Any:
        if any(module.training for module in twin.modules()):  # else as it is: a switch may empty what it keeps
            twin.eval()  # which need not return the module
        return twin(*args, **kwargs)

    def train(twin: nn.Module) -> Any:
        twin.train()
        return twin(*args, **kwargs)

    twin = copy_module(model)
    try:
        with deterministic():
            evaluate(twin)
    except Exception as error:  # it is the user's
        raise CompressionError(
            f"`inputs` must be what {type(model).__name__} runs on. Received: {type(error).__name__}: {error}."
        ) from error
    try:
        with deterministic():
            train(twin)
    except Exception:
        return [evaluate]  # it wants targets too, or a BatchNorm gets a single value
    return [evaluate, train]


def remove_channels_(
    model: nn.Module,
    plan: RemovalPlan,
    optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
    *,
    calibration: Iterable[Any] | None = None,
    calibration_batches: int = CALIBRATION_BATCHES,
) -> Compensation | None:
    """Apply a plan: channels leave ``model``, and what optimizers remember of them.

    Parameters stay the same objects, with their hooks and places in optimizers; the keys of ``state_dict`` stay.
    With ``calibration`` the layers that have lost inputs are fitted to what the whole model puts out on these batches:
    see `compensate_`. Without, running statistics of norms stay those of the wider model: run batches in training mode
    before you evaluate, through frozen norms too. In a Trainer `ChannelPruning` does that.

    Args:
        model: the module that the plan was made for.
        plan: from `plan_removal`.
        optimizers: that train it; their moments are cut with the same indices.
        calibration: batches **of the kind that the model will be given**: a fit serves what it has seen.
        calibration_batches: how many of them at most.

    Returns:
        With ``calibration``, what was fitted, and how well the outputs agree on samples that were held out.

    Raises:
        CompressionError: the plan is for another model, or for this one before other channels left; nothing has
            changed then.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> remove_channels_(model, plan_removal(model, torch.ones(1, 8), macs=0.25), [optimizer])
        >>> model[0].weight.shape
        torch.Size([4, 8])
    """
    if not isinstance(plan, RemovalPlan):
        raise invalid("plan", "be a plan", plan, "`plan_removal` makes one.")
    optimizers = [optimizers] if isinstance(optimizers, Optimizer) else optimizers
    if not isinstance(optimizers, Sequence) or not all(isinstance(optimizer, Optimizer) for optimizer in optimizers):
        raise invalid("optimizers", "be a list of optimizers", optimizers)
    check_shapes(model, plan.shapes)
    batches = take_batches(calibration, calibration_batches)
    with torch.inference_mode(False):
        if not batches:
            cut_together_(model, plan, optimizers)
            return None
        runner = Runner(model, way_without_trainer(model))
        fits, compensation = fitted_narrow(runner, plan, batches, "`calibration`")
        cut_together_(model, plan, optimizers)
        take_fits_(model, fits, compensation)
    _logger.info("remove_channels_: %s.", compensation)
    return compensation


def cut_together_(
    model: nn.Module,
    plan: RemovalPlan,
    optimizers: Iterable[Optimizer],
    copies: Iterable[nn.Module] = (),
    layers: Mapping[str, nn.Module] = MappingProxyType({}),
) -> tuple[Cut, list[str]]:
    """Cut a module, averaged ``copies`` of it, and ``layers`` beside it, which the plan names as its children.

    Returns:
        What was done to the module and to all parameters, and the optimizers that keep state of no known layout.
    """
    own = {name: dims for name, dims in plan.kept.items() if name.partition(".")[0] not in layers}
    changes = dict(cut_(model, own, plan.numbers).changes)
    for copied in copies:
        cut_(copied, own, plan.numbers)
    whole = Cut(plan.kept, plan.numbers, {})
    for name, layer in layers.items():
        changes.update(cut_(layer, whole.below(name).kept_indices, {}).changes)
    return Cut(own, plan.numbers, changes), resize_state_(optimizers, changes)
