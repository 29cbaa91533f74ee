"""The plan of a dry run: what is paired with what, by which adapter, and which parameters learn nothing."""

from __future__ import annotations

import logging
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from lightning_compress import AttentionTransfer, FeatureCosine, FeatureMSE, HardTarget, NoEffectWarning, SoftTarget
from lightning_compress.distillation import Distillation, DistillationModule
from lightning_compress.errors import CompressionError
from lightning_compress.modules.calls import take_examples
from tests.distillation.nets import ConvNet, assert_same_bits, bits, dataset, loader, trainer
from tests.distillation.own import Own, large
from tests.support.oracles import hooks, same_random_state

# The module can validate; these runs have nothing to validate on.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")
IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def module(student: nn.Module | None = None, teacher: nn.Module | None = None, *losses: Any, **kwargs: Any) -> Any:
    torch.manual_seed(3)
    return DistillationModule(student or ConvNet(), teacher or ConvNet(8, stride=2), list(losses) or None, **kwargs)


def said(caplog: pytest.LogCaptureFixture, callback: Distillation, own: Any) -> list[str]:
    """The plan as a fit prints it, line by line."""
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        trainer(callbacks=[callback], limit_train_batches=1).fit(own, loader())
    (text,) = (record.getMessage() for record in caplog.records if "the student learns from" in record.getMessage())
    return [line.strip() for line in text.splitlines()]


def test_the_plan_is_printed_with_shapes_adapters_and_their_parameters() -> None:
    losses = [
        SoftTarget(),
        FeatureMSE("features.0", "features.0"),
        FeatureCosine("head:input", "head:input", weight=1.0),
    ]
    plan = module(None, None, *losses, AttentionTransfer("features.0", "features.1")).prepare_(IMAGES)
    assert str(plan).splitlines() == [
        "soft_target: logits (2, 4)",
        "  feature_mse: features.0 (2, 4, 8, 8) with features.0 (2, 8, 4, 4) by Conv2d, 40 parameters",
        "  feature_cosine: head:input (2, 4) with head:input (2, 8) by Linear, 40 parameters",
        "  attention_transfer: features.0 (2, 4, 8, 8) with features.1 (2, 8, 4, 4)",
    ]


@pytest.mark.parametrize("way", ["module", "callback"])
def test_a_fit_prints_the_plan_once(way: str, caplog: pytest.LogCaptureFixture) -> None:
    if way == "callback":
        lines = said(caplog, Distillation(large(), [FeatureMSE("net.features.0", "features.0")]), Own())
        assert lines == [
            "Distillation: the student learns from ConvNet.",
            "feature_mse: net.features.0 (8, 4, 8, 8) with features.0 (8, 8, 8, 8) by Conv2d, 40 parameters",
        ]
        return
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        trainer().fit(module(None, None, FeatureMSE("features.0", "features.0")), loader())
    told = [record.getMessage() for record in caplog.records if "the student learns from" in record.getMessage()]
    assert len(told) == 1 and "by Conv2d, 40 parameters" in told[0]


class Unused(ConvNet):
    def __init__(self) -> None:
        super().__init__()
        self.spare, self.frozen = nn.Linear(3, 2), nn.Linear(3, 2).requires_grad_(False)


def test_parameters_that_no_loss_reaches_are_listed(caplog: pytest.LogCaptureFixture) -> None:
    plan = module(Unused()).prepare_(IMAGES)
    assert plan.without_gradient == ("spare.weight", "spare.bias")
    assert "no loss reaches 2 parameters of the student: `spare.weight`, `spare.bias`." in str(plan)
    lines = said(caplog, Distillation(large()), Own(Unused()))
    assert lines[-1].startswith("no loss reaches 2 parameters of the student: `net.spare.weight`, `net.spare.bias`.")


def test_features_alone_reach_no_head() -> None:
    loss = FeatureMSE("features.0", "features.0")
    plan = module(None, None, loss, task_weight=0.0).prepare_(IMAGES)
    assert plan.without_gradient == ("features.1.weight", "features.1.bias", "head.weight", "head.bias")
    assert module(None, None, loss).prepare_(IMAGES).without_gradient == ()
    assert module(None, None, HardTarget(), task_weight=0.0).prepare_(IMAGES).without_gradient == ()


class AsObject(ConvNet):
    def forward(self, x: Tensor) -> Any:
        return types.SimpleNamespace(logits=super().forward(x), hidden=None)


class AuxiliaryInTraining(ConvNet):
    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        hidden = self.features(x).mean((2, 3))
        return (self.head(hidden), self.aux(hidden)) if self.training else self.head(hidden)


