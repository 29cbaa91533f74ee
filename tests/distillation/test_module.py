"""`DistillationModule` in real Trainer runs: what it computes, saves, resumes, refuses and leaves behind."""

from __future__ import annotations

import copy
import json
import pickle
import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_compress import (
    CompressionReport,
    FeatureCosine,
    FeatureMSE,
    HardTarget,
    QuantizationAwareTraining,
    SoftTarget,
    load_compressed,
    save_compressed,
)
from lightning_compress.distillation import DistillationModule
from lightning_compress.errors import CompressionError
from tests.distillation.nets import (
    ConvNet,
    assert_same_bits,
    bits,
    dataset,
    hooks,
    loader,
    soft_only,
    trainer,
    with_features,
)

# The module can validate; most of these runs have nothing to validate on.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")
AVERAGING = pytest.mark.filterwarnings(
    # WeightAveraging says so of every module that overrides `configure_model`; ours is idempotent and may be called.
    "ignore:You're using the WeightAveraging callback with a model that overrides:UserWarning"
)


class Record(Callback):
    """Logged values of each step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def test_twenty_steps_equal_a_hand_written_loop() -> None:
    module = with_features(task_weight=0.3, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    module.example_input_array = torch.randn(2, 1, 8, 8)
    student, teacher = copy.deepcopy(module.student), copy.deepcopy(module.teacher).eval()
    record = Record()
    trainer(max_epochs=4, callbacks=[record]).fit(module, loader(40))
    regressor = nn.Conv2d(4, 8, 1)
    reference = with_features()
    reference.prepare_(torch.randn(2, 1, 8, 8))
    regressor.load_state_dict(reference.adapters["feature_mse"].state_dict())

    losses = []
    optimizer = torch.optim.SGD([*student.parameters(), *regressor.parameters()], lr=0.1)
    for _ in range(4):
        for x, y in loader(40):
            hidden, target = student.features[0](x), teacher.features[0](x)
            mapped = F.avg_pool2d(regressor(hidden), 2)
            mse = ((mapped - target) ** 2).mean()
            logits = student.head(student.features[1:](hidden.clone()).mean((2, 3)))
            target = teacher(x).detach()
            p, q = (target / 2).softmax(1), (logits / 2).softmax(1)
            kl = (p * (p.log() - q.log())).sum(1).mean() * 4
            cosine = 1 - F.cosine_similarity(logits, target).mean()
            loss = 0.3 * F.cross_entropy(logits, y) + 0.75 * kl + 0.25 * cosine + 0.25 * mse
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert len(losses) == 20
    assert [row["train_loss"] for row in record.rows] == pytest.approx(losses, rel=1e-5)
    row = record.rows[-1]
    names = {"task", "soft_target", "feature_cosine", "feature_mse"}
    assert {f"train_{name}" for name in names} | {f"train_{name}_weighted" for name in names} < set(row)
    assert sum(row[f"train_{name}_weighted"] for name in names) == pytest.approx(row["train_loss"], rel=1e-5)


def test_the_gradient_reaches_student_and_adapters_and_nobody_else() -> None:
    module = with_features()
    module.prepare_(torch.randn(2, 1, 8, 8))
    loss, terms, _ = module.distill(next(iter(loader())))
    loss.backward()
    assert list(terms) == ["task", "soft_target", "feature_cosine", "feature_mse"]
    assert module.teacher is not None
    assert all(parameter.grad is not None for parameter in module.trainable_parameters())
    assert all(parameter.grad is None for parameter in module.teacher.parameters())
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"student", "adapters"}


def test_adapters_are_in_the_optimizer_from_the_start_and_draw_nothing() -> None:
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    weights = []
    for _ in range(2):
        module, fit = with_features(), trainer(limit_train_batches=0)
        torch.rand(len(weights))  # other draws before don't change the adapter
        state = torch.get_rng_state()
        fit.fit(module, loader())
        assert torch.equal(torch.get_rng_state(), state)
        (optimizer,) = fit.optimizers
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        assert held == {id(parameter) for parameter in module.parameters()}
        weights.append(module.adapters["feature_mse"].weight.detach().clone())
    assert torch.equal(*weights)
    assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all()


def test_a_loader_that_splits_at_random_is_asked_under_a_forked_random_state() -> None:
    draws = []

    class Splits(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            draws.append(torch.rand(()).item())
            return loader()

    trainer().fit(with_features(), Splits())
    assert len(draws) == 2 and draws[0] == draws[1]  # the dry run's call drew nothing from the training's


def test_the_dry_run_leaves_the_student_bit_identical() -> None:
    class Counts(ConvNet):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    module = with_features(student=Counts())
    module.train()
    before, modes = bits(module.student), [child.training for child in module.modules()]
    module.prepare_(torch.randn(2, 1, 8, 8))
    assert_same_bits(before, bits(module.student))
    assert modes == [child.training for child in module.modules() if child not in list(module.adapters.values())]
    assert hooks(module.student) == 0


def test_evaluation_logs_the_students_own_loss_and_accuracy() -> None:
    module, x, y = soft_only(), *dataset(20).tensors
    fit = trainer()
    fit.fit(module, loader(), loader())
    (row,) = fit.test(module, loader(), verbose=False)
    module.eval()
    assert row["test_loss"] == pytest.approx(F.cross_entropy(module(x), y).item(), rel=1e-5)
    assert row["test_acc"] == pytest.approx((module(x).argmax(1) == y).float().mean().item())
    predicted = torch.cat(fit.predict(module, DataLoader(x, batch_size=8)))
    torch.testing.assert_close(predicted, module(x))
    module.teacher = None
    assert trainer().validate(module, loader(), verbose=False)[0]["val_loss"] == pytest.approx(row["test_loss"])


# The checkpoint callback's folder changes on purpose.
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.parametrize("make", [soft_only, with_features])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, make: Any) -> None:
    whole = make()
    trainer(max_epochs=3).fit(whole, loader())
    checkpoint = ModelCheckpoint(tmp_path, filename="one")
    trainer(max_epochs=1, enable_checkpointing=True, callbacks=[checkpoint]).fit(make(), loader())
    path = tmp_path / "one.ckpt"
    middle = torch.load(path, weights_only=True)["state_dict"]
    resumed = make()
    checkpoint = ModelCheckpoint(tmp_path / "more", filename="one")
    trainer(max_epochs=3, enable_checkpointing=True, callbacks=[checkpoint]).fit(resumed, loader(), ckpt_path=path)
    assert_same_bits(bits(whole), bits(resumed))
    assert not any(torch.equal(middle[name], value) for name, value in whole.named_parameters())


def test_fit_twice_and_a_new_teacher_in_between() -> None:
    module = with_features()
    for _ in range(2):
        trainer().fit(module, loader())
        assert hooks(module.student) == hooks(module.teacher) == 0
    adapter = module.adapters["feature_mse"]
    module.teacher = ConvNet(6)
    trainer().fit(module, loader())
    assert module.adapters["feature_mse"] is not adapter and module.adapters["feature_mse"].weight.shape[:2] == (6, 4)
    assert "teacher" not in module._modules


def test_an_exception_leaves_no_hook_and_fit_works_again() -> None:
    class Fails(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("stop here")

    module = with_features()
    before = bits(module.teacher)
    with pytest.raises(RuntimeError, match="stop here"):
        trainer(callbacks=[Fails()]).fit(module, loader())
    assert hooks(module.student) == hooks(module.teacher) == 0
    trainer().fit(module, loader())
    assert_same_bits(before, bits(module.teacher))


@AVERAGING
def test_averaged_copies_share_the_teacher_and_train_to_the_same_end(tmp_path: Path) -> None:
    class Copies(EMAWeightAveraging):
        teachers: list[Any] = []

        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.teachers.append((self._average_model.module.teacher, module.teacher))

    module, average = with_features(), Copies(decay=0.5)
    checkpoint = ModelCheckpoint(tmp_path, filename="ema")
    trainer(max_epochs=2, enable_checkpointing=True, callbacks=[average, checkpoint]).fit(module, loader(), loader())
    ((first, second),) = average.teachers
    assert first is second is module.teacher
    saved = torch.load(tmp_path / "ema.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(module.state_dict()) == set(saved["current_model_state"])
    assert "adapters.feature_mse.weight" in saved["state_dict"]
    assert hooks(module.student) == 0


def test_deepcopy_shares_and_pickle_keeps_the_teacher() -> None:
    module = with_features(optimizer=torch.optim.SGD)
    module.prepare_(torch.randn(2, 1, 8, 8))
    batch = next(iter(loader()))
    expected = module.distill(batch)[0]
    twin, again = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    assert twin.teacher is module.teacher and again.teacher is not module.teacher
    for other in (twin, again):
        assert torch.equal(other.distill(batch)[0], module.distill(batch)[0])
    assert expected.isfinite()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true"])
def test_low_precision_trains_with_a_teacher_that_follows(precision: str) -> None:
    module = with_features(task_weight=0.5, optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
    before, record = bits(module.teacher), Record()
    trainer(precision=precision, callbacks=[record]).fit(module, loader(), loader())
    assert len(record.rows) == 3 and all(np.isfinite(row["train_loss"]) for row in record.rows)
    assert_same_bits(before, bits(module.teacher))


def test_accumulation_and_a_scheduler() -> None:
    module = soft_only(scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    fit = trainer(accumulate_grad_batches=2, max_epochs=2)
    fit.fit(module, loader())
    assert fit.global_step == 4 and fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 / 4)


@pytest.mark.parametrize("compiled", ["features", pytest.param("student", marks=pytest.mark.slow)])
def test_compiled_students_are_tapped_by_their_plain_names_in_every_fit(compiled: str) -> None:
    eager, module = with_features(), with_features()
    if compiled == "student":
        module.student = torch.compile(module.student, backend="aot_eager")
    else:
        module.student.features = torch.compile(module.student.features, backend="aot_eager")
    for model in (eager, module):
        for _ in range(2):
            trainer(max_epochs=1).fit(model, loader())
    for parameter, expected in zip(module.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected)


def test_several_inputs_and_dict_outputs() -> None:
    class Pair(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, width), nn.Linear(width, 4)

        def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
            return {"aux": x, "logits": self.b(self.a(x) * scale)}

    class Keywords(DistillationModule):
        def split_batch(self, batch: Any) -> tuple[Any, Any]:
            return {"x": batch["x"], "scale": batch["scale"]}, batch["y"]

    rows = [{"x": torch.randn(3), "scale": torch.rand(1), "y": index % 4} for index in range(8)]
    module = Keywords(Pair(2), Pair(5), losses=[SoftTarget(), FeatureMSE("a", "a")])
    fit = trainer()
    fit.fit(module, DataLoader(rows, batch_size=4), DataLoader(rows, batch_size=4))
    assert {"val_loss", "val_acc", "train_feature_mse"} < set(fit.callback_metrics)


def test_distillation_alone_needs_no_targets() -> None:
    module = soft_only(task_weight=0, losses=[HardTarget(weight=1.0), SoftTarget(), SoftTarget(temperature=9.0)])
    fit = trainer()
    fit.fit(module, DataLoader(dataset().tensors[0], batch_size=8))
    assert {"train_hard_target", "train_soft_target", "train_soft_target_2"} < set(fit.callback_metrics)
    with pytest.raises(CompressionError, match="hold targets"):
        trainer().fit(soft_only(), DataLoader(dataset().tensors[0], batch_size=8))


def test_masked_positions_and_other_inputs_by_subclassing() -> None:
    class Masked(DistillationModule):
        def valid_positions(self, batch: Any) -> Tensor:
            return batch[1] > 0

        def teacher_inputs(self, inputs: Tensor) -> Tensor:
            return F.avg_pool2d(inputs, 2)

    module = Masked(ConvNet(), ConvNet(8), losses=[SoftTarget(), FeatureCosine("head", "head")])
    x, y = dataset(8).tensors
    _, terms, logits = module.distill((x, y))
    target = module.teacher(F.avg_pool2d(x, 2))
    keep = y > 0
    expected = F.kl_div((logits[keep] / 2).log_softmax(1), (target[keep] / 2).softmax(1), reduction="batchmean") * 4
    torch.testing.assert_close(terms["soft_target"], expected)
    assert 0 < keep.sum() < 8


def test_an_int8_student_is_exported_with_what_was_done_to_it(tmp_path: Path) -> None:
    module = with_features()
    trainer(callbacks=[QuantizationAwareTraining()]).fit(module, loader())
    student = module.export_student()
    x = dataset().tensors[0]
    assert isinstance(student, ConvNet) and torch.equal(student(x), module(x)) and hooks(student) == 0
    save_compressed(student, tmp_path / "student.ckpt")
    again = load_compressed(tmp_path / "student.ckpt", ConvNet())
    assert torch.equal(again.eval()(x), student.eval()(x))


def test_a_report_counts_no_adapter(tmp_path: Path) -> None:
    module = with_features()
    fit = trainer(callbacks=[CompressionReport(str(tmp_path), picture=False, max_seconds=0.01)])
    fit.fit(module, loader())
    fit.test(module, loader(), verbose=False)
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert len(rows) == 2 and len(module.adapters) == 1
    assert {row["measurement"]["parameters"] for row in rows} == {
        sum(parameter.numel() for parameter in module.student.parameters())
    }


def test_a_student_without_logits_is_validated_too() -> None:
    class Hidden(ConvNet):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"hidden": self.features(x)}

    losses = [FeatureMSE(":output.hidden", "features")]
    module = soft_only(student=Hidden(), losses=losses, task_weight=0)
    images = DataLoader(dataset().tensors[0], batch_size=8)
    trainer().fit(module, images, images)
    wrong = soft_only(student=Hidden(), losses=[FeatureMSE(":output", "features")], task_weight=0)
    with pytest.raises(CompressionError, match="Received: dict with hidden. Name a part of it, such as :output.hidden"):
        trainer().fit(wrong, images)
