"""`QLoRA` in real fits: its numbers against plain autograd, what its optimizers train, and what it leaves alone."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)
from torch import Tensor, nn

from lightning_compress import (
    NF4,
    ChannelPruning,
    CompressionError,
    CompressionReport,
    Distillation,
    DistillationModule,
    FeatureMSE,
    PostTrainingQuantization,
    QLoRA,
    QuantizationAwareTraining,
    ScheduledPruning,
    SoftTarget,
    Targets,
    WeightOnly,
    merge_adapters,
    plan_removal,
    prune_,
    quantize,
)
from tests.support import fits
from tests.support.data import TinyData, keyword_loader
from tests.support.modules import Classifier, KeywordClassifier, ManualClassifier, ZooModule, quiet_trainer
from tests.support.oracles import (
    assert_different_state,
    assert_same_state,
    hooks,
    snapshot,
)
from tests.support.zoo import row


def adapted_layers(module: nn.Module) -> dict[str, Any]:
    """What computes each adapted layer, by the layer's path: a packed `weight`, `lora_A`, `lora_B`, `scaling`."""
    return {
        ".".join(part for part in path.split(".")[:-1] if part != "_orig_mod"): inner
        for path, inner in module.named_modules()
        if "lora_A" in inner._parameters
    }


def adapters(module: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{name}": value
        for path, layer in adapted_layers(module).items()
        for name, value in (("A", layer.lora_A), ("B", layer.lora_B))
    }


def reference(layer: Any, x: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """The layer written plainly, with the base as one float matrix."""
    a, b = layer.lora_A if a is None else a, layer.lora_B if b is None else b
    w = layer.weight().to(x.dtype)
    return F.linear(x, w, layer.bias) + layer.scaling * F.linear(F.linear(x, a), b)


class At(Callback):
    """Calls back at a hook, with (trainer, module)."""

    def __init__(self, **hooks: Callable[[L.Trainer, Any], Any]) -> None:
        for name, function in hooks.items():
            setattr(self, name, lambda trainer, module, *_, function=function, **__: function(trainer, module))


SHORT = {"limit_val_batches": 1, "num_sanity_val_steps": 0}
fit = partial(fits.fit, **SHORT)


class Net(Classifier):
    """Runs any network on the vectors of `TinyData`."""

    def __init__(self, net: nn.Module, lr: float = 0.05) -> None:
        L.LightningModule.__init__(self)
        self.net = net
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip((16, *widths[:-1]), widths, strict=True):
        layers += [nn.Linear(before, after), nn.GELU()]
    return nn.Sequential(*layers[:-1])


# The numbers.


@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 3, 16), (0, 16)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_outputs_and_gradients_are_those_of_a_dequantized_reference(shape: tuple[int, ...], bias: bool) -> None:
    module = Net(nn.Sequential(nn.Linear(16, 70, bias=bias), nn.Tanh(), nn.Linear(70, 4)))
    fit(QLoRA(rank=3, alpha=7.0), module=module, max_epochs=1)
    [layer] = adapted_layers(module).values()
    assert layer.lora_A.shape == (3, 16) and layer.lora_B.shape == (70, 3) and layer.scaling == 7.0 / 3
    assert layer.lora_B.detach().any()
    x = torch.randn(shape, requires_grad=True)
    y = module.net[0](x)
    upstream = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), upstream)
    expected_y = reference(layer, x)
    expected = torch.autograd.grad(expected_y, (x, layer.lora_A, layer.lora_B), upstream)
    torch.testing.assert_close(y, expected_y, rtol=1e-5, atol=1e-6)
    for ours, plain in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    if x.numel():
        assert all(gradient.abs().sum() > 0 for gradient in got)


