"""What went wrong for users of frozen teachers before: the scenarios, each with its source.

PL = Lightning-AI/pytorch-lightning, PT = pytorch/pytorch.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ModelSummary
from torch import nn
from torch.utils.data import DataLoader

from lightning_compress import FeatureMSE, HardTarget, SoftTarget
from lightning_compress.callback import refuse_strategy
from lightning_compress.distillation import DistillationModule
from lightning_compress.distillation.losses.soft_target import soft_target
from lightning_compress.errors import CompressionError
from tests.distillation.nets import (
    ConvNet,
    Wrapped,
    assert_same_bits,
    bits,
    dataset,
    loader,
    soft_only,
    trainer,
    with_features,
)
from tests.support.ddp import run_ranks

# The module can validate; most of these runs have nothing to validate on.
# The runs that read a checkpoint have no ModelCheckpoint of their own.
pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no:UserWarning",
    "ignore:Be aware that when using `ckpt_path`, callbacks used:UserWarning",
)


class Plain(L.LightningModule):
    """A teacher as users have it: a LightningModule, trained before."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ConvNet(8)

    def forward(self, x: Any) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("seen", 1.0)
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_and_save(module: L.LightningModule, folder: Path, **kwargs: Any) -> Path:
    checkpoint = ModelCheckpoint(folder, filename="last", **kwargs)
    trainer(enable_checkpointing=True, callbacks=[checkpoint]).fit(module, loader())
    return folder / "last.ckpt"


@pytest.mark.parametrize("teacher", [Plain, lambda: ConvNet(8)])
def test_d1_a_trained_lightning_teacher_is_loaded_from_its_checkpoint(tmp_path: Path, teacher: Any) -> None:
    # PL#17592: how to load a teacher's weights and set it to eval.
    trained = Plain()
    path = fit_and_save(trained, tmp_path)
    module = soft_only(teacher=teacher(), teacher_checkpoint=str(path))
    trainer().fit(module, loader())
    loaded = module.teacher.net if isinstance(module.teacher, Plain) else module.teacher
    assert_same_bits(bits(trained.net), bits(loaded))
    assert not any(child.training for child in module.teacher.modules())


def train_on_ranks() -> dict[str, Any]:
    module = with_features()
    run = trainer(devices=2, strategy="ddp", max_epochs=2)
    torch.manual_seed(run.global_rank)  # ranks that draw differently must still end equal
    before, teacher_before = bits(module), bits(module.teacher)
    run.fit(module, loader(32), loader(32))
    x, y = dataset(32).tensors
    own = slice(run.global_rank, None, 2)
    counts = (module.eval()(x[own]).argmax(1) == y[own]).sum().float()
    torch.distributed.all_reduce(counts)
    return {
        "before": before,
        "after": bits(module),
        "teacher_before": teacher_before,
        "teacher_after": bits(module.teacher),
        "val_acc": float(run.callback_metrics["val_acc"]),
        "val_acc_by_hand": float(counts) / 32,
    }


@pytest.mark.slow
def test_d2_d3_ddp_trains_without_unused_parameters_and_equally_on_both_ranks() -> None:
    # PL#6087, PL#17212, PL#18457: a frozen teacher broke DDP with its default `find_unused_parameters=False`.
    ranks = run_ranks(train_on_ranks)
    assert "adapters.feature_mse.weight" in ranks[0]["after"]
    parameters = {name for name in ranks[0]["after"] if "running" not in name and "num_batches" not in name}
    for name in parameters:
        assert torch.equal(ranks[0]["after"][name], ranks[1]["after"][name]), name
    assert not torch.equal(ranks[0]["after"]["student.head.weight"], ranks[0]["before"]["student.head.weight"])
    assert_same_bits(ranks[0]["teacher_before"], ranks[0]["teacher_after"])
    assert ranks[0]["val_acc"] == ranks[1]["val_acc"] == pytest.approx(ranks[0]["val_acc_by_hand"])


def test_d3_the_teacher_is_frozen_in_the_constructor() -> None:
    # PL#17212: `requires_grad_(False)` has to come before DDP wraps.
    module = soft_only()
    assert not any(parameter.requires_grad for parameter in module.teacher.parameters())
    module.teacher = ConvNet(6)
    assert not any(parameter.requires_grad for parameter in module.teacher.parameters())


