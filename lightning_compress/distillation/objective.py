"""What a distillation step computes, and the dry run that checks it before anything changes."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.distillation.adapters import Adapters, adapt, make_adapter
from lightning_compress.distillation.features import Taps, is_compiled
from lightning_compress.distillation.losses import DistillationLoss, FeatureLoss, LogitLoss
from lightning_compress.distillation.teacher import Teacher
from lightning_compress.errors import invalid


def name_losses(losses: Sequence[DistillationLoss]) -> dict[str, DistillationLoss]:
    """The losses by name; a name that comes again is numbered.

    Example:
        >>> from lightning_compress.distillation.losses import SoftTarget
        >>> list(name_losses([SoftTarget(), SoftTarget(temperature=8.0)]))
        ['soft_target', 'soft_target_2']
    """
    named: dict[str, DistillationLoss] = {}
    for loss in losses:
        if not isinstance(loss, DistillationLoss):
            raise invalid("losses", "be a list of distillation losses", loss, "Such as [SoftTarget(temperature=2.0)].")
        name, count = loss.name, 2
        while name in named:
            name, count = f"{loss.name}_{count}", count + 1
        named[name] = loss
    return named


def find_logits(outputs: Any) -> Tensor:
    """The logits within outputs: the tensor itself, ``logits`` by key or attribute, or a tuple's first tensor.

    Raises:
        CompressionError: If there are none.

    Example:
        >>> find_logits({"logits": torch.zeros(2, 3), "hidden": torch.zeros(2, 8)}).shape
        torch.Size([2, 3])
    """
    found = outputs
    if isinstance(outputs, Mapping):
        found = outputs.get("logits")
    elif not isinstance(outputs, Tensor):
        found = getattr(outputs, "logits", None)
        if found is None and isinstance(outputs, tuple | list):
            found = next((item for item in outputs if isinstance(item, Tensor)), None)
    if not isinstance(found, Tensor):
        received = list(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise invalid("outputs", "contain `logits`", received, "Override `logits(outputs)` on the module.")
    return found


def distillation_terms(
    losses: Mapping[str, DistillationLoss],
    logits: tuple[Tensor, Tensor],
    taps: tuple[Taps, Taps],
    adapters: Adapters,
    valid: Tensor | None = None,
    targets: Any = None,
) -> dict[str, Tensor]:
    """The raw value of each loss by name.

    Args:
        losses: The losses by name.
        logits: Of student and teacher, same shape.
        taps: Of student and teacher, after both forwards.
        adapters: By loss name, where shapes differ.
        valid: Which positions of the logits count; None: all.
        targets: The batch's targets.
    """
    values = {}
    for name, loss in losses.items():
        if isinstance(loss, FeatureLoss):
            ours, theirs = taps[0][str(loss.student_layer)], taps[1][str(loss.teacher_layer)]
            adapter = adapters[name] if name in adapters else None  # noqa: SIM401 - a ModuleDict has no get
            if loss.adapts:
                ours = adapt(ours, theirs.shape, adapter)
            if loss.adapts and ours.shape != theirs.shape:
                make_adapter(ours.shape, theirs.shape)  # its error names the shapes, if there is no adapter at all
                remedy = "Call `prepare_` with an example input of this shape before the optimizer is made."
                raise invalid("student_layer", f"have an adapter for {name}", tuple(ours.shape), remedy)
            values[name] = loss(ours, theirs, valid)
        elif isinstance(loss, LogitLoss):
            values[name] = loss(*logits, valid, targets)
    return values


def check_logits(student: Tensor, teacher: Tensor) -> None:
    """Refuse a teacher whose logits have another shape than the student's.

    Raises:
        CompressionError: If the shapes differ.

    Example:
        >>> check_logits(torch.zeros(2, 3), torch.zeros(2, 3))
    """
    if student.shape != teacher.shape:
        remedy = "Both must predict the same classes at the same positions; override `logits` to pick or reshape them."
        must = f"put out logits of the student's shape {tuple(student.shape)}"
        raise invalid("teacher", must, tuple(teacher.shape), remedy)


def dry_run(
    forward: Callable[[Any], Tensor],
    teacher_forward: Callable[[Any], Tensor],
    student: nn.Module,
    taps: tuple[Taps, Taps],
    teacher: Teacher,
    inputs: Any,
) -> tuple[dict[str, torch.Size], dict[str, torch.Size]]:
    """The shapes of all tapped features, from one pass in evaluation mode that leaves no trace, and checked logits."""
    modes = [(module, module.training) for module in student.modules()]
    attached = [each.attached for each in taps]
    models = (student, teacher.require())
    try:
        for each, model, was in zip(taps, models, attached, strict=True):
            if not was:
                each.attach(model)
        student.eval()
        # Eager, or the compiled code would be that of the dry run.
        eager = torch.compiler.set_stance("force_eager") if any(map(is_compiled, models)) else nullcontext()
        with random_state_kept(), buffers_kept(student), eager, torch.no_grad(), taps[0].listen(), taps[1].listen():
            check_logits(forward(inputs), teacher_forward(inputs))
            return {k: taps[0][k].shape for k in taps[0]}, {k: taps[1][k].shape for k in taps[1]}
    finally:
        for module, training in modes:
            module.training = training
        for each, model, was in zip(taps, models, attached, strict=True):
            if not was:
                each.detach(model)


def plan_adapters(
    losses: Mapping[str, DistillationLoss],
    shapes: tuple[Mapping[str, torch.Size], Mapping[str, torch.Size]],
    like: nn.Module,
) -> dict[str, nn.Module]:
    """The adapters that the feature losses need, by loss name, on the device and in the dtype of ``like``.

    Their initial weights depend on ``torch.initial_seed()`` alone and take nothing from the global generator.
    """
    planned: dict[str, nn.Module] = {}
    parameter = next((p for p in like.parameters() if p.is_floating_point()), None)
    with random_state_kept():
        torch.manual_seed(torch.initial_seed())
        for name, loss in losses.items():
            if isinstance(loss, FeatureLoss) and loss.adapts:
                adapter = make_adapter(shapes[0][str(loss.student_layer)], shapes[1][str(loss.teacher_layer)])
                if adapter is not None:
                    planned[name] = adapter if parameter is None else adapter.to(parameter.device, parameter.dtype)
    return planned


def merge_adapters_(adapters: Adapters, planned: Mapping[str, nn.Module]) -> None:
    """Make ``adapters`` what was ``planned``, but keep those that are there, trained, and of the right shape."""
    for name in set(adapters) - set(planned):
        del adapters[name]
    for name, adapter in planned.items():
        if name not in adapters or _shapes(adapters[name]) != _shapes(adapter):
            adapters[name] = adapter


def take_examples(loader: Any, count: int = 2) -> Any | None:
    """A small batch from a ``DataLoader`` over a map-style dataset, or None.

    Its first items are collated by hand: no iterator, worker or sampler of the user's is started or moved on. A dataset
    that draws from a generator of its own does draw; ``example_input_array`` avoids that.

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> [x.shape for x in take_examples(DataLoader(TensorDataset(torch.ones(9, 3), torch.ones(9)), batch_size=4))]
        [torch.Size([2, 3]), torch.Size([2])]
    """
    dataset: Any = getattr(loader, "dataset", None)
    if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__") or len(dataset) == 0:
        return None
    with random_state_kept():
        if loader.batch_sampler is None:  # the dataset's items are batches already
            return loader.collate_fn(dataset[0])
        return loader.collate_fn([dataset[index] for index in range(min(count, len(dataset)))])


def to_device_of(inputs: Any, module: nn.Module) -> Any:
    """Nested ``inputs`` on the device of ``module``, floating tensors in its dtype."""
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return inputs
    if isinstance(inputs, Tensor):
        return inputs.to(parameter.device, parameter.dtype if inputs.is_floating_point() else inputs.dtype)
    if isinstance(inputs, Mapping):
        return {key: to_device_of(value, module) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return [to_device_of(value, module) for value in inputs]
    return inputs


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the global generators of Python, numpy and torch (all CUDA devices) back at the end of the block."""
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)


@contextmanager
def buffers_kept(module: nn.Module, on_error_only: bool = False) -> Iterator[None]:
    """Put all buffers of ``module`` back at the end of the block, the same tensors with the same values."""
    kept = [
        (child, name, buffer, None if nn.parameter.is_lazy(buffer) else buffer.detach().clone())
        for child in module.modules()
        for name, buffer in child._buffers.items()
        if buffer is not None
    ]
    passed = False
    try:
        yield
        passed = True
    finally:
        if not (passed and on_error_only):
            for child, name, buffer, values in kept:
                if values is not None:
                    buffer.data = values
                    child._buffers[name] = buffer


def _shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in module.parameters()]
