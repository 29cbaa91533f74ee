"""What is handed over in evaluation mode trains in training mode under every callback, unless frozen on purpose."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, Callback
from torch import Tensor, nn

from lightning_compress import (
    AccuracyGuard,
    CompressionReport,
    DistillationModule,
    ExportModel,
    PostTrainingPruning,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    ScheduledPruning,
    SoftTarget,
)
from tests.contracts.rows import ROWS, Row
from tests.support import fits
from tests.support.data import TinyData
from tests.support.fits import resume
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_different_state, assert_same_state, snapshot

AFTERWARDS = PostTrainingPruning | PostTrainingQuantization | CompressionReport | ExportModel | AccuracyGuard
TRAINERS = [row for row in ROWS if not isinstance(row.make(), AFTERWARDS)]
each_trainer = pytest.mark.parametrize("row", TRAINERS, ids=str)
pytestmark = pytest.mark.filterwarnings(
    "ignore:Found [0-9]+ module",  # in eval mode: that is the test
    "ignore:The dirpath has changed",
    "ignore:Be aware that when using `ckpt_path`",
)


class Pretrained(Classifier):
    """A network whose norm and dropout tell the modes apart."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2))
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.flatten(x)))


class Modes(Callback):
    """Notes which modules train in each batch."""

    def __init__(self) -> None:
        self.batches: list[dict[str, bool]] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        torch.manual_seed(trainer.global_step)  # of dropout: a resumed fit draws on, and Lightning doesn't restore that

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.batches.append({path: inner.training for path, inner in pl_module.named_modules()})

    def trained(self, path: str) -> set[bool]:
        return {batch[path] for batch in self.batches}


def fit(module: Any, *callbacks: Callback, **options: Any) -> Modes:
    modes = Modes()
    fits.fit(*callbacks, modes, module=module, **options)
    return modes


def body_in_eval(module: Any) -> None:
    module.body.eval()


def all_in_eval(module: Any) -> None:
    module.eval()


