"""`Distillation` in two processes: equal on both, and what one process learns from the same samples."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["given", "average"])
def test_two_processes_learn_what_one_learns(kind: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("ddp_callback_script.py")
    command = [sys.executable, "-W", "error", str(script), kind, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for part in ("weights", "adapters", "first", "teacher"):
        assert ranks[0][part].keys() == ranks[1][part].keys()
        for name, value in ranks[0][part].items():
            assert torch.equal(value, ranks[1][part][name]), f"{part}: {name}"
    module, callback, first = build(kind)
    torch.manual_seed(7)
    fit = trainer(max_epochs=3, accumulate_grad_batches=2, callbacks=[callback, first])
    fit.fit(module, data(8), data(8))
    alone = {
        "weights": bits(module),
        "adapters": bits(callback.objective.adapters),
        "first": first.state,
        "teacher": bits(callback.objective.teacher.require()),
        "kl": float(fit.callback_metrics["val_kl"]),
        "held": adapter(fit),
    }
    torch.testing.assert_close(ranks[0], alone, rtol=1e-4, atol=1e-5)
    if kind == "given":
        assert len(first.state) == 4 and alone["held"] == 8
        assert not torch.allclose(first.state["feature_mse.weight"], alone["adapters"]["feature_mse.weight"])
