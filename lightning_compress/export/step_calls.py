"""Which module of a LightningModule becomes a file, and with what is it called? Its own steps say so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor, nn

from lightning_compress.calibration import calibration_loader, calibration_source
from lightning_compress.deployable import deployable
from lightning_compress.distillation.learner import Learner
from lightning_compress.errors import CompressionError, invalid, nearest
from lightning_compress.export.nest import described
from lightning_compress.export.nest import named as argument_names
from lightning_compress.messages import named
from lightning_compress.modules.call_log import CallLog, as_seen, record_calls
from lightning_compress.modules.calls import Call, Forward, parameter_names, samples_in
from lightning_compress.modules.copying import copy_module
from lightning_compress.modules.isolation import isolated_evaluation
from lightning_compress.modules.paths import is_at_or_below, is_below, modules_of
from lightning_compress.probe import Feed, Step, data_feed
from lightning_compress.quantization.convert import keep_record_
from lightning_compress.structure.change import to_float_


def part_path(model: nn.Module, path: str) -> str:
    """Return the path of the module that becomes a file: of a module that distils it is the student, or lies in it.

    Raises:
        CompressionError: there is no such module, or it helps in training alone.
    """
    known = [inner for inner in modules_of(model) if inner]
    if path and path not in known:
        raise invalid("module", "be the path of a module", path, nearest(path, known))
    if not isinstance(model, Learner):
        return path
    path = path or "student"
    if not is_at_or_below(path, "student"):
        raise invalid("module", "be `student`, or lie in it", path, "Nothing else of a module that distils serves.")
    return path


def served_part(trainer: Any, model: nn.Module, path: str) -> nn.Module:
    """Return a plain copy of the module at a path, as it serves: see `deployable`."""
    served, inside = deployable(model, trainer), part_path(model, path)
    if isinstance(model, Learner):
        inside = inside.removeprefix("student").lstrip(".")
    part = modules_of(served)[inside]
    if inside:
        keep_record_(part, served, inside)
    return part


def float_part(model: nn.Module, path: str) -> nn.Module | None:
    """Return a plain copy of the module at a path in float; None where its float weights are gone."""
    twin = copy_module(model)
    try:
        to_float_(twin)
    except CompressionError:
        return None
    return served_part(None, twin, path)


def feed_of_steps(trainer: Any, probe: Any, batches: Iterator[Any]) -> tuple[Feed, Iterator[Any]]:
    """Return the way of batches through a silent copy of a LightningModule, and the batches, one that it takes first.

    It is ``calibration_step`` where there is one, else ``test_step``, ``validation_step``, ``predict_step``, or
    ``forward``.

    Raises:
        CompressionError: none of them takes a batch.
    """
    feed = data_feed(trainer, probe, "test")
    if trainer.world_size > 1:  # a step may wait for processes that don't run it
        feed.ways = [way for way in feed.ways if isinstance(way, Forward)]
    return feed, feed.choose(probe, batches)


def step_calls(probe: nn.Module, feed: Feed, batches: Iterator[Any], module: str, most: int) -> tuple[str, list[Call]]:
    """Return the path of what is exported, and calls of it.

    Args:
        probe: a silent copy, see `make_probe`.
        feed: runs a step of it.
        batches: for the step.
        module: the path that the user named, or none: then it is what the step calls from outside of all modules.
        most: of calls.

    Raises:
        CompressionError: there is no such module, or the step calls several or none.
    """
    first = next(batches, None)
    if first is None:
        raise CompressionError("The module must run one batch. Received: a loader without any.")
    log = log_of(probe, feed, first)
    step = feed.ways[0].__name__
    path = module or _outermost(probe, log, step)
    calls: list[Call] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(as_seen((args, kwargs)))

    with modules_of(probe)[part_path(probe, path)].register_forward_pre_hook(keep, with_kwargs=True):
        for batch in chain([first], batches):
            with isolated_evaluation(probe):
                feed(probe, batch)
            if len(calls) >= most:
                break
    if not calls:
        raise invalid("module", f"be called by {step}", path, f"It calls {named(_called(probe, log))}.")
    return path, calls[:most]


def calls_alike(
    module: nn.Module, calls: Sequence[Call], dynamic_batch: bool
) -> tuple[list[Call], dict[str, set[int]]]:
    """Return the calls that one file takes, those with the arguments of the first; and the dimensions that vary.

    Args:
        module: that is called.
        calls: of it.
        dynamic_batch: whether the number of samples may differ.
    """
    example: list[Tensor] = []
    nest = described(calls[0], example)
    names, alike, varying = argument_names(nest, parameter_names(module)), list[Call](), dict[str, set[int]]()
    for call in calls:
        tensors: list[Tensor] = []
        same = described(call, tensors) == nest and [x.dim() for x in tensors] == [x.dim() for x in example]
        if not same or not (dynamic_batch or samples_in(tensors) == samples_in(example)):
            continue
        alike.append(call)
        for name, tensor, first in zip(names, tensors, example, strict=True):
            places = {place for place in range(1, first.dim()) if tensor.shape[place] != first.shape[place]}
            varying[name] = varying.get(name, set()) | places
    return alike, varying


def loader_of_calls(trainer: Any, model: Any) -> Any:
    """Return the loader whose batches make calls: what calibrates, else what trains; None where there is neither."""
    trained = getattr(trainer, "train_dataloader", None)
    if calibration_source(trainer, model) is None and trained is not None:
        return trained
    try:
        return calibration_loader(trainer, model)
    except CompressionError:
        return None


def feed_of_test_step(trainer: Any) -> Feed:
    """Return the way of batches through ``test_step``."""
    return Feed(trainer, [Step("test")], "Set `test=False`, or let `test_step` run on such batches.")


def why_untested(trainer: Any, probe: nn.Module, batch: Any, path: str) -> str:
    """Say why ``test_step`` doesn't run what is exported as a whole; empty if it does, or takes no such batch."""
    try:
        log = log_of(probe, feed_of_test_step(trainer), batch)
    except CompressionError:
        return ""
    return why_not_tested(probe, log, path)


