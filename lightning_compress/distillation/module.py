"""`DistillationModule`: a student that learns from a frozen teacher, as one LightningModule.

`Learner` computes; `DistillationSteps` has the hooks, for any base class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from typing_extensions import override

from lightning_compress.callback import refuse_strategy
from lightning_compress.distillation.callback_base import ModuleCallback, announce, logs_now
from lightning_compress.distillation.calling import call, mask_of, positions_of
from lightning_compress.distillation.learner import Learner
from lightning_compress.distillation.losses.base import DistillationLoss
from lightning_compress.distillation.objective import Objective, step_values
from lightning_compress.distillation.ramps import Ramp
from lightning_compress.distillation.teacher import TeacherDtype
from lightning_compress.distillation.teacher_check import accuracy, closeness
from lightning_compress.errors import CompressionError
from lightning_compress.modules.calls import take_examples
from lightning_compress.modules.isolation import isolated_random_state
from lightning_compress.silent_copy import is_silent
from lightning_compress.structure.change import is_converted

if TYPE_CHECKING:
    _Base = pl.LightningModule
else:
    _Base = object


class DistillationSteps(Learner, _Base):
    """All that :class:`DistillationModule` does, for any base class with Lightning's hooks."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        losses: list[DistillationLoss] | None = None,
        task_loss: nn.Module | None = None,
        task_weight: float = 0.25,
        teacher_checkpoint: str | None = None,
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | None = None,
        teacher_adapter: nn.Module | None = None,
        teacher_dtype: TeacherDtype | None = None,
        teacher_compile: bool = False,
        ramps: list[Ramp] | None = None,
        log_gradient_share: bool = False,
    ) -> None:
        objective = Objective(
            losses, task_weight, ramps, teacher_checkpoint, teacher_adapter, teacher_dtype, teacher_compile
        )
        super().__init__(student, teacher, objective, task_loss)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.log_gradient_share = log_gradient_share
        if type(self).__init__ is DistillationSteps.__init__:  # a subclass decides for itself what it saves
            self.save_hyperparameters()

    @override
    def configure_optimizers(self) -> Any:
        """``optimizer`` over the trainable parameters, and ``scheduler``, stepped each epoch."""
        # Not a default argument: LightningCLI would hand AdamW's settings on to the class that YAML names instead.
        optimizer = (self.optimizer or torch.optim.AdamW)(self.trainable_parameters())
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "monitor": "val_loss"}}

    # The steps --------------------------------------------------------------------------------------------------

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One distillation step; logs every term raw and weighted."""
        loss, terms, outputs = self.distill(batch)
        weights = self.objective.weights()
        shares = self.log_gradient_share and logs_now(self.trainer)
        values = step_values(terms, weights, self.student if shares else None)
        size = len(self.logits(outputs)) if self.objective.compares_logits else None
        self.log_dict(values, batch_size=size)
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=size)
        return loss

    @override
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the student's loss and accuracy."""
        self._evaluate(batch, "val")

    @override
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the student's loss and accuracy."""
        self._evaluate(batch, "test")

    @override
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Return the student's outputs."""
        return call(self, self.split_batch(batch)[0])

    def _evaluate(self, batch: Any, stage: str) -> None:
        # The student's own loss: the same number with and without a teacher.
        inputs, targets = self.split_batch(batch)
        outputs = call(self, self.student_inputs(inputs))
        values: dict[str, Tensor] = {}
        if targets is not None or self.task_weight > 0:
            values[f"{stage}_loss"] = self._task(outputs, targets)
        size = None
        try:
            logits = self.logits(outputs)
        except CompressionError:
            if self.objective.compares_logits:
                raise
        else:
            size = self._compare(inputs, targets, logits, self.valid_positions(batch), stage, values)
        # Means over positions that count, whatever the batches' sizes and masks.
        self.log_dict(values, prog_bar=True, sync_dist=True, batch_size=size)

    def _compare(
        self, inputs: Any, targets: Any, logits: Tensor, valid: Tensor | None, stage: str, values: dict[str, Tensor]
    ) -> int:
        """Add accuracy and closeness to ``values``, and return over how many positions these are means."""
        class_dim, size = self.objective.class_dim(logits, targets), len(logits)
        if not self.compares_classes:
            return size
        valid = None if class_dim is None else mask_of(valid, positions_of(logits, class_dim))
        found = accuracy(logits, targets, class_dim, valid, getattr(self.task_loss, "ignore_index", None))
        if found is not None:
            values[f"{stage}_acc"], size = found
        # A copy on which is measured is the student alone: neither work nor time of the teacher count.
        fits = self.trainer.state.fn == TrainerFn.FITTING and not is_silent(self)
        if fits and self.objective.compares_logits and class_dim is not None:
            teacher_logits = self.logits(self.teacher_outputs(inputs))
            self.objective.check_once(logits, teacher_logits, targets, valid, classes=True)
            close, size = closeness(logits, teacher_logits, class_dim, valid)
            values |= {f"{stage}_{name}": value for name, value in close.items()}
        return max(size, 1)

    # When: see also `ModuleCallback` ------------------------------------------------------------------------------

    @override
    def setup(self, stage: str) -> None:
        if stage == TrainerFn.FITTING:
            refuse_strategy(self.trainer, "DistillationModule")

    @override
    def configure_model(self) -> None:
        """Make the adapters before the optimizer, and before averaging callbacks copy the module."""
        trainer = self._trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING or self._prepared:
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, ModuleCallback) for callback in callbacks):
            raise CompressionError(
                "`configure_callbacks` must return the callback of DistillationModule too. Received: none of it. "
                "Override it as: return [*super().configure_callbacks(), ...]."
            )
        if is_converted(self):
            return  # called before a callback of ours has made it float again; the Trainer calls once more
        try:
            inputs = self._example_inputs()
        except AttributeError:
            # The module's own `setup` may make the data, and it comes after those of the callbacks. Where a callback's
            # calls this, the Trainer calls it once more; but a copy of Lightning's averaging callbacks, which is made
            # until then, would miss the adapters.
            copied = self.objective.needs_example and any(hasattr(callback, "_average_model") for callback in callbacks)
            if self._current_fx_name != "setup" or copied:
                raise
            return
        plan = self.prepare_(inputs)
        self.objective.attach(self.student)
        if plan is not None:
            announce(plan, type(self).__name__, self.teacher)

    @override
    def configure_callbacks(self) -> list[Callback]:
        # Once is enough: Lightning tells the user of each that it replaces.
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        present = any(isinstance(callback, ModuleCallback) for callback in callbacks)
        return [] if present else [ModuleCallback()]

    def _example_inputs(self) -> Any:
        for owner in (self, self.student):
            example = getattr(owner, "example_input_array", None)
            if example is not None:
                return example
        with isolated_random_state():  # a `train_dataloader` may split at random
            batch = take_examples(self.trainer.fit_loop._data_source.dataloader())
        return None if batch is None else self.split_batch(batch)[0]

    def _set_hparams(self, hp: Any) -> None:
        # Only what a checkpoint can hold as plain values; never a module, whatever a subclass asks to save.
        plain = {k: v for k, v in self._to_hparams_dict(hp).items() if k != "teacher" and _is_plain(v)}
        super()._set_hparams(plain)


