"""Distil any LightningModule: add one callback, and leave the module as it is.

Run it with `python examples/distillation/callback.py`.
"""

import sys

import lightning as L
import torch
from plain import fit
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import Distillation, FeatureMSE, SoftTarget


class MyModule(L.LightningModule):  # knows nothing of teachers
    def __init__(self, width):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(16 * width, 10))

    def forward(self, images):
        return self.head(self.features(images))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        images = images + 0.3 * torch.randn_like(images)  # the teacher sees this noise too
        return functional.cross_entropy(self(images), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def accuracy(module):
    return f"{(module(images[1200:]).argmax(1) == labels[1200:]).float().mean():.3f}"


def batches(count):
    return DataLoader(TensorDataset(images[:count], labels[:count]), batch_size=32, shuffle=True)


pixels, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)
epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 10

teacher, alone, taught = MyModule(32), MyModule(4), MyModule(4)
fit(teacher, batches(1200), epochs)
fit(alone, batches(200), 4 * epochs)

losses = [SoftTarget(temperature=4.0, weight=0.75), FeatureMSE("features", "features", weight=0.25)]
fit(taught, batches(200), 4 * epochs, Distillation(teacher, losses, task_weight=0.25))

print(f"Accuracy on {len(labels) - 1200} images")
print(f"teacher, 1200 labels:              {accuracy(teacher)}")
print(f"student alone, 200 labels:         {accuracy(alone)}")
print(f"distilled on the same 200 images:  {accuracy(taught)}")
