"""`ScheduledPruning`: decides when masks grow, and keeps them on the weights."""

from __future__ import annotations

import weakref
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_compress import structure
from lightning_compress.callback import CompressionCallback
from lightning_compress.errors import invalid
from lightning_compress.pruning.masks import Masks, Scope, applied, check_masks, pack, read_masks, sparsity_of, unpack
from lightning_compress.pruning.prune import apply_masks_, check_arguments, check_dim, magnitudes_of, next_masks
from lightning_compress.schedules import Polynomial, Schedule
from lightning_compress.targets import Targets, clean_name
from lightning_compress.window import Window


class ScheduledPruning(CompressionCallback):
    """Zeroes weights on a schedule; at its window's end exactly ``round(sparsity * N)`` of N weights are zero.

    Masks only grow. They live in this callback (and in its checkpoint state), never in the model: after each optimizer
    step the weights are multiplied by them in place, so a forward pass costs nothing extra and the keys of
    ``state_dict`` stay as they are. Zeros alone make no dense kernel faster and no file smaller; the report says so.

    Args:
        method: ``l1_unstructured``, ``random_unstructured``, ``ln_structured``, ``random_structured``,
            ``custom_from_mask``, or the import path of a `torch.nn.utils.prune.BasePruningMethod` subclass.
        sparsity: the fraction of the original weights that is zero at the end, in [0, 1); left out where the method
            fixes it.
        scope: ``global`` ranks all targeted weights together, ``layer`` each tensor by itself.
        schedule: how sparsity grows over the window.
        window: when.
        targets: which weights; by default those of all trainable convolution, linear, recurrent and attention layers.
        dim: structured methods: whose slices are the units; 0 is filters and rows. Exclude the output layer from these.
        norm: ``ln_structured``: the norm's order.
        mask_file: ``custom_from_mask``: a file that ``torch.save({parameter name: mask}, ...)`` wrote.
        seed: of the random methods; the global generators aren't touched, and all ranks draw the same.

    Raises:
        CompressionError: in the constructor for bad arguments, at fit start for targets that match nothing.

    Hooks: `on_fit_start` finds the targets, each optimizer step applies the masks, `on_train_batch_end` grows them:
    before validation and saving, so a monitored metric belongs to the weights that are saved.

    Example:
        >>> pruning = ScheduledPruning("l1_unstructured", sparsity=0.9, schedule=Polynomial(power=3))
        >>> # Trainer(callbacks=[pruning]).fit(model, datamodule)

    References:
        Zhu and Gupta, "To prune, or not to prune", 2017 (arXiv:1710.01878), for the default schedule.
    """

    def __init__(
        self,
        method: str = "l1_unstructured",
        sparsity: float | None = None,
        scope: Scope = "global",
        schedule: Schedule = Polynomial(),  # noqa: B008  frozen
        window: Window = Window(0.1, 0.75),  # noqa: B008  frozen
        targets: Targets = Targets(),  # noqa: B008  frozen
        dim: int = 0,
        norm: float = 2.0,
        mask_file: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(window)
        self.rule = check_arguments(method, sparsity, scope, dim, norm)
        if (mask_file is not None) != (method == "custom_from_mask"):
            raise invalid("mask_file", "be given with method='custom_from_mask', and only then", mask_file)
        self.sparsity = sparsity
        self.scope: Scope = scope
        self.schedule = schedule
        self.targets = targets
        self.mask_file = mask_file
        self.seed = seed
        self._masks: Masks = {}
        self._weights: dict[str, Tensor] = {}
        self._magnitudes: dict[str, tuple[str, Tensor]] = {}
        self._applied: Masks = {}
        self._given: Masks | None = None
        self._skipped: dict[str, str] = {}
        self._model: weakref.ref[nn.Module] | None = None

    @property
    def masks(self) -> Masks:
        """Parameter name to bool mask, False where pruned; kept after the fit."""
        return self._masks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and (self._model is None or self._model() is not pl_module):
            self._masks, self._model = {}, weakref.ref(pl_module)
            restored = structure.restored_state(pl_module, self.state_key)
            if restored is not None:
                self._masks = unpack(restored["masks"])

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        selection = self.targets.select(pl_module)
        weights: dict[str, Tensor] = {target.name: target.parameter for target in selection.targets}
        self._magnitudes = magnitudes_of(selection.targets)
        check_dim(self.rule, weights)
        given = read_masks(self.mask_file) if self.mask_file is not None else None
        if given is not None:
            check_masks(given, weights)
        self._masks = check_masks(self._masks, weights)
        self._applied = applied(self._masks, self._magnitudes)
        self._weights = weights
        self._given = given
        self._skipped = selection.skipped
        if selection.skipped:
            lines = [f"  {name}: {reason}" for name, reason in selection.skipped.items()]
            rank_zero_info("\n".join([f"ScheduledPruning prunes {len(weights)} tensors and leaves out:", *lines]))

    def act(self, trainer: pl.Trainer, pl_module: pl.LightningModule, progress: float) -> None:
        goal = None if self.sparsity is None else self.schedule.value(progress, self.sparsity)
        start = check_masks(self._given, self._weights) if self._given is not None else self._masks
        grown = next_masks(self._weights, start, goal, self.rule, self.scope, self.seed + self._step)
        # All ranks hold the same weights and seed; a user's own rule may still draw from elsewhere.
        self._masks = trainer.strategy.broadcast(grown) if trainer.world_size > 1 else grown
        self._applied = applied(self._masks, self._magnitudes)
        self.bring_in_line(trainer, pl_module)
        if self._step:
            pl_module.log(self._logged_name(trainer), sparsity_of(self._masks))

    def _logged_name(self, trainer: pl.Trainer) -> str:
        """``sparsity``, numbered where several callbacks prune."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        pruning = [callback for callback in callbacks if isinstance(callback, ScheduledPruning)]
        return "sparsity" if len(pruning) == 1 else f"sparsity_{pruning.index(self)}"

    def after_optimizer_step(self) -> None:
        apply_masks_({**self._weights, **dict(self._magnitudes.values())}, self._applied)

    def bring_in_line(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._weights:
            self.after_optimizer_step()
            for copy in structure.averaged_copies(trainer):
                apply_masks_(_named_weights(copy), self._applied)

    def close(self, pl_module: pl.LightningModule) -> None:
        super().close(pl_module)
        self._weights, self._magnitudes = {}, {}

    def unfinished(self) -> str:
        return f"sparsity is {sparsity_of(self._masks):.3f}, not {self.sparsity}. Shorten the window, or train longer."

    def report_notes(self) -> list[str]:
        notes = [*super().report_notes(), *(f"{name} isn't pruned: {why}" for name, why in self._skipped.items())]
        if self._masks and not self.rule.structured:
            notes.append(
                f"ScheduledPruning: {sparsity_of(self._masks):.1%} of the targeted weights are zero; zeros alone make "
                "dense kernels no faster and plain files no smaller."
            )
        return notes

    @property
    def state_key(self) -> str:
        return self._generate_state_key(method=self.rule.name, targets=repr(self.targets))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "masks": pack(self._masks)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._masks = unpack(state_dict["masks"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_model": None, "_weights": {}, "_magnitudes": {}}


def _named_weights(module: nn.Module) -> dict[str, Tensor]:
    return {clean_name(name): parameter for name, parameter in module.named_parameters(remove_duplicate=False)}
