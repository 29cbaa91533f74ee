"""Lists the arms of `compensation.py` that train for a while: half of the multiply-accumulates leave, and a short fit.

All see the same batches in the same order. `pip install --no-deps torch-pruning` brings the other side.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from compensation_arms import TODAY, Arm, Missing, estimate_statistics_, macs
from compensation_networks import Batches, Row
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import ChannelPruning, Linear, OneShot, Window

BUDGET, BATCH = 0.5, 32
WITHOUT: dict[str, Any] = {"calibration_batches": 0, "window": Window(0.0, 0.3)}
BY_HAND = "torch-pruning"
STEPS = {"pitch": 200, "sentences": 60, "voices": 200, "lines": 40, "residual": 200, "transformer": 200}
"""As many as a few minutes of one thread allow, at most 200; a row without an entry isn't trained."""
RATES = {"pitch": 3e-4, "sentences": 1e-4, "voices": 3e-3, "lines": 3e-4, "residual": 1e-3, "transformer": 3e-4}
TRIED = (1e-4, 3e-4, 1e-3, 3e-3)
"""The rate of a row is to be the one of these with which `TODAY` loses least: residual's is, the others are guesses."""
WRITTEN = ("conv6", "blocks.9.narrow")
"""Layers whose width the code names, or an LSTM that reads several of their rows at once."""

Loss = Callable[[Tensor, Tensor], Tensor]


class Module(L.LightningModule):
    """Adam, whose rate falls to 0 by a cosine."""

    def __init__(self, network: nn.Module, loss: Loss, rate: float) -> None:
        super().__init__()
        self.network, self.loss, self.rate = network, loss, rate

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(self.network(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self) -> dict[str, Any]:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, self.rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@torch.no_grad()
def lessons(row: Row, original: nn.Module, calibration: Batches, labels: bool) -> tuple[TensorDataset, Loss]:
    """Labelled samples with the task's loss, or calibration with the original's outputs and the loss to them."""
    if not labels:
        outputs = torch.cat([original.eval()(batch) for batch in calibration])
        return TensorDataset(torch.cat(calibration), outputs), row.loss
    if row.labelled is None:
        raise Missing("it has no labels")
    return TensorDataset(*row.labelled()[0]), row.task_loss


def fit(
    row: Row, network: nn.Module, taught: tuple[TensorDataset, Loss], rate: float, seed: int, *callbacks: L.Callback
) -> nn.Module:
    """The network after the row's steps, all of it in training mode."""
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(taught[0], BATCH, shuffle=True, drop_last=True, generator=generator)
    trainer = L.Trainer(
        max_epochs=-1,
        max_steps=STEPS[row.name],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(Module(network.train(), taught[1], rate), loader)
    return network.eval()


def _callback(labels: bool, rate: float | None = None, part: float = 1.0, **wanted: Any) -> Arm:
    """`ChannelPruning` as it comes, or with the arguments ``wanted``; at a ``part`` of the row's rate."""

    def arm(row: Row, model: nn.Module, calibration: Batches, seed: int) -> nn.Module:
        if row.name not in STEPS:
            raise Missing("its fit takes too long")
        taught = lessons(row, model, calibration, labels)
        return fit(row, model, taught, rate or part * RATES[row.name], seed, ChannelPruning(macs=BUDGET, **wanted))

    return arm


def _by_hand(labels: bool, importance: str, everywhere: bool) -> Arm:
    """Cut by torch-pruning in 200 steps until torch counts the budget, then fitted, BatchNorms estimated in the end."""

    def arm(row: Row, model: nn.Module, calibration: Batches, seed: int) -> nn.Module:
        if row.name not in STEPS:
            raise Missing("its fit takes too long")
        taught = lessons(row, model, calibration, labels)
        if importance == "taylor":
            _backward(model, taught if labels else None, calibration, seed)
        sample, pruner = calibration[0][:1], _pruner(model, calibration[0][:1], importance, everywhere)
        goal = BUDGET * macs(model, sample)
        for _ in range(200):
            if macs(model, sample) <= goal:
                break
            pruner.step()
        else:
            raise RuntimeError(f"{macs(model, sample) * BUDGET / goal:.2f} of the MACs stay")
        model.zero_grad()
        return estimate_statistics_(fit(row, model, taught, RATES[row.name], seed), calibration)

    return arm


def _pruner(model: nn.Module, sample: Tensor, importance: str, everywhere: bool) -> Any:
    """Told what users tell it: what makes outputs or has its width in the code, heads, LSTMs, which it can't cut."""
    try:
        tool = importlib.import_module("torch_pruning")
    except ImportError:
        raise Missing("torch-pruning isn't installed") from None
    kinds = {"magnitude": tool.importance.GroupMagnitudeImportance, "taylor": tool.importance.GroupTaylorImportance}
    attentions = [module for module in model.modules() if hasattr(module, "heads")]
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    written = [module for name, module in model.named_modules() if name in WRITTEN]
    return tool.pruner.BasePruner(
        model.eval(),
        sample,
        importance=kinds[importance](),
        global_pruning=everywhere,
        pruning_ratio=1.0,
        max_pruning_ratio=0.9,
        iterative_steps=200,
        ignored_layers=[last, *written, *(module for module in model.modules() if isinstance(module, nn.LSTM))],
        num_heads={layer: module.heads for module in attentions for layer in (module.query, module.key, module.value)},
        # Its default arguments are shared by all pruners and written to.
        in_channel_groups={},
        out_channel_groups={},
    )


def _backward(model: nn.Module, taught: tuple[TensorDataset, Loss] | None, calibration: Batches, seed: int) -> None:
    """Gradients of the task's loss, or of random projections of the outputs, as a loss to them has none."""
    generator = torch.Generator().manual_seed(seed)
    model.eval().zero_grad()
    if taught is None:
        for batch in calibration:
            output = model(batch)
            (output * torch.randn(output.shape, generator=generator)).sum().backward()
        return
    for inputs, target in DataLoader(taught[0], BATCH, shuffle=True, generator=generator):
        taught[1](model(inputs), target).backward()


def _arms() -> dict[str, Arm]:
    arms: dict[str, Arm] = {}
    for labels, name in ((True, "Fit to labels"), (False, "Fit to the original's outputs")):
        make = functools.partial(_callback, labels)
        arms |= {
            f"{name}, {TODAY}": make(**WITHOUT, schedule=Linear()),
            f"{name}, at once": make(**WITHOUT, schedule=OneShot()),
            f"{name}, calibrated": make(),
            f"{name}, calibrated, a tenth of the rate": make(part=0.1),
            f"{name}, calibrated, in rounds": make(schedule=Linear()),
            f"{name}, calibrated, blocks": make(blocks=True),
        }
        for importance in ("magnitude", "taylor"):
            for everywhere in (True, False):
                scope = "global" if everywhere else "local"
                arms[f"{name}, {BY_HAND}, {importance}, {scope}"] = _by_hand(labels, importance, everywhere)
    for rate in TRIED:
        arms[f"Rates, {rate:g}"] = _callback(False, rate, **WITHOUT, schedule=Linear())
    return arms


FITS = _arms()
