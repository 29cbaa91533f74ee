"""Ask a trained network which layers hurt, let bits be chosen by layer, and test what was promised.

Run it with `python examples/choosing/which_layers.py`. It draws the pictures of docs/choosing.md.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_compress import PostTrainingQuantization, Targets, ValidationMetric, WeightOnly, search, sensitivity


class Digits(L.LightningDataModule):
    """1797 grey images of 8 by 8 pixels: 1077 train, 360 validate, 360 test."""

    def setup(self, stage: str) -> None:
        pixels, labels = load_digits(return_X_y=True)
        data = TensorDataset(torch.tensor(pixels).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels))
        self.sets = random_split(data, [1077, 360, 360], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.sets[0], 32, shuffle=True, generator=torch.Generator().manual_seed(0))

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.sets[1], 30)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.sets[2], 360)


def block(width: int, wide: int) -> nn.Sequential:
    """Wide by 1 x 1, depthwise by 3 x 3, narrow by 1 x 1."""
    layers: list[nn.Module] = [nn.Conv2d(width, wide, 1), nn.BatchNorm2d(wide), nn.ReLU()]
    layers += [nn.Conv2d(wide, wide, 3, padding=1, groups=wide), nn.BatchNorm2d(wide), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(wide, width, 1), nn.BatchNorm2d(width))


class Net(L.LightningModule):
    """A stem, three depthwise blocks, each beside its input, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2))
        self.blocks = nn.ModuleList(block(32, 96) for _ in range(3))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for part in self.blocks:
            x = x + part(x)
        return self.head(x.mean((2, 3)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int, stage: str = "val") -> None:
        output = self(batch[0])
        accuracy = (output.argmax(1) == batch[1]).float().mean()
        self.log_dict({f"{stage}_loss": functional.cross_entropy(output, batch[1]), f"{stage}_acc": accuracy})

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx, "test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 2e-3)


def trainer(epochs: int = 1, *callbacks: L.Callback) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=list(callbacks), **quiet)


logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
folder = Path("demo_output/choosing")
folder.mkdir(parents=True, exist_ok=True)
L.seed_everything(0, verbose=False)
model, data = Net(), Digits()
trainer(int(sys.argv[1]) if len(sys.argv) > 1 else 12).fit(model, data)
model.eval()

batches = [batch for batch, _ in zip(data.train_dataloader(), range(8), strict=False)]
metric = ValidationMetric(trainer(), data, "val_loss")
table = sensitivity(model, metric, batches, of="weights", method="measured", mode="min", path=folder / "run.jsonl")
print(table)
table.plot(folder / "sensitivity.png")

found = search(model, metric, batches, over="weights", max_drop=0.01, mode="min")
print(f"\n{found}\n\n{found.to_yaml()}")
found.plot(folder / "search.png")

settings = found.settings  # in a configuration it is the YAML; here the same as Python
schemes = {layer: WeightOnly(**plain.get("init_args", {})) for layer, plain in settings.get("overrides", {}).items()}
targets = Targets(**settings["targets"]) if "targets" in settings else None
base = WeightOnly(**settings["scheme"].get("init_args", {}))
mixed = PostTrainingQuantization(base, overrides=schemes, targets=targets, compare=True)
[tested] = trainer(1, mixed).test(model, data, verbose=False)
print("\n".join(f"{name}: {value:.4f}" for name, value in sorted(tested.items())))
