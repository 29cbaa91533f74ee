"""A LightningModule as users have it, and the loop by hand that the callback's runs must equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_compress import SoftTarget
from lightning_compress.distillation import Distillation, DistillationModule
from tests.distillation.nets import ConvNet, bits, loader, trainer
from tests.support.oracles import hooks

WAYS = pytest.mark.parametrize("way", ["module", "callback"])


class Own(L.LightningModule):
    """The usual module around a network."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = ConvNet() if net is None else net

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def large() -> ConvNet:
    torch.manual_seed(8)
    return ConvNet(8, dropout=0.5)


def kd(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    return (p * (p.log() - q.log())).sum(-1).mean() * temperature**2


Step = Callable[[Any, Any, Any], tuple[Tensor, Tensor, Tensor] | None]


def by_hand(module: Any, teacher: nn.Module, step: Step, data: Any = None) -> dict[str, Tensor]:
    """Weights after a written-out loop; ``step`` gives the module's own loss and the logits of both, or None."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    teacher.eval()
    for index, batch in enumerate(loader() if data is None else data):
        found = step(module, batch, index)
        if found is not None:
            task, student, target = found
            optimizer.zero_grad()
            (0.5 * task + 0.75 * kd(student, target.detach())).backward()
            optimizer.step()
    return bits(module)


def taught(module: Any, teacher: nn.Module, data: Any = None, **kwargs: Any) -> dict[str, Tensor]:
    callback, before = Distillation(teacher, task_weight=0.5, **kwargs), hooks(module)
    trainer(callbacks=[callback]).fit(module, loader() if data is None else data)
    assert hooks(module) == before and hooks(teacher) == []
    return bits(module)


def assert_close(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)


def own_step(module: Any, batch: Any, teacher: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    logits = module.net(batch[0])
    return F.cross_entropy(logits, batch[1]), logits, teacher(batch[0])


def build(way: str, teacher: nn.Module | None = None, **kwargs: Any) -> tuple[Any, list[Callback]]:
    arguments = {"teacher": teacher or large(), "losses": [SoftTarget()], "task_weight": 0.5, **kwargs}
    if way == "module":
        torch.manual_seed(5)
        sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)  # noqa: E731
        return DistillationModule(ConvNet(), optimizer=sgd, **arguments), []
    return Own(), [Distillation(**arguments)]