class Recurrent(nn.Module):
    """Keeps its state from call to call, outside of its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.GRU(8, 6, batch_first=True), nn.Linear(6, 4)
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        hidden, state = self.body(x[:, 0], self.state)
        self.state = state.detach()
        return self.head(hidden[:, -1])


@pytest.mark.parametrize("student", [AsObject, AuxiliaryInTraining, Recurrent])
def test_no_false_alarm_and_no_trace(student: Any) -> None:
    taught = module(student())
    before, modes = bits(taught.student), [child.training for child in taught.student.modules()]
    assert taught.prepare_(IMAGES).without_gradient == ()
    assert_same_bits(before, bits(taught.student))
    assert modes == [child.training for child in taught.student.modules()]
    assert getattr(taught.student, "state", None) is None and hooks(taught.student) == []


def test_a_layer_that_is_called_in_training_only_can_be_tapped() -> None:
    class Both(DistillationModule):
        def compute_task_loss(self, outputs: Any, targets: Any) -> Tensor:
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            return sum(F.cross_entropy(logits, targets) for logits in outputs)

    torch.manual_seed(3)
    taught = Both(AuxiliaryInTraining(), ConvNet(8), [SoftTarget(), FeatureMSE("aux", "head")])
    fit = trainer()
    fit.fit(taught, loader(), loader())
    assert {"train_feature_mse", "val_kl"} < set(fit.callback_metrics)


class OwnHead(Own):
    """A head that only its training step calls."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(4, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss + F.cross_entropy(self.aux(batch[0].mean(2)[:, 0, :4]), batch[1])


def test_what_the_modules_own_loss_reaches_is_no_false_alarm(caplog: pytest.LogCaptureFixture) -> None:
    assert not any("no loss reaches" in line for line in said(caplog, Distillation(large()), OwnHead()))
    caplog.clear()
    lines = said(caplog, Distillation(large(), task_weight=0.0), OwnHead())
    assert lines[-1].startswith("no loss reaches 2 parameters of the student: `aux.weight`, `aux.bias`")


class Recomputed(ConvNet):
    def forward(self, x: Tensor) -> Tensor:
        maps = torch.utils.checkpoint.checkpoint(self.features, x.clone().requires_grad_(), use_reentrant=True)
        return self.head(maps.mean((2, 3)))


@pytest.mark.parametrize("way", ["module", "callback"])
@pytest.mark.parametrize("hidden", ["frozen", "recomputed"])
def test_a_loss_that_cannot_teach_the_student_is_told(way: str, hidden: str) -> None:
    student = Recomputed() if hidden == "recomputed" else ConvNet()
    student.features.requires_grad_(hidden != "frozen")
    losses = [SoftTarget(), FeatureMSE("features.0", "features.0")]
    with pytest.warns(NoEffectWarning, match="feature_mse can't teach the student"):
        if way == "module":
            trainer(limit_train_batches=1).fit(module(student, None, *losses), loader())
        else:
            callback = Distillation(large(), losses, student="net")
            trainer(limit_train_batches=1, callbacks=[callback]).fit(Own(student), loader())


# Pairs.


class Stages(nn.Sequential):
    """Three resolutions, two layers each."""

    def __init__(self, width: int) -> None:
        def stage(inputs: int, stride: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(inputs, width, 3, stride, 1), nn.ReLU(inplace=True))

        super().__init__(
            stage(1, 1), stage(width, 2), nn.Conv2d(width, width, 1), nn.Flatten(), nn.Linear(16 * width, 4)
        )


