"""`ScheduledPruning`: decides when masks grow, and what weights and files become of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NotRequired

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_compress.callback import compression_callbacks, warn_of_other_settings
from lightning_compress.errors import NoEffectWarning, invalid
from lightning_compress.modules.resizing import Cut
from lightning_compress.pruning import rewind as rewinding
from lightning_compress.pruning.masking import MaskingCallback, MaskingState
from lightning_compress.pruning.masks import SparsityPoint, add_point_, check_masks, read_masks, sparsity_of
from lightning_compress.pruning.methods import pruned
from lightning_compress.pruning.pruner import Pruner
from lightning_compress.pruning.recipe import METHOD, check_batches, make_recipe
from lightning_compress.pruning.rewind import Rewind
from lightning_compress.pruning.trainer import calibrated_outcome
from lightning_compress.schedules import Polynomial, Schedule
from lightning_compress.structure.listener import averaged_copies
from lightning_compress.targets import Scope, Targets
from lightning_compress.window import Window, fit_length

_WORTH = 0.1
"""Between two calibrations at least this fraction of the way to the budget is gone: less isn't worth the time."""


class PruningState(MaskingState):
    """What a checkpoint holds of `ScheduledPruning`."""

    history: list[tuple[int, float, dict[str, float]]]
    settings: dict[str, str]
    rewind_step: int
    kept: rewinding.RewindPoint | None
    calibrated: NotRequired[str]
    asked: NotRequired[float]


