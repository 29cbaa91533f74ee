"""A fit that was interrupted between two removals goes on as if nothing had happened, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging
from torch import nn

from lightning_compress import (
    ChannelPruning,
    Distillation,
    EMATeacher,
    FeatureMSE,
    Linear,
    QuantizationAwareTraining,
    Rewind,
    ScheduledPruning,
    SoftTarget,
    Steps,
    Window,
)
from tests.support.fits import fit, read_checkpoint, resume
from tests.support.modules import Classifier, ManualClassifier

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed", "ignore:Be aware that when using `ckpt_path`", "ignore:Swapping scheduler"
)
EPOCHS = 4


def shrink(**settings: Any) -> ChannelPruning:
    """Channels leave in epochs 0 to 2."""
    rounds = {"schedule": Linear(), "window": Window(5, 20, unit="step", every_n_steps=5), "calibration_batches": 0}
    return ChannelPruning(**{"macs": 0.5, "round_to": 1, **rounds, **settings})


def prune(method: str = "taylor", **settings: Any) -> ScheduledPruning:
    return ScheduledPruning(method, 0.7, window=Window(3, 24, unit="step", every_n_steps=3), **settings)


def taught() -> Distillation:
    torch.manual_seed(7)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 4))
    return Distillation(teacher, [SoftTarget(), FeatureMSE("body", "1")], task_weight=0.5)


class Scheduled(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def quantized() -> list[Callback]:
    return [QuantizationAwareTraining(window=Window(0.8))]


CASES: dict[str, tuple[Callable[[], list[Callback]], type[Classifier], dict[str, Any]]] = {
    "l2": (lambda: [shrink()], Scheduled, {}),
    "calibrated": (lambda: [shrink(calibration_batches=8)], Scheduled, {}),
    # Between a schedule's steps that aren't worth a round: what was asked for already counts.
    "in rounds": (lambda: [shrink(window=Window(2, 24, unit="step"))], Classifier, {}),
    "taylor": (lambda: [shrink(importance="taylor")], Classifier, {}),
    "taylor, late": (lambda: [shrink(importance="taylor", window=Window(20, 24, unit="step"))], Classifier, {}),
    "regularized": (lambda: [shrink(regularization=0.01)], Classifier, {}),
    "random": (lambda: [shrink(importance="random", macs=None, params=0.5)], Classifier, {}),
    "accumulated": (lambda: [shrink(window=Window(0.1, 0.9))], Classifier, {"accumulate_grad_batches": 3}),
    "manual": (lambda: [shrink(importance="taylor")], ManualClassifier, {}),
    "averaged": (lambda: [EMAWeightAveraging(decay=0.9), shrink()], Classifier, {}),
    "averaged at the end": (lambda: [shrink(), StochasticWeightAveraging(0.01, swa_epoch_start=2)], Classifier, {}),
    "pruned": (lambda: [prune(), shrink()], Classifier, {}),
    "pruned with regrowth": (lambda: [shrink(), prune(regrow=True)], Classifier, {}),
    "rewound": (lambda: [prune("l1_unstructured", schedule=Steps(), rewind=Rewind(2)), shrink()], Classifier, {}),
    "taught": (lambda: [taught(), shrink()], Classifier, {}),
    "taught by an average": (lambda: [shrink(), Distillation(EMATeacher(0.9), [SoftTarget()])], Classifier, {}),
    "quantized": (lambda: [*quantized(), shrink()], Classifier, {}),
    "all at once": (
        lambda: [prune(), shrink(calibration_batches=8), taught(), EMAWeightAveraging(decay=0.9), *quantized()],
        Classifier,
        {},
    ),
}


def run(case: str, folder: Path, ckpt_path: Path | None = None) -> None:
    make, kind, options = CASES[case]
    fit(*make(), module=kind(), folder=folder, ckpt_path=ckpt_path, max_epochs=EPOCHS, **options)


def read(path: Path) -> dict[str, Any]:
    checkpoint = read_checkpoint(path)
    # What a fingerprint is of, a student's average here, a fit that was resumed never had.
    checkpoint["callbacks"].get("Distillation", {}).pop("teacher", None)
    return checkpoint


@pytest.mark.parametrize("case", CASES)
def test_resumed_between_removals_equals_uninterrupted(case: str, tmp_path: Path) -> None:
    # In the middle of the schedule; beside quantization, after it has begun too.
    epochs = (1, 2) if case in ("quantized", "all at once") else (1,)
    resume(partial(run, case), tmp_path, *epochs, read=read)
    files = [read_checkpoint(tmp_path / "whole" / f"epoch={epoch}.ckpt") for epoch in (0, EPOCHS - 1)]
    widths = [len(file["state_dict"]["body.bias"]) for file in files]
    assert widths[0] > widths[1]


def test_the_goal_of_a_latency_budget_isnt_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_compress.channels.planning import search

    def run(folder: Path, ckpt_path: Path | None) -> None:
        if ckpt_path:
            monkeypatch.setattr(search, "latency_ratio", lambda *_: pytest.fail("measured again"))
        fit(shrink(macs=None, latency=0.5), folder=folder, ckpt_path=ckpt_path, max_epochs=EPOCHS)

    monkeypatch.setattr(search, "latency_ratio", lambda before, after, run: after.body.out_features / 32)
    resume(run, tmp_path, 1)
    early = read_checkpoint(tmp_path / "whole" / "epoch=1.ckpt")
    assert len(early["state_dict"]["body.bias"]) < 32
