"""`QuantizationAwareTraining`: what is trained, and what can not be traced as a whole."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_compress import (
    CompressionError,
    QuantizationAwareTraining,
    Targets,
    Window,
)
from lightning_compress.modules.routing import form_of
from lightning_compress.quantization.convert import form_name
from tests.quantization.prepared import At, fake_quantizers, int8_layers
from tests.support.data import TinyData, keyword_loader
from tests.support.modules import (
    Classifier,
    KeywordClassifier,
    ZooModule,
    float_leaves,
    quiet_trainer,
)
from tests.support.oracles import (
    assert_different_state,
    assert_same_state,
    differing,
    same_random_state,
    snapshot,
)
from tests.support.zoo import ZOO, Row, row


def observers(module: nn.Module) -> dict[str, Any]:
    """What the observers of activations have seen so far, without the switch that is off in evaluation."""
    seen = {path: snapshot(inner) for path, inner in fake_quantizers(module).items() if "weight_fake_quant" not in path}
    return {
        path: {key: value for key, value in state.items() if key != "observer_enabled"} for path, state in seen.items()
    }


@pytest.mark.parametrize("row", ZOO, ids=str)
def test_over_the_zoo_trains_converts_tests_and_trains_again(row: Row) -> None:
    module = ZooModule(row)
    order, identities = list(module.state_dict()), [id(parameter) for parameter in module.parameters()]
    before, seen = snapshot(module), {}

    def during(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        own = [name for name, _ in pl_module.named_parameters()]
        seen.update(quantizers=len(fake_quantizers(pl_module)), own=own, ids=[id(p) for p in pl_module.parameters()])

    qat = QuantizationAwareTraining()
    trainer = quiet_trainer(max_epochs=2, callbacks=[qat, At(on_train_epoch_end=during)])
    trainer.fit(module)
    assert seen["quantizers"] > 0
    # The same Parameters, in the same order and under the same names.
    assert seen["ids"] == identities
    assert seen["own"] == [name for name, _ in ZooModule(row).named_parameters()]
    assert int8_layers(module)
    loss = trainer.test(module, verbose=False)[0]["test_loss"]
    assert int8_layers(module)
    trainer = quiet_trainer(max_epochs=1, callbacks=[QuantizationAwareTraining(convert=False)])
    trainer.fit(module)
    assert not int8_layers(module)
    assert [id(parameter) for parameter in module.parameters()] == identities
    state = module.state_dict()
    assert list(state) == order
    assert_different_state(before, state)
    assert torch.tensor(loss).isfinite()


@pytest.mark.parametrize("row", ZOO, ids=str)
def test_over_the_zoo_int8_computes_what_the_fake_quantized_model_computed(row: Row) -> None:
    class Slow(ZooModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            # Ranges follow slowly, and fake-quantization clips to 7 bits where the kernels have 8.
            return torch.optim.SGD(self.parameters(), lr=1e-5)

    module = Slow(row)
    quiet_trainer(max_epochs=2, callbacks=[QuantizationAwareTraining(convert=False)]).fit(module)
    args, kwargs = row.inputs(0)
    with torch.no_grad():
        expected = list(float_leaves(module.eval()(*args, **kwargs)))
        quiet_trainer(callbacks=[QuantizationAwareTraining()]).test(module, verbose=False)
        got = list(float_leaves(module(*args, **kwargs)))
    assert int8_layers(module)
    for ours, fake in zip(got, expected, strict=True):
        # A few roundings apart, each of a 127th of the range.
        assert (ours - fake).abs().mean() < 0.02 * (fake.max() - fake.min()) + 1e-3


def test_batchnorm_is_folded_in_int8_and_its_statistics_move_while_it_trains() -> None:
    # Q8.
    module = ZooModule(row("conv_bn_relu"))
    statistics = module.net[1].running_mean.clone()

    def during(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert not torch.equal(pl_module.net[1].running_mean, statistics)

    quiet_trainer(callbacks=[QuantizationAwareTraining(), At(on_train_epoch_end=during)]).fit(module)
    int8: Any = form_of(module.net)
    assert "batch_norm" in int8._trace.graph.code
    assert not any("batch_norm" in form.code for form in (int8._reference, int8._kernels))


def test_the_optimizer_goes_on_with_the_same_parameters() -> None:
    module = Classifier()
    values: list[dict[str, Any]] = []
    record = At(on_train_batch_end=lambda t, m: values.append({n: p.detach().clone() for n, p in m.named_parameters()}))
    quiet_trainer(max_epochs=1, callbacks=[QuantizationAwareTraining(window=Window(3, unit="step")), record]).fit(
        module, TinyData()
    )
    for before, after in pairwise(values):
        assert all(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("evaluate", ["validate in fit", "validate", "test", "sanity"])
def test_evaluation_never_moves_an_observer(evaluate: str, tmp_path: Path) -> None:
    # Promise 13: validation batches a thousand times larger than the training batches.
    class Loud(TinyData):
        def setup(self, stage: str) -> None:
            super().setup(stage)
            for dataset in (self.val, self.test):
                dataset.tensors = (dataset.tensors[0] * 1000, dataset.tensors[1])

    data, module = Loud(), Classifier()
    qat = QuantizationAwareTraining(convert=False, freeze_observers=1.0)
    if evaluate == "validate in fit":
        before: dict[str, Any] = {}

        def check(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if not trainer.sanity_checking:
                assert before and not differing(before, observers(pl_module))

        watch = At(on_validation_start=lambda t, m: before.update(observers(m)), on_validation_end=check)
        quiet_trainer(max_epochs=2, val_check_interval=3, callbacks=[qat, watch]).fit(module, data)
    else:
        trainer = quiet_trainer(max_epochs=1, limit_val_batches=0, callbacks=[qat])
        trainer.fit(module, data)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        expected = observers(module)
        if evaluate == "sanity":
            again: dict[str, Any] = {}
            watch = At(on_sanity_check_end=lambda t, m: again.update(observers(m)))
            quiet_trainer(max_epochs=1, num_sanity_val_steps=2, callbacks=[qat, watch]).fit(module, data)
            assert again and not differing(expected, again)
            return
        convert = quiet_trainer(callbacks=[qat])
        getattr(convert, evaluate)(module, data, verbose=False)
        assert expected and not differing(expected, observers(module))


def test_observers_and_batchnorm_freeze_on_schedule() -> None:
    module = ZooModule(row("conv_bn_relu"))
    observed: list[Any] = []
    statistics: list[Tensor] = []

    def note(trainer: L.Trainer, pl_module: Any) -> None:
        observed.append(observers(pl_module))
        statistics.append(pl_module.net[1].running_mean.clone())

    qat = QuantizationAwareTraining(freeze_observers=0.5, freeze_batchnorm=0.75)
    quiet_trainer(max_epochs=3, callbacks=[qat, At(on_train_batch_end=note)]).fit(module)  # 12 steps
    moved = [bool(differing(a, b)) for a, b in pairwise(observed)]
    assert moved == [True] * 5 + [False] * 6
    moved = [not torch.equal(a, b) for a, b in pairwise(statistics)]
    assert moved == [True] * 8 + [False] * 3


def test_freezing_can_be_left_out() -> None:
    module = ZooModule(row("conv_bn_relu"))
    statistics: list[Tensor] = []
    qat = QuantizationAwareTraining(freeze_observers=1.0, freeze_batchnorm=1.0)
    note = At(on_train_batch_end=lambda t, m: statistics.append(m.net[1].running_mean.clone()))
    quiet_trainer(max_epochs=2, callbacks=[qat, note]).fit(module)
    assert all(not torch.equal(a, b) for a, b in pairwise(statistics))


@pytest.mark.parametrize("start", [0, 1, 5, 9])
def test_float_before_its_window_and_prepared_from_there_on(start: int) -> None:
    forms: list[bool] = []
    note = At(on_train_batch_end=lambda t, m: forms.append(bool(fake_quantizers(m))))
    qat = QuantizationAwareTraining(window=Window(start, unit="step"))
    module = Classifier()
    quiet_trainer(max_epochs=2, callbacks=[qat, note]).fit(module, TinyData())
    assert forms == [False] * start + [True] * (14 - start)
    assert int8_layers(module)


def test_before_its_window_training_is_that_of_plain_lightning() -> None:
    ours, plain = Classifier(), Classifier()
    plain.load_state_dict(ours.state_dict())
    states: dict[str, Any] = {}
    note = At(on_train_epoch_end=lambda t, m: states.setdefault(str(t.current_epoch), (snapshot(m), form_name(m))))
    qat = QuantizationAwareTraining(window=Window(1, unit="epoch"))
    quiet_trainer(max_epochs=2, callbacks=[qat, note]).fit(ours, TinyData())
    quiet_trainer(max_epochs=1).fit(plain, TinyData())
    assert_same_state(states["0"][0], plain)
    assert [form for _, form in states.values()] == ["float", "prepared"]


def test_preparing_draws_nothing_from_the_global_generators() -> None:
    module = Classifier()

    class Data(TinyData):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(self.train, batch_size=8, generator=torch.Generator())

    with same_random_state():
        quiet_trainer(limit_val_batches=0, callbacks=[QuantizationAwareTraining()]).fit(module, Data())
    assert int8_layers(module)


# What can't be traced as a whole, and why it stays right.


@pytest.mark.parametrize("name", ["functional_dropout", "auxiliary_head"])
def test_a_functional_dropout_follows_the_mode_and_a_trace_that_bakes_in_the_mode_is_refused_and_the_children_are_tried(
    name: str,
) -> None:
    module = ZooModule(row(name))
    outputs: dict[str, Any] = {}

    def look(trainer: L.Trainer, pl_module: Any) -> None:
        args, kwargs = row(name).inputs(0)
        with torch.no_grad(), torch.random.fork_rng():
            outputs["train"] = [pl_module.net.train()(*args, **kwargs) for _ in range(2)]
            outputs["eval"] = [pl_module.net.eval()(*args, **kwargs) for _ in range(2)]
            pl_module.net.train()

    qat = QuantizationAwareTraining()
    quiet_trainer(max_epochs=1, callbacks=[qat, At(on_train_epoch_end=look)]).fit(module)
    assert torch.equal(*outputs["eval"])
    if name == "functional_dropout":
        assert not torch.equal(*outputs["train"])
    else:
        assert isinstance(outputs["train"][0], tuple) and isinstance(outputs["eval"][0], Tensor)
    assert len(int8_layers(module)) == (2 if name == "functional_dropout" else 3)
    parted = any("not as a whole" in note or "in parts" in note for note in qat.report_notes())
    assert parted == (name == "auxiliary_head")


class CallsAPart(Classifier):
    """The training step calls a part directly; so do users who share a backbone between losses."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        middle = self.backbone[0](batch[0])
        return F.cross_entropy(self(batch[0]), batch[1]) + middle.square().mean()


