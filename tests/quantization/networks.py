"""Networks of what static int8 treats apart."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class Net(nn.Module):
    """Has BatchNorm in a kernel, a residual, a layer called twice, and a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.dropout, self.norm = nn.Dropout(0.5), nn.LayerNorm(8)
        self.twice, self.table = nn.Linear(8, 8), nn.Parameter(torch.randn(5, 8) / 3)

    def features(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return (x + self.bn2(self.conv2(x))).relu().mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.norm(self.features(x)))
        return linear(self.twice(self.twice(x).relu()), self.table)


class Sequence(nn.Module):
    """Has a recurrent layer, attention, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(20, 16), nn.LSTM(16, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.lstm(self.embedding(tokens))
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.head(x)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"net": Net, "sequence": Sequence}


def trained_net(x: Tensor) -> Net:
    """A network with statistics of its own, and gains of BatchNorm that are negative and zero."""
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for norm in (net.bn1, net.bn2):
            norm.weight.uniform_(0.5, 2.0)
            norm.bias.normal_()
        net.bn1.weight[0], net.bn1.weight[1] = -1.0, 0.0
        for _ in range(20):
            net(x)
    return net.eval()
