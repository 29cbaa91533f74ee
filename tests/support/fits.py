"""Fits of the tests' modules: from a seed, saved after each epoch, resumed, and read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint

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
    if data is None and type(module).train_dataloader.__module__.endswith(
        "core.hooks"
    ):  # Lightning's own, in both names
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
    for key in [key for key in callbacks if "ModelCheckpoint" in key]:
        del callbacks[key]
    return checkpoint


def resume(
    run: Callable[..., Any],
    folder: Path,
    *epochs: int,
    last: str | None = None,
    read: Callable[[Path], dict[str, Any]] = read_checkpoint,
) -> tuple[Any, Any]:
    """Holds that a fit resumed after each of the ``epochs`` ends with the file of the uninterrupted one.

    ``run(folder=..., ckpt_path=...)`` is the fit, which saves in the folder after each epoch; ``last`` names the file
    at its end if that isn't the last epoch's. What it returned uninterrupted, and resumed the last time, is returned.
    """
    whole = run(folder=folder / "whole", ckpt_path=None)
    final = max(int(path.stem[6:]) for path in (folder / "whole").glob("epoch=*.ckpt"))
    last = last or f"epoch={final}.ckpt"
    expected = read(folder / "whole" / last)
    for epoch in epochs:
        start = folder / "whole" / f"epoch={epoch}.ckpt"
        resumed = run(folder=folder / f"from {epoch}", ckpt_path=start)
        content = read(folder / f"from {epoch}" / last)
        for part in PARTS:
            assert_same_state(expected.get(part, {}), content.get(part, {}))
        if epoch < final:
            assert_different_state(read(start)["state_dict"], expected["state_dict"])
    return whole, resumed