class DistillationModule(DistillationSteps, pl.LightningModule):
    """A student that learns from a frozen teacher: use it as it is, subclass it, or configure it in YAML.

    ``loss = task_weight · task_loss(student logits, targets) + Σ weight · distillation loss``

    The teacher never enters the module tree: it is in no checkpoint, optimizer or averaged copy. Features are tapped
    by layer name; where two layers' shapes differ, an adapter is made by a dry run before the optimizer is, on
    ``example_input_array`` of module or student, or else on the first items of the train loader's dataset.

    Args:
        student: The model that is trained; ``forward`` gives its outputs.
        teacher: Any module, also a LightningModule, :class:`Snapshot` or :class:`EMATeacher`; None is legal until
            ``fit``.
        losses: Distillation losses; None: soft targets. Without any, ``[]``, the student learns alone and needs no
            teacher.
        task_loss: A module called with (logits, targets); None: cross-entropy.
        task_weight: Factor of the task loss. With 0, batches need no targets to train.
        teacher_checkpoint: File with the teacher's weights: see :func:`~.weights.load_weights_`.
        optimizer: Called with the trainable parameters; None: `torch.optim.AdamW`.
        scheduler: Called with the optimizer; stepped each epoch.
        teacher_adapter: Called with the teacher's inputs: another normalisation or resolution.
        teacher_dtype: The teacher's floating dtype; None: the student's. 16 bits are for devices that compute in them:
            a CPU without such instructions takes many times as long.
        teacher_compile: Call the teacher through `torch.compile`.
        ramps: Weights and temperatures that change: see :class:`Ramp`.
        log_gradient_share: Log each term's share of the gradient whenever the Trainer logs; a backward pass for each
            term, then.

    Raises:
        CompressionError: If a value is out of range, or teacher and student share parameters.

    Logs ``train_loss``, ``train_<term>`` and ``train_<term>_weighted``; ``val_loss`` and ``test_loss`` (the student's
    task loss) and, for classification, ``val_acc`` and ``test_acc``; while fitting, ``val_agreement`` (same first
    choice as the teacher) and ``val_kl``, if a loss compares logits.

    Example:
        >>> from lightning_compress import SoftTarget
        >>> module = DistillationModule(
        ...     student=nn.Linear(4, 3),
        ...     teacher=nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)),
        ...     losses=[SoftTarget(temperature=4.0, weight=0.75)],
        ... )
        >>> loss, terms, outputs = module.distill((torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])))
        >>> sorted(terms)
        ['soft_target', 'task']
        >>> list(module.state_dict())
        ['student.weight', 'student.bias']

    References:
        Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015).

    Hooks: ``setup`` (refuses strategies), ``configure_model`` (dry run, adapters, ``teacher_checkpoint``, taps), and a
    callback that ``configure_callbacks`` adds: see :mod:`~.distillation.callback_base` for the order.
    """


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
