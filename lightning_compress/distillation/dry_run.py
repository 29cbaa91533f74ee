"""The dry run: what is paired with what, which adapters that takes, and what will get no gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.distillation.adapters import make_adapter
from lightning_compress.distillation.features import Taps, is_compiled
from lightning_compress.distillation.losses.arithmetic import check_shapes
from lightning_compress.distillation.losses.base import DistillationLoss, FeatureLoss, LogitLoss
from lightning_compress.distillation.outputs import find_logits, find_tensors
from lightning_compress.errors import CompressionError
from lightning_compress.messages import named
from lightning_compress.modules.paths import clean_name

Run = Callable[[], tuple[Any, Tensor | None, Tensor | None]]
"""Runs student and teacher; gives what the task's loss is made of, and the logits of both if they are compared."""

Shapes = Mapping[str, torch.Size]


@dataclass(frozen=True)
class Pair:
    """What one loss compares.

    Attributes:
        loss: Its name in the log.
        student: Path and shape of the student's side; the path of logits is empty.
        teacher: The same of the teacher's side.
        adapter: What brings the one to the other; None where nothing is needed.
    """

    loss: str
    student: tuple[str, tuple[int, ...]]
    teacher: tuple[str, tuple[int, ...]]
    adapter: nn.Module | None = None

    def __str__(self) -> str:
        if not self.student[0]:
            return f"{self.loss}: logits {self.student[1]}"
        text = f"{self.loss}: {self.student[0]} {self.student[1]} with {self.teacher[0]} {self.teacher[1]}"
        if self.adapter is None:
            return text
        count = sum(parameter.numel() for parameter in self.adapter.parameters())
        return f"{text} by {type(self.adapter).__name__}, {count:,} parameters"


@dataclass(frozen=True)
class Plan:
    """What a student will learn from, before anything has changed.

    Attributes:
        losses: By name; those that asked for pairs stand for each pair.
        asked: For each name the one under which it was asked for, which differs for pairs.
        pairs: What each compares.
        without_gradient: Trainable parameters of the student that no loss reaches.
        idle: Losses that reach no parameter of the student.
    """

    losses: Mapping[str, DistillationLoss]
    asked: Mapping[str, str]
    pairs: tuple[Pair, ...]
    without_gradient: tuple[str, ...]
    idle: tuple[str, ...]

    @property
    def adapters(self) -> dict[str, nn.Module]:
        """The adapters by loss name."""
        return {pair.loss: pair.adapter for pair in self.pairs if pair.adapter is not None}

    def __str__(self) -> str:
        lines = [str(pair) for pair in self.pairs]
        if self.without_gradient:
            lines.append(
                f"no loss reaches {len(self.without_gradient)} parameters of the student: "
                f"{named(self.without_gradient)}. They won't learn; "
                "freeze them (`requires_grad_(False)`), or DDP will miss their gradients."
            )
        return "\n  ".join(lines)

    def warnings(self) -> list[str]:
        """What has no effect."""
        return [
            f"{name} can't teach the student: no gradient leads from there to it. Layers are frozen, called under "
            "no_grad, or recomputed by checkpointing, which hides them with use_reentrant=True."
            for name in self.idle
        ]


def rehearse(
    losses: Mapping[str, DistillationLoss],
    models: tuple[nn.Module, nn.Module],
    run: Run,
    task: bool,
) -> Plan:
    """Run student and teacher once, and tell what will happen; the random state is the caller's to keep.

    Args:
        losses: By name.
        models: Student and teacher; the student is a copy, whose state may change.
        run: See :data:`Run`.
        task: Whether a task loss learns from the student's outputs too.

    Raises:
        CompressionError: If layers, shapes or logits don't fit.
    """
    # Eager, or the compiled code would be that of this run.
    eager = torch.compiler.set_stance("force_eager") if any(map(is_compiled, models)) else nullcontext()
    asked = {name: name for name in losses}
    with eager:
        if any(isinstance(loss, FeatureLoss) and loss.pairs for loss in losses.values()):
            whole = not (task or any(isinstance(loss, LogitLoss) for loss in losses.values()))
            with torch.no_grad(), _resolutions(models[0], whole) as ours, _resolutions(models[1], whole) as theirs:
                run()
            losses, asked = _expanded(losses, _matching(ours, theirs))
        taps = make_taps(losses)
        with _attached(taps, models), taps[0].listen(), taps[1].listen(), torch.enable_grad():
            outputs, *logits = run()
            pairs = [_pair(name, loss, taps, logits) for name, loss in losses.items()]
            roots = [taps[0][path] for path in taps[0]] + [each for each in logits[:1] if each is not None]
            missed = _missed(models[0], roots + (find_tensors(outputs) if task else []))
            compared = {
                name: taps[0][str(loss.student_layer)] if isinstance(loss, FeatureLoss) else logits[0]
                for name, loss in losses.items()
            }
            idle = [name for name, each in compared.items() if each is not None and not each.requires_grad]
    return Plan(losses, asked, tuple(pairs), missed, tuple(idle))


def make_taps(losses: Mapping[str, DistillationLoss]) -> tuple[Taps, Taps]:
    """Taps of student and teacher for the layers that feature losses name."""
    named = [loss for loss in losses.values() if isinstance(loss, FeatureLoss) and not loss.pairs]
    return (
        Taps([str(loss.student_layer) for loss in named], "student_layer"),
        Taps([str(loss.teacher_layer) for loss in named], "teacher_layer"),
    )