def test_a_module_that_the_step_calls_directly_is_a_cut_point() -> None:
    module = CallsAPart()
    ran: list[bool] = []

    def during(trainer: L.Trainer, pl_module: Any) -> None:
        x = torch.randn(4, 16)
        part = pl_module.backbone[0]
        with torch.no_grad():
            # Fake-quantized weights round: the part itself is quantized, and called as such.
            ran.append(not torch.equal(part(x), F.linear(x, part.weight, part.bias)))

    quiet_trainer(callbacks=[QuantizationAwareTraining(), At(on_train_epoch_end=during)]).fit(module, TinyData())
    assert ran == [True]
    x = torch.randn(4, 16)
    with torch.no_grad():
        assert module.backbone[0](x).shape == (4, 32)
    assert len(int8_layers(module)) == 3


def test_keyword_forward_long_ids_and_a_flag_that_steers_control_flow() -> None:
    # P12, Q1, Q2.
    module = KeywordClassifier()
    trainer = quiet_trainer(max_epochs=2, callbacks=[QuantizationAwareTraining()])
    trainer.fit(module, keyword_loader(), keyword_loader())
    assert len(int8_layers(module)) == 2
    batch = next(iter(keyword_loader()))
    assert module(ids=batch["ids"], mask=batch["mask"]).shape == (8, 4)
    trainer.test(module, keyword_loader(), verbose=False)


