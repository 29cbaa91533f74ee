"""What a distillation step computes: the terms of the loss, from taps, adapters and the teacher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.distillation.adapters import Adapters, adapt, make_adapter
from lightning_compress.distillation.calling import fit_masks, mask_of, positions_of
from lightning_compress.distillation.dry_run import DistillationPlan, RunBoth, dry_run
from lightning_compress.distillation.losses.base import (
    DistillationLoss,
    FeatureLoss,
    LogitLoss,
    check_weight,
    name_losses,
)
from lightning_compress.distillation.losses.soft_target import SoftTarget
from lightning_compress.distillation.ramps import TASK, Clock, Ramp, check_ramps
from lightning_compress.distillation.taps import Taps, make_taps
from lightning_compress.distillation.teacher import Teacher, device_and_dtype
from lightning_compress.distillation.teacher_check import TeacherCheck, check_teacher, find_class_dim, is_classes
from lightning_compress.errors import invalid
from lightning_compress.modules.isolation import isolated_random_state


class Objective:
    """The losses of a student against a teacher; whoever holds the objective holds the student.

    ``teacher`` are the arguments of :class:`Teacher` beside its module and taps.

    Attributes:
        losses: By name in the log; a loss with ``pairs`` stands here once for each pair, as soon as these are known.
        adapters: By loss name.
        clock: How far the ramps are.
        teacher: The teacher in its box.
        taps: Taps of the student.
        check: What the first batch says of the teacher; None before it.
        notes: For each term that can't take the mask of valid positions as it is, what it takes.
    """

    def __init__(
        self,
        losses: Sequence[DistillationLoss] | None,
        task_weight: float,
        ramps: Sequence[Ramp] | None,
        *teacher: Any,
    ) -> None:
        losses, ramps = [SoftTarget()] if losses is None else losses, ramps or ()
        check_weight("task_weight", task_weight)
        if not isinstance(losses, Sequence):
            raise invalid("losses", "be a list of distillation losses", losses)
        for loss in losses:
            if not isinstance(loss, LogitLoss | FeatureLoss):
                remedy = "Such as [SoftTarget(temperature=2.0)]."
                raise invalid("losses", "be a list of distillation losses", loss, remedy)
        self.losses: Mapping[str, DistillationLoss] = name_losses(losses)
        self.task_weight = task_weight
        check_ramps(ramps, self.losses)
        if not self.losses and task_weight == 0:
            raise invalid("losses", "name something to learn", losses, "`task_weight` is 0 too.")
        self.clock = Clock(ramps)
        self.adapters = Adapters()
        self._requested = self.losses
        self._teacher_options = teacher
        self.check: TeacherCheck | None = None
        self.notes: dict[str, str] = {}
        self.set_teacher(None)

    def set_teacher(self, module: nn.Module | None) -> None:
        """Replace the teacher."""
        self.teacher = Teacher(module, Taps([]), *self._teacher_options)
        self.reset()

    def reset(self) -> None:
        """Go back to the losses that were requested, without pairs or progress. No tap may be attached."""
        self.losses = self._requested
        self._requested_as = {name: name for name in self.losses}
        self.taps, self.teacher.taps = make_taps(self.losses)
        self.clock.reset()

    @property
    def compares_logits(self) -> bool:
        """Whether any loss looks at logits."""
        return any(isinstance(loss, LogitLoss) for loss in self.losses.values())

    @property
    def compares_classes(self) -> bool:
        """Whether any loss looks at logits of classes, and not at the outputs of a regression."""
        return any(isinstance(loss, LogitLoss) and loss.of_classes for loss in self.losses.values())

    @property
    def needs_example(self) -> bool:
        """Whether shapes have to be known before an optimizer is made."""
        return any(isinstance(loss, FeatureLoss) for loss in self._requested.values())

    def class_dim(self, logits: Tensor, targets: Any) -> int | None:
        """Find where the logits' classes stand; None if neither a loss nor the targets say that there are any.

        Raises:
            CompressionError: If the targets say something else than a loss.
        """
        found = find_class_dim(logits, targets)
        for loss in self.losses.values():
            if isinstance(loss, LogitLoss) and loss.of_classes:
                if found is not None and not is_classes(targets, positions_of(logits, loss.class_dim)):
                    raise invalid(
                        "class_dim",
                        f"be {found}, where the targets {tuple(targets.shape)} leave the classes of the logits "
                        f"{tuple(logits.shape)}",
                        loss.class_dim,
                    )
                return loss.class_dim
        return found

    def check_once(
        self, student: Tensor | None, teacher: Tensor | None, targets: Any, valid: Tensor | None, classes: bool
    ) -> None:
        """Check the teacher on the first logits, if they are of ``classes``, which integer targets alone don't say."""
        if self.check is not None or student is None or teacher is None or not classes:
            return
        if (class_dim := self.class_dim(student, targets)) is not None:
            counts = mask_of(valid, positions_of(student, class_dim))
            self.check = check_teacher(student.detach(), teacher, targets, class_dim, counts)

    def plan(self, student: nn.Module, run: RunBoth) -> DistillationPlan:
        """Plan the fit by :func:`~.dry_run.dry_run`. Nothing is changed yet.

        Adapters have the device and dtype of ``student``. Their initial weights depend on ``torch.initial_seed()``
        alone, and draw nothing from the global generator.
        """
        models = (student, self.teacher.require())
        with isolated_random_state(seed=torch.initial_seed()):
            plan = dry_run(self._requested, models, run, self.task_weight > 0)
        for adapter in plan.adapters.values():
            adapter.to(*device_and_dtype(student))
        return plan

    def apply_(self, plan: DistillationPlan, student: nn.Module) -> None:
        """Do what the plan says; adapters of the right shape stay, with what they have learnt."""
        if plan.losses != self.losses:
            attached = self.taps.attached
            self.taps.detach(student)
            self.teacher.taps.detach(self.teacher.require())
            self.losses, self._requested_as = plan.losses, dict(plan.requested_as)
            self.taps, self.teacher.taps = make_taps(plan.losses)
            if attached:
                self.attach(student)
        for name in set(self.adapters) - set(plan.adapters):
            del self.adapters[name]
        for name, adapter in plan.adapters.items():
            if name not in self.adapters or _shapes(self.adapters[name]) != _shapes(adapter):
                self.adapters[name] = adapter

    def attach(self, student: nn.Module) -> None:
        """Attach the taps to student and teacher, unless they are attached."""
        if not self.losses:
            return
        teacher = self.teacher.require()
        if not self.taps.attached:
            self.teacher.taps.find(teacher)  # both are checked before either is touched
            self.taps.attach(student)
        if not self.teacher.taps.attached:
            self.teacher.taps.attach(teacher)

    def detach(self, student: nn.Module) -> None:
        """Take the taps off and give the teacher its own tensors back; safe to call at any time."""
        self.check, self.notes = None, {}
        self.taps.detach(student)
        if self.teacher.module is not None:
            self.teacher.taps.detach(self.teacher.module)
            self.teacher.restore_tensors()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hold tapped tensors inside the block."""
        with self.taps.listen(), self.teacher.taps.listen():
            yield

    def terms(
        self, student: Tensor | None, teacher: Tensor | None, valid: Tensor | None = None, targets: Any = None
    ) -> dict[str, Tensor]:
        """Compute the raw value of each loss by name, from the logits of both and from the tapped tensors.

        ``valid``, the positions that count, is fitted to each term.

        Raises:
            CompressionError: If shapes differ, or logits alone are compared and ``valid`` doesn't fit them.
        """
        losses, pairs = self._losses_now(), dict[str, tuple[Tensor, Tensor]]()
        for name, loss in losses.items():
            if isinstance(loss, LogitLoss) and student is not None and teacher is not None:
                pairs[name] = student, teacher
            elif isinstance(loss, FeatureLoss):
                pairs[name] = self._features(name, loss)
        masks, notes = fit_masks({name: losses[name] for name in pairs}, pairs, valid)
        self.notes |= notes
        values = {}
        for name, pair in pairs.items():
            extra = (targets,) if isinstance(losses[name], LogitLoss) else ()
            values[name] = losses[name](*pair, masks[name], *extra)  # type: ignore[operator]
        return values

    def weights(self) -> dict[str, float]:
        """Return the weight that each term has now; the weight of a loss with several pairs is divided among them."""
        pairs = Counter(self._requested_as.values())
        weights = {name: loss.weight / pairs[self._requested_as[name]] for name, loss in self._losses_now().items()}
        return {TASK: self.clock.weight(TASK, self.task_weight), **weights}

    def _losses_now(self) -> dict[str, DistillationLoss]:
        return {name: self.clock.loss(self._requested_as[name], loss) for name, loss in self.losses.items()}

    def _features(self, name: str, loss: FeatureLoss) -> tuple[Tensor, Tensor]:
        if loss.pairs:
            raise invalid("pairs", "be found before a step", loss.pairs, "Call `prepare_` with an example input.")
        student, teacher = self.taps[str(loss.student_layer)], self.teacher.taps[str(loss.teacher_layer)]
        if loss.adapts:
            adapter = self.adapters[name] if name in self.adapters else None  # noqa: SIM401 - a ModuleDict has no get
            student = adapt(student, teacher.shape, adapter)
            if student.shape != teacher.shape:
                make_adapter(student.shape, teacher.shape)  # its error names the shapes, if there is no adapter at all
                remedy = "Call `prepare_` with an example input of this shape before the optimizer is made."
                raise invalid("student_layer", f"have an adapter for {name}", tuple(student.shape), remedy)
        return student, teacher


def sum_terms(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum the weighted terms, in their order.

    Example:
        >>> float(sum_terms({"task": torch.tensor(2.0), "kd": torch.tensor(1.0)}, {"task": 0.25, "kd": 0.5}))
        1.0
    """
    first, *rest = (weights[name] * value for name, value in terms.items())
    return sum(rest, first)


