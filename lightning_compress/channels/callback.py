"""`ChannelPruning`: decides when channels leave, and lets all that rides on them follow."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_compress.callback import CompressionCallback, compression_callbacks, rebuild_ddp, warn_of_other_settings
from lightning_compress.channels.batchnorm_restart import BatchNormRestart, input_moments
from lightning_compress.channels.cutting.cut import cut_
from lightning_compress.channels.fit_calls import ADAPTERS, FitCalls, guests
from lightning_compress.channels.planning.importance import carry_scores_, rank
from lightning_compress.channels.planning.plan import RemovalPlan
from lightning_compress.channels.planning.recipe import LEAST, SCOPE, Budget, make_recipe
from lightning_compress.channels.planning.regularize import regularize_
from lightning_compress.channels.planning.search import Progress, make_plan, removable
from lightning_compress.channels.remove_channels import check_module
from lightning_compress.channels.tracing.find_groups import find_groups
from lightning_compress.channels.tracing.groups import DependencyGroups
from lightning_compress.errors import NoEffectWarning, invalid
from lightning_compress.messages import by_reason, in_short, named, they
from lightning_compress.modules.copying import copy_tensors
from lightning_compress.modules.paths import modules_of, named_tensors
from lightning_compress.modules.resizing import Cut, resize_state_
from lightning_compress.schedules import Linear, OneShot, Schedule
from lightning_compress.silent_copy import make_probe
from lightning_compress.structure.change import to_float_
from lightning_compress.structure.files import restored_state
from lightning_compress.structure.listener import averaged_copies
from lightning_compress.targets import Scope, Targets
from lightning_compress.window import Bounds, Window, fit_length
from lightning_compress.windowed_callback import WindowedCallback

_WORTH = 0.1
"""Between two removals at least this fraction of the way to the budget is gone: less isn't worth a plan."""


