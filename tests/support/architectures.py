"""The networks of the model zoo: one shape of trouble each, as small as they can be."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def conv_bn_relu(inplace: bool = False) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=inplace),
        nn.Conv2d(8, 16, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=inplace),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


class Residual(nn.Module):
    """The stem's channels, both branches and the sum depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.head(x.mean((2, 3)))


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 16, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(192, 4)
    )


class Concat(nn.Module):
    """Two branches side by side: the head's input channels belong to one or the other."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 1)
        self.right = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(x), self.right(x)], dim=1).relu().mean((2, 3)))


class Attention(nn.Module):
    """`nn.MultiheadAttention`, whose out_proj is read and never called, then one with a fused qkv of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.theirs = nn.MultiheadAttention(16, 4, batch_first=True)
        self.qkv = nn.Linear(16, 48)
        self.proj = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.theirs(x, x, x, need_weights=False)[0]
        query, key, value = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.head((x + self.proj(mixed)).mean(1))


def transformer() -> nn.Module:
    return nn.Sequential(
        nn.TransformerEncoderLayer(16, 4, dim_feedforward=32, dropout=0.0, batch_first=True), nn.Linear(16, 4)
    )


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.rnn = kind(8, 12, num_layers=2, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class TiedLanguageModel(nn.Module):
    """The embedding and the head are one tensor with two names; the input is Long ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.body = nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, 20, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.body(self.embedding(ids)).relu())


class SharedModule(nn.Module):
    """One module called twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.again = self.first
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.first(x).relu()).relu())


class KeywordOnly(nn.Module):
    """Two inputs, and an option that can't be given by position and steers control flow."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(8, 16)
        self.right = nn.Linear(8, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, a: Tensor, b: Tensor, *, softmax: bool = False) -> Tensor:
        x = self.head((self.left(a) + self.right(b)).relu())
        return x.softmax(-1) if softmax else x


class DictInDictOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = self.body(inputs["features"]).relu() * inputs["mask"]
        return {"logits": self.head(hidden), "hidden": hidden}


class FunctionalDropout(nn.Module):
    """`self.training` in forward: a trace bakes it in."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.body(x).relu(), 0.5, training=self.training))


class AuxiliaryHead(nn.Module):
    """Returns a tuple while training and a tensor in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 32)
        self.head = nn.Linear(32, 4)
        self.auxiliary = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.body(x).relu()
        return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)


class UNet(nn.Module):
    """Down, up by a transposed convolution of kernel 2, and a skip between; torch's int8 kernel for it is wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.bottom = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.head = nn.Conv2d(24, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        return self.head(torch.cat([skip, self.up(self.bottom(skip))], 1))


def weight_normed() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Linear(16, 32)), nn.ReLU(), nn.Linear(32, 4))


class Repeat(nn.Module):
    """Its `weight` is a number, not a tensor."""

    def __init__(self, weight: int) -> None:
        super().__init__()
        self.weight = weight
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, self.weight)


def int_weight() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 8, bias=False), Repeat(3), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4, bias=False)
    )
