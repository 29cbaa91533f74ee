"""Everything in one fit: distilled, pruned, quantization-aware, averaged and reported."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from lightning_compress import (
    CompressionReport,
    DistillationModule,
    FeatureMSE,
    QuantizationAwareTraining,
    ScheduledPruning,
    SoftTarget,
    Window,
    load_compressed,
    quantize,
)
from lightning_compress.modules.routing import routed_modules
from tests.quantization.prepared import int8_layers
from tests.support.data import TinyData
from tests.support.fits import fit, read_checkpoint, resume
from tests.support.modules import quiet_trainer
from tests.support.oracles import assert_float_keys, assert_same_state, count_zeros, snapshot

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:You're using the WeightAveraging callback with a model that overrides the configure_model",
)
EPOCHS = 4


def network(width: int) -> nn.Module:
    hidden = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU())
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), hidden, nn.Linear(width, 4))


def build(teacher: bool = True) -> DistillationModule:
    torch.manual_seed(0)
    large, small = network(32), network(8)
    return DistillationModule(
        student=small,
        teacher=large if teacher else None,
        losses=[SoftTarget(weight=0.5), FeatureMSE(student_layer="2", teacher_layer="2", weight=0.1)],
        task_weight=0.5,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    )


def callbacks(averaged: bool) -> list[Any]:
    average = [EMAWeightAveraging(decay=0.9)] if averaged else []
    pruning, qat = ScheduledPruning(sparsity=0.6), QuantizationAwareTraining(window=Window(0.3))
    report = CompressionReport(directory="report", picture=False, max_seconds=0.01)
    return [qat, *average, pruning, report]


def run(averaged: bool, folder: Path, ckpt_path: Path | None = None) -> tuple[Any, DistillationModule]:
    return fit(*callbacks(averaged), module=build(), folder=folder, ckpt_path=ckpt_path, max_epochs=EPOCHS)


@pytest.mark.parametrize("averaged", [False, True], ids=["alone", "with EMA"])
def test_interrupted_and_resumed_equals_uninterrupted(averaged: bool, tmp_path: Path) -> None:
    epochs = (0, 1, 2) if averaged else (1,)
    (_, whole), (trainer, resumed) = resume(partial(run, averaged), tmp_path, *epochs)
    assert_same_state(whole.student, resumed.student)
    for epoch in epochs:
        content = read_checkpoint(tmp_path / f"from {epoch}" / f"epoch={EPOCHS - 1}.ckpt")
        assert_float_keys(content, trained_keys(content))
    trainer.test(resumed, TinyData(), verbose=False)


def trained_keys(checkpoint: dict[str, Any]) -> nn.Module:
    """The module as its class makes it, with the adapter that the checkpoint brings."""
    module = build(teacher=False)
    module.load_state_dict(checkpoint["state_dict"])
    return module


@pytest.mark.parametrize("averaged", [False, True], ids=["alone", "with EMA"])
def test_what_is_saved_is_sparse_and_what_is_tested_is_int8(averaged: bool, tmp_path: Path) -> None:
    trainer, module = run(averaged, tmp_path)
    path = tmp_path / f"epoch={EPOCHS - 1}.ckpt"
    masks = next(callback for callback in trainer.callbacks if isinstance(callback, ScheduledPruning)).masks
    assert masks and all(name.startswith("student.") for name in masks)
    plain = build(teacher=False)
    plain.load_state_dict(read_checkpoint(path)["state_dict"])
    zeros, elements = count_zeros([plain.get_parameter(name) for name in masks])
    assert zeros == round(0.6 * elements)
    assert int8_layers(module.student) and not routed_modules(module.adapters)
    metrics = trainer.test(module, TinyData(), verbose=False)
    # A Trainer of its own: one that holds averages would test the weights that weren't averaged, with or without us.
    tester = quiet_trainer(callbacks=callbacks(averaged=False))
    assert tester.test(build(teacher=False), TinyData(), ckpt_path=path, verbose=False) == metrics
    again = load_compressed(path, build(teacher=False))
    assert tester.test(again, TinyData(), verbose=False) == metrics


def test_the_taps_see_the_fake_quantized_student(tmp_path: Path) -> None:
    module = build()
    seen: list[torch.Tensor] = []
    trainer = quiet_trainer(max_epochs=2, callbacks=[QuantizationAwareTraining(convert=False)])
    hook = module.student[2].register_forward_hook(lambda _m, _a, output: seen.append(output))
    trainer.fit(module, TinyData())
    hook.remove()
    steps = [output for output in seen if isinstance(output, torch.Tensor) and output.requires_grad]
    # Values on a grid of at most 256 levels: what the hook sees is what the int8 model will compute.
    assert steps and len(steps[-1].unique()) <= 256
    assert "train_feature_mse" in trainer.callback_metrics


def test_a_pruned_model_quantized_afterwards_keeps_its_zeros(tmp_path: Path) -> None:
    module = build()
    pruning = ScheduledPruning(sparsity=0.6)
    quiet_trainer(max_epochs=1, callbacks=[pruning]).fit(module, TinyData())
    data = TinyData()
    data.setup("fit")
    student = module.student.eval()
    before = snapshot(student)
    int8 = quantize(student, "int8_static", data.train_dataloader())
    assert_same_state(before, snapshot(student))
    codes = [int8.state_dict()[f"{path}.weight"] for path in int8_layers(int8)]
    assert len(codes) == 3
    kept = sum(int((weight != 0).sum()) for weight in codes)
    assert kept <= sum(int(mask.sum()) for mask in pruning.masks.values())