def step_values(
    terms: Mapping[str, Tensor], weights: Mapping[str, float], student: nn.Module | None = None
) -> dict[str, Tensor]:
    """Return what a training step logs: each term raw and weighted.

    Args:
        terms: By name.
        weights: Of the terms.
        student: Log each term's share of this module's gradient too: the norm of the term's own gradient over the sum
            of all terms' norms, which takes a backward pass for each term.

    Example:
        >>> student = nn.Linear(2, 1, bias=False)
        >>> terms = {"task": student.weight.sum(), "kd": student.weight.sum()}
        >>> values = step_values(terms, {"task": 0.5, "kd": 1.5}, student)
        >>> [round(float(values[f"train_{name}_share"]), 2) for name in terms]
        [0.25, 0.75]
    """
    values = {f"train_{name}": term.detach() for name, term in terms.items()}
    values |= {f"train_{name}_weighted": weights[name] * term.detach() for name, term in terms.items()}
    if student is None:
        return values
    trained, norms = [parameter for parameter in student.parameters() if parameter.requires_grad], {}
    for name, term in terms.items():
        found = torch.autograd.grad(term, trained, retain_graph=True, allow_unused=True) if term.requires_grad else ()
        gradients = [gradient.detach().float().norm().to(term.dtype) for gradient in found if gradient is not None]
        norms[name] = weights[name] * torch.stack([term.new_zeros(()), *gradients]).norm()
    total = torch.stack(list(norms.values())).sum().clamp(min=torch.finfo(torch.float32).tiny)
    return values | {f"train_{name}_share": norm / total for name, norm in norms.items()}


def _shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in module.parameters()]