def test_d4_teacher_statistics_do_not_drift_even_after_train(tmp_path: Path) -> None:
    # PL#18930, PL#2551: a frozen part was put back to train mode after validation.
    class Trains(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            module.train()
            module.teacher.train()

    module = with_features()
    before = bits(module.teacher)
    trainer(max_epochs=2, callbacks=[Trains()]).fit(module, loader(), loader())
    assert_same_bits(before, bits(module.teacher))


@pytest.mark.parametrize("weights_only", [False, True])
def test_d6_the_teacher_is_in_no_checkpoint(tmp_path: Path, weights_only: bool) -> None:
    # PL#19514, PL#21053, PL#19281: a frozen module was saved in each checkpoint.
    alone = sum(tensor.nbytes for tensor in ConvNet().state_dict().values())
    module = soft_only(teacher=nn.Sequential(ConvNet(2000)))
    path = fit_and_save(module, tmp_path, save_weights_only=weights_only)
    saved = torch.load(path, weights_only=True)
    assert list(saved["state_dict"]) == [f"student.{name}" for name in ConvNet().state_dict()]
    assert path.stat().st_size < alone + 20_000 < 2000 * 4 * 9
    assert not any("teacher" in key and value for key, value in saved.get("hyper_parameters", {}).items())


class Careless(DistillationModule):
    """Saves everything it was given, as many do."""

    def __init__(self, student: nn.Module, teacher: nn.Module, width: int = 3) -> None:
        super().__init__(student, teacher)
        self.save_hyperparameters()


def test_d6_save_hyperparameters_stores_no_module(tmp_path: Path) -> None:
    # PL#19906: modules among the hyperparameters.
    path = fit_and_save(Careless(ConvNet(), ConvNet(8), width=5), tmp_path)
    assert torch.load(path, weights_only=True)["hyper_parameters"]["width"] == 5
    loaded = Careless.load_from_checkpoint(path, student=ConvNet(), teacher=None)
    assert loaded.hparams.width == 5 and set(loaded.hparams).isdisjoint({"student", "teacher"})


def test_d7_everything_but_fit_works_without_the_teacher(tmp_path: Path) -> None:
    # PL#13246, PL#19404: only teacher keys may be missing.
    module = with_features(task_weight=0.6)
    path = fit_and_save(module, tmp_path)
    loaded = DistillationModule.load_from_checkpoint(path, student=ConvNet())
    assert_same_bits(bits(module), bits(loaded))  # adapters included, though no teacher told their shapes
    assert loaded.task_weight == 0.6
    fresh = DistillationModule(ConvNet())
    for run in ("validate", "test", "predict"):
        getattr(trainer(), run)(fresh, loader(), ckpt_path=path)
        assert_same_bits(bits(module), bits(fresh))
    with pytest.raises(CompressionError, match="`teacher` must be given before `fit`"):
        trainer().fit(fresh, loader(), ckpt_path=path)
    loaded.teacher = module.teacher
    trainer().fit(loaded, loader())


def test_d7_d8_a_missing_student_key_still_fails(tmp_path: Path) -> None:
    # PL#19404, lightly-train PRs 80, 108, 434.
    path = fit_and_save(with_features(), tmp_path)
    saved = torch.load(path, weights_only=True)
    for key in ("student.head.weight", "adapters.feature_mse.weight"):
        torch.save({**saved, "state_dict": {k: v for k, v in saved["state_dict"].items() if k != key}}, path)
        with pytest.raises(RuntimeError, match=key):
            trainer().fit(with_features(), loader(), ckpt_path=path)


def test_d9_the_summary_counts_the_student_alone() -> None:
    # PL#19393: leave the teacher out of the printed parameters.
    module = soft_only(teacher=ConvNet(500))
    summary = ModelSummary()._summary(trainer(), module)
    own = sum(parameter.numel() for parameter in ConvNet().parameters())
    assert summary.trainable_parameters == summary.total_parameters == own


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_d10_the_teacher_is_where_the_student_is_while_it_teaches_and_home_afterwards(precision: Any) -> None:
    # mmdetection PR 10078, optimum-intel PR 182: an unregistered teacher stayed behind.
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            seen.append((module.teacher.head.weight.dtype, module.student.head.weight.dtype))

    module = soft_only()
    trainer(precision=precision, callbacks=[Look()]).fit(module, loader())
    assert seen and all(teacher == student != torch.float32 for teacher, student in seen)
    assert module.teacher.head.weight.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_d10_the_teacher_goes_to_the_gpu_and_back() -> None:
    module = with_features()
    before = bits(module.teacher)
    trainer(accelerator="gpu", devices=1).fit(module, loader())
    assert module.teacher.head.weight.device.type == "cpu"
    assert_same_bits(before, bits(module.teacher))


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "DDPStrategy"])
def test_d12_strategies_that_break_the_module_up_are_refused(name: str) -> None:
    # PT#104690, PT#91167: sharding wants uniform `requires_grad`; spawned processes lose structure.
    strategy = type(name, (), {"_start_method": "spawn"})()
    with pytest.raises(CompressionError, match=rf"must be one that keeps whole parameters.*{name}.*strategy='ddp'"):
        refuse_strategy(SimpleNamespace(strategy=strategy), "DistillationModule")  # type: ignore[arg-type]