def test_a_layer_of_many_blocks_computes_like_one_matrix() -> None:
    # More values than are dequantized at a time, and rows that aren't whole blocks of 64.
    module = Net(nn.Sequential(nn.Linear(16, 1100), nn.ReLU(), nn.Linear(1100, 1003), nn.ReLU(), nn.Linear(1003, 4)))
    fit(QLoRA(rank=2), module=module, max_epochs=1, limit_train_batches=2, limit_val_batches=0)
    layer = adapted_layers(module)["net.2"]
    x = torch.randn(3, 1100, requires_grad=True)
    y, expected = module.net[2](x), reference(layer, x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(y)
    for ours, plain in zip(
        torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), upstream),
        torch.autograd.grad(expected, (x, layer.lora_A, layer.lora_B), upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_second_derivatives_flow() -> None:
    # A gradient penalty differentiates the gradient of the inputs.
    module = Net(mlp(24, 4))
    fit(QLoRA(rank=2), module=module, max_epochs=1)
    [layer] = adapted_layers(module).values()
    x = torch.randn(5, 16, requires_grad=True)

    def penalty(run: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        [gradient] = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), (layer.lora_A, layer.lora_B))

    for ours, plain in zip(penalty(module.net[0]), penalty(lambda x: reference(layer, x)), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_a_whole_fit_is_that_of_a_loop_over_the_dequantized_reference() -> None:
    module = Net(mlp(24, 24, 4))
    start: dict[str, Any] = {}
    note = At(
        on_train_start=lambda t, m: start.update(
            layers={path: (layer, layer.weight()) for path, layer in adapted_layers(m).items()},
            values={name: value.detach().clone() for name, value in adapters(m).items()},
        )
    )
    data = TinyData()
    fit(QLoRA(rank=4, alpha=8.0), note, module=module, data=data, max_epochs=3)
    assert list(start["layers"]) == ["net.0", "net.2"]
    leaves = {name: value.requires_grad_() for name, value in start["values"].items()}
    optimizer = torch.optim.SGD(leaves.values(), lr=module.lr, momentum=0.9)
    for _ in range(3):
        for x, y in data.train_dataloader():
            for path, (layer, w) in start["layers"].items():
                a, b = leaves[f"{path}.A"], leaves[f"{path}.B"]
                x = F.gelu(F.linear(x, w + 2.0 * b @ a, layer.bias))
            optimizer.zero_grad()
            F.cross_entropy(module.net[4](x), y).backward()
            optimizer.step()
    for name, value in adapters(module).items():
        torch.testing.assert_close(value, leaves[name], rtol=1e-3, atol=1e-5, msg=lambda text, name=name: name + text)
    assert_different_state(start["values"], adapters(module))


def test_the_first_step_starts_from_the_nf4_model() -> None:
    module = Classifier()
    four_bits = quantize(copy.deepcopy(module), NF4(), targets=Targets(include=["body"])).eval()
    seen: list[Tensor] = []
    x = torch.randn(9, 16)

    def look(trainer: L.Trainer, module: Any) -> None:
        with torch.no_grad():
            seen.append(module.eval()(x))
        module.train()

    fit(QLoRA(), At(on_train_start=look), module=module)
    with torch.no_grad():
        assert torch.equal(seen[0], four_bits(x))
        assert not torch.equal(seen[0], Classifier()(x))


def test_adapters_drop_their_inputs_in_training_only() -> None:
    module = Net(mlp(24, 4))
    fit(QLoRA(rank=2, dropout=0.4), module=module)
    [layer] = adapted_layers(module).values()
    x = torch.randn(7, 16)
    with torch.no_grad():
        for training in (True, False):
            module.train(training)
            torch.manual_seed(3)
            got = module.net[0](x)
            torch.manual_seed(3)
            narrow = F.linear(F.dropout(x, 0.4, training), layer.lora_A)
            expected = F.linear(x, layer.weight(), layer.bias) + layer.scaling * F.linear(narrow, layer.lora_B)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(module.eval().net[0](x), module.net[0](x))
        assert not torch.equal(module.train().net[0](x), module.net[0](x))


def test_adapters_of_equal_layers_differ_and_come_from_no_global_generator() -> None:
    start: dict[str, Tensor] = {}
    note = At(on_train_start=lambda t, m: start.update({k: v.detach().clone() for k, v in adapters(m).items()}))
    module = Net(mlp(16, 16, 16, 4))
    before = torch.get_rng_state()
    quiet_trainer(limit_train_batches=2, limit_val_batches=0, callbacks=[QLoRA(rank=2), note]).fit(module, Quiet())
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(start["net.0.A"], start["net.2.A"])
    assert not torch.equal(start["net.2.A"], start["net.4.A"])
    for name, value in start.items():
        assert value.any() if name.endswith("A") else not value.any()
        assert value.abs().max() <= 1 / 16**0.5
    first = dict(start)
    torch.manual_seed(99)
    quiet_trainer(limit_train_batches=1, limit_val_batches=0, callbacks=[QLoRA(rank=2), note]).fit(
        Net(mlp(16, 16, 16, 4)), TinyData()
    )
    assert_same_state(first, start)


class Quiet(TinyData):
    """A loader whose iterator draws its base seed from a generator of its own."""

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.train, batch_size=8, generator=torch.Generator())


def test_it_learns_what_the_frozen_model_does_not_know() -> None:
    module = Net(mlp(32, 32, 4), lr=0.05)
    fit(module=module, max_epochs=6)
    # The classes change their names.
    moved = TinyData()
    moved.setup("fit")
    for dataset in (moved.train, moved.val, moved.test):
        dataset.tensors = (dataset.tensors[0].flip(1), dataset.tensors[1])
    moved.setup = lambda stage: None  # type: ignore[method-assign]
    before = quiet_trainer().test(module, moved, verbose=False)[0]["test_loss"]
    _, module = fit(QLoRA(rank=4, alpha=4.0), module=module, data=moved, max_epochs=8)
    after = quiet_trainer().test(module, moved, verbose=False)[0]["test_loss"]
    assert after < 0.6 * before


# Which layers, and what stays as it was.


def test_by_default_all_linear_layers_but_the_last() -> None:
    module = Net(mlp(24, 20, 4))
    qlora = QLoRA()
    fit(qlora, module=module)
    assert list(adapted_layers(module)) == ["net.0", "net.2"]
    assert any("net.4" in note and "last" in note for note in qlora.report_notes())


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (Targets(include=["net.4"]), ["net.4"]),
        (Targets(include=["net.0", "net.4"]), ["net.0", "net.4"]),
        (Targets(include=["net.*"]), ["net.0", "net.2"]),
        (Targets(exclude=["net.0"]), ["net.2"]),
    ],
    ids=str,
)
def test_targets_name_layers(targets: Targets, expected: list[str]) -> None:
    module = Net(mlp(24, 20, 4))
    fit(QLoRA(targets=targets), module=module)
    assert list(adapted_layers(module)) == expected


