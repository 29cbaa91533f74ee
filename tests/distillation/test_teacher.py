"""The teacher: frozen, untouched, and what it may be told to be: its dtype, its inputs, its file."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_compress import FeatureMSE, Snapshot, SoftTarget
from lightning_compress.distillation import Distillation, DistillationModule, Taps
from lightning_compress.distillation.teacher import Teacher
from lightning_compress.errors import CompressionError
from tests.distillation.nets import ConvNet, assert_same_bits, bits, loader, trainer
from tests.distillation.own import WAYS, Own, assert_close, build, by_hand, large
from tests.support.oracles import hooks

pytestmark = pytest.mark.filterwarnings(
    # The module can validate; these runs have nothing to validate on.
    "ignore:You defined a `validation_step` but have no:UserWarning",
    "ignore:The dirpath has changed",
    "ignore:Be aware that when using `ckpt_path`",
)


def box(module: nn.Module) -> Teacher:
    return Teacher(module, Taps([]))


def test_the_teacher_answers_in_evaluation_mode_without_a_graph_even_after_train() -> None:
    net = ConvNet(dropout=0.9)
    teacher, x, before = box(net), torch.randn(4, 1, 8, 8), bits(net)
    teacher.freeze_()
    expected = net(x)
    net.train()
    answer = teacher(x, like=ConvNet())
    assert torch.equal(answer, expected) and not answer.requires_grad and not answer.is_inference()
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert_same_bits(before, bits(net))


def test_the_teacher_follows_the_students_dtype_and_returns_bit_identical() -> None:
    net = ConvNet()
    net.features[0].weight.data += 1e-5  # not representable in bfloat16
    before, parameters = bits(net), list(map(id, net.parameters()))
    teacher = box(net)
    with torch.inference_mode():  # as in `trainer.test`
        teacher(torch.ones(1, 1, 8, 8).bfloat16(), like=ConvNet().bfloat16())
    assert net.features[0].weight.dtype == torch.bfloat16
    assert not net.features[0].weight.is_inference() and not net.features[1].running_mean.is_inference()
    teacher.restore_tensors()
    assert_same_bits(before, bits(net))
    assert list(map(id, net.parameters())) == parameters
    teacher.restore_tensors()  # safe to repeat


def test_a_deep_copy_shares_the_teacher_and_a_pickle_holds_it() -> None:
    teacher = box(ConvNet())
    assert copy.deepcopy({"teacher": teacher})["teacher"] is teacher
    teacher.place(ConvNet().bfloat16())
    again = pickle.loads(pickle.dumps(teacher))
    again.restore_tensors()
    assert_same_bits(bits(teacher.require()), bits(again.require()))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda net: net.features[1].running_mean.add_(1e-7), "features.1.running_mean"),
        (lambda net: net.head.bias.data.neg_(), "head.bias"),
        (lambda net: net.features[1].num_batches_tracked.add_(1), "features.1.num_batches_tracked"),
    ],
)
def test_the_layer_that_moved_is_named(change: Any, name: str) -> None:
    net = ConvNet()
    teacher = box(net)
    teacher.take_fingerprint()
    assert teacher.changed() == []
    change(net)
    assert teacher.changed() == [name]


class Steps(L.LightningModule):
    """It has steps, and no `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.flatten = ConvNet(), nn.Flatten()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize(
    ("teacher", "remedy"),
    [
        (Steps, r"Received: teacher='Steps'\. Pass the one of its children.*: `net` \(ConvNet\); or give it"),
        (lambda: nn.ModuleDict({"net": ConvNet()}), r"Received: teacher='ModuleDict'.*`net` \(ConvNet\)"),
        (lambda: nn.ModuleList([nn.ModuleList([nn.Linear(1, 1)])]), r".*'ModuleList'\. Give it a `forward`"),
    ],
    ids=["lightning module", "dict", "nothing to name"],
)
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")
@pytest.mark.parametrize("way", ["callback", "module"])
def test_a_teacher_without_forward_names_the_child_that_could_serve(way: str, teacher: Any, remedy: str) -> None:
    student = Steps() if way == "callback" else DistillationModule(ConvNet(), teacher(), task_weight=0)
    before = bits(student)
    callbacks = [Distillation(teacher())] if way == "callback" else []
    with pytest.raises(CompressionError, match=rf"`teacher` must have a `forward`\. {remedy}"):
        trainer(callbacks=callbacks).fit(student, loader())
    assert_same_bits(before, bits(student))


@pytest.mark.parametrize("teacher", [ConvNet, "resnet"])
@pytest.mark.parametrize("make", [Distillation, lambda teacher: DistillationModule(ConvNet(), teacher)])
def test_a_class_or_a_name_in_the_place_of_a_teacher_says_what_to_write(make: Any, teacher: Any) -> None:
    with pytest.raises(CompressionError, match=r"`teacher` must be a module\. .* Make one: teacher=\w+\(\.\.\.\)\."):
        make(teacher)


def test_a_snapshot_of_a_student_without_forward_serves() -> None:
    fit = trainer(callbacks=[Distillation(Snapshot())])
    fit.fit(Steps(), loader())
    assert "train_soft_target" in fit.callback_metrics


def learnt(way: str, **kwargs: Any) -> dict[str, Tensor]:
    module, callbacks = build(way, **kwargs)
    trainer(callbacks=callbacks).fit(module, loader())
    return bits(module.student if way == "module" else module.net)


def expected(teacher: nn.Module, ask: Any) -> dict[str, Tensor]:
    def step(module: Any, batch: Any, index: int) -> Any:
        logits = module.net(batch[0])
        return F.cross_entropy(logits, batch[1]), logits, ask(teacher, batch[0]).float()

    return {name.removeprefix("net."): value for name, value in by_hand(Own(), teacher, step).items()}


@WAYS
def test_a_teacher_in_bfloat16(way: str) -> None:
    teacher = large()
    before = bits(teacher)
    weights = learnt(way, teacher=teacher, teacher_dtype="bfloat16")
    assert_same_bits(before, bits(teacher))
    assert_close(weights, expected(large().bfloat16(), lambda net, x: net(x.bfloat16())))
    exact = expected(large(), lambda net, x: net(x))
    assert not torch.equal(weights["head.weight"], exact["head.weight"])


class Normalize(nn.Module):
    """Another normalisation, with numbers that 16 bits can't hold, and weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(0.4855))
        self.mix = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(F.avg_pool2d((x - self.mean) / 0.2291, 2))


def normalize() -> Normalize:
    torch.manual_seed(9)
    return Normalize()


@WAYS
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_adapter_of_the_teachers_inputs(way: str, dtype: Any) -> None:
    adapter, after = normalize(), normalize()
    before = bits(adapter)
    weights = learnt(way, teacher_adapter=adapter, teacher_dtype=dtype)
    assert_same_bits(before, bits(adapter))
    assert not any(parameter.requires_grad for parameter in adapter.parameters())
    if dtype is None:
        reference = expected(large(), lambda net, x: net(after(x)))
    else:
        reference = expected(large().bfloat16(), lambda net, x: net(after(x).bfloat16()))
    assert_close(weights, reference)


class Split(nn.Module):
    """Gives keyword arguments."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": x, "shift": x.mean()}


class Shifted(ConvNet):
    def forward(self, x: Tensor, *, shift: Tensor) -> Tensor:
        return super().forward(x + shift)


@WAYS
def test_an_adapter_may_give_other_arguments(way: str) -> None:
    torch.manual_seed(1)
    teacher = Shifted(8)
    weights = learnt(way, teacher=teacher, teacher_adapter=Split())
    assert_close(weights, expected(teacher, lambda net, x: net(x, shift=x.mean())))


@pytest.mark.slow
# torch's own compiler imports what torch has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@WAYS
def test_a_compiled_teacher_is_tapped_and_left_as_it_was(way: str) -> None:
    name = "features.0" if way == "module" else "net.features.0"
    ends = []
    for compiled in (False, True):
        teacher = large()
        losses = [SoftTarget(), FeatureMSE(name, "features.0")]
        module, callbacks = build(way, teacher, losses=losses, teacher_compile=compiled)
        for _ in range(2):
            trainer(callbacks=callbacks).fit(module, loader(), loader())
            assert hooks(teacher) == []
        assert list(teacher.state_dict()) == list(large().state_dict())
        ends.append(bits(module))
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)


# Its file, and what a checkpoint says of it.


@WAYS
def test_its_weights_come_from_a_file_once(way: str, tmp_path: Path) -> None:
    torch.save({"state_dict": {f"net.{name}": value for name, value in bits(large()).items()}}, tmp_path / "t.ckpt")
    teacher = ConvNet(8, dropout=0.5)
    module, callbacks = build(way, teacher, teacher_checkpoint=str(tmp_path / "t.ckpt"))
    trainer(callbacks=callbacks).fit(module, loader())
    assert_same_bits(bits(teacher), bits(large()))
    (tmp_path / "t.ckpt").unlink()
    trainer(callbacks=callbacks).fit(module, loader())


@WAYS
def test_the_checkpoint_refers_to_it_and_a_resume_with_another_warns(way: str, tmp_path: Path) -> None:
    module, callbacks = build(way)
    save = ModelCheckpoint(tmp_path, filename="last")
    trainer(callbacks=[*callbacks, save], enable_checkpointing=True).fit(module, loader())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    (state,) = (state for state in saved["callbacks"].values() if "clock" in state)
    reference = state["teacher"]
    assert reference["class"] == "tests.distillation.nets.ConvNet" and reference["checkpoint"] is None
    assert len(reference["fingerprint"]) == 32 and set(reference) == {"class", "checkpoint", "dtype", "fingerprint"}

    def resume(teacher: nn.Module, **kwargs: Any) -> None:
        module, callbacks = build(way, teacher, **kwargs)
        trainer(callbacks=callbacks, max_epochs=2).fit(module, loader(), ckpt_path=tmp_path / "last.ckpt")

    resume(large())
    other = large()
    with torch.no_grad():
        other.head.bias[0] += 1e-6
    with pytest.warns(UserWarning, match=r"isn't the one.*tests\.distillation\.nets\.ConvNet, file None"):
        resume(other)


@pytest.mark.parametrize("dtype", ["float64", "int8", torch.bfloat16, 16])
@WAYS
def test_other_dtypes_are_refused(way: str, dtype: Any) -> None:
    with pytest.raises(CompressionError, match="`teacher_dtype` must be float32, bfloat16, float16 or None"):
        build(way, teacher_dtype=dtype)


@WAYS
def test_a_teacher_that_moves_is_named_and_still_goes_home(way: str) -> None:
    class Moves(ConvNet):
        def forward(self, x: Tensor) -> Tensor:
            self.head.bias.data += 1e-6
            return super().forward(x)

    teacher = Moves(8)
    module, callbacks = build(way, teacher, losses=[SoftTarget(), FeatureMSE(pairs="auto")])
    with pytest.raises(CompressionError, match=r"The teacher must not change while it teaches. Changed: head\.bias\."):
        trainer(callbacks=callbacks).fit(module, loader())
    assert hooks(teacher) == hooks(module) == []
