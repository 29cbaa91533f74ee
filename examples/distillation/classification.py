"""Distil a classifier: a teacher that learnt from all digits teaches a student that has the labels of 200.

Run it with `python examples/distillation/classification.py`.
"""

import sys
from functools import partial

import torch
from plain import Alone, fit
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import DistillationModule, SoftTarget


def cnn(width):
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(8 * width, 10)),
    )


def batches(*tensors):
    return DataLoader(TensorDataset(*tensors), batch_size=32, shuffle=True)


def accuracy(network):
    return f"{(network(test_images).argmax(1) == test_labels).float().mean():.3f}"


pixels, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)
images, test_images, labels, test_labels = train_test_split(images, labels, test_size=0.4, random_state=0)
epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 10

teacher = Alone(cnn(16))
fit(teacher, batches(images, labels), epochs)

alone = Alone(cnn(4))
fit(alone, batches(images[:200], labels[:200]), 3 * epochs)

distil = partial(DistillationModule, teacher=teacher, optimizer=partial(torch.optim.AdamW, lr=3e-3))
# Soft targets and labels of the same images.
taught = distil(student=cnn(4), losses=[SoftTarget(temperature=4.0, weight=0.75)], task_weight=0.25)
fit(taught, batches(images[:200], labels[:200]), 3 * epochs)

# A teacher needs no labels: with task_weight=0 any image will do.
unlabelled = distil(student=cnn(4), losses=[SoftTarget(temperature=4.0, weight=1.0)], task_weight=0.0)
fit(unlabelled, batches(images), epochs)

print(f"Accuracy on {len(test_labels)} images")
print(f"teacher, {len(labels)} labels:              {accuracy(teacher)}")
print(f"student alone, 200 labels:         {accuracy(alone)}")
print(f"distilled on the same 200 images:  {accuracy(taught)}")
print(f"distilled on all, without labels:  {accuracy(unlabelled)}")