@each_trainer
@pytest.mark.parametrize("hand_over", [all_in_eval, body_in_eval])
def test_a_fit_from_eval_mode_is_the_fit_from_train_mode(
    row: Row, hand_over: Callable[[Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    usual, given = Pretrained(), Pretrained()
    hand_over(given)
    before = {inner: inner.training for inner in given.modules()}
    fit(usual, row.make())
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        modes = fit(given, row.make())
    assert all(modes.batches[0].values())
    assert_same_state(usual, given)
    (text,) = (record.getMessage() for record in caplog.records if "evaluation mode" in record.getMessage())
    assert ("`body`" if hand_over is body_in_eval else "the whole module") in text
    # As plain Lightning leaves it: `model(x)` after the fit drops nothing out.
    assert {inner: inner.training for inner in before} == before


@pytest.mark.parametrize("row", [row for row in TRAINERS if str(row) in ("channels", "qat", "qlora")], ids=str)
def test_a_fit_from_eval_mode_resumes_bit_equal(row: Row, tmp_path: Path) -> None:
    resume(lambda **files: fit(Pretrained().eval(), row.make(), **files), tmp_path, 0)


@each_trainer
def test_it_holds_in_a_second_fit_and_after_a_test(row: Row) -> None:
    module, callback = Pretrained().eval(), row.make()
    assert fit(module, callback, max_epochs=1).trained("body.3") == {True}
    if not isinstance(callback, QuantizationAwareTraining):
        quiet_trainer().test(module, TinyData(), verbose=False)
    before = snapshot(module)
    assert fit(module, callback, max_epochs=1).trained("body.3") == {True}
    assert_different_state(before, module)


def test_qat_moves_batchnorm_statistics_in_a_second_fit_from_eval_mode() -> None:
    module, callback = Pretrained().eval(), QuantizationAwareTraining(convert=False)
    for _ in range(2):
        before = module.body[1].running_mean.clone()
        fit(module, callback, max_epochs=1)
        assert not torch.equal(before, module.body[1].running_mean)


def test_the_student_of_a_distillation_module_trains() -> None:
    student = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4)).eval()
    for losses in ([SoftTarget()], []):
        module = DistillationModule(student, nn.Linear(16, 4) if losses else None, losses=losses, task_weight=1.0)
        modes = fit(module)
        assert modes.trained("student.1") == modes.trained("student.2") == {True}
        assert not student.training


# What stays in evaluation mode.


class Kept(Pretrained):
    """Its `train` keeps the body in evaluation mode."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.body.eval()
        return self


class KeptPart(nn.Sequential):
    """As some metrics' and losses' networks do."""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)


class Hooked(Pretrained):
    """Puts its body into evaluation mode when an epoch starts."""

    def on_train_epoch_start(self) -> None:
        self.body.eval()


class Untrained(Pretrained):
    """Its optimizer has only the head."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


def frozen() -> Pretrained:
    module = Pretrained()
    module.body.requires_grad_(False)
    return module.eval()  # type: ignore[no-any-return]


def kept_part() -> Pretrained:
    module = Pretrained()
    module.body = KeptPart(*module.body)
    return module.eval()  # type: ignore[no-any-return]


ON_PURPOSE = {
    "frozen": frozen,
    "train keeps it": lambda: Kept().eval(),
    "train of a part keeps it": kept_part,
    "a hook's": lambda: Hooked().eval(),
    "in no optimizer": lambda: Untrained().eval(),
}


@pytest.mark.parametrize("make", ON_PURPOSE.values(), ids=ON_PURPOSE)
def test_what_is_frozen_on_purpose_stays_in_eval_mode(make: Callable[[], Pretrained]) -> None:
    module = make()
    mean = module.body[1].running_mean.clone()
    modes = fit(module, ScheduledPruning(sparsity=0.5))
    assert modes.trained("") == modes.trained("head") == {True}
    for path in ("body", "body.1", "body.3"):
        assert modes.trained(path) == {False}
    assert torch.equal(mean, module.body[1].running_mean)
    assert not module.training and not module.head.training


def test_a_norm_or_dropout_put_into_eval_mode_stays_so() -> None:
    module = Pretrained()
    module.body[1].eval()
    module.body.append(nn.Sequential(nn.LayerNorm(32), nn.Dropout()).eval())
    modes = fit(module, ScheduledPruning(sparsity=0.5))
    assert modes.trained("body.1") == modes.trained("body.4.1") == {False}
    assert modes.trained("body") == modes.trained("body.3") == {True}


class Unfreezing(Pretrained):
    """Trains its body from the second epoch on."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.body.requires_grad_(True)


def test_what_is_unfrozen_later_trains_from_then_on() -> None:
    module = Unfreezing()
    module.body.requires_grad_(False)
    modes = fit(module.eval(), ScheduledPruning(sparsity=0.5))
    first = [batch["body.3"] for batch in modes.batches]
    assert first == [False] * 7 + [True] * 7
    assert not module.body.training


class Finetuning(BaseFinetuning):
    """Freezes the body with its norms, and thaws it in the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.body, train_bn=False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.body, optimizer, lr=0.1)


class WithBackbone(Pretrained):
    """Gives its optimizer what isn't frozen."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([each for each in self.parameters() if each.requires_grad], lr=0.1)


@pytest.mark.parametrize("first", [True, False], ids=["before ours", "after ours"])
def test_a_backbone_that_a_callback_unfreezes_trains_from_then_on(first: bool) -> None:
    finetuning, ours = Finetuning(), ScheduledPruning(sparsity=0.5)
    module = WithBackbone().eval()
    modes = fit(module, *([finetuning, ours] if first else [ours, finetuning]))
    assert [batch["body.3"] for batch in modes.batches] == [False] * 7 + [True] * 7


def test_an_error_in_the_fit_leaves_the_modes_as_they_were() -> None:
    class Breaks(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("enough")

    module = Pretrained().eval()
    with pytest.raises(RuntimeError, match="enough"):
        fit(module, ScheduledPruning(sparsity=0.5), Breaks())
    assert not any(inner.training for inner in module.modules())
