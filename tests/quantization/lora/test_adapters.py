"""Layers with adapters: what they compute, which they are, and what stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress import (
    NF4,
    CompressionError,
    QLoRA,
    Targets,
    quantize,
)
from tests.quantization.lora.fits import BOTH, At, Net, adapted_layers, adapters, fit, mlp
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import (
    assert_different_state,
    assert_same_state,
    snapshot,
)


def reference(layer: Any, x: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """The layer written plainly, with the base as one float matrix."""
    a, b = layer.lora_A if a is None else a, layer.lora_B if b is None else b
    w = layer.weight().to(x.dtype)
    return F.linear(x, w, layer.bias) + layer.scaling * F.linear(F.linear(x, a), b)


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


def test_the_tree_is_the_users_with_adapters() -> None:
    module, plain = Classifier(), Classifier()
    fit(QLoRA(rank=2), module=module, max_epochs=1)
    assert [name for name, _ in module.named_modules()] == [name for name, _ in plain.named_modules()]
    assert [name for name, _ in module.named_buffers()] == [name for name, _ in plain.named_buffers()]
    names = {name for name, _ in plain.named_parameters()}
    assert {name for name, _ in module.named_parameters()} == names | BOTH
    scales = {f"body.weight_scale_{name}" for name in ("codes", "offset", "step")}
    assert module.state_dict().keys() == plain.state_dict().keys() | BOTH | scales
    assert module.body.state_dict().keys() == {key.removeprefix("body.") for key in BOTH | scales} | {"weight", "bias"}


def test_it_compiles_and_exports_without_a_float_weight() -> None:
    module, x = Net(mlp(24, 24, 4)), torch.randn(5, 16)
    fit(QLoRA(rank=2), module=module, max_epochs=1)
    expected = module.eval()(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(module.net, fullgraph=True, backend="eager")(x), expected)
    for strict in (False, True):
        program = torch.export.export(module.net, (x,), strict=strict)
        held = {**program.state_dict, **program.constants}
        floats = {key for key, value in held.items() if value.is_floating_point() and value.dim() > 1}
        assert floats == {"4.weight", *(f"{layer}.lora_{name}" for layer in (0, 2) for name in "AB")}
        torch.testing.assert_close(program.module()(x), expected)


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
        *(f"body.lora_{name}" for name in "AB"),
        *(f"norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")),
    }
    assert {"body.weight", "body.weight_scale_codes"} <= set(start)  # the base is among what didn't move
    kept = {"scale", "table", "frozen.weight", "frozen.bias", "table_of.weight", "head.weight", "norm.weight"}
    assert_same_state({key: before[key] for key in kept}, {key: after[key] for key in kept})


def test_modules_to_train_train_as_they_are() -> None:
    module = Classifier()
    before = snapshot(module)
    seen: list[set[str]] = []
    note = At(on_train_start=lambda t, m: seen.append({n for n, p in m.named_parameters() if p.requires_grad}))
    fit(QLoRA(rank=2, modules_to_train=["head", "no*m"]), note, module=module)
    adapters_of = {f"body.lora_{name}" for name in "AB"}
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
