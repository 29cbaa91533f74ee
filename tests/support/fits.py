"""Fits of the tests' modules: from a seed, saved after each epoch, resumed, and read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden

from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_different_state, assert_same_state

PARTS = ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "callbacks", "lightning_compress")


def every_epoch(folder: Path, **options: Any) -> ModelCheckpoint:
    """Saves "epoch=N.ckpt" after each epoch."""
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, **options)


def fit(
    *callbacks: Callback,
    module: Any = None,
    data: Any = None,
    folder: Path | None = None,
    save_weights_only: bool = False,
    ckpt_path: Path | None = None,
    weights_only: bool = True,
    **options: Any,
) -> tuple[pl.Trainer, Any]:
    """Two epochs of the classifier on the tiny data, from a seed; with a ``folder`` each epoch is saved there."""
    torch.manual_seed(1)
    module = Classifier() if module is None else module
    if data is None and not is_overridden("train_dataloader", module):
        data = TinyData()
    saves = [every_epoch(folder, save_weights_only=save_weights_only)] if folder else []
    saving = any(isinstance(callback, Checkpoint) for callback in [*callbacks, *saves])
    options = {"max_epochs": 2, "enable_checkpointing": saving, **options}
    trainer = quiet_trainer(callbacks=[*callbacks, *saves], **options)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=weights_only)
    return trainer, module


def read_checkpoint(path: Path, weights_only: bool = True) -> dict[str, Any]:
    """The file without the one thing in which equal fits may differ: where a ModelCheckpoint's files lie."""
    checkpoint: dict[str, Any] = torch.load(path, weights_only=weights_only)
    callbacks = checkpoint.get("callbacks", {})
    return {**checkpoint, "callbacks": {key: callbacks[key] for key in callbacks if "ModelCheckpoint" not in key}}


def last_epoch(folder: Path) -> Path:
    """The file of the last epoch that `every_epoch` saved."""
    return max(folder.glob("epoch=*.ckpt"), key=lambda path: int(path.stem.removeprefix("epoch=")))


def resume(
    run: Callable[..., Any], folder: Path, *epochs: int, read: Callable[[Path], dict[str, Any]] = read_checkpoint
) -> tuple[Any, Any]:
    """Holds that a fit resumed after each of the ``epochs`` ends with the file of the uninterrupted one.

    ``run(folder=..., ckpt_path=...)`` is the fit; what it returned uninterrupted and what it returned the last time
    it was resumed are returned.
    """
    whole = run(folder=folder / "whole", ckpt_path=None)
    last = last_epoch(folder / "whole")
    expected = read(last)
    for epoch in epochs:
        start, again = last.with_name(f"epoch={epoch}.ckpt"), folder / f"from {epoch}"
        resumed = run(folder=again, ckpt_path=start)
        content = read(again / last.name)
        for part in PARTS:
            assert_same_state(expected.get(part, {}), content.get(part, {}))
        assert_different_state(read(start)["state_dict"], expected["state_dict"])
    return whole, resumed