def untested(reason: str) -> CompressionError:
    """Return the error of a ``test_step`` whose metrics wouldn't be those of the file."""
    return CompressionError(
        "`test` must be False, or `test_step` run all of the exported module by calling it: else its metrics aren't "
        f"those of the file. Received: a `test_step` that {reason}. Name in `module` what it calls."
    )


def log_of(probe: nn.Module, feed: Feed, batch: Any) -> CallLog:
    """Return what a batch calls; the copy stays as it is."""
    with isolated_evaluation(probe):
        return record_calls(probe, partial(feed, probe, batch), keep_inputs=False)


def _called(model: nn.Module, log: CallLog) -> list[str]:
    """Return the paths of what a step calls itself; metrics and losses, which have no parameters, aren't counted."""
    modules = modules_of(model)
    return [path for path, callers in log.callers.items() if None in callers and _has_parameters(modules[path])]


def _outermost(model: nn.Module, log: CallLog, step: str) -> str:
    """Return the path of the one module that a step calls."""
    found = _called(model, log)
    if "" in found:
        return ""
    if len(found) != 1:
        remedy = "Name the one that is exported." if found else "Call the module, not its `forward`."
        raise invalid("module", f"be named where {step} calls {named(found) if found else 'none'}", "", remedy)
    return found[0]


def why_not_tested(model: nn.Module, log: CallLog, path: str) -> str:
    """Say why a step with this log doesn't run all of the module at a path by calling it; empty if it does."""
    path, modules = part_path(model, path), modules_of(model)
    calls = named(_called(model, log)) or "no module"
    if path not in log.callers:
        return f"calls {calls}, and never `{path}`" if path else f"calls {calls}, and never the module itself"
    outside = [
        inner
        for inner, callers in log.callers.items()
        if is_below(inner, path) and _has_parameters(modules[inner]) and _from_outside(callers, path)
    ]
    if outside:
        return f"calls {named(outside)} from outside of {named([path])} too"
    if (reader := log.read_below(path)) is not None:
        return f"reads the parameters of {named([reader])} outside of {named([path])}"
    return ""


def _from_outside(callers: Any, path: str) -> bool:
    return any(caller is None or not is_at_or_below(caller, path) for caller in callers)


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