class ScheduledPruning(MaskingCallback):
    """Zeroes weights on a schedule; at its window's end exactly ``round(sparsity * N)`` of N weights are zero.

    Masks only grow. They live in this callback (and in its checkpoint state), never in the model: after each optimizer
    step the weights are multiplied by them in place, so a forward pass costs nothing extra and the keys of
    ``state_dict`` stay as they are. Gradients and optimizer moments of pruned weights are zero too. Zeros alone make no
    dense kernel faster and no file smaller; the report says so.

    Args:
        method: ``lamp``, by which the weights of several layers compare, ``l1_unstructured`` (or ``magnitude``),
            ``wanda`` and ``least_squares`` (see below), ``taylor``, ``movement`` (see `criteria`),
            ``random_unstructured``, ``ln_structured``, ``random_structured``, ``custom_from_mask``, or the import path
            of a `torch.nn.utils.prune.BasePruningMethod` subclass, of a function that scores a layer's weights, or of
            a `pruning.criteria.Criterion`.
        sparsity: the fraction of the original weights that is zero at the end, in [0, 1); left out where the method
            or ``n_m`` fixes it.
        scope: ``global`` ranks all targeted weights together, ``layer`` each tensor by itself.
        schedule: how sparsity grows over the window.
        window: when. Masks grow at every ``every_n_steps``-th step of it and are frozen after it.
        targets: which weights; by default those of all trainable convolution, linear, recurrent and attention layers.
        overrides: pattern of a layer's path to a final fraction of its own; the last match wins. With scope ``global``
            the other layers make up the difference, so that ``sparsity`` holds for all together.
        max_layer_sparsity: scope ``global``: no layer without an override is pruned more than this.
        n_m: ``"2:4"``: of every 4 consecutive weights along a layer's input dimension 2 stay, the larger ones. Layers
            whose inputs don't divide into such groups stay dense and are listed.
        dim: structured methods: the dimension whose slices are the units, of weights seen as ``(outputs, inputs, ...)``
            whatever their own layout is. With 0, bias and following norms are silenced too. Exclude the output layer
            from these.
        norm: ``ln_structured``: the norm's order.
        mask_file: ``custom_from_mask``: a file that ``torch.save({parameter name: mask}, ...)`` wrote.
        regrow: whether a pruned weight may come back while the window lasts, with the value that it had when it went;
            else masks only grow. Takes memory of the weights' size.
        rewind: whether, and to where, all other weights go back when some were pruned.
        progress_bar: whether the progress bar shows the sparsity.
        calibration_batches: ``wanda`` and ``least_squares``: how many batches they look at, at most.
        seed: of the random methods, and of what calibration looks at; the global generators aren't touched, and all
            ranks draw the same.

    Raises:
        CompressionError: in the constructor for bad arguments, at fit start for targets that match nothing or a budget
            that they can't meet.

    The methods ``wanda`` and ``least_squares`` (see `prune_`) look at batches of ``calibration_dataloader()`` of the
    datamodule or the module, if there is one, else of the train loader, in an iteration of their own, as
    `PostTrainingQuantization` feeds them. As that takes seconds, they act only when the schedule has moved on by a
    tenth of the way. The original is the model as it is then; averages are shifted as the model's weights are.

    Logs ``sparsity`` whenever masks grow, and ``sparsity/<parameter>`` for each weight at the end of each epoch.

    Hooks: `on_fit_start` finds the targets, `on_before_optimizer_step` masks the gradients, each optimizer step
    the weights; `on_train_batch_end` grows the masks: before validation and saving, so a monitored metric belongs
    to the weights that are saved.

    Example:
        >>> pruning = ScheduledPruning(sparsity=0.9, schedule=Polynomial(power=3))
        >>> # Trainer(callbacks=[pruning]).fit(model, datamodule)

    References:
        Zhu and Gupta, "To prune, or not to prune", 2017 (arXiv:1710.01878), for the default schedule.
    """

    leads_to = "pruned"
    is_guarded = can_wait = True

    saved_form: ClassVar[Any] = PruningState

    def __init__(
        self,
        method: str = METHOD,
        sparsity: float | None = None,
        scope: Scope = "global",
        schedule: Schedule = Polynomial(),  # noqa: B008  frozen
        window: Window = Window(0.1, 0.6, every_n_steps=10),  # noqa: B008  frozen
        targets: Targets = Targets(),  # noqa: B008  frozen
        overrides: Mapping[str, float] | None = None,
        max_layer_sparsity: float = 1.0,
        n_m: str | None = None,
        dim: int = 0,
        norm: float = 2.0,
        mask_file: str | None = None,
        regrow: bool = False,
        rewind: Rewind | None = None,
        progress_bar: bool = False,
        calibration_batches: int = 32,
        seed: int = 0,
    ) -> None:
        budget = (sparsity, scope, targets, overrides, max_layer_sparsity)
        recipe = make_recipe(method, *budget, n_m, dim, norm, regrow)
        super().__init__(recipe, window)
        if (mask_file is not None) != (method == "custom_from_mask"):
            raise invalid("mask_file", "be given with method='custom_from_mask', and only then", mask_file)
        if regrow and rewind is not None:
            raise invalid("rewind", "be left out with regrow=True", rewind)
        if rewind is not None and recipe.method.calibrates:
            raise invalid("rewind", f"be left out with method={method!r}", rewind)
        check_batches(calibration_batches)
        self.method = method
        self.sparsity = sparsity
        self.scope = scope
        self.overrides = overrides
        self.targets = targets
        self.n_m = n_m
        self.schedule = schedule
        self.mask_file = mask_file
        self.regrow = regrow
        self.rewind = rewind
        self.progress_bar = progress_bar
        self.calibration_batches = calibration_batches
        self.seed = seed
        self.sparsity_history: list[SparsityPoint] = []
        self._rewind_point: rewinding.RewindPoint | None = None
        self._rewind_step = 0
        self._asked = 0.0  # of the budget, when a method calibrated last
        self._calibrated = ""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.sparsity_history, self._rewind_point = [], None
            self._asked, self._calibrated = 0.0, ""

    @override
    def make_pruner(self, pl_module: pl.LightningModule) -> Pruner:
        pruner = super().make_pruner(pl_module)
        if self.mask_file is not None:
            pruner.given = check_masks(read_masks(self.mask_file), pruner.weights)
            if not pruned(pruner.given.values()):
                raise invalid("mask_file", "hold masks that prune something", self.mask_file)
        return pruner

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        rewind = self._rewind(trainer)
        if rewind is not None and self._bounds is None:
            length = fit_length(trainer)
            self._rewind_step = rewind.step(*length)
            rewinding.check_rounds(self._rewind_step, self.window.bounds(*length), self.window, self.schedule)
        self._record_if_due(trainer, pl_module)
        super().on_train_start(trainer, pl_module)

    def _rewind(self, trainer: Any) -> Rewind | None:
        return None if trainer.fast_dev_run else self.rewind  # a run of a step or two is too short for rounds

    def _record_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._rewind(trainer) and self._rewind_point is None and self._step == self._rewind_step:
            self._rewind_point = rewinding.record_point(pl_module, trainer.optimizers)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._record_if_due(trainer, pl_module)

    @override
    def act(self, trainer: pl.Trainer, pl_module: pl.LightningModule, progress: float) -> None:
        self._record_if_due(trainer, pl_module)
        pruner, before = self.pruner, self.masks
        fraction = self.schedule.value(progress, 1.0)
        if pruner.method.calibrates:
            self._calibrate(trainer, pl_module, fraction)
        else:
            pruner.grow_(fraction, self.seed + self._step, self.regrow)
        if trainer.world_size > 1 and not pruner.method.calibrates:
            # All ranks hold the same weights and seed; a user's own method may still draw from elsewhere.
            pruner.masks = trainer.strategy.broadcast(pruner.masks)
        if self._rewind_point is not None and pruned(pruner.masks.values()) > pruned(before.values()):
            rewinding.rewind_(self._rewind_point, pl_module, trainer.optimizers, averaged_copies(trainer))
            for other in compression_callbacks(trainer):
                other.sync_(trainer, pl_module)
            rank_zero_info(
                f"ScheduledPruning: {sparsity_of(pruner.masks):.1%} of the weights are zero at step {self._step}; the "
                f"others are back at step {self._rewind_step}."
            )
        self.follow_masks_(trainer, before)
        self.sync_(trainer, pl_module)
        add_point_(self.sparsity_history, self._step, pruner.masks, at_end=progress >= 1.0)
        if progress >= 1.0:
            self._freeze()
            if not pruner.plan.is_met(self.masks):
                rank_zero_warn(f"ScheduledPruning: at its window's end {self.reached()}")
        if self._step:
            pl_module.log(self._logged_name(trainer), sparsity_of(pruner.masks), prog_bar=self.progress_bar)

    def _calibrate(self, trainer: pl.Trainer, pl_module: pl.LightningModule, fraction: float) -> None:
        if round(fraction - self._asked, 6) < _WORTH and not fraction == 1.0 > self._asked:
            return
        self._asked = fraction
        outcome = calibrated_outcome(
            trainer, pl_module, self.pruner, fraction, self.calibration_batches, self.seed + self._step
        )
        self.pruner.take_(pl_module, outcome, averaged_copies(trainer))
        self._calibrated = f"at step {self._step} {outcome}"
        rank_zero_info(f"ScheduledPruning: {self._calibrated}.")
        if outcome.warning and fraction == 1.0:
            rank_zero_warn(f"ScheduledPruning: {outcome.warning}", category=NoEffectWarning)

    def _freeze(self) -> None:
        """Drop all that only growing masks need."""
        self.pruner.criterion_state = {}
        self._rewind_point = None

    @override
    def has_begun(self) -> bool:
        return pruned(self.masks.values()) > 0

    @override
    def give_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().give_up(trainer, pl_module)
        self._freeze()

    @override
    def reached(self) -> str:
        goal = self.recipe.budget.sparsity  # known for N:M too
        return f"sparsity is {sparsity_of(self.masks):.3f}, not {goal}."

    def _logged_name(self, trainer: pl.Trainer) -> str:
        """Name the logged value: ``sparsity``, numbered where several callbacks prune."""
        pruning = [callback for callback in compression_callbacks(trainer) if isinstance(callback, ScheduledPruning)]
        return "sparsity" if len(pruning) == 1 else f"sparsity_{pruning.index(self)}"

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        prefix = self._logged_name(trainer)
        by_layer = {f"{prefix}/{name}": sparsity_of({name: mask}) for name, mask in self.masks.items()}
        pl_module.log_dict({prefix: sparsity_of(self.masks), **by_layer})

    @override
    def on_channels_removed(self, trainer: pl.Trainer, pl_module: pl.LightningModule, cut: Cut) -> None:
        if self._pruner is not None and self._rewind_point is not None:
            self._rewind_point = rewinding.cut_point(self._rewind_point, trainer.optimizers, cut)
        super().on_channels_removed(trainer, pl_module, cut)

    @override
    def refit_masks_(self, trainer: pl.Trainer) -> None:
        progress = None if self._bounds is None else self.progress_at(self._step)
        if progress is not None:
            before, calibrates = self.masks, self.pruner.method.calibrates
            fraction = self._asked if calibrates else self.schedule.value(progress, 1.0)
            self.pruner.refit_(fraction, self.seed + self._step)
            self.follow_masks_(trainer, before)

    @override
    def report_notes(self) -> list[str]:
        notes = super().report_notes()
        return [*notes, f"ScheduledPruning {self._calibrated}."] if self._calibrated else notes

    @override
    def report_history(self) -> list[Any]:
        return self.sparsity_history

    @property
    def state_key(self) -> str:
        return self._generate_state_key(method=self.method, targets=repr(self.recipe.targets), n_m=self.n_m)

    @property
    def _settings(self) -> dict[str, str]:
        """What a checkpoint's masks and bounds hold for."""
        return {name: repr(getattr(self, name)) for name in ("sparsity", "scope", "overrides", "schedule", "window")}

    @override
    def state_dict(self) -> dict[str, Any]:
        history = [[point.step, point.sparsity, point.by_layer] for point in self.sparsity_history]
        rewind = {"rewind_step": self._rewind_step, "kept": self._rewind_point}
        calibrated = {"asked": self._asked, "calibrated": self._calibrated} if self._calibrated else {}
        return {**super().state_dict(), "history": history, "settings": self._settings, **rewind, **calibrated}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        saved = state_dict["settings"]
        warn_of_other_settings("ScheduledPruning", saved, self._settings, goes_on="window, step and masks")
        self.sparsity_history = [SparsityPoint(*point) for point in state_dict["history"]]
        self._rewind_step, self._rewind_point = state_dict["rewind_step"], state_dict["kept"]
        self._asked, self._calibrated = state_dict.get("asked", 0.0), state_dict.get("calibrated", "")