class Sequences(nn.Module):
    """Ids (B, L) to hidden states (B, L, width), of a length that no width has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(9, width), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(ids))[:, 0])


def pairs(plan: Any) -> list[tuple[str, str]]:
    return [(pair.student[0], pair.teacher[0]) for pair in plan.pairs]


def test_auto_pairs_the_deepest_layers_of_each_resolution() -> None:
    taught = module(Stages(3), Stages(5), FeatureMSE(pairs="auto", weight=0.6), SoftTarget())
    with same_random_state():
        plan = taught.prepare_(IMAGES)
    assert pairs(plan) == [("0", "0"), ("2", "2"), ("", "")]
    assert [pair.loss for pair in plan.pairs] == ["feature_mse", "feature_mse_2", "soft_target"]
    assert list(taught.adapters) == ["feature_mse", "feature_mse_2"]
    loss, terms, _ = taught.distill((IMAGES, torch.zeros(2, dtype=torch.long)))
    weights = taught.objective.weights()
    assert weights["feature_mse_2"] == pytest.approx(0.3)
    assert loss.item() == pytest.approx(sum(weights[name] * value.item() for name, value in terms.items()))


def test_auto_pairs_sequences_of_one_length() -> None:
    plan = module(Sequences(4), Sequences(6), FeatureMSE(pairs="auto")).prepare_(torch.ones(2, 7, dtype=torch.long))
    assert pairs(plan) == [("body", "body")]
    assert isinstance(plan.adapters["feature_mse"], nn.Linear)


@pytest.mark.parametrize("way", ["module", "callback"])
def test_auto_without_a_common_resolution_is_refused_with_everything_as_it_was(way: str) -> None:
    student, teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), Stages(5)
    before = bits(student), bits(teacher)
    callbacks, losses = [], [FeatureMSE(pairs="auto")]
    target: Any = Own(student)
    if way == "module":
        target = module(student, teacher, *losses)
    else:
        callbacks = [Distillation(teacher, losses)]
    with pytest.raises(CompressionError, match="`pairs` must find layers of equal resolution.*Name `student_layer`"):
        trainer(callbacks=callbacks).fit(target, loader())
    assert_same_bits(before[0], bits(student))
    assert_same_bits(before[1], bits(teacher))
    assert hooks(target) == hooks(teacher) == []


# Adapters.


def test_adapters_depend_on_the_seed_alone_and_are_the_same_for_module_and_callback() -> None:
    weights = []

    class Begins(Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if not trainer.global_step:
                weights.append(bits(callback.objective.adapters))

    losses = [SoftTarget(), FeatureMSE("features.0", "features.0"), FeatureCosine("head:input", "head:input")]
    for draws in (0, 3):
        torch.manual_seed(11)
        torch.rand(draws)
        callback = Distillation(ConvNet(8), losses, student="net")
        own = Own()
        torch.manual_seed(11)
        torch.rand(draws)
        trainer(callbacks=[callback, Begins()]).fit(own, loader())
    assert_same_bits(*weights)
    taught = module(ConvNet(), ConvNet(8), *losses)
    torch.manual_seed(11)
    taught.prepare_(IMAGES)
    assert_same_bits(weights[0], bits(taught.adapters))


def test_two_losses_share_the_tap_of_a_layer_and_the_export_has_none() -> None:
    losses = [FeatureMSE("features.0", "features.0"), FeatureCosine("features.0", "features.0")]
    taught = module(None, None, *losses)
    taught.prepare_(IMAGES)
    taught.distill((IMAGES, torch.zeros(2, dtype=torch.long)))
    assert len(hooks(taught.student)) == len(hooks(taught.teacher)) == 1
    student = taught.export_student()
    assert hooks(student) == [] and len(hooks(taught.student)) == 1
    assert type(student) is ConvNet and list(student.state_dict()) == list(ConvNet().state_dict())
    assert torch.equal(student.eval()(IMAGES), taught.student.eval()(IMAGES))
    taught.close()
    assert hooks(taught.student) == hooks(taught.teacher) == []


def test_a_teacher_set_by_hand_takes_the_taps_of_the_last_one_along() -> None:
    taught = module(None, None, FeatureMSE("features.0", "features.0"))
    taught.prepare_(IMAGES)
    taught.distill((IMAGES, torch.zeros(2, dtype=torch.long)))
    old, taught.teacher = taught.teacher, ConvNet(6)
    taught.close()
    assert hooks(taught.student) == hooks(old) == []


def test_a_resumed_fit_with_one_more_loss_trains_its_adapter_too(tmp_path: Any) -> None:
    first, second = FeatureMSE("net.features.0", "features.0"), FeatureMSE("net.features.1", "features.1")
    fit = trainer(callbacks=[Distillation(large(), [first])])
    fit.fit(Own(), loader())
    fit.save_checkpoint(tmp_path / "last.ckpt")
    callback = Distillation(large(), [first, second])
    fit = trainer(callbacks=[callback], max_epochs=2)
    fit.fit(Own(), loader(), ckpt_path=tmp_path / "last.ckpt")
    held = {id(parameter) for parameter in fit.optimizers[0].param_groups[0]["params"]}
    assert held >= {id(parameter) for parameter in callback.objective.adapters.parameters()}
    assert len(callback.objective.adapters) == 2


def test_a_student_without_logits_learns_features() -> None:
    class Boxes(ConvNet):
        def forward(self, x: Tensor) -> Any:
            return {"boxes": super().forward(x)}

    class Detects(DistillationModule):
        def compute_task_loss(self, outputs: Any, targets: Any) -> Tensor:
            return F.cross_entropy(outputs["boxes"], targets)

    fit = trainer()
    fit.fit(Detects(Boxes(), ConvNet(8), [FeatureMSE("features.0", "features.0")]), loader())
    assert "train_feature_mse" in fit.callback_metrics


def test_a_subclass_that_forgets_our_callback_is_told() -> None:
    class Forgets(DistillationModule):
        def configure_callbacks(self) -> list[Callback]:
            return []

    with pytest.raises(CompressionError, match=r"super\(\).configure_callbacks\(\)"):
        trainer().fit(Forgets(ConvNet(), ConvNet(8)), loader())


def test_a_loader_whose_sampler_gives_lists_lends_a_batch() -> None:
    data, sampler = dataset(), BatchSampler(SequentialSampler(range(8)), 4, drop_last=False)
    batch = take_examples(DataLoader(data, sampler=sampler, batch_size=None))
    assert batch is not None and [len(part) for part in batch] == [2, 2]
