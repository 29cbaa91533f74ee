"""What all callbacks share: checks before anything changes, hooks into checkpoints, what callbacks say to each other.

The order of a fit, with what a callback of ours does in each hook::

    setup                    refuse what can't work, hook into checkpoints
    (checkpoint is loaded)   structure first, then weights, then `load_state_dict`
    on_fit_start             what was given in eval mode trains; `begin`: find the targets, check everything
    on_train_start           fix the window's bounds, watch the optimizers; `act` where the window starts at 0
      on_train_batch_start
        optimizer step       `after_optimizer_step`
      on_train_batch_end     count the step; `act` where the window says so
      validation, saving     see the weights as `act` left them
    on_train_end             warn if the window didn't end
    on_fit_end               (the module is on the CPU again)
    teardown, on_exception   `close`: no hook stays
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_compress.errors import CompressionError
from lightning_compress.modules.paths import clean_name
from lightning_compress.modules.resizing import Cut
from lightning_compress.modules.training_mode import has_frozen, restore_given_, train_given_, wake_
from lightning_compress.structure.change import recorded
from lightning_compress.structure.checkpoint import attach, detach
from lightning_compress.structure.listener import CheckpointListener

STATE_VERSION = 1


class CompressionCallback(Callback, CheckpointListener):
    """Base of all callbacks of the package: it works on a module, and other callbacks may ask it what they must know.

    Attributes:
        key: names the technique where callbacks are compared.
        conflicts: keys of the techniques that can't be beside this one.
    """

    key: ClassVar[str]
    conflicts: ClassVar[tuple[str, ...]] = ()

    # What callbacks ask each other. All of it does nothing by default.

    def why_conflicts(self, trainer: pl.Trainer, other: CompressionCallback) -> str:
        """Why this callback can't be beside another in one Trainer; empty if it can."""
        if other.key not in self.conflicts:
            return ""
        names = f"{type(self).__name__} or {type(other).__name__}"
        return f"`callbacks` must hold either {names}. Received: both. Remove one."

    def apply_pending_(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Do now, before another callback builds on the module's structure, what is due at the start of this batch."""

    def is_final(self) -> bool:
        """Whether the module's structure is what it will be at the end of this fit, as far as this callback goes."""
        return True

    def final_step(self, trainer: pl.Trainer) -> int:
        """The optimizer step of this fit after which `is_final` holds."""
        return 0

    def on_channels_removed(self, trainer: pl.Trainer, pl_module: pl.LightningModule, cut: Cut) -> None:
        """Channels have left the module: cut what is kept of its tensors with the same indices."""

    @property
    def averages_weights(self) -> bool:
        """Whether an average of the module's weights is kept, so that these must keep their scale."""
        return False

    def serves(self, module: nn.Module) -> bool:
        """Whether this callback adds to the loss of ``module``, this very module and not a copy of it."""
        return False

    def teach(self, step: Any, module: pl.LightningModule, args: tuple[Any, ...]) -> Any:
        """Run ``step``, the training step of a module that is served, and add to its loss."""
        return step(*args)

    @property
    def trained_layers(self) -> nn.ModuleDict:
        """Layers of the callback's own that train on what the module puts out; they are cut with it."""
        return nn.ModuleDict()

    def compared(self, module: nn.Module, layers: nn.Module, step: Any) -> list[Tensor]:
        """What the callback compares with what has another size in a ``step`` of a copy of the module: that stays.

        Args:
            module: a copy of a module that is served.
            layers: copies of `trained_layers`.
            step: runs it.
        """
        return []

    def report_notes(self) -> list[str]:
        """Lines for the report: what was skipped, and why; what made nothing smaller or faster."""
        return []

    def report_history(self) -> list[Any]:
        """How sparsity grew, for the report's picture."""
        return []

    # Lightning's hooks.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_strategy(trainer, type(self).__name__)
        self.refuse_others(trainer)
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

    def __getstate__(self) -> dict[str, Any]:
        """The state for pickling: without the methods of its last module that Lightning puts on it for logging."""
        return {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")}


def compression_callbacks(trainer: pl.Trainer) -> list[CompressionCallback]:
    """The Trainer's callbacks that are ours."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, CompressionCallback)]


def begin_training_mode_(trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> None:
    """Let what was handed over in evaluation mode train, unless it is frozen on purpose, and say so."""
    _tell_of_modes(name, train_given_(pl_module, _trained_parameters(trainer, pl_module)), "was handed over")


def keep_training_mode_(trainer: pl.Trainer, pl_module: pl.LightningModule, name: str, batch_idx: int) -> None:
    """In the first batch of each epoch: let train what was frozen and isn't any more."""
    # Here, as what unfreezes it may be any hook of the epoch's start.
    if batch_idx == 0 and has_frozen(pl_module):
        _tell_of_modes(name, wake_(pl_module, _trained_parameters(trainer, pl_module)), "was frozen until now")


def _tell_of_modes(name: str, paths: list[str], why: str) -> None:
    if paths:
        shown = ", ".join(f"`{path}`" if path else "the whole module" for path in paths[:5])
        more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
        rank_zero_info(
            f"{name}: {shown}{more} {why} in evaluation mode, and trains in training mode. What is to stay in "
            "evaluation mode: freeze its parameters, or put it there in `on_train_start`."
        )


def _trained_parameters(trainer: pl.Trainer, pl_module: pl.LightningModule) -> set[int]:
    """Ids of the parameters that are trained, or would be if `QLoRA` hadn't frozen them."""
    groups = [group["params"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    held = {id(parameter) for group in groups for parameter in group}
    frozen = {name for _, record in recorded(pl_module) for name in record.get("frozen", ())}
    return {
        id(parameter)
        for name, parameter in pl_module.named_parameters()
        if (parameter.requires_grad and (not held or id(parameter) in held)) or clean_name(name) in frozen
    }


def check_version(state: dict[str, Any], owner: str) -> None:
    """Raise if a saved state was written by a newer version of the package."""
    version = state.get("version")
    if version != STATE_VERSION:
        raise CompressionError(
            f"The checkpoint's state of {owner} must have version {STATE_VERSION}. Received: version={version}. "
            "Update lightning_compress, or resume with the version that wrote it."
        )


def warn_of_other_settings(owner: str, saved: Mapping[str, str], now: Mapping[str, str], goes_on: str) -> None:
    """Say if a fit resumes from a checkpoint that another configuration wrote, and what ``goes_on`` as it was."""
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
    """Let the DDP wrapper find parameters and buffers as they are now, on all ranks at the same batch."""
    strategy: Any = trainer.strategy
    if isinstance(strategy.model, DistributedDataParallel) and hasattr(strategy, "configure_ddp"):
        strategy.model = pl_module
        strategy.configure_ddp()
