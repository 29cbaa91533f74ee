"""`DistillationModule`: a student that learns from a frozen teacher, as one LightningModule.

The work is done by `Learner`; the hooks stand in `DistillationSteps`, apart from the base class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_compress.callback import refuse_strategy
from lightning_compress.distillation.learner import Learner
from lightning_compress.distillation.losses import DistillationLoss
from lightning_compress.distillation.objective import random_state_kept, take_examples
from lightning_compress.distillation.teacher import call
from lightning_compress.errors import CompressionError

if TYPE_CHECKING:
    _Base = L.LightningModule
else:
    _Base = object


class DistillationSteps(Learner, _Base):
    """Everything :class:`DistillationModule` does, for any base class with Lightning's hooks."""

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
    ) -> None:
        super().__init__(student, teacher, losses, task_loss, task_weight, teacher_checkpoint)
        self.optimizer = optimizer
        self.scheduler = scheduler
        if type(self).__init__ is DistillationSteps.__init__:  # a subclass decides for itself what it saves
            self.save_hyperparameters()

    def configure_optimizers(self) -> Any:
        """``optimizer`` over the trainable parameters, and ``scheduler``, stepped each epoch."""
        # Not a default argument: LightningCLI would hand AdamW's settings on to the class that YAML names instead.
        optimizer = (self.optimizer or torch.optim.AdamW)(self.trainable_parameters())
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "monitor": "val_loss"}}

    # The steps --------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One distillation step; logs every term raw and weighted."""
        loss, terms, outputs = self.distill(batch)
        values = {f"train_{name}": value.detach() for name, value in terms.items()}
        values |= {f"train_{name}_weighted": self._weight(name) * value.detach() for name, value in terms.items()}
        size = len(self.logits(outputs))
        self.log_dict(values, batch_size=size)
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=size)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the student's loss and accuracy."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the student's loss and accuracy."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """The student's outputs."""
        return call(self, self.split_batch(batch)[0])

    def _evaluate(self, batch: Any, stage: str) -> None:
        # The student's own loss: the same number with and without a teacher, and no forward of it.
        inputs, targets = self.split_batch(batch)
        outputs = call(self, inputs)
        logits = self.logits(outputs)
        values = {f"{stage}_loss": self._task(outputs, targets)}
        accuracy = _accuracy(logits, targets, getattr(self.task_loss, "ignore_index", None))
        if accuracy is not None:
            values[f"{stage}_acc"] = accuracy
        self.log_dict(values, prog_bar=True, sync_dist=True, batch_size=len(logits))

    # When ---------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if stage == TrainerFn.FITTING:
            refuse_strategy(self.trainer, "DistillationModule")
            self._attach()

    def configure_model(self) -> None:
        """Make the adapters before the optimizer, and before averaging callbacks copy the module."""
        trainer = self._trainer
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING and not self._prepared:
            self.prepare_(self._example_inputs())

    def on_fit_start(self) -> None:
        self._teacher.place(self.student)
        self._teacher.seal()

    def teardown(self, stage: str) -> None:
        moved = self._teacher.moved()
        self.close()
        if moved:
            raise CompressionError(
                f"The teacher must not change while it teaches. Changed: {', '.join(moved[:5])}"
                f"{' ...' if len(moved) > 5 else ''}. The student learnt from a moving teacher."
            )

    def configure_callbacks(self) -> list[Callback]:
        # No hook of a LightningModule runs then. Once is enough: Lightning tells the user of each that it replaces.
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        present = any(isinstance(callback, _CloseOnException) for callback in callbacks)
        return [] if present else [_CloseOnException()]

    def _example_inputs(self) -> Any:
        for owner in (self, self.student):
            example = getattr(owner, "example_input_array", None)
            if example is not None:
                return example
        if not len(self._student_taps):
            return None  # nothing to make; the first step checks the rest
        with random_state_kept():  # a `train_dataloader` may split at random
            batch = take_examples(self.trainer.fit_loop._data_source.dataloader())
        return None if batch is None else self.split_batch(batch)[0]

    def _set_hparams(self, hp: Any) -> None:
        # Only what a checkpoint can hold as plain values; never a module, whatever a subclass asks to save.
        plain = {k: v for k, v in self._to_hparams_dict(hp).items() if k != "teacher" and _is_plain(v)}
        super()._set_hparams(plain)


class DistillationModule(DistillationSteps, L.LightningModule):
    """A student that learns from a frozen teacher: use it as it is, subclass it, or configure it in YAML.

    ``loss = task_weight · task_loss(student logits, targets) + Σ weight · distillation loss``

    The teacher never enters the module tree: it is in no checkpoint, optimizer or averaged copy. Features are tapped
    by layer name; where two layers' shapes differ, an adapter is made by a dry run before the optimizer is, on
    ``example_input_array`` of module or student, or else on the first items of the train loader's dataset.

    Args:
        student: The model that is trained; ``forward`` gives its outputs.
        teacher: Any module, also a LightningModule; None is legal until ``fit``.
        losses: Distillation losses; None: soft targets.
        task_loss: A module called with (logits, targets); None: cross-entropy.
        task_weight: Factor of the task loss. With 0, batches need no targets to train.
        teacher_checkpoint: File with the teacher's weights: see :func:`~.teacher.load_weights_`.
        optimizer: Called with the trainable parameters; None: `torch.optim.AdamW`.
        scheduler: Called with the optimizer; stepped each epoch.

    Raises:
        CompressionError: If a value is out of range, or teacher and student share parameters.

    Logs ``train_loss``, ``train_<term>`` and ``train_<term>_weighted``; ``val_loss`` and ``test_loss`` (the student's
    task loss) and, for classification, ``val_acc`` and ``test_acc``.

    Example:
        >>> from lightning_compress.distillation import SoftTarget
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

    Hooks: ``setup`` (checks, taps), ``configure_model`` (adapters, ``teacher_checkpoint``), ``on_fit_start`` (the
    teacher moves to the student's device), ``teardown`` (it goes home, and must be bit-identical).
    """


class _CloseOnException(Callback):
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(pl_module, DistillationSteps):
            pl_module.close()


def _accuracy(logits: Tensor, targets: Any, ignore_index: int | None) -> Tensor | None:
    """Accuracy where this looks like classification: integer targets, logits with a dimension more (1 or last)."""
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.dtype == torch.bool:
        return None
    if logits.dim() != targets.dim() + 1:
        return None
    for class_dim in (1, -1):
        classes = logits.movedim(class_dim, 1)
        if classes.shape[:1] + classes.shape[2:] == targets.shape:
            return multiclass_accuracy(
                classes.detach().float(),
                targets,
                num_classes=classes.shape[1],
                average="micro",
                ignore_index=ignore_index,
                validate_args=False,
            )
    return None


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