def test_all_else_stays_bit_identical() -> None:
    class Busy(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.register_buffer("table", torch.randn(4))
            self.frozen = nn.Linear(4, 4)
            self.frozen.requires_grad_(False)
            self.table_of = nn.Embedding(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.frozen(super().forward(x) * self.scale + self.table) + self.table_of(torch.zeros(1).long())

        def configure_optimizers(self) -> Any:
            # Weight decay moves a parameter that an optimizer holds, without any gradient.
            return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.5)

    module = Busy()
    start: dict[str, Any] = {}
    note = At(on_train_start=lambda t, m: start.update(snapshot(m)))
    before = snapshot(module)
    fit(QLoRA(rank=2, targets=Targets(include=["body"])), note, module=module)
    after = snapshot(module)
    moved = {key for key in start if not torch.equal(start[key], after[key])}
    assert moved == {
        *(f"body._traced_forward.lora_{name}" for name in "AB"),
        *(f"norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")),
    }
    assert {key for key in start if ".codes" in key or "scale_" in key}  # the base is among what didn't move
    kept = {"scale", "table", "frozen.weight", "frozen.bias", "table_of.weight", "head.weight", "norm.weight"}
    assert_same_state({key: before[key] for key in kept}, {key: after[key] for key in kept})


def test_modules_to_train_train_as_they_are() -> None:
    module = Classifier()
    before = snapshot(module)
    seen: list[set[str]] = []
    note = At(on_train_start=lambda t, m: seen.append({n for n, p in m.named_parameters() if p.requires_grad}))
    fit(QLoRA(rank=2, modules_to_train=["head", "no*m"]), note, module=module)
    adapters_of = {f"body._traced_forward.lora_{name}" for name in "AB"}
    assert seen == [{"head.weight", "head.bias", "norm.weight", "norm.bias", *adapters_of}]
    after = snapshot(module)
    for key in ("head.weight", "head.bias", "norm.weight", "norm.bias"):
        assert not torch.equal(before[key], after[key]), key
    assert torch.equal(before["body.bias"], after["body.bias"])


def test_the_users_own_frozen_layers_are_thawed_by_nobody() -> None:
    module = Classifier()
    module.head.bias.requires_grad_(False)
    module.body.weight.requires_grad_(False)
    expected = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    assert set(expected.values()) == {True, False}
    qlora = QLoRA(rank=2)
    fit(qlora, module=module)
    assert {name: parameter.requires_grad for name, parameter in qlora.merge().named_parameters()} == expected


def test_a_frozen_module_that_is_to_train_does_or_is_refused() -> None:
    # Fine-tuning often begins with `model.requires_grad_(False)`.
    module = Classifier()
    module.requires_grad_(False)
    before = snapshot(module)
    try:
        fit(QLoRA(rank=2, modules_to_train=["head"]), module=module)
    except CompressionError as error:
        assert "head" in str(error)
    else:
        assert not torch.equal(before["head.weight"], module.head.weight)


def test_a_layer_that_is_to_train_as_it_is_gets_no_adapters() -> None:
    module = Net(mlp(24, 20, 4))
    before = snapshot(module)
    try:
        fit(QLoRA(rank=2, modules_to_train=["net.2"]), module=module)
    except CompressionError as error:
        assert "net.2" in str(error)
    else:
        assert list(adapted_layers(module)) == ["net.0"]
        assert not torch.equal(before["net.2.weight"], module.net[2].weight)


def test_a_model_that_is_frozen_as_a_whole_trains_its_adapters() -> None:
    module = Classifier()
    module.requires_grad_(False)
    qlora = QLoRA(rank=2)
    fit(qlora, module=module)
    assert all(value.requires_grad and value.detach().any() for value in adapters(module).values())
    assert not any(parameter.requires_grad for parameter in qlora.merge().parameters())


# Optimizers of every kind.


