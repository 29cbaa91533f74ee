"""Projects of strangers: each kind trains under each public callback, saves, resumes, is tested and reported."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_compress import (
    AccuracyGuard,
    ChannelPruning,
    CompressionError,
    CompressionReport,
    Distillation,
    ExportModel,
    PostTrainingPruning,
    PostTrainingQuantization,
    QLoRA,
    QuantizationAwareTraining,
    ScheduledPruning,
    load_compressed,
)
from tests.contracts.rows import PUBLIC
from tests.support.fits import read_checkpoint, resume
from tests.support.oracles import assert_same_state, hooks, snapshot
from tests.support.projects import PROJECTS, Project

pytestmark = pytest.mark.filterwarnings(
    "ignore:Attribute '.*' is an instance of `nn.Module`",
    "ignore:.*reads weights and plain data alone",
    "ignore:The dirpath has changed",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:.*accuracy is near chance",
    "ignore:.*budget is missed",
)

DEFAULTS: dict[str, Callable[[Project], Callback]] = {
    "pruning": lambda _: ScheduledPruning(sparsity=0.5),
    "least squares": lambda _: ScheduledPruning("least_squares", 0.5),
    "post-training pruning": lambda _: PostTrainingPruning(sparsity=0.5),
    "channels": lambda _: ChannelPruning(macs=0.5),
    "qat": lambda _: QuantizationAwareTraining(),
    "ptq static": lambda _: PostTrainingQuantization(),
    "ptq dynamic": lambda _: PostTrainingQuantization("int8_dynamic"),
    "qlora": lambda _: QLoRA(),
    "distillation": lambda project: Distillation(project.build()),
    "guard": lambda _: AccuracyGuard("val_acc", max_drop=0.01),
    "export": lambda _: ExportModel("model.onnx"),
    "report": lambda _: CompressionReport(directory="report", max_seconds=0.1),
}
# What may be refused: in one sentence, with the module as it was.
MAY_REFUSE = {
    ("GAN", "channels"): "must run one batch",  # a manual step isn't tried, and forward takes noise
    ("GAN", "qat"): "must run one batch",
    ("GAN", "distillation"): "`automatic_optimization` must be True",
    ("GAN", "export"): "calls `discriminator` from outside of the module too",
    ("autoencoder", "export"): "`module` must be named where test_step calls `encoder`, `decoder`",
    ("UNet", "qlora"): "must have a linear layer to adapt",
    ("UNet", "distillation"): "`class_dim` must be 1",
    ("UNet", "ptq dynamic"): "must have a layer",
    ("keyword spotting", "qlora"): "must have a linear layer to adapt",
    ("autoencoder", "distillation"): "`teacher` must have a `forward`",
}
# One or two for each kind; `make test-all` has the rest.
QUICK = {(kind, "qat") for kind in PROJECTS if kind != "UNet"} | {
    ("UNet", "pruning"),
    ("hyperparameters", "distillation"),
    ("GAN", "ptq static"),
    ("GAN", "pruning"),
    ("GAN", "channels"),
    ("sequence to sequence", "qlora"),
    ("forecasting", "channels"),
    ("keyword spotting", "ptq static"),
    ("keyword spotting", "pruning"),
    ("autoencoder", "channels"),
    ("metrics", "ptq dynamic"),
    ("autoencoder", "export"),
}
NOT_YET = {
    ("UNet", "distillation"): "it is refused within the first step, which has moved BatchNorm's statistics by then",
}


def marks(*case: str) -> list[Any]:
    waits = [pytest.mark.xfail(reason=NOT_YET[case], strict=True)] if case in NOT_YET else []
    return waits if case in QUICK else [*waits, pytest.mark.slow]


CASES = [
    pytest.param(kind, name, id=f"{kind}-{name}", marks=marks(kind, name)) for kind in PROJECTS for name in DEFAULTS
]


def test_every_public_callback_is_among_them() -> None:
    assert {type(make(PROJECTS["metrics"])) for make in DEFAULTS.values()} == set(PUBLIC)


def make_trainer(project: Project, name: str, folder: Path | None = None) -> Any:
    torch.manual_seed(5)
    callbacks: list[Any] = [DEFAULTS[name](project)]
    if folder is not None:
        callbacks.append(project.package.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1))
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    return project.package.Trainer(
        accelerator="cpu", max_epochs=2, enable_checkpointing=folder is not None, callbacks=callbacks, **quiet
    )


def run(project: Project, name: str, folder: Path, ckpt_path: Path | None) -> tuple[Any, Any]:
    torch.manual_seed(1)
    module = project.build()
    before = snapshot(module)
    trainer = make_trainer(project, name, folder)
    try:
        trainer.fit(module, ckpt_path=ckpt_path, weights_only=project.weights_only)
    except CompressionError:
        assert_same_state(before, snapshot(module))
        assert hooks(module) == []
        raise
    return trainer, module


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_project_works_as_it_is(kind: str, name: str, tmp_path: Path) -> None:
    project = PROJECTS[kind]
    read = partial(read_checkpoint, weights_only=project.weights_only)
    try:
        (trainer, module), _ = resume(partial(run, project, name), tmp_path, 0, read=read)
    except CompressionError as error:
        assert MAY_REFUSE.get((kind, name), "no refusal") in str(error)
        return
    try:
        metrics = trainer.test(module, verbose=False)
    except CompressionError as error:  # what quantizes when a test begins
        assert MAY_REFUSE.get((kind, name), "no refusal") in str(error)
        return
    assert metrics[0].keys() >= {"test_loss"}
    trainer.save_checkpoint(tmp_path / "final.ckpt", weights_only=True)
    loaded = load_compressed(str(tmp_path / "final.ckpt"), project.build())
    assert make_trainer(project, name).test(loaded, verbose=False) == metrics


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROJECTS)
def test_pruned_trained_for_int8_and_reported_at_once(kind: str, tmp_path: Path) -> None:
    project = PROJECTS[kind]
    trainer = make_trainer(project, "qat")
    trainer.callbacks += [ScheduledPruning(sparsity=0.5), CompressionReport(directory=str(tmp_path))]
    module = project.build()
    try:
        trainer.fit(module)
    except CompressionError as error:
        assert MAY_REFUSE.get((kind, "qat"), "no refusal") in str(error)
        return
    trainer.test(module, verbose=False)
    assert (tmp_path / "report.json").exists()