def test_d12_spawned_processes_are_refused_before_anything_changes() -> None:
    module = soft_only()
    fit = trainer()
    fit.strategy.__class__ = type("DDPStrategy", (type(fit.strategy),), {"_start_method": "spawn"})
    before = bits(module)
    with pytest.raises(CompressionError, match="returns weights from its processes without structure"):
        fit.fit(module, loader())
    assert_same_bits(before, bits(module))


def test_d13_a_teacher_with_its_own_preprocessing_and_a_dict_of_outputs() -> None:
    # super-gradients PR 145, nni PR 1819.
    module = soft_only(teacher=Wrapped(ConvNet(8)), losses=[SoftTarget(), FeatureMSE("features.0", "net.features.0")])
    fit = trainer()
    fit.fit(module, loader())
    assert {"train_soft_target", "train_feature_mse"} < set(fit.callback_metrics)

    class Tuple(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = ConvNet(8)

        def forward(self, x: Any) -> Any:
            return None, self.net(x)

    trainer().fit(soft_only(teacher=Tuple()), loader())


@pytest.mark.parametrize(("shape", "dim"), [((6, 5), -1), ((3, 4, 5), -1), ((3, 5, 2, 4), 1)])
def test_d14_kl_is_summed_over_classes_averaged_over_positions_and_scaled(shape: Any, dim: int) -> None:
    # sparseml PR 592, LD#74, Teacher-free-KD#5, knowledge-distillation-pytorch#48, deit#116.
    student, teacher = torch.randn(shape), torch.randn(shape)
    rows = [x.movedim(dim, -1).reshape(-1, 5).double() for x in (student, teacher)]
    total = 0.0
    for s, t in zip(*rows, strict=True):
        p = [math.exp(v / 3) for v in t.tolist()]
        q = [math.exp(v / 3) for v in s.tolist()]
        total += sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    assert soft_target(student, teacher, 3.0, dim).item() == pytest.approx(9 * total / len(rows[0]), rel=1e-5)


def test_d14_the_gradient_scale_does_not_depend_on_a_high_temperature() -> None:
    student, teacher = torch.randn(8, 10, dtype=torch.float64), torch.randn(8, 10, dtype=torch.float64)
    norms = []
    for temperature in (50.0, 500.0):
        leaf = student.clone().requires_grad_()
        soft_target(leaf, teacher, temperature).backward()
        norms.append(leaf.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.02) and norms[0] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("loss", [SoftTarget(temperature=0.05), HardTarget()])
def test_d15_finite_loss_and_gradients_at_ten_thousand(dtype: torch.dtype, loss: Any) -> None:
    # Soup#719, brevitas PR 1388: finite loss, NaN gradients.
    for student, teacher in [(1e4, -1e4), (-1e4, 1e4)]:
        leaf = torch.tensor([[student, teacher, 0.0]], dtype=dtype, requires_grad=True)
        value = loss(leaf, torch.tensor([[teacher, student, 0.0]], dtype=dtype))
        value.backward()
        assert value.isfinite() and leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.any()


def test_the_student_alone_reaches_the_same_weights_with_a_teacher_that_weighs_nothing() -> None:
    # labml#66: a refactoring made the teacher teach itself; with weight 0 nothing may leak, with weight it must.
    ends = []
    for weight in (0.0, 0.5):
        module = soft_only(losses=[SoftTarget(weight=weight)], task_weight=1.0)
        alone = copy.deepcopy(module.student)
        trainer().fit(module, loader())
        ends.append(bits(module.student))
    optimizer = torch.optim.AdamW(alone.parameters())
    for x, y in DataLoader(dataset(), batch_size=8):
        optimizer.zero_grad()
        nn.functional.cross_entropy(alone(x), y).backward()
        optimizer.step()
    assert_same_bits(bits(alone), ends[0])
    assert not torch.equal(ends[0]["head.weight"], ends[1]["head.weight"])