def test_arguments_may_be_given_otherwise_in_another_step() -> None:
    # training_step calls by keyword, predict_step by position.
    class Both(KeywordClassifier):
        def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return self(batch["ids"], batch["mask"])

    module = Both()
    trainer = quiet_trainer(callbacks=[QuantizationAwareTraining()])
    trainer.fit(module, keyword_loader(), keyword_loader())
    by_keyword = [module(ids=batch["ids"], mask=batch["mask"]) for batch in keyword_loader()]
    by_position = trainer.predict(module, keyword_loader())
    assert all(torch.equal(a, b) for a, b in zip(by_keyword, by_position, strict=True))


@pytest.mark.parametrize("name", ["keyword_only", "dict", "tied"])
def test_structures_in_and_out(name: str) -> None:
    module = ZooModule(row(name))
    quiet_trainer(callbacks=[QuantizationAwareTraining()]).fit(module)
    args, kwargs = row(name).inputs()
    expected, got = row(name).build().eval()(*args, **kwargs), module.eval()(*args, **kwargs)
    assert type(expected) is type(got)
    if name == "dict":
        assert list(expected) == list(got)


@pytest.mark.parametrize("inner", ["conv1", "bn1", "conv2", "bn2", "stem", "head"])
def test_forward_hooks_of_inner_modules_keep_firing_once_a_call(inner: str) -> None:
    module = ZooModule(row("residual"))
    shapes: list[tuple[int, ...]] = []
    module.net.get_submodule(inner).register_forward_hook(lambda m, i, o: shapes.append(tuple(o.shape)))
    counts: list[int] = []
    start = At(
        on_train_batch_start=lambda t, m: shapes.clear(), on_train_batch_end=lambda t, m: counts.append(len(shapes))
    )
    quiet_trainer(num_sanity_val_steps=0, callbacks=[QuantizationAwareTraining(), start]).fit(module)
    assert counts == [1] * 4
    assert set(shapes) == {(4, 4) if inner == "head" else (4, 8, 8, 8)}


