"""What a distillation step computes: losses, taps, adapters and the teacher, of a student that stands elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.distillation.adapters import Adapters, adapt, make_adapter
from lightning_compress.distillation.dry_run import Plan, Run, make_taps, name_losses, rehearse
from lightning_compress.distillation.features import Taps
from lightning_compress.distillation.losses.base import DistillationLoss, FeatureLoss, LogitLoss, check_weight
from lightning_compress.distillation.masks import fit_masks, mask_of, positions_of
from lightning_compress.distillation.ramps import TASK, Clock, Ramp, check_ramps
from lightning_compress.distillation.teacher import Teacher
from lightning_compress.distillation.teacher_check import TeacherCheck, check_teacher, find_class_dim, is_classes
from lightning_compress.errors import invalid
from lightning_compress.modules.isolation import isolated_random_state


class Objective:
    """The losses of one student against one teacher.

    Args:
        losses: What is compared.
        task_weight: Factor of the student's own loss.
        ramps: Numbers of the losses that change.
        teacher: Arguments of :class:`Teacher` beside its module and taps.

    Attributes:
        losses: By name in the log; those with ``pairs`` stand for each pair once that is known.
        adapters: By loss name.
        clock: Where the ramps stand.
        teacher: The box that answers.
        taps: Of the student.
        check: What the first batch said of the teacher; None before it.
        notes: Which terms don't take the mask of valid positions as it is, and what they take.
    """

    def __init__(
        self, losses: Sequence[DistillationLoss], task_weight: float, ramps: Sequence[Ramp], **teacher: Any
    ) -> None:
        check_weight("task_weight", task_weight)
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
        self._asked = self.losses
        self._teacher_options = teacher
        self.check: TeacherCheck | None = None
        self.notes: dict[str, str] = {}
        self.set_teacher(None)

    def set_teacher(self, module: nn.Module | None) -> None:
        """Put another teacher in the place of this one."""
        self.teacher = Teacher(module, Taps([]), **self._teacher_options)
        self.reset()

    def reset(self) -> None:
        """Go back to what was asked for: no pairs, no progress. No tap may be on."""
        self.losses = self._asked
        self._asked_as = {name: name for name in self.losses}
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
        return any(isinstance(loss, FeatureLoss) for loss in self._asked.values())

    def class_dim(self, logits: Tensor, targets: Any) -> int | None:
        """Where the logits' classes stand; None if neither a loss nor the targets say that there are any.

        Raises:
            CompressionError: If the targets say something else than a loss.
        """
        found = find_class_dim(logits, targets)
        for loss in self.losses.values():
            if isinstance(loss, LogitLoss) and loss.of_classes:
                positions = logits.movedim(loss.class_dim, -1).shape[:-1]
                if found is not None and not is_classes(targets, positions):
                    raise invalid(
                        "class_dim",
                        f"be {found}, where the targets {tuple(targets.shape)} leave the classes of the logits "
                        f"{tuple(logits.shape)}",
                        loss.class_dim,
                    )
                return loss.class_dim
        return found

    def look(
        self, student: Tensor | None, teacher: Tensor | None, targets: Any, valid: Tensor | None, classes: bool
    ) -> None:
        """Compare the logits of both, the first time that there are any.

        Args:
            student: Logits.
            teacher: Logits of the same shape.
            targets: The batch's targets.
            valid: Which positions count; None: all.
            classes: Whether the logits are known to be of classes; integers beside them alone don't say so.
        """
        if self.check is None and student is not None and teacher is not None and classes:
            class_dim = self.class_dim(student, targets)
            if class_dim is not None:
                counts = mask_of(valid, positions_of(student, class_dim))
                self.check = check_teacher(student.detach(), teacher, targets, class_dim, counts)

    def plan(self, student: nn.Module, run: Run) -> Plan:
        """The dry run: see :func:`~.rehearsal.rehearse`. Nothing is changed yet.

        Adapters are in the device and dtype of ``student``; their initial weights depend on ``torch.initial_seed()``
        alone and take nothing from the global generator.
        """
        models = (student, self.teacher.require())
        with isolated_random_state():
            torch.manual_seed(torch.initial_seed())
            plan = rehearse(self._asked, models, run, self.task_weight > 0)
        parameter = next((p for p in student.parameters() if p.is_floating_point()), None)
        if parameter is not None:
            for adapter in plan.adapters.values():
                adapter.to(parameter.device, parameter.dtype)
        return plan

    def follow_(self, plan: Plan, student: nn.Module) -> None:
        """Do as planned; adapters that are there, trained and of the right shape stay."""
        if plan.losses != self.losses:
            attached = self.taps.attached
            self.taps.detach(student)
            self.teacher.taps.detach(self.teacher.require())
            self.losses, self._asked_as = plan.losses, dict(plan.asked)
            self.taps, self.teacher.taps = make_taps(plan.losses)
            if attached:
                self.attach(student)
        for name in set(self.adapters) - set(plan.adapters):
            del self.adapters[name]
        for name, adapter in plan.adapters.items():
            if name not in self.adapters or _shapes(self.adapters[name]) != _shapes(adapter):
                self.adapters[name] = adapter

    def attach(self, student: nn.Module) -> None:
        """Put the taps on student and teacher, where they aren't."""
        if not self.losses:
            return
        teacher = self.teacher.require()
        if not self.taps.attached:
            self.teacher.taps.find(teacher)  # both are checked before either is touched
            self.taps.attach(student)
        if not self.teacher.taps.attached:
            self.teacher.taps.attach(teacher)

    def detach(self, student: nn.Module) -> None:
        """Take the taps off and send the teacher home; safe to call at any time."""
        self.check, self.notes = None, {}
        self.taps.detach(student)
        if self.teacher.module is not None:
            self.teacher.taps.detach(self.teacher.module)
            self.teacher.return_home()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Keep tapped tensors inside the block."""
        with self.taps.listen(), self.teacher.taps.listen():
            yield

    def terms(
        self, student: Tensor | None, teacher: Tensor | None, valid: Tensor | None = None, targets: Any = None
    ) -> dict[str, Tensor]:
        """The raw value of each loss by name, from the logits of both and what the taps kept.

        Args:
            student: Logits; None where no loss looks at them.
            teacher: Logits of the same shape.
            valid: Which positions count; None: all. Each term takes it as it fits that.
            targets: The batch's targets.

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
            loss = losses[name]
            arguments = (masks[name], targets) if isinstance(loss, LogitLoss) else (masks[name],)
            values[name] = loss(*pair, *arguments)  # type: ignore[operator]
        return values

    def weights(self) -> dict[str, float]:
        """The weight that each term has now, that of several pairs divided among them."""
        pairs = Counter(self._asked_as.values())
        weights = {name: loss.weight / pairs[self._asked_as[name]] for name, loss in self._losses_now().items()}
        return {TASK: self.clock.weight(TASK, self.task_weight), **weights}

    def _losses_now(self) -> dict[str, DistillationLoss]:
        return {name: self.clock.loss(self._asked_as[name], loss) for name, loss in self.losses.items()}

    def _features(self, name: str, loss: FeatureLoss) -> tuple[Tensor, Tensor]:
        if loss.pairs:
            raise invalid("pairs", "be found before a step", loss.pairs, "Call `prepare_` with an example input.")
        ours, theirs = self.taps[str(loss.student_layer)], self.teacher.taps[str(loss.teacher_layer)]
        if loss.adapts:
            adapter = self.adapters[name] if name in self.adapters else None  # noqa: SIM401 - a ModuleDict has no get
            ours = adapt(ours, theirs.shape, adapter)
            if ours.shape != theirs.shape:
                make_adapter(ours.shape, theirs.shape)  # its error names the shapes, if there is no adapter at all
                remedy = "Call `prepare_` with an example input of this shape before the optimizer is made."
                raise invalid("student_layer", f"have an adapter for {name}", tuple(ours.shape), remedy)
        return ours, theirs