class ChannelPruning(WindowedCallback):
    """Removes channels, neurons, heads and hidden widths while a model trains, until a budget is met.

    What leaves is really gone: parameters, multiply-accumulates, memory and time fall. Training goes on undisturbed:
    parameters stay the same objects, and optimizer moments, pruning masks, averaged copies and adapters are cut with
    the same indices; running statistics of norms start anew, frozen ones too where a cut has changed what reaches them:
    see `BatchNormRestart`. Checkpoints hold the smaller
    tensors; ``fit(ckpt_path=)``, ``test(ckpt_path=)`` (with this callback) and ``load_compressed(path, model)`` load
    them into the full-size module.

    Args:
        channels: budget: the fraction of the channels that remains; exactly one of the four is given.
        params: budget: the fraction of the parameters that remains.
        macs: budget: the fraction of the multiply-accumulates that remains, for the batches of this fit.
        latency: budget: the fraction of a forward pass' time that remains, measured on this machine when the window
            starts.
        importance: ``l1``, ``l2``, ``batchnorm``, ``taylor``, ``fpgm``, ``random``, or the import path of your own
            function: see `Importance`.
        scope: ``global`` ranks the channels of all layers together, but leaves no layer less than 3/4 of what it would
            keep if all lost the same fraction, which is what ``layer`` takes of each.
        schedule: how much of the way to the budget is gone when. Channels leave when it asks for a tenth more, so there
            are ten rounds at most; `Steps` says how many, `OneShot` is one, at the window's start.
        window: when. Leave a hundred optimizer steps or more after its end.
        targets: which layers; by default all that can lose channels and are trained. A width that a norm spans
            (LayerNorm, GroupNorm) is cut only if ``include`` names one of its layers exactly, as that is approximate.
        overrides: pattern of layers' paths to the fraction of their channels that remains; the last match wins.
        min_layer_channels: no layer keeps a smaller fraction of its channels.
        round_to: keep a multiple of this in each layer; by default of 8 in layers of 32 channels and more, or of less
            where that misses the budget.
        regularization: strength of a penalty that draws the least important units of each group to zero until the last
            channels have left: see `regularize_`. Give it time with a schedule such as ``Steps([0.0, 1.0], [0.0,
            1.0])``, by which all leave when the window ends.
        seed: of ``importance="random"``; the global generators aren't touched.

    Raises:
        CompressionError: in the constructor for bad arguments; in ``setup`` for a strategy that can't follow, and where
            QuantizationAwareTraining begins before the last channels leave; at the first batch if nothing can be
            removed. Nothing has changed then.

    Logs ``remaining_<budget>`` (a fraction of the original; of the multiply-accumulates, where the budget is latency)
    whenever channels leave, and at the end of each epoch.

    Hooks: `on_train_batch_start` looks at what the module does with the first batch, and removes what is due at the
    very start; `on_train_batch_end` removes later, after the optimizer step, before validation and saving.

    Example:
        >>> callback = ChannelPruning(macs=0.5)
        >>> # Trainer(callbacks=[callback]).fit(model, datamodule)

    References:
        Fang et al., "DepGraph: Towards Any Structural Pruning", 2023 (arXiv:2301.12900).
    """

    key = "channels"
    conflicts = ("quantization-aware training",)

    def __init__(
        self,
        channels: float | None = None,
        params: float | None = None,
        macs: float | None = None,
        latency: float | None = None,
        importance: str = "l1",
        scope: Scope = SCOPE,
        schedule: Schedule = Linear(),  # noqa: B008  frozen
        window: Window = Window(0.0, 0.3),  # noqa: B008  frozen
        targets: Targets = Targets(),  # noqa: B008  frozen
        overrides: Mapping[str, float] | None = None,
        min_layer_channels: float = LEAST,
        round_to: int | None = None,
        regularization: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(window)
        self.recipe = make_recipe(channels, params, macs, latency, importance, scope, targets, overrides,
                                  min_layer_channels, round_to, seed)  # fmt: skip
        if isinstance(regularization, bool) or not isinstance(regularization, (int, float)) or regularization < 0:
            raise invalid("regularization", "be a number, at least 0", regularization, "Usual values: 1e-4 to 1e-2.")
        if self.recipe.importance.needs_gradients and window.start == 0 and schedule.value(0.0, 1.0) > 0:
            raise invalid("window", f"start later with importance={importance!r}, which needs gradients", window)
        self.schedule = schedule
        self.regularization = regularization
        self.plans: list[RemovalPlan] = []
        """What each round of this fit led to, as seen from the original."""
        self._progress = Progress()
        self._fresh = BatchNormRestart()
        self._goal: float | None = None
        self._latency: float | None = None
        self._asked = 0.0
        self._taylor: dict[str, Tensor] = {}
        self._seen: DependencyGroups | None = None
        self._looked = self._warned = False
        self._waits: float | None = None
        self._batch: tuple[Any, int] | None = None
        self._missed = ""
        self._model: weakref.ref[nn.Module] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.plans, self._seen, self._waits, self._batch = [], None, None, None
        self._looked = self._warned = False
        restored = restored_state(pl_module, self.state_key)
        if restored is not None or self._model is None or self._model() is not pl_module:
            self._model = weakref.ref(pl_module)
            self._forget()
            if restored is not None:
                self._take(restored)

    def _forget(self) -> None:
        self._progress, self._taylor, self._missed = Progress(), {}, ""
        self._fresh.batches, self._fresh.norms = None, []
        self._asked, self._goal, self._latency = 0.0, None, None

    @override
    def why_conflicts(self, trainer: pl.Trainer, other: CompressionCallback) -> str:
        """Quantization must not begin before the last channels have left."""
        if trainer.state.fn != "fit" or other.key not in self.conflicts or not isinstance(other, WindowedCallback):
            return ""
        if other.waits or self.is_final():
            return ""
        # Where both are fractions of the same, rounding to steps may cross: then quantization waits.
        comparable = other.window.unit == self.window.unit
        overlap = comparable and other.window.start < self._last_place()
        remedy = f"start={self._last_place()}, unit={self.window.unit!r}"
        if self._bounds is not None and not comparable:
            bounds = other._bounds or other.window.bounds(*fit_length(trainer))
            last = self.final_step(trainer)
            overlap, remedy = bounds.start < last, f"start={last}, unit='step'"
        if not overlap:
            return ""
        return (
            f"`window` of {type(other).__name__} must start when all channels have left. Received: {other.window} "
            f"beside ChannelPruning's {self.window}. Leave it out, by which quantization waits, or start it later: "
            f"{type(other).__name__}(window=Window({remedy}))."
        )

    def is_final(self) -> bool:
        return self._asked >= 1.0

    def _last_place(self) -> float:
        """Where in the window's unit the last channels leave."""
        end = self.window.end if self.window.end is not None else math.inf
        return self.window.start if isinstance(self.schedule, OneShot) else end

    def final_step(self, trainer: pl.Trainer) -> int:
        if self.is_final():
            return 0
        bounds = self._bounds or self.window.bounds(*fit_length(trainer))
        return self._last_step(bounds)

    def _last_step(self, bounds: Bounds) -> int:
        return bounds.start if isinstance(self.schedule, OneShot) else bounds.end

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.recipe.targets.check_patterns(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.refuse_others(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.apply_pending_(trainer, pl_module, batch, batch_idx)
        self._refresh_statistics_(trainer, pl_module, batch, batch_idx)
        if self._seen is None and self._asked < 1.0 and (self._needs_groups or not self._looked):
            look = FitCalls(trainer, pl_module, batch, batch_idx)
            self._seen = find_groups(look.subject)
            if not self._looked:
                # Now, and not when the first channels are to leave: what can't work is said before it costs anything.
                removable(look.host, self._seen, self.recipe)
        self._looked = True
        # Only where it may be needed: a step may change or empty what it is given.
        if self.bounds.is_due(self._step + 1, self.window.every_n_steps) and self._asks(
            self.bounds.progress(self._step + 1)
        ):
            self._batch = copy_tensors(batch), batch_idx

    def _refresh_statistics_(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let norms forget the wider network in this batch, those too that can't by themselves."""
        if self._fresh.awaits_pass(pl_module):
            look = FitCalls(trainer, pl_module, batch, batch_idx)
            models = (pl_module, *averaged_copies(trainer))
            probe = make_probe(trainer, pl_module)
            to_float_(probe)
            self._fresh.follow_(models, probe, look.own)
        self._fresh.begin_(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._fresh.end_(pl_module)  # before channels leave in this hook: the next batch is the first after that
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def apply_pending_(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._waits is not None:
            progress, self._waits = self._waits, None
            self._remove(trainer, pl_module, (batch, batch_idx), progress)

    @property
    def _needs_groups(self) -> bool:
        """Whether something is done with each gradient until the last channels have left."""
        return (self.recipe.importance.needs_gradients or self.regularization > 0) and (
            self._step < self._last_step(self.bounds)
        )

    def _asks(self, progress: float | None) -> bool:
        """Whether the schedule asks for enough to be worth a plan."""
        asked = 0.0 if progress is None else self.schedule.value(progress, 1.0)
        # Rounded: a tenth is a hair less than that in some steps of a schedule.
        return round(asked - self._asked, 6) >= _WORTH or asked == 1.0 > self._asked

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if not self._needs_groups or self._seen is None:
            return
        tensors, modules, groups = named_tensors(pl_module), modules_of(pl_module), self._seen.all
        if self.recipe.importance.needs_gradients:
            carry_scores_(groups, tensors, modules, self.recipe.importance, self._taylor)
        if self.regularization > 0 and self._step >= self.bounds.start:
            stepped = {id(one) for group in optimizer.param_groups for one in group["params"]}
            ranked = rank(groups, tensors, modules, self.recipe.importance, self._taylor, self.recipe.seed)
            regularize_(groups, tensors, ranked, self.regularization, stepped)

    def act(self, trainer: pl.Trainer, pl_module: pl.LightningModule, progress: float) -> None:
        if not self._asks(progress):
            return
        if self._step == 0 or self._batch is None:
            self._waits = progress  # the first batch shows what the model does
        else:
            batch, self._batch = self._batch, None
            self._remove(trainer, pl_module, batch, progress)

    def _remove(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: tuple[Any, int], progress: float
    ) -> None:
        check_module(pl_module)
        self._asked, self._looked = self.schedule.value(progress, 1.0), True
        look = FitCalls(trainer, pl_module, *batch)
        plan = trainer.strategy.broadcast(self._plan(look))
        self._progress = self._progress.after(plan)
        overall = self._progress.overall(plan)
        self.plans.append(overall)
        before = input_moments(make_probe(trainer, pl_module), look.own)
        self._apply(trainer, pl_module, plan)
        if plan.kept:
            models = (pl_module, *averaged_copies(trainer))
            self._fresh.restart_(models, make_probe(trainer, pl_module), look.own, before, plan.kept)
        if self._asked >= 1.0:
            head = f"ChannelPruning, after step {self._step}: {'; '.join(overall.totals())}"
            rank_zero_info("\n  ".join(in_short([head, *overall.lines()])))
            self._finish(plan)
        else:
            rank_zero_info(f"ChannelPruning, after step {self._step}: {self._logged_name} is {self._remaining:.3f}.")
        if self._step:
            pl_module.log(self._logged_name, self._remaining)

    def _finish(self, plan: RemovalPlan) -> None:
        self._missed = self._missed or plan.missed
        if self._missed:
            rank_zero_warn(f"ChannelPruning: {self._missed}")
        elif self._remaining == 1.0 and self.recipe.budget.fraction < 1.0:
            rank_zero_warn("ChannelPruning: no channel has left.", category=NoEffectWarning)

    def _plan(self, look: FitCalls) -> RemovalPlan:
        """What goes now: a part of the way from the original to the budget."""
        found = find_groups(look.subject)
        recipe = self.recipe
        if recipe.budget.kind == "latency":
            if self._goal is None:
                timed = make_plan(look.subject, found, recipe, self._taylor, self._progress)
                self._goal = look.trainer.strategy.broadcast(timed.after.macs / timed.before.macs)
                self._latency, self._missed = timed.latency, timed.missed
            recipe = replace(recipe, budget=Budget("macs", self._goal))
        overrides = {pattern: self._on_the_way(final) for pattern, final in recipe.overrides.items()}
        budget = replace(recipe.budget, fraction=self._on_the_way(recipe.budget.fraction))
        recipe = replace(
            recipe, budget=budget, goal=recipe.budget.fraction, overrides=overrides, seed=recipe.seed + self._step
        )
        if self._asked < 1.0:
            # Steps are for the end: a round takes less than one from most layers.
            recipe = replace(recipe, round_to=1)
        plan = make_plan(look.subject, found, recipe, self._taylor, self._progress)
        fixed = {layer: reason for layer, reason in plan.fixed.items() if not layer.startswith(ADAPTERS)}
        return replace(plan, fixed=fixed, latency=self._latency)

    @property
    def _remaining(self) -> float:
        """The fraction of the original that is logged."""
        remaining: float = getattr(self._progress, self._logged)
        return remaining

    @property
    def _logged(self) -> str:
        kind = self.recipe.budget.kind
        return "macs" if kind == "latency" else kind

    def _on_the_way(self, final: float) -> float:
        return final if self._asked >= 1.0 else 1.0 - self._asked * (1.0 - final)

    def _apply(self, trainer: pl.Trainer, pl_module: pl.LightningModule, plan: RemovalPlan) -> None:
        """Cut the module and all that rides on it."""
        whole = Cut(plan.kept, plan.numbers, {})
        own = {name: dims for name, dims in plan.kept.items() if not name.startswith(ADAPTERS)}
        cut = cut_(pl_module, own, plan.numbers)
        changes = dict(cut.changes)
        for copied in averaged_copies(trainer):
            cut_(copied, own, plan.numbers)
        for number, callback in guests(trainer, pl_module).items():
            adapters = cut_(callback.trained_layers, whole.below(f"{ADAPTERS}{number}").kept_indices, {})
            changes.update(adapters.changes)
        anew = resize_state_(trainer.optimizers, changes)
        if anew and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"ChannelPruning: {', '.join(anew)} keeps state of no known layout, and starts anew for what shrank."
            )
        cut = Cut(own, plan.numbers, changes)
        for callback in compression_callbacks(trainer):
            callback.on_channels_removed(trainer, pl_module, cut)
        if plan.kept:
            rebuild_ddp(trainer, pl_module)
        self._seen, self._taylor = None, {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        pl_module.log(self._logged_name, self._remaining)

    @property
    def _logged_name(self) -> str:
        return f"remaining_{self._logged}"

    def close(self, pl_module: pl.LightningModule) -> None:
        super().close(pl_module)
        self._fresh.end_(pl_module)
        self._seen, self._batch, self._waits = None, None, None

    def unfinished(self) -> str:
        kind, fraction = self.recipe.budget.kind, self.recipe.budget.fraction
        return (
            f"{kind}={fraction} was asked for, {self._remaining:.3f} is reached. Shorten the window, or train longer."
        )

    def report_notes(self) -> list[str]:
        notes = super().report_notes()
        if self.plans:
            last = self.plans[-1]
            spanned = [row.layers[0] for row in last.rows if row.approximate and row.after < row.before]
            if spanned:
                notes.append(f"ChannelPruning cut {named(spanned)} approximately: a norm spans its width.")
            whole = by_reason({layer: why for layer, why in last.fixed.items() if why != "an output"})
            notes += [f"{they(layers, 'keeps its', 'keep their')} width: {why}" for why, layers in whole.items()]
        if self._latency is not None:
            notes.append(f"ChannelPruning: a forward pass took {self._latency:.2f} of its time when this was planned.")
        return [*notes, f"ChannelPruning: {self._missed}"] if self._missed else notes

    @property
    def state_key(self) -> str:
        return self._generate_state_key(budget=self.recipe.budget.kind, targets=repr(self.recipe.targets))

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "asked": self._asked,
            "progress": asdict(self._progress),
            "batches": self._fresh.batches,
            "norms": self._fresh.norms,
            "goal": self._goal,
            "latency": self._latency,
            "taylor": self._taylor,
            "settings": self._settings,
        }

    @property
    def _settings(self) -> dict[str, str]:
        """What a checkpoint's progress holds for."""
        return {"budget": repr(self.recipe.budget), "schedule": repr(self.schedule), "window": repr(self.window)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._take(state_dict)
        warn_of_other_settings("ChannelPruning", state_dict["settings"], self._settings, goes_on="window and step")

    def _take(self, state: Mapping[str, Any]) -> None:
        self._asked = state["asked"]
        self._progress = Progress(**state["progress"])
        self._fresh.batches, self._fresh.norms = state["batches"], list(state["norms"])
        self._goal, self._latency, self._taylor = state["goal"], state["latency"], dict(state["taylor"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_model": None, "_seen": None, "_batch": None}
