"""The dry run: what each loss compares, which adapters that takes, and which parameters will get no gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.distillation.adapters import make_adapter
from lightning_compress.distillation.calling import find_logits
from lightning_compress.distillation.losses.arithmetic import check_shapes
from lightning_compress.distillation.losses.base import DistillationLoss, FeatureLoss, LogitLoss, name_losses
from lightning_compress.distillation.taps import Taps, is_compiled, make_taps
from lightning_compress.errors import CompressionError
from lightning_compress.messages import named
from lightning_compress.modules.outputs import tensors_in
from lightning_compress.modules.paths import clean_name

RunBoth = Callable[[], tuple[Any, Tensor | None, Tensor | None]]
"""Runs student and teacher; returns what the task loss is made of, and the logits of both if they are compared."""

Shapes = Mapping[str, torch.Size]


@dataclass(frozen=True)
class Pair:
    """What one loss compares.

    Attributes:
        loss: Its name in the log.
        student: Path and shape of the student's side; the path of logits is empty.
        teacher: The same of the teacher's side.
        adapter: What brings the student's features to the teacher's shape; None where nothing is needed.
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
class DistillationPlan:
    """What a student will learn from, before anything has changed.

    Attributes:
        losses: By name; a loss with ``pairs`` stands here once for each pair.
        requested_as: For each name the name of the loss that was requested, which differs for pairs.
        pairs: What each loss compares.
        without_gradient: Trainable parameters of the student that no loss reaches.
        idle: Losses that reach no parameter of the student.
    """

    losses: Mapping[str, DistillationLoss]
    requested_as: Mapping[str, str]
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
        """What to warn of: losses that have no effect."""
        return [
            f"{name} can't teach the student: no gradient leads from there to it. Layers are frozen, called under "
            "no_grad, or recomputed by checkpointing, which hides them with use_reentrant=True."
            for name in self.idle
        ]


def dry_run(
    losses: Mapping[str, DistillationLoss], models: tuple[nn.Module, nn.Module], run: RunBoth, task: bool
) -> DistillationPlan:
    """Run the copy of a student and its teacher once, and plan the fit from that; the caller keeps the random state.

    Args:
        losses: By name.
        models: Student and teacher.
        run: See :data:`RunBoth`.
        task: Whether a task loss learns from the student's outputs too.

    Raises:
        CompressionError: If layers, shapes or logits don't fit.
    """
    requested_as = {name: name for name in losses}
    with ExitStack() as stack:
        if any(map(is_compiled, models)):  # or the compiled code would be that of this run
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if any(isinstance(loss, FeatureLoss) and loss.pairs for loss in losses.values()):
            whole = not (task or any(isinstance(loss, LogitLoss) for loss in losses.values()))
            with torch.no_grad(), _resolutions(models[0], whole) as student, _resolutions(models[1], whole) as teacher:
                run()
            losses, requested_as = _expanded(losses, _matching(student, teacher))
        taps = make_taps(losses)
        for side, model in zip(taps, models, strict=True):
            side.attach(model)
            stack.callback(side.detach, model)
        with taps[0].listen(), taps[1].listen(), torch.enable_grad():
            outputs, *logits = run()
            pairs = [_pair(name, loss, taps, logits) for name, loss in losses.items()]
            roots = [taps[0][path] for path in taps[0]] + [tensor for tensor in logits[:1] if tensor is not None]
            missed = _missed(models[0], [*roots, *(tensors_in(outputs) if task else ())])
            compared = {
                name: taps[0][str(loss.student_layer)] if isinstance(loss, FeatureLoss) else logits[0]
                for name, loss in losses.items()
            }
            idle = [name for name, tensor in compared.items() if tensor is not None and not tensor.requires_grad]
    return DistillationPlan(losses, requested_as, tuple(pairs), missed, tuple(idle))


def _pair(name: str, loss: DistillationLoss, taps: tuple[Taps, Taps], logits: list[Any]) -> Pair:
    if not isinstance(loss, FeatureLoss):
        check_shapes(*logits)
        return Pair(name, ("", tuple(logits[0].shape)), ("", tuple(logits[1].shape)))
    paths = (str(loss.student_layer), str(loss.teacher_layer))
    features = [side[path].detach() for side, path in zip(taps, paths, strict=True)]
    shapes = [tuple(tensor.shape) for tensor in features]
    adapter = make_adapter(*shapes) if loss.adapts else None
    if not loss.adapts:  # its own demands on the shapes, before training
        loss(*features)
    return Pair(name, (paths[0], shapes[0]), (paths[1], shapes[1]), adapter)


@contextmanager
def _resolutions(model: nn.Module, whole: bool) -> Iterator[dict[str, torch.Size]]:
    """Give at the end of the block the shape that each inner layer put out, in the order in which they finished.

    Layers that put out the model's own logits are left out, unless the ``whole`` model is to be included.
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
        shapes |= {path: out.shape for path, out in tensors.items() if whole or not _is_logits(out, last)}


def _is_logits(tensor: Tensor, outputs: list[Any]) -> bool:
    try:
        logits = find_logits(outputs[0] if outputs else None)
    except CompressionError:
        return False
    return tensor.shape == logits.shape and tensor.data_ptr() == logits.data_ptr()


def _matching(student: Shapes, teacher: Shapes) -> list[tuple[str, str]]:
    """Pair the deepest layers of each resolution that both have: the sizes of maps, or the lengths of sequences."""
    for length in (1, 2):  # where the length of features of rank 3 stands: (B, L, D), or else (B, C, L)
        deepest = [
            {(len(shape), *_size(shape, length)): path for path, shape in shapes.items() if len(shape) > 2}
            for shapes in (student, teacher)
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
    """Repeat the losses with ``pairs`` for each pair; and tell for each name that of the loss that was requested."""
    expanded: list[DistillationLoss] = []
    requested: list[str] = []
    for name, loss in losses.items():
        for student, teacher in pairs if isinstance(loss, FeatureLoss) and loss.pairs else [("", "")]:
            layers = {"student_layer": student, "teacher_layer": teacher, "pairs": None} if student else {}
            expanded.append(dataclasses.replace(loss, **layers) if layers else loss)  # type: ignore[type-var]
            requested.append(name)
    named = name_losses(expanded)
    return named, dict(zip(named, requested, strict=True))


def _missed(student: nn.Module, roots: list[Tensor]) -> tuple[str, ...]:
    """Find the student's trainable parameters that no graph of ``roots`` leads to; none where that can't be seen."""
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
