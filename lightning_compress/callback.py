"""What all callbacks share: the count of optimizer steps, hooks into checkpoints, and cleaning up.

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
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_compress.errors import CompressionError
from lightning_compress.modules.paths import clean_name
from lightning_compress.modules.resizing import Cut, with_inner
from lightning_compress.modules.training_mode import has_frozen, restore_given_, train_given_, wake_
from lightning_compress.quantization import convert
from lightning_compress.structure import checkpoint
from lightning_compress.window import Bounds, Window, fit_length

STATE_VERSION = 1


class CompressionCallback(Callback):
    """Base of the callbacks that change a model while it trains.

    A subclass overrides `begin` (find targets, check), `act` (a step of the window), `after_optimizer_step` and
    `close`; the base counts steps and keeps the state that a checkpoint needs.

    Args:
        window: when to act.
    """

    def __init__(self, window: Window) -> None:
        self.window = window
        self._step = 0
        self._bounds: Bounds | None = None
        self._stepped = False
        self._handles: list[RemovableHandle] = []

    # What a subclass decides.

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find what to work on and check it; nothing is changed yet."""

    def act(self, trainer: pl.Trainer, pl_module: pl.LightningModule, progress: float) -> None:
        """One step of the window, at ``progress`` in [0, 1]."""

    def after_optimizer_step(self, optimizer: Optimizer) -> None:
        """Called after each step of each optimizer, with that optimizer."""

    def sync_(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring the module and its averaged copies in line, before they are validated or saved."""

    def check_entry(self, entry: Mapping[str, Any], stage: str) -> None:
        """Raise if a checkpoint with our ``entry`` can't be loaded for this stage; nothing is changed yet."""
        if stage == "fit" and entry.get("quantization", {}).get("form") == "adapted":
            raise CompressionError(
                f"`ckpt_path` must be a checkpoint with float weights for {type(self).__name__}. Received: one of "
                "QLoRA. Load it with load_compressed, merge it with merge_adapters, and fit without `ckpt_path`."
            )

    def apply_pending_(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Do now, before another callback builds on the module's structure, what is due at the start of this batch."""

    def is_final(self) -> bool:
        """Whether the module's structure is what it will be at the end of this fit."""
        return True

    def final_step(self, trainer: pl.Trainer) -> int:
        """The optimizer step of this fit after which the module's structure is what it will be at its end."""
        return 0

    def on_channels_removed(self, trainer: pl.Trainer, pl_module: pl.LightningModule, cut: Cut) -> None:
        """Channels have left the module: cut what is kept of its tensors with the same indices."""

    # Lightning's hooks.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_strategy(trainer, type(self).__name__)
        if stage == "fit":
            convert.refuse_adapted(pl_module)
        pl_module.configure_model()
        checkpoint.attach(pl_module)
        if stage == "fit":
            self._step, self._bounds = 0, None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        begin_training_mode_(trainer, pl_module, type(self).__name__)
        self.begin(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._bounds is None:
            self._bounds = self.window.bounds(*fit_length(trainer))
        self._stepped = False
        self._handles = [
            optimizer.register_step_post_hook(lambda stepped, *_: self._on_optimizer_step(stepped))
            for optimizer in with_inner(trainer.optimizers)  # SAM steps only the one that it wraps
        ]
        if self._step == 0 and self._bounds.start == 0:
            self.act(trainer, pl_module, 0.0)
        self.sync_(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        keep_training_mode_(trainer, pl_module, type(self).__name__, batch_idx)

    def _on_optimizer_step(self, optimizer: Optimizer) -> None:
        self._stepped = True
        self.after_optimizer_step(optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._stepped:
            self._stepped = False
            self._step += 1
            progress = self.bounds.progress(self._step)
            if progress is not None and self.bounds.is_due(self._step, self.window.every_n_steps):
                self.act(trainer, pl_module, progress)
        if any(True for _ in checkpoint.averaged_copies(trainer)):
            self.sync_(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.sync_(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.sync_(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.sync_(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.sync_(trainer, pl_module)
        if self._step < self.bounds.end:
            rank_zero_warn(
                f"{type(self).__name__}: training stopped at optimizer step {self._step}, before its window's end at "
                f"{self.bounds.end}: {self.unfinished()}"
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.close(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.close(pl_module)

    def close(self, pl_module: pl.LightningModule) -> None:
        """Take all hooks away; may be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        restore_given_(pl_module)
        checkpoint.detach(pl_module)

    # State: plain, versioned.

    @property
    def bounds(self) -> Bounds:
        """The window in optimizer steps, known from the start of training on."""
        if self._bounds is None:
            raise CompressionError(f"{type(self).__name__}'s window has no bounds before training starts.")
        return self._bounds

    def unfinished(self) -> str:
        """What it means that the window's end wasn't reached."""
        return "its work isn't complete. Shorten the window, or train longer."

    def report_notes(self) -> list[str]:
        """Lines for the report: what was skipped, and why; what made nothing smaller or faster."""
        if self._bounds is not None and self._step < self._bounds.end:
            return [f"{type(self).__name__} stopped at step {self._step} of {self._bounds.end}: {self.unfinished()}"]
        return []

    def state_dict(self) -> dict[str, Any]:
        bounds = None if self._bounds is None else [self._bounds.start, self._bounds.end]
        return {"version": STATE_VERSION, "step": self._step, "bounds": bounds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_version(state_dict, type(self).__name__)
        self._step = state_dict["step"]
        self._bounds = None if state_dict["bounds"] is None else Bounds(*state_dict["bounds"])

    def __getstate__(self) -> dict[str, Any]:
        return {**without_logging(self), "_handles": []}


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
    held = {id(one) for optimizer in trainer.optimizers for group in optimizer.param_groups for one in group["params"]}
    frozen = (convert.record_of(pl_module) or {}).get("frozen", ())
    return {
        id(parameter)
        for name, parameter in pl_module.named_parameters()
        if (parameter.requires_grad and (not held or id(parameter) in held)) or clean_name(name) in frozen
    }


def without_logging(callback: Callback) -> dict[str, Any]:
    """A callback's state for pickling: without the methods of its last module that Lightning puts on it for logging."""
    return {key: value for key, value in vars(callback).items() if key not in ("log", "log_dict")}


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
