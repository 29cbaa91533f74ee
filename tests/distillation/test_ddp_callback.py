"""`Distillation` in two processes: equal on both, and what one process learns from the same samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lightning_compress import FeatureCosine, FeatureMSE, SoftTarget
from lightning_compress.distillation import Distillation, EMATeacher, Ramp
from tests.distillation.nets import bits, dataset, trainer
from tests.distillation.own import Own
from tests.support.ddp import run_ranks


class Smooth(nn.Module):
    """Without BatchNorm, so that two halves of a batch are the batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(1, width, 3, padding=1), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh().mean((2, 3)))


class First(Callback):
    """The adapters before the first step."""

    state: dict[str, Tensor]

    def __init__(self, callback: Distillation) -> None:
        self.callback = callback

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if not hasattr(self, "state"):
            self.state = bits(self.callback.objective.adapters)


def build(kind: str) -> tuple[Own, Distillation, First]:
    torch.manual_seed(2)
    student, large = Smooth(4), Smooth(8)
    if kind == "given":
        losses = [
            SoftTarget(),
            FeatureMSE("net.body", "body", weight=2.0),
            FeatureCosine("net.head:input", "head:input"),
        ]
        callback = Distillation(large, losses, ramps=[Ramp("feature_*", initial=0.5)])
    else:
        callback = Distillation(EMATeacher(0.8), [SoftTarget(weight=2.0)])
    return Own(student), callback, First(callback)


def data(batch_size: int, rank: int = 0, ranks: int = 1) -> DataLoader[Any]:
    """In the order of the samples, which Lightning's own sampler would shuffle."""
    return DataLoader(Subset(dataset(32), range(rank, 32, ranks)), batch_size=batch_size)


def adapter(fit: Any) -> int:
    """How many parameters the optimizer holds."""
    return sum(len(group["params"]) for group in fit.optimizers[0].param_groups)


def learn(kind: str, ranks: int) -> dict[str, Any]:
    """What batches of 8 teach, each half of them in another process if there are two."""
    module, callback, first = build(kind)
    options = {"max_epochs": 3, "accumulate_grad_batches": 2, "callbacks": [callback, first]}
    fit = trainer(devices=ranks, strategy="ddp" if ranks > 1 else "auto", use_distributed_sampler=False, **options)
    # Ranks that draw differently must still end equal; rank 0 draws as the single process does.
    torch.manual_seed(7 + fit.global_rank)
    batches = data(8 // ranks, fit.global_rank, ranks)
    fit.fit(module, batches, batches)
    return {
        "weights": bits(module),
        "adapters": bits(callback.objective.adapters),
        "first": first.state,
        "teacher": bits(callback.objective.teacher.require()),
        "kl": float(fit.callback_metrics["val_kl"]),
        "held": adapter(fit),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["given", "average"])
def test_two_processes_learn_what_one_learns(kind: str) -> None:
    ranks = run_ranks(learn, kind, 2)
    for part in ("weights", "adapters", "first", "teacher"):
        assert ranks[0][part].keys() == ranks[1][part].keys()
        for name, value in ranks[0][part].items():
            assert torch.equal(value, ranks[1][part][name]), f"{part}: {name}"
    alone = learn(kind, 1)
    torch.testing.assert_close(ranks[0], alone, rtol=1e-4, atol=1e-5)
    if kind == "given":
        assert len(alone["first"]) == 4 and alone["held"] == 8
        assert not torch.allclose(alone["first"]["feature_mse.weight"], alone["adapters"]["feature_mse.weight"])
