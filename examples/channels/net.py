"""Defines what the scripts of this folder share: an ordinary LightningModule, without compression, and its data."""

import warnings

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore", ".*(does not have many workers|logging interval|TreeSpec)")  # hints for larger fits
torch.set_num_threads(1)  # this network is too small to share

pixels, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(1, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU())
        self.block = nn.Sequential(
            *(nn.Conv2d(48, 96, 3, padding=1, bias=False), nn.BatchNorm2d(96), nn.ReLU()),
            *(nn.Conv2d(96, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48)),
        )
        self.head = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 48, 10))

    def forward(self, images):
        x = self.stem(images)
        return self.head(functional.relu(x + self.block(x)))  # a sum: stem and block must lose the same channels

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return functional.cross_entropy(self(images), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(module, epochs, *callbacks):
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module.train(), DataLoader(TensorDataset(images[:1200], labels[:1200]), batch_size=64, shuffle=True))
    module.eval()
    return trainer


def accuracy(module):
    """On the images that no fit has seen."""
    with torch.no_grad():
        found = module.eval()(images[1200:]).argmax(1)
    return f"{(found == labels[1200:]).float().mean():.3f}"
