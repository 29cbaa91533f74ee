"""`QLoRA` in fits of every kind, with optimizers of every kind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    Callback,
    GradientAccumulationScheduler,
)
from torch import Tensor, nn

from lightning_compress import (
    NF4,
    CompressionError,
    QLoRA,
    Targets,
    merge_adapters,
    quantize,
)
from tests.quantization.lora.fits import BOTH, At, Held, LoadsInSetup, Net, adapted_layers, adapters, fit, mlp
from tests.support.data import TinyData
from tests.support.modules import Classifier, ManualClassifier, quiet_trainer
from tests.support.oracles import (
    assert_same_state,
    hooks,
    snapshot,
)


class Grouped(Classifier):
    def configure_optimizers(self) -> Any:
        decay = [parameter for name, parameter in self.named_parameters() if not name.endswith("bias")]
        rest = [parameter for name, parameter in self.named_parameters() if name.endswith("bias")]
        optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.5}, {"params": rest, "lr": 1.0}], lr=0.01)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


class Filtered(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(filter(lambda parameter: parameter.requires_grad, self.parameters()), lr=0.01)


class OneCycle(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Plateau(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adagrad(self.parameters(), lr=0.1)  # fills its state when it is made
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


class Quasi(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class Fused(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)


class Averaged(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.ASGD(self.parameters(), lr=0.1, foreach=True)


@pytest.mark.parametrize("kind", [Classifier, Grouped, Filtered, OneCycle, Plateau, Fused, Averaged])
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before")
def test_optimizers_hold_the_adapters_alone(kind: type[Classifier]) -> None:
    module, held = kind(), Held()
    start: dict[str, Any] = {}
    note = At(on_train_start=lambda t, m: start.update(snapshot(m)))
    fit(QLoRA(rank=2), held, note, module=module)
    assert held.names == held.states == BOTH
    after = snapshot(module)
    assert {key for key in start if not torch.equal(start[key], after[key])} - {
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    } == BOTH


def test_groups_keep_their_settings_and_their_number() -> None:
    held = Held()
    trainer, _ = fit(QLoRA(rank=2, modules_to_train=["head"]), held, module=Grouped())
    [optimizer] = trainer.optimizers
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.01]
    assert held.groups == [[["body.lora_A", "body.lora_B", "head.weight"], ["head.bias"]]]


def test_lbfgs_trains_the_adapters() -> None:
    module, held = Quasi(), Held()
    start: dict[str, Any] = {}
    note = At(on_train_start=lambda t, m: start.update(snapshot(m)))
    fit(QLoRA(rank=2), held, note, module=module)
    assert held.names == BOTH
    after = snapshot(module)
    for name in ("body.bias", "head.weight", "norm.weight"):
        assert torch.equal(start[name], after[name])
    assert all(not torch.equal(start[name], after[name]) for name in BOTH)


class TwoManual(ManualClassifier):
    """Toggles, and an optimizer whose parameters all have adapters."""

    def __init__(self, toggle: bool) -> None:
        super().__init__()
        self.middle = nn.Linear(32, 32)
        self.toggle = toggle

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.norm(self.body(x)).relu()).relu())

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, schedule in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            if self.toggle:
                self.toggle_optimizer(optimizer)
            loss = F.cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            schedule.step()
            if self.toggle:
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        parts = ([self.body, self.norm], [self.middle, self.head])
        optimizers = [
            torch.optim.Adam([p for module in part for p in module.parameters()], lr=0.01 * (1 + index))
            for index, part in enumerate(parts)
        ]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99) for optimizer in optimizers]


@pytest.mark.parametrize("toggle", [False, True])
def test_several_optimizers_by_hand(toggle: bool) -> None:
    module, held = TwoManual(toggle), Held()
    fit(QLoRA(rank=2, targets=Targets(include=["body", "middle"])), held, module=module)
    first, second = (held.groups[0][0], held.groups[1][0])
    assert set(first) == BOTH
    assert set(second) == {name.replace("body", "middle") for name in BOTH}
    assert all(value.detach().any() for value in adapters(module).values())
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    assert frozen == {
        "body.weight",
        "middle.weight",
        "body.bias",
        "norm.weight",
        "norm.bias",
        "middle.bias",
        "head.weight",
        "head.bias",
    }


def test_an_optimizer_without_any_adapter_goes_on_empty() -> None:
    # `ManualClassifier` has an optimizer for the head alone.
    module, held = ManualClassifier(), Held()
    fit(QLoRA(rank=2), held, module=module)
    assert [set(groups[0]) for groups in held.groups] == [BOTH, set()]


class Lacking(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


class LacksHalf(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for name, p in self.named_parameters() if "lora_B" not in name], lr=0.1)


@pytest.mark.parametrize(("kind", "count"), [(Lacking, "0 of 2"), (LacksHalf, "1 of 2")])
def test_optimizers_without_the_adapters_are_refused(kind: type[Classifier], count: str) -> None:
    with pytest.raises(CompressionError, match=f"`configure_optimizers`.*{count}.*self.parameters"):
        fit(QLoRA(rank=2, modules_to_train=["head"]), module=kind())


def test_a_fit_that_was_refused_leaves_the_module_bit_identical() -> None:
    # DESIGN section 3, rule 2.
    module = Lacking()
    before, had = snapshot(module), set(vars(module))
    with pytest.raises(CompressionError, match="`configure_optimizers`"):
        fit(QLoRA(rank=2), module=module)
    assert_same_state(before, snapshot(module))
    assert set(vars(module)) - had <= {"_trainer", "_current_fx_name", "_metric_attributes"}


# Fits of every kind.


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"gradient_clip_val": 0.01},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 3},
        {"detect_anomaly": True},
        {"overfit_batches": 2},
        {"fast_dev_run": True},
        {"max_epochs": -1, "max_steps": 5},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*max_epochs=-1", "ignore:.*overfit", "ignore:You .*fast_dev_run")
def test_a_fit_with_other_settings_of_the_trainer(options: dict[str, Any]) -> None:
    # A type of its own for the batches of `-true` precisions is the Trainer's affair.
    module = Classifier()
    trainer, _ = fit(QLoRA(rank=2), module=module, **options)
    [layer] = adapted_layers(module).values()
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(options.get("precision", ""), torch.float32)
    assert layer.lora_A.dtype == layer.lora_B.dtype == dtype
    assert layer.lora_B.detach().any()
    trainer.test(module, TinyData(), verbose=False)
    assert layer.weight.scale_step.dtype == torch.float32
    plain = merge_adapters(module)
    assert {parameter.dtype for parameter in plain.parameters()} == {dtype}
    x = torch.randn(6, 16, dtype=dtype)
    with torch.no_grad():
        tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(plain.eval()(x), module.eval()(x), rtol=tolerance, atol=tolerance)


def test_gradient_clipping_sees_the_adapters_alone() -> None:
    norms: list[float] = []

    class Clips(Classifier):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))
            assert {n for n, p in self.named_parameters() if p.grad is not None} == BOTH

    fit(QLoRA(rank=2), module=Clips(), gradient_clip_val=1e-4)
    assert norms and all(norm > 0 for norm in norms)


def test_accumulation_equals_large_batches() -> None:
    small, large = Net(mlp(24, 4)), None
    large = copy.deepcopy(small)
    fit(QLoRA(rank=2), module=small, data=TinyData(48, 8), accumulate_grad_batches=2)
    fit(QLoRA(rank=2), module=large, data=TinyData(48, 16))
    for (name, ours), theirs in zip(adapters(small).items(), adapters(large).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_a_schedule_of_accumulation() -> None:
    _, module = fit(QLoRA(rank=2), GradientAccumulationScheduler({0: 2, 1: 1}))
    assert adapted_layers(module)


def test_evaluation_right_after_a_fit() -> None:
    qlora = QLoRA(rank=2)
    trainer, module = fit(qlora)
    state = snapshot(module)
    data = TinyData()
    loss = trainer.test(module, data, verbose=False)[0]["test_loss"]
    x, y = data.test.tensors
    plain = qlora.merge().eval()
    with torch.no_grad():
        assert loss == pytest.approx(float(F.cross_entropy(plain(x), y)), rel=1e-4)
        predicted = torch.cat(trainer.predict(module, data))
        torch.testing.assert_close(predicted, plain(x), rtol=1e-4, atol=1e-5)
    trainer.validate(module, data, verbose=False)
    assert_same_state(state, snapshot(module))
    assert quiet_trainer().test(module, data, verbose=False)[0]["test_loss"] == loss  # without us
    with torch.inference_mode():
        torch.testing.assert_close(module.eval()(x), plain(x), rtol=1e-4, atol=1e-5)


def test_evaluation_before_any_fit_leaves_a_float_module() -> None:
    module = Classifier()
    before, keys = snapshot(module), set(vars(module))
    for stage in ("validate", "test", "predict"):
        options = {} if stage == "predict" else {"verbose": False}
        getattr(quiet_trainer(callbacks=[QLoRA()]), stage)(module, TinyData(), **options)
    assert_same_state(before, snapshot(module))
    assert not {"on_save_checkpoint", "on_load_checkpoint", "setup", "forward"} & (set(vars(module)) - keys)


@pytest.mark.parametrize("same", [True, False], ids=["the same callback", "a new one"])
def test_a_second_fit_trains_on(same: bool) -> None:
    qlora = QLoRA(rank=2)
    _, module = fit(qlora)
    first = snapshot(module)
    start: dict[str, Any] = {}
    note = At(on_train_start=lambda t, m: start.update(snapshot(m)))
    held = Held()
    again = qlora if same else QLoRA(rank=2)
    fit(again, note, held, module=module)
    assert_same_state(first, start)
    assert held.names == BOTH
    after = snapshot(module)
    assert all(not torch.equal(first[name], after[name]) for name in BOTH)
    assert torch.equal(first["body.weight"], after["body.weight"])
    assert hooks(module) == []
    fit(again, module=Classifier())  # and a second module
    assert isinstance(again.merge(), Classifier)


@pytest.mark.parametrize("other", [{"rank": 4}, {"alpha": 3.0}, {"dropout": 0.1}], ids=lambda other: next(iter(other)))
def test_a_second_fit_with_other_adapters_is_refused(other: dict[str, Any]) -> None:
    _, module = fit(QLoRA(rank=2))
    before = snapshot(module)
    with pytest.raises(CompressionError, match="have the adapters that QLoRA asks for.*merge_adapters"):
        fit(QLoRA(**{"rank": 2, **other}), module=module)
    assert_same_state(before, snapshot(module))
    merged = merge_adapters(module)
    fit(QLoRA(**{"rank": 2, **other}), module=merged)
    assert adapted_layers(merged)


@pytest.mark.parametrize(
    "other",
    [{"targets": Targets(include=["head"])}, {"modules_to_train": ["head"]}],
    ids=["targets", "modules to train"],
)
def test_a_second_fit_that_asks_for_other_layers_is_heard(other: dict[str, Any]) -> None:
    # No silent no-op (DESIGN, section 3, rule 5): refused, or done.
    _, module = fit(QLoRA(rank=2))
    before = snapshot(module)
    try:
        fit(QLoRA(rank=2, **other), module=module)
    except CompressionError as error:
        assert "merge_adapters" in str(error)
        assert_same_state(before, snapshot(module))
    else:
        assert "head" in adapted_layers(module) or not torch.equal(before["head.weight"], module.head.weight)


def test_a_plain_fit_of_an_adapted_module_trains_its_adapters_on() -> None:
    _, module = fit(QLoRA(rank=2))
    first = snapshot(module)
    fit(module=module)  # without us
    after = snapshot(module)
    assert {key for key in first if not torch.equal(first[key], after[key])} - {
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    } == BOTH


class Stop(Callback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 5:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("stopped"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_after_an_exception_the_module_can_be_used_merged_and_trained_on(error: BaseException) -> None:
    module, qlora = Classifier(), QLoRA(rank=2)
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        fit(qlora, Stop(error), module=module)
    assert hooks(module) == [] and "setup" not in vars(module)
    x = torch.randn(4, 16)
    with torch.no_grad():
        torch.testing.assert_close(qlora.merge().eval()(x), module.eval()(x), rtol=1e-4, atol=1e-5)
    fit(qlora, module=module.train())
    quiet_trainer().test(module, TinyData(), verbose=False)
    fit(module=merge_adapters(module))


class BuildsInSetup(Classifier):
    def __init__(self) -> None:
        super().__init__()
        del self.body

    def setup(self, stage: str) -> None:
        if not hasattr(self, "body"):
            self.body = nn.Linear(16, 32)


class BuildsInConfigureModel(Classifier):
    def __init__(self) -> None:
        super().__init__()
        del self.body

    def configure_model(self) -> None:
        if not hasattr(self, "body"):
            self.body = nn.Linear(16, 32)


def test_weights_that_setup_loads_are_those_that_are_quantized() -> None:
    module = LoadsInSetup()
    qlora = QLoRA(rank=2)
    with torch.random.fork_rng():
        torch.manual_seed(77)
        wanted = Classifier()
    fit(qlora, module=module)
    assert module.stages == ["fit"] and "setup" not in vars(module)
    layer = adapted_layers(module)["body"]
    four_bits = quantize(wanted, NF4(), targets=Targets(include=["body"]))
    x = torch.randn(5, 16)
    with torch.no_grad():
        assert torch.equal(F.linear(x, layer.weight(), layer.bias), four_bits.body(x))
    assert_same_state({"": wanted.head.weight}, {"": module.head.weight})
    fit(qlora, module=module)
    quiet_trainer(callbacks=[qlora]).test(module, TinyData(), verbose=False)
    assert module.stages == ["fit", "fit", "test"]


@pytest.mark.parametrize("kind", [BuildsInSetup, BuildsInConfigureModel])
def test_layers_that_are_made_late_are_adapted(kind: type[Classifier]) -> None:
    module = kind()
    qlora = QLoRA(rank=2, targets=Targets(include=["body"]))
    fit(qlora, module=module)
    assert list(adapted_layers(module)) == ["body"]
    fit(qlora, module=module)
    assert list(merge_adapters(module).state_dict()) == [
        *(key for key in Classifier().state_dict() if not key.startswith("body")),
        "body.weight",
        "body.bias",
    ]


def test_an_exception_in_the_modules_setup_leaves_a_plain_module() -> None:
    class Fails(Classifier):
        def setup(self, stage: str) -> None:
            raise RuntimeError("no data here")

    module = Fails()
    before = snapshot(module)
    with pytest.raises(RuntimeError, match="no data here"):
        fit(QLoRA(), module=module)
    assert_same_state(before, snapshot(module))
    assert not {"setup", "on_save_checkpoint", "forward"} & set(vars(module))
