"""Tiny students, teachers and data of this room's tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import FeatureCosine, FeatureMSE, LogitLoss, SoftTarget
from lightning_compress.distillation import DistillationModule


class ConvNet(nn.Module):
    """Images (B, 1, 8, 8) to 4 classes; BatchNorm and dropout are what a careless loop moves or forgets."""

    def __init__(self, width: int = 4, classes: int = 4, dropout: float = 0.0, stride: int = 1) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, stride=stride, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(x).mean((2, 3))))


class Wrapped(nn.Module):
    """A teacher with its own preprocessing and a dict of outputs."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"hidden": x, "logits": self.net((x - 0.5) / 0.25)}


def dataset(samples: int = 20) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 1, 8, 8, generator=generator)
    return TensorDataset(x, (x.mean((1, 2, 3)) * 40).long().clamp(-2, 1) + 2)


def loader(samples: int = 20, batch_size: int = 8) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(dataset(samples), batch_size=batch_size)


def trainer(**kwargs: Any) -> L.Trainer:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    return L.Trainer(**{"accelerator": "cpu", "max_epochs": 1, **quiet, **kwargs})


def soft_only(**kwargs: Any) -> DistillationModule:
    torch.manual_seed(3)
    return DistillationModule(**{"student": ConvNet(), "teacher": ConvNet(8, dropout=0.5), **kwargs})


def with_features(**kwargs: Any) -> DistillationModule:
    """Soft targets, a cosine without and a regressor with an adapter (channels and resolution differ)."""
    torch.manual_seed(3)
    losses = [SoftTarget(), FeatureCosine("head", "head"), FeatureMSE("features.0", "features.0")]
    return soft_only(**{"teacher": ConvNet(8, dropout=0.5, stride=2), "losses": losses, **kwargs})


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same_bits(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert list(before) == list(after)
    different = [name for name in before if not torch.equal(before[name], after[name])]
    assert not different


def hooks(module: nn.Module) -> int:
    return sum(len(child._forward_hooks) for child in module.modules())


@dataclass(frozen=True)
class LogitL1(LogitLoss):
    """A loss of the user's own."""

    weight: float = 0.5

    def __call__(
        self, student: Tensor, teacher: Tensor, valid: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        return (student - teacher).abs().mean()