def sum_terms(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted sum, in the order of the terms.

    Example:
        >>> float(sum_terms({"task": torch.tensor(2.0), "kd": torch.tensor(1.0)}, {"task": 0.25, "kd": 0.5}))
        1.0
    """
    first, *rest = (weights[name] * value for name, value in terms.items())
    return sum(rest, first)


def gradient_shares(
    terms: Mapping[str, Tensor], weights: Mapping[str, float], parameters: Sequence[nn.Parameter]
) -> dict[str, Tensor]:
    """Each term's share of the gradient: the norm of its own gradient over the sum of all terms' norms.

    It takes a backward pass for each term.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> shares = gradient_shares({"task": weight.sum(), "kd": weight.sum()}, {"task": 0.5, "kd": 1.5}, [weight])
        >>> [round(float(share), 2) for share in shares.values()]
        [0.25, 0.75]
    """
    norms = {}
    for name, term in terms.items():
        gradients = (
            torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True) if term.requires_grad else ()
        )
        norms[name] = (
            weights[name]
            * torch.stack(
                [term.new_zeros(()), *(g.detach().float().norm().to(term.dtype) for g in gradients if g is not None)]
            ).norm()
        )
    total = torch.stack(list(norms.values())).sum().clamp(min=torch.finfo(torch.float32).tiny)
    return {name: norm / total for name, norm in norms.items()}


def _shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in module.parameters()]