class Held(Callback):
    """Notes which parameters the optimizers hold while they train, and what state they have at the end."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        self.groups = [
            [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        self.states = {names[id(p)] for optimizer in trainer.optimizers for p in optimizer.state}

    @property
    def names(self) -> set[str]:
        return {name for groups in self.groups for group in groups for name in group}


BOTH = {"body._traced_forward.lora_A", "body._traced_forward.lora_B"}


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
    assert held.groups == [
        [["body._traced_forward.lora_A", "body._traced_forward.lora_B", "head.weight"], ["head.bias"]]
    ]


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
    assert frozen == {"body.bias", "norm.weight", "norm.bias", "middle.bias", "head.weight", "head.bias"}


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
    assert layer.weight().dtype == torch.float32
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
    assert torch.equal(first["body._traced_forward.weight.codes"], after["body._traced_forward.weight.codes"])
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


# Modules that make or load their weights late.


class LoadsInSetup(Classifier):
    def setup(self, stage: str) -> None:
        self.stages = [*getattr(self, "stages", []), stage]
        if stage == "fit" and len(self.stages) == 1:
            with torch.random.fork_rng():
                torch.manual_seed(77)
                self.load_state_dict(Classifier().state_dict())


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


# merge.


def test_merge_gives_the_plain_module_and_leaves_the_other() -> None:
    module = Net(mlp(24, 20, 4))
    plain_keys = list(module.state_dict())
    names = [name for name, _ in module.named_parameters()]
    attributes = {path: set(vars(inner)) for path, inner in Net(mlp(24, 20, 4)).named_modules()}
    qlora = QLoRA(rank=3, alpha=2.0)
    fit(qlora, module=module)
    before, was = snapshot(module), adapted_layers(module)
    for merged in (qlora.merge(), merge_adapters(module)):
        assert type(merged) is Net and merged is not module
        assert list(merged.state_dict()) == plain_keys
        assert [name for name, _ in merged.named_parameters()] == names
        assert all(parameter.requires_grad and parameter.is_leaf for parameter in merged.parameters())
        assert all(isinstance(parameter, nn.Parameter) for parameter in merged.parameters())
        ours = {path: set(vars(inner)) for path, inner in merged.named_modules()}
        lightnings = {"_trainer", "_current_fx_name", "_metric_attributes", "_param_requires_grad_state", "_hparams"}
        lightnings |= {f"{stage}_dataloader" for stage in ("train", "val", "test", "predict")}
        assert {path: names - lightnings for path, names in ours.items()} == {
            path: names - lightnings for path, names in attributes.items()
        }
        for path, layer in adapted_layers(module).items():
            expected = layer.weight() + (2.0 / 3) * layer.lora_B @ layer.lora_A
            torch.testing.assert_close(merged.get_submodule(path).weight, expected, rtol=1e-5, atol=1e-6)
        x = torch.randn(8, 16)
        with torch.no_grad():
            torch.testing.assert_close(merged.eval()(x), module.eval()(x), rtol=1e-5, atol=1e-5)
        Net(mlp(24, 20, 4)).load_state_dict(merged.state_dict(), strict=True)
        shared = {p.data_ptr() for p in merged.parameters()} & {p.data_ptr() for p in module.parameters()}
        assert not shared
        with torch.no_grad():
            for parameter in merged.parameters():
                parameter.add_(1.0)
    assert_same_state(before, snapshot(module))
    assert adapted_layers(module).keys() == was.keys()


def test_what_was_merged_trains_saves_and_quantizes_like_any_module(tmp_path: Any) -> None:
    qlora = QLoRA(rank=2)
    fit(qlora)
    merged = qlora.merge()
    trainer, _ = fit(ScheduledPruning(sparsity=0.5), module=merged)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    checkpoint = torch.load(tmp_path / "plain.ckpt", weights_only=True)
    assert "quantization" not in checkpoint.get("lightning_compress", {})
    Classifier.load_from_checkpoint(tmp_path / "plain.ckpt", weights_only=True)
    quiet_trainer(callbacks=[QuantizationAwareTraining(WeightOnly(4, 16))]).fit(qlora.merge(), TinyData())
    quantize(qlora.merge(), "int8_dynamic")
    pickle.loads(pickle.dumps(qlora.merge()))
    fit(QLoRA(rank=4), module=qlora.merge())


def test_merge_needs_a_fit_and_adapters() -> None:
    with pytest.raises(CompressionError, match="`merge` must come after a fit"):
        QLoRA().merge()
    with pytest.raises(CompressionError, match="`model` must have adapters.*float.*QLoRA"):
        merge_adapters(Classifier())
    with pytest.raises(CompressionError, match="`model` must have adapters.*converted"):
        merge_adapters(quantize(Classifier(), "nf4"))
    qlora = QLoRA()
    module = Classifier()
    fit(qlora, module=module)
    trainer_free = weakref.ref(module)
    del module
    gc.collect()
    if trainer_free() is None:
        with pytest.raises(CompressionError, match="`merge` must come after a fit"):
            qlora.merge()


def test_merge_after_evaluation_alone_says_what_is_missing() -> None:
    module, qlora = Classifier(), QLoRA()
    quiet_trainer(callbacks=[qlora]).test(module, TinyData(), verbose=False)
    with pytest.raises(CompressionError, match="adapters|fit"):
        qlora.merge()


def test_copies_and_pickles_of_an_adapted_module() -> None:
    qlora = QLoRA(rank=2)
    _, module = fit(qlora)
    x = torch.randn(4, 16)
    before = snapshot(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same_state(snapshot(module), snapshot(twin))
        assert torch.equal(module.eval()(x), twin.eval()(x))
        pointers = {p.data_ptr() for p in (*module.parameters(), *module.buffers()) if p.numel()}
        assert not pointers & {p.data_ptr() for p in (*twin.parameters(), *twin.buffers()) if p.numel()}
        fit(QLoRA(rank=2), module=twin.train())
        assert_different_state(adapters(module), adapters(twin))
        assert_same_state(before, snapshot(module))
        torch.testing.assert_close(merge_adapters(twin).eval()(x), twin.eval()(x), rtol=1e-5, atol=1e-5)
    for callback in (copy.deepcopy(qlora), pickle.loads(pickle.dumps(qlora))):
        assert callback.state_key == qlora.state_key
        fit(callback)


# Networks of every kind.


@pytest.mark.parametrize("name", ["mlp", "attention", "transformer", "tied", "shared", "keyword_only", "dict"])
def test_over_the_zoo_trains_evaluates_and_merges(name: str) -> None:
    module = ZooModule(row(name))
    keys = list(module.state_dict())
    identities = {n: p.data_ptr() for n, p in module.named_parameters(remove_duplicate=False)}
    same = [(a, b) for a in identities for b in identities if a < b and identities[a] == identities[b]]
    qlora = QLoRA(rank=2)
    trainer = quiet_trainer(max_epochs=2, callbacks=[qlora])
    trainer.fit(module)
    layers = adapted_layers(module)
    assert layers and all(layer.lora_B.detach().any() for layer in layers.values())
    trainer.test(module, verbose=False)
    merged = qlora.merge()
    assert list(merged.state_dict()) == keys
    again = {n: p.data_ptr() for n, p in merged.named_parameters(remove_duplicate=False)}
    assert [(a, b) for a in again for b in again if a < b and again[a] == again[b]] == same
    args, kwargs = row(name).inputs(5)
    with torch.no_grad():
        module.eval(), merged.eval()
        torch.testing.assert_close(merged(*args, **kwargs), module(*args, **kwargs), rtol=1e-4, atol=1e-4)
    ZooModule(row(name)).load_state_dict(merged.state_dict(), strict=True)


def test_a_module_under_two_names_has_one_adapter() -> None:
    block = nn.Linear(16, 16)
    module = Net(nn.Sequential(block, nn.ReLU(), block, nn.ReLU(), nn.Linear(16, 4)))
    held = Held()
    qlora = QLoRA(rank=2)
    fit(qlora, held, module=module)
    assert len(held.names) == 2
    merged = qlora.merge()
    assert merged.net[0] is merged.net[2]
    x = torch.randn(4, 16)
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(x), module.eval()(x), rtol=1e-5, atol=1e-5)


def test_tied_weights_stay_float_and_tied_and_say_so() -> None:
    class Tied(KeywordClassifier):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(16, 20, bias=False)
            self.out.weight = self.embedding.weight
            self.narrow = nn.Linear(20, 32)

        def forward(self, ids: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
            return self.head(self.narrow(self.out(self.embedding(ids))).mean(1))

    module, qlora = Tied(), QLoRA(rank=2, targets=Targets(include=["out", "narrow"]))
    quiet_trainer(callbacks=[qlora]).fit(module, keyword_loader(), keyword_loader())
    assert module.out.weight is module.embedding.weight
    assert "out" not in adapted_layers(module) and "narrow" in adapted_layers(module)
    assert any("out" in note and "tied" in note for note in qlora.report_notes())
    merged = qlora.merge()
    assert merged.out.weight is merged.embedding.weight


def test_a_weight_that_the_module_itself_holds_too_is_left_alone() -> None:
    class Holds(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.middle = nn.Linear(32, 32)
            self.kept = self.body.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.middle(self.norm(self.body(x)).relu() + self.kept.sum()).relu())

    module, qlora = Holds(), QLoRA(rank=2, targets=Targets(include=["body", "middle"]))
    fit(qlora, module=module)
    assert module.kept is module.body.weight
    assert list(adapted_layers(module)) == ["middle"]


class Encoder(Classifier):
    """torch's encoder, whose evaluation reads weights and calls no layers."""

    def __init__(self) -> None:
        L.LightningModule.__init__(self)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 4)
        self.lr = 0.05

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x.view(-1, 2, 8)).mean(1))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_torchs_encoder_evaluates_what_it_trained() -> None:
    module, qlora = Encoder(), QLoRA(rank=2)
    trainer, _ = fit(qlora, module=module)
    assert {path.rpartition(".")[2] for path in adapted_layers(module)} == {"linear1", "linear2"}
    x = torch.randn(6, 16)
    with torch.no_grad():
        training = module.train()(x)
        torch.testing.assert_close(module.eval()(x), training, rtol=1e-5, atol=1e-6)
        with torch.inference_mode():
            torch.testing.assert_close(module(x), training, rtol=1e-5, atol=1e-6)
        merged = qlora.merge()
        torch.testing.assert_close(merged.eval()(x), training, rtol=1e-4, atol=1e-5)
    trainer.test(module, TinyData(), verbose=False)
    encoder = merged.encoder
    assert encoder.use_nested_tensor == Encoder().encoder.use_nested_tensor
    assert encoder.layers[0].activation_relu_or_gelu == Encoder().encoder.layers[0].activation_relu_or_gelu


