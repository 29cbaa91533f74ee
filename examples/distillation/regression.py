"""Distil a regression: the mean of five networks teaches one of them, on scikit-learn's diabetes data.

Run it with `python examples/distillation/regression.py`.
"""

import sys
from functools import partial

import torch
from plain import Alone, fit
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import DistillationModule, LogitMSE


def mlp(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))


class Ensemble(nn.Module):
    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x):
        return torch.stack([member(x) for member in self.members]).mean(0)


def error(network):
    return f"{(network(test_x) - test_y).square().mean().sqrt() * spread:.1f}"


x, y = (torch.tensor(values).float() for values in load_diabetes(return_X_y=True))
x, test_x, y, test_y = train_test_split(x / x.std(0), y.unsqueeze(1), test_size=0.4, random_state=0)
mean, spread = y.mean(), y.std()
y, test_y = (y - mean) / spread, (test_y - mean) / spread
batches = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 20

members = [Alone(mlp(seed), nn.functional.mse_loss) for seed in range(5)]
for member in members:
    fit(member, batches, epochs)
teacher = Ensemble(members)

module = DistillationModule(
    student=mlp(0),
    teacher=teacher,
    losses=[LogitMSE(weight=0.9)],  # of the predictions; soft targets need classes
    task_loss=nn.MSELoss(),
    task_weight=0.1,
    optimizer=partial(torch.optim.AdamW, lr=3e-3),
)
fit(module, batches, epochs)
print(f"Root mean square error on {len(test_y)} patients, whose spread is {test_y.std() * spread:.1f}")
print(f"teacher, five networks: {error(teacher)}")
print(f"one of them, alone:     {error(members[0])}")
print(f"the same, distilled:    {error(module)}")