def test_forward_hooks_of_a_container_keep_firing_once_a_call() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.head = nn.Sequential(nn.Linear(16, 8), nn.ReLU()), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.features(x))

    module, calls, counts = ZooModule(row("mlp")), [], []
    module.net = Net()
    module.net.features.register_forward_hook(lambda m, i, o: calls.append(o.shape))
    start = At(
        on_train_batch_start=lambda t, m: calls.clear(), on_train_batch_end=lambda t, m: counts.append(len(calls))
    )
    quiet_trainer(callbacks=[QuantizationAwareTraining(), start]).fit(module)
    assert counts == [1] * 4


@pytest.mark.parametrize("inner", ["1", "2"], ids=["relu", "linear"])
def test_a_hook_that_changes_the_output_changes_it_once(inner: str) -> None:
    module = ZooModule(row("mlp"))
    with torch.no_grad():
        module.net[4].bias.zero_()
    seen: list[Tensor] = []

    def during(trainer: L.Trainer, pl_module: Any) -> None:
        x = row("mlp").inputs(5)[0][0]
        with torch.no_grad():
            seen.append(pl_module.net(x))

    # Zeroed in the middle, every row of the output is the same.
    module.net.get_submodule(inner).register_forward_hook(lambda m, i, o: o * 0)
    quiet_trainer(callbacks=[QuantizationAwareTraining(), At(on_train_epoch_end=during)]).fit(module)
    assert torch.equal(seen[0], seen[0][:1].expand_as(seen[0]))


def test_targets_choose_the_layers() -> None:
    # Q3.
    module = Classifier()
    qat = QuantizationAwareTraining(targets=Targets(exclude=["head"]))
    quiet_trainer(callbacks=[qat]).fit(module, TinyData())
    assert len(int8_layers(module)) == 1
    assert any("`head` stays float: excluded" in note for note in qat.report_notes())


def test_only_a_submodule() -> None:
    module = CallsAPart()
    qat = QuantizationAwareTraining(targets=Targets(include=["backbone"]))
    quiet_trainer(callbacks=[qat]).fit(module, TinyData())
    assert len(int8_layers(module)) == 2


def test_a_loss_that_becomes_nan_is_said_at_the_end() -> None:
    class Diverges(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * torch.nan

    with pytest.raises(CompressionError, match=r"Activations must be finite\. Received: NaN or infinity, behind `.+`"):
        quiet_trainer(max_epochs=2, callbacks=[QuantizationAwareTraining()]).fit(Diverges(), TinyData())