def test_multihead_attention_stays_float_and_is_listed() -> None:
    module, qlora = ZooModule(row("attention")), QLoRA(rank=2)
    quiet_trainer(callbacks=[qlora]).fit(module)
    attention = [path for path, inner in module.named_modules() if isinstance(inner, nn.MultiheadAttention)]
    assert attention
    assert all(any(f"`{path}` stays float" in note for note in qlora.report_notes()) for path in attention)


def test_a_compiled_submodule() -> None:
    module = Net(mlp(24, 20, 4))
    module.net = torch.compile(module.net, backend="eager")
    keys = list(module.state_dict())
    qlora = QLoRA(rank=2)
    trainer, _ = fit(qlora, module=module)
    assert list(adapted_layers(module)) == ["net.0", "net.2"]
    assert all(layer.lora_B.detach().any() for layer in adapted_layers(module).values())
    trainer.test(module, TinyData(), verbose=False)
    x = torch.randn(4, 16)
    with torch.no_grad():
        merged = qlora.merge()
        torch.testing.assert_close(merged.eval()(x), module.eval()(x), rtol=1e-5, atol=1e-5)
    assert list(merged.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in merged.parameters())


@pytest.mark.parametrize("wrapper", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_computed_weights_stay_float(wrapper: Callable[[nn.Module], nn.Module]) -> None:
    net = mlp(24, 20, 4)
    wrapper(net[0])
    module, qlora = Net(net), QLoRA(rank=2)
    fit(qlora, module=module)
    assert list(adapted_layers(module)) == ["net.2"]
    qlora.merge()


def test_subclasses_of_linear_stay_float() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    module = Net(nn.Sequential(Scaled(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)))
    fit(QLoRA(rank=2), module=module)
    assert list(adapted_layers(module)) == ["net.2"]


def test_a_step_that_reads_the_weight_of_a_layer_says_what_to_do() -> None:
    # A penalty on weights: they are in 4 bits now.
    class Penalty(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + 1e-3 * self.body.weight.square().sum()

    module = Penalty()
    fit(QLoRA(rank=2, targets=Targets(include=["head"])), module=module)  # the remedy
    assert list(adapted_layers(module)) == ["head"]


def test_hooks_on_an_adapted_layer_still_run() -> None:
    module = Classifier()
    calls: list[torch.Size] = []
    module.body.register_forward_hook(lambda layer, args, output: calls.append(output.shape))
    fit(QLoRA(rank=2), module=module)
    assert calls and calls[0] == (8, 32)


def test_ranks_above_the_layers_and_layers_of_one_row() -> None:
    module = Net(nn.Sequential(nn.Linear(16, 1), nn.Tanh(), nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 4)))
    qlora = QLoRA(rank=40, alpha=1)
    fit(qlora, module=module)
    x = torch.randn(4, 16)
    with torch.no_grad():
        torch.testing.assert_close(qlora.merge().eval()(x), module.eval()(x), rtol=1e-5, atol=1e-5)


# Refusals.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "`rank` must be at least 1. Received: rank=0"),
        ({"rank": -2}, "`rank` must"),
        ({"rank": 2.0}, "`rank` must.*Received: rank=2.0"),
        ({"rank": True}, "`rank` must"),
        ({"rank": "8"}, "`rank` must"),
        ({"alpha": 0}, "`alpha` must be above 0"),
        ({"alpha": -1.0}, "`alpha` must"),
        ({"alpha": float("nan")}, "`alpha` must"),
        ({"alpha": float("inf")}, "`alpha` must"),
        ({"alpha": "16"}, "`alpha` must"),
        ({"alpha": None}, "`alpha` must"),
        ({"dropout": 1.0}, r"`dropout` must lie in \[0, 1\). Received: dropout=1.0"),
        ({"dropout": -0.1}, "`dropout` must"),
        ({"dropout": "0.1"}, "`dropout` must"),
        ({"targets": ["body"]}, "`targets` must be a Targets.*Targets"),
        ({"targets": "body"}, "`targets` must be a Targets"),
        ({"modules_to_train": "head"}, "`modules_to_train` must be a list of patterns"),
        ({"modules_to_train": [3]}, "`modules_to_train` must"),
        ({"modules_to_train": None}, "`modules_to_train` must"),
    ],
    ids=str,
)
def test_bad_arguments(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(CompressionError, match=words):
        QLoRA(**settings)


OTHERS: dict[str, Callable[[], Callback]] = {
    "pruning": lambda: ScheduledPruning(sparsity=0.5),
    "channels": lambda: ChannelPruning(channels=0.5),
    "qat": lambda: QuantizationAwareTraining(),
    "qat in few bits": lambda: QuantizationAwareTraining("int4_weight_only"),
    "ptq": lambda: PostTrainingQuantization("int8_dynamic"),
    "a second one": lambda: QLoRA(rank=2),
}


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("other", OTHERS)
def test_refused_beside_what_needs_float_weights(other: str, before: bool) -> None:
    module = Classifier()
    was, had = snapshot(module), set(vars(module))
    callbacks = [QLoRA(), OTHERS[other]()]
    with pytest.raises((CompressionError, RuntimeError), match="QLoRA|one|more than"):
        fit(*(reversed(callbacks) if before else callbacks), module=module)
    assert_same_state(was, snapshot(module))
    assert not {"forward", "setup", "on_save_checkpoint", "on_load_checkpoint"} & set(vars(module)) - had
    fit(module=module)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"targets": Targets(include=["boddy"])}, "'boddy' must match a module.*body"),
        ({"targets": Targets(include=["norm"])}, "must have a linear layer to adapt"),
        ({"targets": Targets(exclude=["body", "head"])}, "must have a linear layer to adapt"),
        ({"modules_to_train": ["haed"]}, "`modules_to_train` must match modules.*'haed'.*Nearest: head"),
    ],
    ids=str,
)
def test_patterns_that_match_nothing(settings: dict[str, Any], words: str) -> None:
    module = Classifier()
    was = snapshot(module)
    with pytest.raises(CompressionError, match=words):
        fit(QLoRA(**settings), module=module)
    assert_same_state(was, snapshot(module))
    assert not {"forward", "setup", "on_save_checkpoint", "on_load_checkpoint"} & set(vars(module))


