"""The base of all callbacks: checks before anything changes, hooks into checkpoints, what callbacks ask each other.

In a fit Lightning calls the hooks in this order, and a callback of ours does in them::

    setup                    refuse what can't work, hook into checkpoints
    (checkpoint is loaded)   structure first, then weights, then `load_state_dict`
    on_fit_start             put into training mode what isn't frozen; `begin`: find the targets, check everything
    on_train_start           fix the window's bounds, watch the optimizers; `act` where the window starts at 0
      on_train_batch_start
        optimizer step       `after_optimizer_step`
      on_train_batch_end     count the step; `act` where the window says so
      validation, saving     use the weights as `act` left them
    on_train_end             warn if the window didn't end
    on_fit_end               (the module is on the CPU again)
    teardown, on_exception   `close`: take all hooks away
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_compress.callback_order import order_callbacks_
from lightning_compress.errors import CompressionError
from lightning_compress.modules.paths import clean_name
from lightning_compress.modules.resizing import Cut
from lightning_compress.modules.training_mode import has_frozen, restore_given_, train_given_, wake_
from lightning_compress.saved_state import check_saved
from lightning_compress.settings import given_arguments
from lightning_compress.structure.change import recorded
from lightning_compress.structure.checkpoint import attach, detach
from lightning_compress.structure.listener import CheckpointListener


@dataclass(frozen=True)
class ReportFile:
    """Describes a file for another runtime to the report.

    Attributes:
        name: of the row.
        size_bytes: of the file.
        path: of the module in it, as the steps of the LightningModule call it; ``""`` is ``forward``.
        prefix: of the names under which a test logs its metrics.
        open: returns a module that runs the file with so many threads (None: torch's), called as the module is.
        facts: how it was proven, as they stand beside it; empty where nothing is known.
    """

    name: str
    size_bytes: int
    path: str
    prefix: str
    open: Callable[[int | None], nn.Module]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """Describes a quantized copy to a guard, before it takes the module's place.

    Attributes:
        model: the copy.
        floats: another copy, in float.
        scheme: of the former, for messages.
        errors: returns the error of the outputs that each quantized layer causes alone, by its path.
        without: returns the same with these layers in another scheme, or in ``float``.
        ratio: returns the time of a batch in this model over that in another candidate's; None where it isn't known.
    """

    model: pl.LightningModule
    floats: pl.LightningModule
    scheme: str
    errors: Callable[[], dict[str, float]]
    without: Callable[[Sequence[str], str], Candidate]
    ratio: Callable[[Candidate], float | None]


class CompressionCallback(Callback, CheckpointListener):
    """Base of all callbacks of the package: works on a module, and answers what other callbacks must know.

    Attributes:
        key: the name of the technique in `conflicts`.
        conflicts: keys of the techniques that can't be in the same Trainer.
        guards: whether it decides about what others do: see `guard` and `hold`.
        is_guarded: whether it asks those that guard.
        leads_to: the `phase` of the module in which a fit with it ends; empty if it brings it to none.
        saved_form: the `TypedDict` of its state in a checkpoint; None if it has none.
    """

    key: ClassVar[str]
    conflicts: ClassVar[tuple[str, ...]] = ()
    guards: ClassVar[bool] = False
    is_guarded: ClassVar[bool] = False
    leads_to: ClassVar[str] = ""
    saved_form: ClassVar[Any] = None

    _given: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        callback = super().__new__(cls)
        callback._given = given_arguments(cls, args, kwargs)  # constructors turn some of them into other things
        return callback

    # What callbacks ask each other. All of it does nothing by default.

    def why_conflicts(self, trainer: pl.Trainer, other: CompressionCallback) -> str:
        """Say why this callback can't be in one Trainer with another; empty if it can."""
        if other.key not in self.conflicts:
            return ""
        names = f"{type(self).__name__} or {type(other).__name__}"
        return f"`callbacks` must hold either {names}. Received: both. Remove one."

    def apply_pending_(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Do what is due at the start of this batch now, since another callback builds on the module's structure."""

    def is_final(self) -> bool:
        """Tell whether this callback won't change the module's structure any more in this fit."""
        return True

    def final_step(self, trainer: pl.Trainer) -> int:
        """Return the optimizer step of this fit after which `is_final` holds."""
        return 0

    def on_channels_removed(self, trainer: pl.Trainer, pl_module: pl.LightningModule, cut: Cut) -> None:
        """Cut what the callback holds of the module's tensors, after channels were removed from the module."""

    def guard(self, trainer: pl.Trainer, pl_module: pl.LightningModule, candidate: Candidate) -> Candidate:
        """Return the quantized copy that may take the module's place, which is ``candidate`` or less of it."""
        return candidate

    def hold(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Tell whether schedules must wait with what is due now, on all ranks alike; asked before each such step."""
        return False

    def phase(self, trainer: pl.Trainer) -> str | None:
        """Tell how far it has brought the module: ``dense``, `leads_to`, or in between (empty); None if nowhere."""
        return None

    def on_fall(self) -> None:
        """Hear that what this callback did last has cost more than a guard allows."""

    @property
    def averages_weights(self) -> bool:
        """Tells whether the callback averages the module's weights, so that these must keep their scale."""
        return False

    def serves(self, module: nn.Module) -> bool:
        """Tell whether this callback adds to the loss of ``module``, of this very module and not of a copy."""
        return False

    def teach(self, step: Any, module: pl.LightningModule, args: tuple[Any, ...]) -> Any:
        """Run ``step``, the training step of a module that the callback serves, and add to its loss."""
        return step(*args)

    @property
    def trained_layers(self) -> nn.ModuleDict:
        """Holds layers of the callback's own that train on outputs of the module; they lose the same channels."""
        return nn.ModuleDict()

    def compared(self, module: nn.Module, layers: nn.Module, step: Any) -> list[Tensor]:
        """Return the tensors that the callback compares in a ``step`` of a copy of the module: their sizes must stay.

        Args:
            module: a copy of a module that the callback serves.
            layers: copies of `trained_layers`.
            step: runs it.
        """
        return []

    def report_notes(self) -> list[str]:
        """Return lines for the report: what was skipped, and why; what made nothing smaller or faster."""
        return []

    def report_files(self) -> list[ReportFile]:
        """Return the files that were written of the module for other runtimes; each gets a row in the report."""
        return []

    def report_settings(self) -> dict[str, Any]:
        """Return the arguments that the callback was made with and that differ from the defaults, as YAML has them."""
        return self._given

    def report_history(self) -> list[Any]:
        """Return how sparsity grew, for the report's picture."""
        return []

    # Lightning's hooks.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_strategy(trainer, type(self).__name__)
        self.refuse_others(trainer)
        order_callbacks_(trainer)
        pl_module.configure_model()
        attach(pl_module)

    def refuse_others(self, trainer: pl.Trainer) -> None:
        """Raise if another callback of the Trainer can't be beside this one."""
        for other in compression_callbacks(trainer):
            if reason := "" if other is self else self.why_conflicts(trainer, other):
                raise CompressionError(reason)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.close(pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.close(pl_module)

    def close(self, pl_module: pl.LightningModule) -> None:
        """Take all hooks away; may be called twice."""
        restore_given_(pl_module)
        detach(pl_module)

    # What the callbacks of the rooms call.

    def name_of(self, pl_module: pl.LightningModule) -> str:
        """Return the name under which messages come."""
        return type(self).__name__

    def begin_training_mode_(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put modules that came in evaluation mode into training mode, unless they are frozen on purpose."""
        switched = train_given_(pl_module, _trained_parameters(trainer, pl_module))
        _tell_of_modes(self.name_of(pl_module), switched, "came")

    def keep_training_mode_(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int) -> None:
        """Put modules that aren't frozen any more into training mode, in the first batch of each epoch."""
        # Not earlier, since any hook of the epoch's start may unfreeze them.
        if batch_idx == 0 and has_frozen(pl_module):
            woken = wake_(pl_module, _trained_parameters(trainer, pl_module))
            _tell_of_modes(self.name_of(pl_module), woken, "was frozen until now")

    @override
    def check_state(self, state: Any) -> None:
        if self.saved_form is not None:
            check_saved(state, self.saved_form, type(self).__name__)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickling, without the methods of a module by which Lightning lets callbacks log."""
        return {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")}


def compression_callbacks(trainer: pl.Trainer) -> list[CompressionCallback]:
    """Return those callbacks of the Trainer that derive from `CompressionCallback`."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, CompressionCallback)]


def _tell_of_modes(name: str, paths: list[str], why: str) -> None:
    if paths:
        shown = ", ".join(f"`{path}`" if path else "the whole module" for path in paths[:5])
        more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
        rank_zero_info(
            f"{name}: {shown}{more} {why} in evaluation mode, and trains in training mode. To keep a module in "
            "evaluation mode, freeze its parameters, or call its `eval` in `on_train_start`."
        )


def _trained_parameters(trainer: pl.Trainer, pl_module: pl.LightningModule) -> set[int]:
    """Return the ids of the parameters that are trained, or would be if `QLoRA` hadn't frozen them."""
    groups = [group["params"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    held = {id(parameter) for group in groups for parameter in group}
    frozen = {name for _, record in recorded(pl_module) for name in record.get("frozen", ())}
    return {
        id(parameter)
        for name, parameter in pl_module.named_parameters()
        if (parameter.requires_grad and (not held or id(parameter) in held)) or clean_name(name) in frozen
    }


def warn_of_other_settings(owner: str, saved: Mapping[str, str], now: Mapping[str, str], goes_on: str) -> None:
    """Warn if a fit resumes from a checkpoint with other settings, and say what ``goes_on`` with the old ones."""
    changed = [f"{name}={saved[name]}" for name, value in now.items() if saved.get(name, value) != value]
    if changed:
        rank_zero_warn(
            f"{owner}: this checkpoint was written with other settings: {', '.join(changed)}. Its {goes_on} go on. For "
            "a new window, load it with load_compressed(path, model) and fit that."
        )


def refuse_strategy(trainer: pl.Trainer, name: str) -> None:
    """Raise where a strategy would lose or shard the structure that a technique changes."""
    strategy = trainer.strategy
    kind = type(strategy).__name__
    launcher = getattr(strategy, "_start_method", None) or getattr(
        getattr(strategy, "launcher", None), "_start_method", None
    )
    if any(word in kind for word in ("FSDP", "DeepSpeed", "ModelParallel")):
        reason = "shards parameters, so neither masks nor structure can follow"
    elif "DDP" in kind and launcher in ("spawn", "fork", "forkserver"):
        reason = "returns weights from its processes without structure or callback state"
    else:
        return
    raise CompressionError(
        f"`strategy` must be one that keeps whole parameters in this process. Received: strategy={kind!r}, "
        f"which {reason}. Use strategy='ddp' or a single device with {name}."
    )


def rebuild_ddp(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Rebuild the DDP wrapper around the present parameters and buffers, on all ranks at the same batch."""
    strategy: Any = trainer.strategy
    if isinstance(strategy.model, DistributedDataParallel) and hasattr(strategy, "configure_ddp"):
        strategy.model = pl_module
        strategy.configure_ddp()