def _pair(name: str, loss: DistillationLoss, taps: tuple[Taps, Taps], logits: list[Any]) -> Pair:
    if not isinstance(loss, FeatureLoss):
        check_shapes(*logits)
        return Pair(name, ("", tuple(logits[0].shape)), ("", tuple(logits[1].shape)))
    paths = (str(loss.student_layer), str(loss.teacher_layer))
    shapes = [tuple(each[path].shape) for each, path in zip(taps, paths, strict=True)]
    adapter = make_adapter(*shapes) if loss.adapts else None
    if not loss.adapts:  # its own demands on the shapes, before training
        loss(*(each[path].detach() for each, path in zip(taps, paths, strict=True)))
    return Pair(name, (paths[0], shapes[0]), (paths[1], shapes[1]), adapter)


@contextmanager
def _attached(taps: tuple[Taps, Taps], models: tuple[nn.Module, nn.Module]) -> Iterator[None]:
    """Taps on both models inside the block."""
    try:
        for each, model in zip(taps, models, strict=True):
            each.attach(model)
        yield
    finally:
        for each, model in zip(taps, models, strict=True):
            each.detach(model)


@contextmanager
def _resolutions(model: nn.Module, whole: bool) -> Iterator[dict[str, torch.Size]]:
    """The shape that each inner layer put out, in the order in which they finished, at the end of the block.

    Without those that put out the model's own logits, unless the ``whole`` is asked for.
    """
    tensors: dict[str, Tensor] = {}
    last: list[Any] = []
    shapes: dict[str, torch.Size] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if path and isinstance(output, Tensor):
                tensors.pop(path, None)
                tensors[path] = output
            if next(module.parameters(), None) is not None:  # neither a loss nor a metric
                last[:] = [output]

        return hook

    layers = {clean_name(name): module for name, module in model.named_modules()}
    handles = [module.register_forward_hook(note(path)) for path, module in layers.items()]
    try:
        yield shapes
    finally:
        for handle in handles:
            handle.remove()
        shapes |= {path: each.shape for path, each in tensors.items() if whole or not _is_logits(each, last)}


def _is_logits(tensor: Tensor, outputs: list[Any]) -> bool:
    try:
        logits = find_logits(outputs[0] if outputs else None)
    except CompressionError:
        return False
    return tensor.shape == logits.shape and tensor.data_ptr() == logits.data_ptr()


def _matching(ours: Shapes, theirs: Shapes) -> list[tuple[str, str]]:
    """The deepest layers of each resolution that both have: the sizes of maps, or the lengths of sequences."""
    for length in (1, 2):  # where the length of features of rank 3 stands: (B, L, D), or else (B, C, L)
        deepest = [
            {(len(shape), *_size(shape, length)): path for path, shape in shapes.items() if len(shape) > 2}
            for shapes in (ours, theirs)
        ]
        found = [(path, deepest[1][size]) for size, path in deepest[0].items() if size in deepest[1]]
        if found:
            return found
    raise CompressionError(
        "`pairs` must find layers of equal resolution in student and teacher. Received: pairs='auto', and none that "
        "put out maps or sequences of one size. Name `student_layer` and `teacher_layer`."
    )


def _size(shape: torch.Size, length: int) -> tuple[int, ...]:
    return tuple(shape[2:]) if len(shape) > 3 else (shape[length],)


def _expanded(
    losses: Mapping[str, DistillationLoss], pairs: list[tuple[str, str]]
) -> tuple[dict[str, DistillationLoss], dict[str, str]]:
    """The losses, those with ``pairs`` once for each pair; and for each name the one it was asked for with."""
    expanded: list[DistillationLoss] = []
    asked: list[str] = []
    for name, loss in losses.items():
        for ours, theirs in pairs if isinstance(loss, FeatureLoss) and loss.pairs else [("", "")]:
            layers = {"student_layer": ours, "teacher_layer": theirs, "pairs": None} if ours else {}
            expanded.append(dataclasses.replace(loss, **layers) if layers else loss)  # type: ignore[type-var]
            asked.append(name)
    named = name_losses(expanded)
    return named, dict(zip(named, asked, strict=True))


def name_losses(losses: Iterable[DistillationLoss]) -> dict[str, DistillationLoss]:
    """The losses by name; a name that comes again is numbered.

    Example:
        >>> from lightning_compress import SoftTarget
        >>> list(name_losses([SoftTarget(), SoftTarget(temperature=8.0)]))
        ['soft_target', 'soft_target_2']
    """
    named: dict[str, DistillationLoss] = {}
    for loss in losses:
        name, count = loss.name, 2
        while name in named:
            name, count = f"{loss.name}_{count}", count + 1
        named[name] = loss
    return named


def _missed(student: nn.Module, roots: list[Tensor]) -> tuple[str, ...]:
    """The student's trainable parameters that no graph of ``roots`` leads to; none where that can't be seen."""
    seen: set[Any] = set()
    ahead = [root.grad_fn for root in roots]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        if "CheckpointFunction" in node.name():  # reentrant checkpointing hides what it recomputes
            return ()
        seen.add(node)
        ahead.extend(following for following, _ in node.next_functions)
    reached = {id(node.variable) for node in seen if hasattr(node, "variable")}
    return tuple(
        clean_name(name)
        for name, parameter in student.named_parameters()
        if parameter.requires_grad and id(parameter) not in reached
    )