def test_a_mistyped_module_to_train_is_named_as_such() -> None:
    # `targets` wasn't given: the message must not speak of it.
    with pytest.raises(CompressionError, match="`modules_to_train`"):
        fit(QLoRA(modules_to_train=["haed"]))


def test_a_module_without_linear_layers() -> None:
    module = Net(nn.Sequential(nn.Unflatten(1, (1, 16)), nn.Conv1d(1, 4, 16), nn.Flatten()))
    was = snapshot(module)
    with pytest.raises(CompressionError, match="must have a linear layer to adapt"):
        fit(QLoRA(), module=module)
    assert_same_state(was, snapshot(module))


def test_the_only_linear_layer_is_adapted_though_it_is_the_last() -> None:
    module = Net(nn.Linear(16, 4))
    fit(QLoRA(rank=2), module=module)
    assert list(adapted_layers(module)) == ["net"]


@pytest.mark.parametrize("scheme", ["nf4", "int8_dynamic", "int8_static"])
def test_quantizing_an_adapted_module_says_what_to_do(scheme: str) -> None:
    _, module = fit(QLoRA(rank=2))
    was = snapshot(module)
    with pytest.raises(CompressionError, match="merge"):
        quantize(module, scheme, calibration=[(torch.randn(4, 16),)])
    with pytest.raises(CompressionError, match="merge"):
        quiet_trainer(callbacks=[PostTrainingQuantization(scheme)]).test(module, TinyData(), verbose=False)
    assert_same_state(was, snapshot(module))


def test_pruning_an_adapted_module_says_what_to_do() -> None:
    _, module = fit(QLoRA(rank=2))
    was = snapshot(module)
    with pytest.raises(CompressionError, match="merge"):
        prune_(module, 0.5)
    assert_same_state(was, snapshot(module))


