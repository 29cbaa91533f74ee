"""Distil a language model: the next byte of Python's own library, with padding left out by `valid_positions`.

Run it with `python examples/distillation/language_model.py`.
"""

import argparse
import inspect
import math
import optparse
import sys
from functools import partial

import torch
from plain import Alone, fit
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_compress import DistillationModule, SoftTarget

LENGTH, PADDING = 48, 0


class Net(nn.Module):
    """Predicts by causal convolutions, from the last 31 bytes."""

    def __init__(self, width):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(128, width)
        self.layers = nn.ModuleList(nn.Conv1d(width, width, 3, dilation=2**i) for i in range(4))
        self.head = nn.Linear(width, 128)

    def forward(self, text):
        x = self.embed(text).transpose(1, 2)
        for layer in self.layers:
            x = x + functional.relu(layer(functional.pad(x, (2 * layer.dilation[0], 0))))
        return self.head(x.transpose(1, 2))  # (B, L, 128): each position predicts the byte after it


def cross_entropy(logits, targets):
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=PADDING)


class NextByte(DistillationModule):
    def split_batch(self, text):
        return text[:, :-1], text[:, 1:]

    def valid_positions(self, text):
        return text[:, 1:] != PADDING

    def compute_task_loss(self, outputs, targets):
        return cross_entropy(outputs, targets)


def lines(*modules):
    """Lines of their source with 20 bytes or more, padded: (lines, LENGTH)."""
    texts = [line[:LENGTH] for module in modules for line in inspect.getsource(module).splitlines()]
    texts = [line.encode() for line in texts if len(line) >= 20 and line.isascii()]
    return torch.tensor([[*line, *[PADDING] * (LENGTH - len(line))] for line in texts])


def bits(network):
    with torch.no_grad():
        return f"{cross_entropy(network(test[:, :-1]), test[:, 1:]) / math.log(2):.3f}"


def batches(count):
    return DataLoader(train[:count], batch_size=32, shuffle=True)


class AloneNextByte(Alone):
    def training_step(self, text, batch_idx):
        return cross_entropy(self(text[:, :-1]), text[:, 1:])


epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 6
train, test = lines(argparse), lines(optparse)
train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]

teacher, alone = AloneNextByte(Net(64)), AloneNextByte(Net(24))
fit(teacher, batches(len(train)), epochs)
fit(alone, batches(300), 3 * epochs)

module = NextByte(
    student=Net(24),
    teacher=teacher,
    losses=[SoftTarget(temperature=1.0, weight=0.5)],
    task_weight=0.5,
    optimizer=partial(torch.optim.AdamW, lr=3e-3),
)
fit(module, batches(300), 3 * epochs)
print(f"Bits a byte on {len(test)} lines of a module that nobody saw (less is better)")
print(f"teacher, {len(train)} lines:        {bits(teacher)}")
print(f"student alone, 300 lines:   {bits(alone)}")
print(f"distilled on the same 300:  {bits(module)}")
