"""The teacher: frozen, untouched, and its weights found by one rule."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_compress import Distillation, Snapshot
from lightning_compress.distillation import DistillationModule, Taps, load_weights_
from lightning_compress.distillation.teacher import Teacher
from lightning_compress.errors import CompressionError
from tests.distillation.nets import ConvNet, assert_same_bits, bits, loader, trainer


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
    teacher.return_home()
    assert_same_bits(before, bits(net))
    assert list(map(id, net.parameters())) == parameters
    teacher.return_home()  # safe to repeat


def test_a_deep_copy_shares_the_teacher_and_a_pickle_holds_it() -> None:
    teacher = box(ConvNet())
    assert copy.deepcopy({"teacher": teacher})["teacher"] is teacher
    teacher.place(ConvNet().bfloat16())
    again = pickle.loads(pickle.dumps(teacher))
    again.return_home()
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
    teacher.seal()
    assert teacher.moved() == []
    change(net)
    assert teacher.moved() == [name]


@pytest.mark.parametrize("prefix", ["", "model.", "student._orig_mod.", "a.b.net."])
@pytest.mark.parametrize("lightning", [True, False])
def test_weights_are_found_under_one_prefix(tmp_path: Path, prefix: str, lightning: bool) -> None:
    source, target = ConvNet(), ConvNet()
    weights: dict[str, Any] = {prefix + name: value for name, value in source.state_dict().items()}
    weights["other.weight"] = torch.zeros(3)
    path = str(tmp_path / "teacher.ckpt")
    torch.save({"state_dict": weights, "epoch": 3} if lightning else weights, path)
    load_weights_(target, path)
    assert_same_bits(bits(source), bits(target))


def test_a_compiled_teacher_loads_plain_weights(tmp_path: Path) -> None:
    source, target = ConvNet(), torch.compile(ConvNet(), backend="eager")
    torch.save(source.state_dict(), tmp_path / "t.pt")
    load_weights_(target, str(tmp_path / "t.pt"))
    assert torch.equal(source.head.weight, target.head.weight)


def prefixed(*prefixes: str) -> dict[str, Tensor]:
    state = ConvNet().state_dict()
    return {prefix + name: value for prefix in prefixes for name, value in state.items()}


def test_the_empty_prefix_wins(tmp_path: Path) -> None:
    source, target = ConvNet(), ConvNet()
    torch.save({**prefixed("ema."), **source.state_dict()}, tmp_path / "t.pt")
    load_weights_(target, str(tmp_path / "t.pt"))
    assert_same_bits(bits(source), bits(target))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "`teacher_checkpoint` must be an existing file"),
        (b"not a checkpoint", "must be readable as a checkpoint"),
        (torch.zeros(3), "must hold a state dict"),
        ({k: v for k, v in prefixed("net.").items() if "bias" not in k}, r"Missing: net\.features\.0\.bias"),
        ({"unrelated": torch.zeros(1)}, "Missing: features.0.weight.* and 4 more"),
        (prefixed("student.", "teacher."), "All of these fit: student., teacher."),
        (ConvNet(8).state_dict(), r"teacher's shape \(4, 1, 3, 3\).*The file has shape \(8, 1, 3, 3\)"),
    ],
)
def test_bad_files_are_refused_and_change_nothing(tmp_path: Path, content: Any, message: str) -> None:
    path, net = tmp_path / "t.ckpt", ConvNet()
    before = bits(net)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CompressionError, match=message):
        load_weights_(net, str(path))
    assert_same_bits(before, bits(net))


@pytest.mark.parametrize(
    ("wrap", "keys"),
    [
        (lambda state: {"model": state, "epoch": 3}, r"\['model'\]"),
        (lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {}}}, r"\['model_state_dict'\]"),
        (lambda state: {"state": {"teacher": {f"net.{key}": value for key, value in state.items()}}},
         r"\['state'\]\['teacher'\]"),
        (lambda state: {"model": state, "model_ema": state}, r"\['model'\], \['model_ema'\]"),
        (lambda state: {"state_dict": {}, "net": state}, r"\['net'\]"),
    ],
)  # fmt: skip
def test_weights_under_another_key_are_named_by_it(tmp_path: Path, wrap: Any, keys: str) -> None:
    source, target = ConvNet(), ConvNet()
    torch.save(wrap(source.state_dict()), tmp_path / "teacher.pt")
    before = bits(target)
    with pytest.raises(CompressionError, match=rf"`teacher_checkpoint` must hold.*They stand under {keys}\. Save them"):
        load_weights_(target, str(tmp_path / "teacher.pt"))
    assert_same_bits(before, bits(target))


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