def test_removing_channels_of_an_adapted_module_says_what_to_do() -> None:
    _, module = fit(QLoRA(rank=2))
    was = snapshot(module)
    with pytest.raises(CompressionError, match="merge"):
        plan_removal(module, torch.randn(2, 16), channels=0.5)
    assert_same_state(was, snapshot(module))


@pytest.mark.parametrize(
    "other",
    ["pruning", "channels", "qat", "qat in few bits"],
)
def test_a_fit_of_an_adapted_module_with_another_technique_says_what_to_do(other: str) -> None:
    _, module = fit(QLoRA(rank=2))
    was = snapshot(module)
    with pytest.raises(CompressionError, match="merge"):
        fit(OTHERS[other](), module=module)
    assert_same_state(was, snapshot(module))
    fit(OTHERS[other](), module=merge_adapters(module))


@pytest.mark.parametrize("scheme", ["nf4", "int8_dynamic"])
@pytest.mark.filterwarnings("ignore:.*converted|.*quantized")
def test_a_quantized_module_is_refused(scheme: str) -> None:
    module = quantize(Classifier(), scheme)
    was = snapshot(module)
    with pytest.raises(CompressionError, match="must be float") as caught:
        fit(QLoRA(rank=2), module=module)
    assert "merge its adapters" not in str(caught.value)  # it has none
    assert_same_state(was, snapshot(module))


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_strategies_that_lose_structure_are_refused(strategy: str) -> None:
    trainer = quiet_trainer(strategy=strategy, devices=1, callbacks=[QLoRA()])
    with pytest.raises(CompressionError, match="`strategy` must"):
        QLoRA().setup(trainer, Classifier(), "fit")


# Company.


@pytest.mark.parametrize("first", [True, False], ids=["QLoRA first", "QLoRA last"])
@pytest.mark.parametrize("feature", [False, True], ids=["logits", "features"])
def test_with_distillation(first: bool, feature: bool) -> None:
    torch.manual_seed(5)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 4))
    losses = [SoftTarget(), *([FeatureMSE("body", "1")] if feature else [])]
    callbacks = [QLoRA(rank=2), Distillation(teacher, losses, task_weight=0.5)]
    held = Held()
    before = snapshot(teacher)
    start: dict[str, Any] = {}
    note = At(on_train_start=lambda t, m: start.update(snapshot(m)))
    module = Classifier()
    trainer, _ = fit(*(callbacks if first else reversed(callbacks)), note, module=module)
    del held
    assert_same_state(before, snapshot(teacher))
    assert adapted_layers(module).keys() == {"body"}
    after = snapshot(module)
    assert all(not torch.equal(start[name], after[name]) for name in BOTH)
    assert torch.equal(start["head.weight"], after["head.weight"])
    assert "train_soft_target" in trainer.callback_metrics
    trainer.test(module, TinyData(), verbose=False)


@pytest.mark.parametrize("wide", [pytest.param(False, id="same width"), pytest.param(True, id="an adapter")])
def test_with_a_distillation_module(wide: bool) -> None:
    torch.manual_seed(5)
    teacher = mlp(48 if wide else 24, 24, 4)
    module = DistillationModule(
        student=mlp(24, 24, 4),
        teacher=teacher,
        losses=[SoftTarget(weight=0.5), FeatureMSE(student_layer="0", teacher_layer="0", weight=0.5)],
        task_weight=0.5,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    )
    before = snapshot(teacher)
    qlora, start = QLoRA(rank=2), dict[str, Any]()
    note = At(on_train_start=lambda t, m: start.update(snapshot(m)))
    fit(qlora, note, module=module)
    assert list(adapted_layers(module)) == ["student.0", "student.2"]
    assert_same_state(before, snapshot(teacher))
    after = snapshot(module)
    moved = {name for name in start if not torch.equal(start[name], after[name])}
    projection = {name for name in start if name.startswith("adapters.")}
    assert bool(projection) == wide
    # What only helps in training learns as it does without us.
    assert moved == projection | {f"student.{index}._traced_forward.lora_{name}" for index in (0, 2) for name in "AB"}
    qlora.merge()


def test_with_a_report(tmp_path: Any) -> None:
    qlora = QLoRA(rank=2)
    report = CompressionReport(directory=str(tmp_path / "report"), picture=False, max_seconds=0.01)
    trainer, module = fit(qlora, report)
    trainer.test(module, TinyData(), verbose=False)
    text = "".join(path.read_text() for path in (tmp_path / "report").rglob("*") if path.suffix in (".md", ".json"))
    assert "NF4" in text and "rank 2" in text
    assert any("76" in note.replace(",", "") or "96" in note for note in qlora.report_notes())


def test_the_notes_count_what_trains() -> None:
    qlora = QLoRA(rank=2)
    fit(qlora)
    # Adapters: 2 x 16 + 32 x 2. All: the Classifier, and those.
    total = sum(parameter.numel() for parameter in Classifier().parameters()) + 96
    assert f"96 of {total:,} parameters train" in qlora.report_notes()[0]


