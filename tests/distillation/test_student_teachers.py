"""Teachers that are made of the student in a fit: a snapshot and an average, against loops by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn

from lightning_compress import FeatureMSE, QuantizationAwareTraining, ScheduledPruning, SoftTarget, Window
from lightning_compress.cli import main
from lightning_compress.distillation import Distillation, DistillationModule, EMATeacher, Snapshot
from lightning_compress.errors import CompressionError
from lightning_compress.modules.routing import routed_modules
from tests.distillation.nets import ConvNet, assert_same_bits, bits, loader, trainer
from tests.distillation.own import Own, assert_close, kd
from tests.quantization.prepared import int8_layers
from tests.support.oracles import hooks

pytestmark = pytest.mark.filterwarnings(
    # The module can validate; these runs have nothing to validate on.
    "ignore:You defined a `validation_step` but have no:UserWarning",
    "ignore:The dirpath has changed",
    "ignore:Be aware that when using `ckpt_path`",
    # Of every module that overrides `configure_model`; ours may be called again.
    "ignore:You're using the WeightAveraging callback with a model that overrides:UserWarning",
)
WAYS = pytest.mark.parametrize("way", ["module", "callback"])


class Inner(Own):
    """Calls its network; its own forward is something else."""

    def forward(self, x: Tensor) -> Any:
        return self.net(x).softmax(-1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])


def build(way: str, teacher: nn.Module, **kwargs: Any) -> tuple[Any, list[Callback]]:
    arguments = {"losses": [SoftTarget()], "task_weight": 0.5, **kwargs}
    if way == "module":
        torch.manual_seed(5)
        sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)  # noqa: E731
        return DistillationModule(ConvNet(), teacher, optimizer=sgd, **arguments), []
    return (Inner() if way == "inner" else Own()), [Distillation(teacher, **arguments)]


def by_hand(decay: float | None, accumulate: int = 1, epochs: int = 2) -> tuple[nn.Module, nn.Module]:
    """Student and teacher after a loop; ``decay`` None leaves the teacher as it began."""
    student = Own().net
    teacher = copy.deepcopy(student).eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for index, (x, y) in enumerate(loader(32)):
            logits = student(x)
            loss = 0.5 * F.cross_entropy(logits, y) + 0.75 * kd(logits, teacher(x).detach())
            (loss / accumulate).backward()
            if (index + 1) % accumulate:
                continue
            optimizer.step()
            optimizer.zero_grad()
            if decay is not None:
                for value, average in zip(student.parameters(), teacher.parameters(), strict=True):
                    average.data = decay * average.data + (1 - decay) * value.data
                for value, average in zip(student.buffers(), teacher.buffers(), strict=True):
                    average.copy_(value)
    return student, teacher


@pytest.mark.parametrize("way", ["module", "callback", "inner"])
@pytest.mark.parametrize(("decay", "accumulate"), [(None, 1), (0.9, 1), (0.9, 2), (0.0, 1)])
def test_what_is_learnt_equals_a_loop_by_hand(way: str, decay: float | None, accumulate: int) -> None:
    teacher = Snapshot() if decay is None else EMATeacher(decay)
    module, callbacks = build(way, teacher)
    trainer(max_epochs=2, accumulate_grad_batches=accumulate, callbacks=callbacks).fit(module, loader(32))
    student, expected = by_hand(decay, accumulate)
    assert_close(bits(module.student if way == "module" else module.net), bits(student))
    held = teacher.model if way == "module" else teacher.model.net
    assert_close(bits(held), bits(expected))
    assert hooks(held) == [] and not any(child.training for child in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@WAYS
def test_a_snapshot_is_what_the_student_was_before_it_was_pruned_and_quantized(way: str) -> None:
    teacher = Snapshot()
    name = "features.0" if way == "module" else "net.features.0"
    module, callbacks = build(way, teacher, losses=[SoftTarget(), FeatureMSE(name, name)])
    before = bits(module.student if way == "module" else module)
    company = [ScheduledPruning(sparsity=0.8), QuantizationAwareTraining(window=Window(0.5))]
    fit = trainer(max_epochs=4, callbacks=[*company, *callbacks])
    fit.fit(module, loader(), loader())
    assert_same_bits(before, bits(teacher.model))
    assert {"val_agreement", "val_kl", "train_feature_mse"} < set(fit.callback_metrics)
    fit.test(module, loader(), verbose=False)


@pytest.mark.parametrize("kind", ["snapshot", "given"])
@pytest.mark.parametrize("first", [True, False], ids=["distillation first", "quantization first"])
def test_a_second_fit_of_a_student_that_is_int8_by_now(kind: str, first: bool) -> None:
    teacher = Snapshot() if kind == "snapshot" else Own(ConvNet(8))
    module, callbacks = build(
        "callback", teacher, losses=[SoftTarget(), FeatureMSE("net.features.0", "net.features.0")]
    )
    for _ in range(2):
        company = [*callbacks, QuantizationAwareTraining()]
        trainer(callbacks=company if first else company[::-1]).fit(module, loader())
        assert "net.head" in int8_layers(module)
    assert hooks(teacher) == [] and not routed_modules(teacher)


@WAYS
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_an_average_follows_a_student_that_is_pruned_and_prepared(way: str, decay: float) -> None:
    teacher = EMATeacher(decay)
    module, callbacks = build(way, teacher)
    company = [ScheduledPruning(sparsity=0.8, window=Window(0.0, 0.5)), QuantizationAwareTraining(convert=False)]
    trainer(max_epochs=4, callbacks=[*callbacks, *company]).fit(module, loader())
    student = module.student if way == "module" else module
    weights, held = dict(student.named_parameters()), dict(teacher.model.named_parameters())
    name = "head.weight" if way == "module" else "net.head.weight"
    if decay:
        assert not torch.equal(weights[name], held[name])
        torch.testing.assert_close(weights[name], held[name], atol=0.5, rtol=0.5)
    else:
        assert all(torch.equal(weights[name], value) for name, value in held.items())


@WAYS
def test_a_second_fit_takes_a_new_copy(way: str) -> None:
    teacher = Snapshot()
    module, callbacks = build(way, teacher)
    trainer(callbacks=callbacks).fit(module, loader())
    student = bits(module.student if way == "module" else module)
    trainer(callbacks=callbacks).fit(module, loader())
    assert_same_bits(student, bits(teacher.model))
    assert not torch.equal(student[next(iter(student))], bits(module)[next(iter(bits(module)))])


@WAYS
@pytest.mark.parametrize("kind", ["snapshot", "average"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_resumed_twice_equals_uninterrupted(way: str, kind: str, precision: Any, tmp_path: Path) -> None:
    def run(folder: Path, ckpt_path: Path | None = None, epochs: int = 4) -> tuple[Any, nn.Module]:
        teacher = Snapshot() if kind == "snapshot" else EMATeacher(0.9)
        module, callbacks = build(way, teacher)
        save = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        options = {"max_epochs": epochs, "enable_checkpointing": True, "precision": precision}
        trainer(callbacks=[*callbacks, save], **options).fit(module, loader(), ckpt_path=ckpt_path)
        return module, teacher

    whole, first = run(tmp_path / "whole")
    run(tmp_path / "one", tmp_path / "whole" / "epoch=0.ckpt", epochs=2)
    resumed, second = run(tmp_path / "two", tmp_path / "one" / "epoch=1.ckpt")
    assert_same_bits(bits(whole), bits(resumed))
    assert_same_bits(bits(first), bits(second))


@WAYS
def test_resumed_from_another_student_warns_that_the_snapshot_is_another(way: str, tmp_path: Path) -> None:
    module, callbacks = build(way, Snapshot())
    save = ModelCheckpoint(tmp_path, filename="last")
    trainer(callbacks=[*callbacks, save], enable_checkpointing=True).fit(module, loader())
    module, callbacks = build(way, Snapshot())
    with torch.no_grad():
        next(iter(module.parameters())).add_(0.1)
    with pytest.warns(UserWarning, match="isn't the one that this checkpoint was trained with"):
        trainer(callbacks=callbacks, max_epochs=2).fit(module, loader(), ckpt_path=tmp_path / "last.ckpt")


@WAYS
@pytest.mark.parametrize("weights_only", [False, True])
def test_neither_is_among_the_models_weights(way: str, weights_only: bool, tmp_path: Path) -> None:
    for teacher in (Snapshot(), EMATeacher(0.9)):
        module, callbacks = build(way, teacher)
        folder = tmp_path / type(teacher).__name__
        save, average = (
            ModelCheckpoint(folder, filename="last", save_weights_only=weights_only),
            EMAWeightAveraging(decay=0.5),
        )
        trainer(callbacks=[*callbacks, save, average], enable_checkpointing=True).fit(module, loader())
        saved = torch.load(folder / "last.ckpt", weights_only=True)
        assert saved["state_dict"].keys() == build(way, Snapshot())[0].state_dict().keys()
        states = [state for key, state in saved.get("callbacks", {}).items() if "clock" in state]
        assert len(states) == (not weights_only)
        assert all(("average" in state) == isinstance(teacher, EMATeacher) for state in states)


@WAYS
@pytest.mark.parametrize("how", ["dtype", "precision"])
def test_a_slow_average_keeps_its_precision_in_16_bits(way: str, how: str) -> None:
    teacher, seen = EMATeacher(0.999), []

    class Follows(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            seen.append((module.student if way == "module" else module.net).head.weight.detach().float().clone())

    options = {"teacher_dtype": "bfloat16"} if how == "dtype" else {}
    module, callbacks = build(way, teacher, **options)
    expected = (module.student if way == "module" else module.net).head.weight.detach().clone()
    first = expected = expected.bfloat16().float()
    precision: Any = "bf16-true" if how == "precision" else "32-true"
    trainer(max_epochs=10, precision=precision, callbacks=[*callbacks, Follows()]).fit(module, loader())
    for weight in seen:
        expected = 0.999 * expected + 0.001 * weight
    held = teacher.average()["head.weight" if way == "module" else "net.head.weight"].float()
    torch.testing.assert_close(held, expected, rtol=1e-4, atol=1e-6)
    assert (expected - first).abs().max() > 1e-4


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan"), True, "0.9"])
def test_a_decay_out_of_range_is_refused(decay: Any) -> None:
    with pytest.raises(CompressionError, match=r"`decay` must lie in \[0, 1\)"):
        EMATeacher(decay)


def test_a_file_for_a_teacher_that_is_made_is_refused() -> None:
    for kind in (Snapshot, EMATeacher):
        with pytest.raises(CompressionError, match="`teacher_checkpoint` must be left out"):
            Distillation(kind(), teacher_checkpoint="teacher.ckpt")
        with pytest.raises(CompressionError, match="have been taken from a student"):
            kind()(torch.zeros(1))


def test_a_snapshot_of_a_student_that_is_averaged_and_tied() -> None:
    class Tied(ConvNet):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)
            self.twin = self.head

    teacher = EMATeacher(0.5)
    trainer(callbacks=[Distillation(teacher)]).fit(Own(Tied()), loader())
    assert teacher.model.net.head is teacher.model.net.twin


CONFIG = {
    "model": {"class_path": "tests.support.modules.Classifier"},
    "data": {"class_path": "tests.support.data.TinyData"},
    "trainer": {
        "max_epochs": 1,
        "accelerator": "cpu",
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    },
}
TEACHERS = [
    {"class_path": "lightning_compress.Snapshot"},
    {"class_path": "lightning_compress.EMATeacher", "init_args": {"decay": 0.9}},
]


@pytest.mark.parametrize("teacher", TEACHERS, ids=["snapshot", "average"])
def test_from_yaml(teacher: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    callback = {
        "class_path": "lightning_compress.Distillation",
        "init_args": {"teacher": teacher, "losses": [{"class_path": "lightning_compress.SoftTarget"}]},
    }
    pruning = {"class_path": "lightning_compress.ScheduledPruning", "init_args": {"sparsity": 0.5}}
    config = {**CONFIG, "trainer": {**CONFIG["trainer"], "callbacks": [callback, pruning]}}
    (tmp_path / "callback.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "callback.yaml")])
    model = {
        "class_path": "lightning_compress.DistillationModule",
        "init_args": {
            "student": {"class_path": "torch.nn.Linear", "init_args": {"in_features": 16, "out_features": 4}},
            "teacher": teacher,
        },
    }
    (tmp_path / "module.yaml").write_text(yaml.safe_dump({**CONFIG, "model": model}))
    main(["fit", "--config", str(tmp_path / "module.yaml")])
