"""`MaskingCallback`: keeps masks on the weights while a Trainer trains them, whoever decides when masks grow."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_compress.errors import CompressionError, NoEffectWarning
from lightning_compress.messages import by_reason, they
from lightning_compress.modules.resizing import Cut
from lightning_compress.probe import observe_steps
from lightning_compress.pruning.dependents import Observations
from lightning_compress.pruning.masks import PackedMask, pack, sparsity_of, unpack
from lightning_compress.pruning.methods import Masks
from lightning_compress.pruning.pruner import Pruner
from lightning_compress.pruning.recipe import PruningRecipe
from lightning_compress.pruning.silence import observe
from lightning_compress.structure.files import restored_state
from lightning_compress.structure.listener import averaged_copies
from lightning_compress.window import Window
from lightning_compress.windowed_callback import WindowedCallback, WindowedState


class MaskingState(WindowedState):
    """What a checkpoint holds of a callback that prunes."""

    masks: dict[str, PackedMask]
    scores: dict[str, Tensor]
    aside: dict[str, Tensor]


class MaskingCallback(WindowedCallback):
    """Multiplies weights by masks after each optimizer step, in place: the base of callbacks that prune."""

    key = "pruning"
    saved_form: ClassVar[Any] = MaskingState

    def __init__(self, recipe: PruningRecipe, window: Window) -> None:
        super().__init__(window)
        self.recipe = recipe
        self._masks: Masks = {}
        self._skipped: dict[str, str] = {}
        self._unseen = True
        self._masked_gradients = False
        self._announced = False
        self._pruner: Pruner | None = None
        self._criterion_state: dict[str, dict[str, Tensor]] = {}
        self._model: weakref.ref[nn.Module] | None = None

    @property
    def masks(self) -> Masks:
        """Parameter name to bool mask, False where pruned; kept after the fit."""
        return self._masks if self._pruner is None else self._pruner.masks

    @property
    def pruner(self) -> Pruner:
        """The pruner of the fit that runs."""
        if self._pruner is None:
            raise CompressionError(f"{type(self).__name__} has no weights before a fit starts.")
        return self._pruner

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._criterion_state, self._announced = {}, False
        if self._model is None or self._model() is not pl_module:
            self._masks, self._model = {}, weakref.ref(pl_module)
            restored = restored_state(pl_module, self.state_key)
            if restored is not None:
                self.check_state(restored)
                self._masks = unpack(restored["masks"])

    @override
    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pruner = self.make_pruner(pl_module)
        pruner.criterion_state = self._criterion_state
        self._pruner, self._skipped, self._unseen = pruner, pruner.plan.selection.skipped, True
        if pruner.plan.warning:
            rank_zero_warn(f"{type(self).__name__}: {pruner.plan.warning}", category=NoEffectWarning)
        if self._skipped:
            rank_zero_info(f"{type(self).__name__}: {pruner.plan}")

    def make_pruner(self, pl_module: pl.LightningModule) -> Pruner:
        """Make the pruner of a fit, once everything was checked."""
        return Pruner(self.recipe, pl_module, self._masks)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        unseen, self._unseen = self._unseen, False
        if not unseen or not self.pruner.units.outputs:
            return
        seen, name = Observations(), type(self).__name__
        try:
            observe_steps(trainer, pl_module, batch, batch_idx, partial(observe, units=self.pruner.units, seen=seen))
        except CompressionError as error:
            rank_zero_warn(f"{name}: only norms in an nn.Sequential go with pruned units. {error}")
            return
        if trainer.world_size > 1:
            seen = trainer.strategy.broadcast(seen)  # what is seen may depend on the batch
        if news := self.pruner.follow(pl_module, seen):
            rank_zero_warn(f"{name}: {news}")
        self.sync_(trainer, pl_module)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._step < self.bounds.end:
            self.pruner.update_scores(optimizer)
        self.pruner.apply_to_gradients_(optimizer)
        self._masked_gradients = True

    @override
    def after_optimizer_step(self, optimizer: Optimizer) -> None:
        self.pruner.apply_(optimizer)
        if not self._masked_gradients:
            # A step that Lightning didn't know of.
            self.pruner.apply_to_moments_([optimizer])
            self.pruner.forget_([optimizer])

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._masked_gradients = False  # only here: an optimizer that calls another's step is seen twice
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def follow_masks_(self, trainer: pl.Trainer, before: Masks) -> None:
        """Let optimizers follow what became of the masks, or start anew, and say so once."""
        if self.recipe.regrow:
            self.pruner.bring_back_(trainer.optimizers, before)
        anew = self.pruner.forget_(trainer.optimizers, before)
        if anew and not self._announced:
            self._announced = True
            rank_zero_info(
                f"{type(self).__name__}: {', '.join(anew)} keeps state of no known layout, and starts anew for what is "
                "pruned whenever masks grow."
            )

    @override
    def sync_(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._pruner is not None:
            self._pruner.settle_()
            self._pruner.apply_to_moments_(trainer.optimizers)
            for copy in averaged_copies(trainer):
                self._pruner.settle_(copy)

    @override
    def on_channels_removed(self, trainer: pl.Trainer, pl_module: pl.LightningModule, cut: Cut) -> None:
        if self._pruner is None:
            return
        before, self._pruner = self._pruner.masks, self._pruner.cut(pl_module, cut)
        self._unseen = True  # norms are to be looked for again
        emptied = {name for name, kept in cut.kept_indices.items() if not all(map(len, kept.values()))}
        if lost := [name for name in before if name not in {*self._pruner.weights, *emptied}]:
            rank_zero_warn(f"{type(self).__name__}: without its channels, {', '.join(lost)} can't be pruned any more.")
        self.refit_masks_(trainer)
        self.sync_(trainer, pl_module)

    def refit_masks_(self, trainer: pl.Trainer) -> None:
        """Bring the masks to what the budget asks of a model that channels have left."""

    @override
    def close(self, pl_module: pl.LightningModule) -> None:
        super().close(pl_module)
        if self._pruner is not None:
            # Kept, as the fit may be saved now, and resumed later.
            self._masks, self._criterion_state = self._pruner.masks, self._pruner.criterion_state
            self._pruner = None

    @override
    def report_notes(self) -> list[str]:
        notes = super().report_notes()
        notes += [f"{they(names, 'is', 'are')} not pruned: {why}" for why, names in by_reason(self._skipped).items()]
        if self.masks:
            notes.append(
                f"{type(self).__name__}: {sparsity_of(self.masks):.1%} of the targeted weights are zero; zeros alone "
                "make dense kernels no faster and plain files no smaller."
            )
        return notes

    @override
    def state_dict(self) -> dict[str, Any]:
        criterion_state = self._criterion_state if self._pruner is None else self._pruner.criterion_state
        return {**super().state_dict(), "masks": pack(self.masks), "scores": {}, "aside": {}, **criterion_state}

    @override
    def check_state(self, state: Any) -> None:
        super().check_state(state)
        unpack(state["masks"])

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._masks = unpack(state_dict["masks"])
        self._criterion_state = {name: state_dict[name] for name in ("scores", "aside")}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_model": None, "_masks": self.masks, "_pruner": None}