@pytest.mark.parametrize("buffers", [True, False], ids=["with buffers", "parameters alone"])
@pytest.mark.parametrize("first", [True, False], ids=["QLoRA first", "QLoRA last"])
def test_with_averages(first: bool, buffers: bool) -> None:
    module = Net(mlp(24, 24, 4))
    values: list[dict[str, Tensor]] = []
    ema = EMAWeightAveraging(decay=0.7, use_buffers=buffers)
    state: dict[str, Any] = {}

    def note(trainer: L.Trainer, pl_module: Any) -> None:
        values.append({name: value.detach().clone() for name, value in adapters(pl_module).items()})
        state.update(base={key: value for key, value in snapshot(pl_module).items() if "lora" not in key})

    callbacks: list[Callback] = [QLoRA(rank=2), ema]
    fit(*(callbacks if first else reversed(callbacks)), At(on_train_batch_end=note), module=module)
    expected = values[0]
    for later in values[1:]:
        expected = {name: 0.7 * expected[name] + 0.3 * later[name] for name in expected}
    for name, value in adapters(module).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    for key, value in snapshot(module).items():
        if "lora" not in key:  # averages of equal numbers round
            torch.testing.assert_close(value, state["base"][key], rtol=1e-5, atol=1e-7)
    merged = merge_adapters(module)
    x = torch.randn(3, 16)
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(x), module.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decay", [0.9, 0.95, 0.9999])
@pytest.mark.parametrize("first", [True, False], ids=["QLoRA first", "QLoRA last"])
def test_averages_never_touch_the_base(first: bool, decay: float) -> None:
    module = Net(mlp(24, 24, 4))
    start: dict[str, Any] = {}
    note = At(on_train_start=lambda t, m: start.update(snapshot(m)))
    callbacks: list[Callback] = [QLoRA(rank=2), EMAWeightAveraging(decay=decay)]
    fit(*(callbacks if first else reversed(callbacks)), note, module=module, max_epochs=3)
    after = snapshot(module)
    base = [key for key in start if ".weight." in key]
    assert len(base) == 8
    assert_same_state({key: start[key] for key in base}, {key: after[key] for key in base})


@pytest.mark.parametrize("first", [True, False], ids=["QLoRA first", "QLoRA last"])
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step", "ignore:Swapping scheduler")
def test_with_stochastic_weight_averaging(first: bool) -> None:
    module = Net(mlp(24, 24, 4))
    starts: list[dict[str, Tensor]] = []
    base: dict[str, Any] = {}

    def note(trainer: L.Trainer, pl_module: Any) -> None:
        starts.append({name: value.detach().clone() for name, value in adapters(pl_module).items()})
        base.update({key: value for key, value in snapshot(pl_module).items() if "lora" not in key})

    callbacks: list[Callback] = [QLoRA(rank=2), StochasticWeightAveraging(0.01, swa_epoch_start=2)]
    fit(*(callbacks if first else reversed(callbacks)), At(on_train_epoch_start=note), module=module, max_epochs=4)
    # Lightning takes the weights at the start of each epoch from the second on, the last included.
    averaged = {name: torch.stack([start[name] for start in starts[1:4]]).mean(0) for name in starts[0]}
    for name, value in adapters(module).items():
        torch.testing.assert_close(value, averaged[name], rtol=1e-3, atol=1e-5)
    assert_same_state(base, {key: value for key, value in snapshot(module).items() if "lora" not in key})


def test_averages_of_a_module_that_loads_in_its_setup() -> None:
    for callbacks in ([QLoRA(rank=2), EMAWeightAveraging(decay=0.7)], [EMAWeightAveraging(decay=0.7), QLoRA(rank=2)]):
        module = LoadsInSetup()
        fit(*callbacks, module=module)
        wanted = LoadsInSetup()
        wanted.setup("fit")
        layer = adapted_layers(module)["body"]
        four_bits = quantize(wanted, NF4(), targets=Targets(include=["body"]))
        x = torch.randn(5, 16)
        with torch.no_grad():
            # Averages of equal numbers round.
            torch.testing.assert_close(F.linear(x, layer.weight(), layer.bias), four_bits.body(x), rtol=1e-5, atol=1e-6)


# What it takes.


def tensors_in_memory() -> Iterator[Tensor]:
    gc.collect()
    for thing in gc.get_objects():
        try:
            if isinstance(thing, Tensor):
                yield thing
        except ReferenceError:
            continue


@pytest.mark.parametrize("average", [pytest.param(False, id="alone"), pytest.param(True, id="with averages")])
@pytest.mark.filterwarnings("ignore:.*isinstance|.*deprecated")
def test_no_float_copy_of_an_adapted_weight_lives_on(average: bool) -> None:
    shape = (67, 61)  # of nothing else in this process
    module = Net(nn.Sequential(nn.Linear(16, 61), nn.ReLU(), nn.Linear(61, 67), nn.ReLU(), nn.Linear(67, 4)))
    original = weakref.ref(module.net[2].weight)
    alive: list[int] = []

    def count(trainer: L.Trainer, pl_module: Any) -> None:
        alive.append(sum(tensor.shape == shape and tensor.is_floating_point() for tensor in tensors_in_memory()))

    others = [EMAWeightAveraging(decay=0.9)] if average else []
    trainer, _ = fit(
        QLoRA(rank=2), *others, At(on_train_start=count, on_train_epoch_end=count), module=module, max_epochs=1
    )
    count(trainer, module)
    assert original() is None
    assert alive == [0, 0, 0]
    packed = sum(b.numel() * b.element_size() for b in adapted_layers(module)["net.2"].weight.buffers())
    assert packed < 67 * 61 * 0.65  # bytes: half of one for a code, and the scales of 67 rows


def test_backward_keeps_no_float_weight() -> None:
    module = Net(mlp(64, 64, 4))
    fit(QLoRA(rank=2), module=module, max_epochs=1)
    saved: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(torch.randn(3, 16))
    assert saved and torch.Size((64, 64)) not in saved and torch.Size((64, 16)) not in saved


def test_draws_nothing_from_the_global_generators() -> None:
    states = []
    for callbacks in ([], [QLoRA(rank=2)]):
        fit(*callbacks, module=Net(mlp(24, 24, 4)))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
