"""`quantize` without a Trainer."""

from __future__ import annotations

import copy
import io
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress import CompressionError, DynamicInt8, StaticInt8, Targets, quantize
from lightning_compress.quantization.convert import revert_
from lightning_compress.quantization.numerics.int8 import needs_reduced_range
from lightning_compress.quantization.static.int8_layer import Int8Layer
from tests.quantization.prepared import form_modules, int8_layers, prepare_for_training_
from tests.support.modules import Classifier, float_leaves
from tests.support.oracles import assert_same_state, hooks, same_random_state, snapshot
from tests.support.zoo import ZOO, Row, row

# How a batch is bound: `quantize` calls model(*args); rows with keywords take a dict of them.


def batches(row: Row, count: int = 8) -> list[Any]:
    """Calibration batches as a user's loader gives them: a tuple, or a dict of keywords."""
    found = []
    for seed in range(count):
        args, kwargs = row.inputs(seed)
        found.append({"a": args[0], **kwargs} if kwargs else (args[0],))
    return found


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def agreement(a: Any, b: Any) -> float:
    """The least cosine similarity of any float output."""
    pairs = zip(float_leaves(a), float_leaves(b), strict=True)
    return min(
        float(F.cosine_similarity(x.detach().flatten().float(), y.detach().flatten().float(), dim=0)) for x, y in pairs
    )


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic"])
@pytest.mark.parametrize("row", ZOO, ids=str)
def test_over_the_zoo_close_to_float_and_the_original_stays(row: Row, scheme: str) -> None:
    model = row.build()
    next(iter(model.children())).eval()  # each module has a mode of its own
    before, had, mode = snapshot(model), [set(vars(m)) for m in model.modules()], modes(model)
    calibration = batches(row)
    with same_random_state():
        int8 = quantize(model, scheme, calibration=calibration)
    assert_same_state(before, model)
    assert [set(vars(m)) for m in model.modules()] == had
    assert modes(model) == mode
    assert hooks(model) == hooks(row.build())
    assert isinstance(int8, type(model)) and int8 is not model
    args, kwargs = row.inputs(0)
    expected, got = copy.deepcopy(model).eval()(*args, **kwargs), int8.eval()(*args, **kwargs)
    assert agreement(expected, got) > 0.98
    different = [not torch.equal(x, y) for x, y in zip(float_leaves(expected), float_leaves(got), strict=True)]
    assert any(different)  # else nothing was quantized


def saved_bytes(model: nn.Module) -> int:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


def wide() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 16)).eval()


@pytest.mark.parametrize("scheme", [StaticInt8(reduce_range=True), DynamicInt8()], ids=lambda scheme: scheme.name)
def test_int8_is_int8_and_takes_about_a_quarter(scheme: Any) -> None:
    model = wide()
    int8 = quantize(model, scheme, calibration=[torch.randn(32, 256) for _ in range(4)])
    assert saved_bytes(int8) / saved_bytes(model) == pytest.approx(0.25, abs=0.02)
    codes = [parameter.dtype for parameter in int8.parameters() if parameter.dim() == 2]
    assert codes == [torch.int8] * 3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        int8(torch.randn(4, 256))
    called = {event.key for event in profile.key_averages()}
    kernel = "onednn::qlinear_pointwise" if scheme.whole else "quantized::linear"
    assert any(kernel in name for name in called), called
    assert not {"aten::addmm", "aten::linear", "aten::mm"} & called


def test_static_convolutions_run_fused_int8_kernels() -> None:
    int8 = quantize(row("conv_bn_relu").build().eval(), calibration=batches(row("conv_bn_relu")))
    layers = [layer for layer in form_modules(int8).values() if isinstance(layer, Int8Layer)]
    assert [(layer.post_op[0], layer.output is None) for layer in layers] == [
        ("relu", False),
        ("relu", False),
        ("none", True),
    ]


def test_static_against_the_formula_by_hand() -> None:
    # Q = clamp(round(R / S) + Z): one linear layer, weights per channel, activations per tensor.
    torch.manual_seed(0)
    linear = nn.Linear(32, 8)
    x = torch.rand(64, 32) * 4 - 1
    int8 = quantize(nn.Sequential(linear), StaticInt8(), calibration=[x])
    steps = 63.5 if needs_reduced_range() else 127.5
    scale = linear.weight.detach().abs().amax(1, keepdim=True) / steps
    weight = (linear.weight.detach() / scale).round().clamp(-128, 127) * scale
    levels = 255
    step = (x.max() - x.min()) / levels
    zero = (-x.min() / step).round()
    activation = (((x / step).round() + zero).clamp(0, levels) - zero) * step
    expected = F.linear(activation, weight, linear.bias.detach())
    out_step = (expected.max() - expected.min()) / levels
    assert (int8(x) - expected).abs().max() < 2 * out_step


def test_dynamic_against_the_formula_by_hand() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(32, 8), torch.rand(64, 32) * 4 - 1
    scale = linear.weight.detach().abs().amax(1, keepdim=True) / (63 if needs_reduced_range() else 127)
    weight = (linear.weight.detach() / scale).round() * scale
    step = (x.max() - x.min()) / 255
    zero = (-x.min() / step).round()
    expected = F.linear(((x / step + zero).round() - zero) * step, weight, linear.bias.detach())
    got = quantize(nn.Sequential(linear), DynamicInt8())(x)
    assert (got - expected).abs().max() < 2 * step * weight.abs().max()  # a tie may round either way
    assert (got - F.linear(x, weight, linear.bias)).abs().max() > 2 * step * weight.abs().max()


def test_dynamic_per_token_against_the_formula_by_hand() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 8)
    x = torch.randn(16, 32) * torch.logspace(-3, 3, 16)[:, None]
    int8 = quantize(nn.Sequential(linear), DynamicInt8(per_token=True))
    expected = F.linear(x, linear.weight, linear.bias).detach()
    # Each token by itself is right, however different their magnitudes are.
    for row_, want in zip(int8(x), expected, strict=True):
        assert F.cosine_similarity(row_ - linear.bias, want - linear.bias, dim=0) > 0.999


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_dynamic_survives_outliers_that_destroy_torchs_own() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, dim_feedforward=256, dropout=0.0, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(64, 64)).eval()
    with torch.no_grad():
        # Outlier features, as large transformers have them: a few channels in some tokens.
        layer.norm1.weight[:2] *= 60
        layer.linear2.weight[:2] *= 20
    x = torch.randn(8, 12, 64)
    x[:, ::4, :3] *= 40
    with torch.no_grad():
        expected = model(x)
        ours = quantize(model, DynamicInt8(per_token=True))(x)
        chosen = quantize(model, "int8_dynamic", calibration=[x])(x)
        # torch's own breaks the fused evaluation path, which reads weights that are functions by then.
        torchs = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
        torchs[0].activation_relu_or_gelu = 0
        theirs = torchs(x)

    def cosine(got: Tensor) -> float:
        return float(F.cosine_similarity(got.flatten(0, 1), expected.flatten(0, 1), dim=-1).min())

    assert cosine(ours) >= 0.99
    assert cosine(theirs) < cosine(ours)
    assert F.cosine_similarity(chosen.flatten(), expected.flatten(), dim=0) >= 0.985


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic"])
def test_an_int8_model_runs_under_inference_mode_and_in_any_batch_size(scheme: str) -> None:
    # Q19.
    model = wide()
    x = torch.randn(32, 256)
    with torch.inference_mode():
        made_inside = quantize(model, scheme, calibration=[x])
    int8 = quantize(model, scheme, calibration=[x])
    expected = int8(x)
    with torch.inference_mode():
        torch.testing.assert_close(int8(x), expected)
        torch.testing.assert_close(made_inside(x), expected)
    torch.testing.assert_close(made_inside(x[:1]), int8(x[:1]))
    model(x).sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic"])
def test_an_int8_model_can_be_printed(scheme: str) -> None:
    printed = repr(quantize(wide(), scheme, calibration=[torch.randn(8, 256)]))
    assert "Linear" in printed


@pytest.mark.parametrize("call", ["by position", "by keyword", "mixed"])
@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic"])
def test_an_argument_may_be_given_by_position_or_by_keyword(scheme: str, call: str) -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.head = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, a: Tensor, b: Tensor, softmax: bool = False) -> Tensor:
            x = self.head((self.left(a) + self.right(b)).relu())
            return x.softmax(-1) if softmax else x

    model = TwoInputs()
    a, b = torch.randn(2, 16, 8)
    int8 = quantize(model, scheme, calibration=[{"a": a, "b": b}])
    got = {
        "by position": lambda: int8(a, b, False),
        "by keyword": lambda: int8(b=b, a=a),
        "mixed": lambda: int8(a, b=b),
    }[call]()
    assert agreement(model(a, b), got) > 0.98


def test_a_batch_whose_first_element_is_a_dict_is_the_first_argument() -> None:
    dictionaries = row("dict")
    model = dictionaries.build()
    inputs = dictionaries.inputs()[0][0]
    assert agreement(model(inputs), quantize(model, calibration=[(inputs, torch.zeros(4))])(inputs)) > 0.98


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic"])
def test_an_int8_model_can_be_copied(scheme: str) -> None:
    model, x = wide(), torch.randn(8, 256)
    int8 = quantize(model, scheme, calibration=[x])
    torch.testing.assert_close(copy.deepcopy(int8)(x), int8(x), rtol=0, atol=0)


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic"])
def test_targets_choose_the_layers(scheme: str) -> None:
    model, x = wide(), torch.randn(8, 256)
    int8 = quantize(model, scheme, calibration=[x], targets=Targets(exclude=["4"]))
    [left] = [
        module
        for module in int8.modules()
        if type(module) is nn.Linear and module._parameters.get("weight") is not None
    ]
    assert torch.equal(left.weight, model[4].weight)


def test_rows_of_the_zoo_that_cannot_be_traced_whole_are_taken_layer_by_layer() -> None:
    # Promise 13: an auxiliary head and a dropout bake `self.training` in.
    for name in ("functional_dropout", "auxiliary_head"):
        int8 = quantize(row(name).build(), calibration=batches(row(name)))
        x = row(name).inputs(0)[0][0]
        int8.eval()
        assert torch.equal(int8(x), int8(x))
        assert int8_layers(int8)


def test_data_dependent_control_flow_stays_float_and_the_layers_do_not() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x.relu() if x.sum() > 0 else -x)

    model = Branches()
    x = torch.randn(8, 16)
    int8 = quantize(model, calibration=[x])
    assert agreement(model(x), int8(x)) > 0.99
    assert agreement(model(-x), int8(-x)) > 0.95


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "int8_statik"}, "Nearest: int8_static"),
        ({}, "`calibration` must be given for int8_static"),
        ({"calibration": []}, "`calibration` must"),
        ({"calibration": [torch.zeros(4, 16)], "calibration_batches": 0}, "`calibration_batches` must be at least 1"),
        ({"calibration": [torch.zeros(4, 16)], "targets": Targets(include=["nope"])}, "'nope' must match a module"),
        ({"calibration": [torch.zeros(4, 16)], "targets": Targets(exclude=["*"])}, "`targets` must leave"),
        ({"scheme": "int8_dynamic", "targets": Targets(include=["nope"])}, "'nope' must match a module"),
        ({"scheme": "int8_dynamic", "targets": Targets(exclude=["*"])}, "must have a layer that|`targets` must"),
        ({"calibration": [{"wrong": torch.zeros(4, 16)}]}, "must bind to Sequential.forward"),
    ],
)
def test_errors_change_nothing(arguments: dict[str, Any], message: str) -> None:
    model = row("mlp").build()
    before, mode = snapshot(model), modes(model)
    with same_random_state(), pytest.raises(CompressionError, match=message):
        quantize(model, **arguments)
    assert_same_state(before, model)
    assert modes(model) == mode and hooks(model) == []


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic"])
def test_nothing_to_quantize_is_an_error_that_says_why(scheme: str) -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4))
    with pytest.raises(CompressionError, match="must have a layer that the scheme can quantize"):
        quantize(model, scheme, calibration=[torch.zeros(2, 3, dtype=torch.long)])


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic"])
def test_quantizing_twice_is_refused(scheme: str) -> None:
    x = torch.randn(4, 16)
    int8 = quantize(row("mlp").build(), scheme, calibration=[x])
    with pytest.raises(CompressionError, match="must be a float model. Received: one that is converted already"):
        quantize(int8, scheme, calibration=[x])


def test_a_forward_that_draws_leaves_every_generator_as_it_was() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + torch.rand(()) + 0 * random.random() + 0 * np.random.rand()

    model = Draws().eval()
    with same_random_state():
        quantize(model, "int8_static", calibration=[torch.ones(2, 8)])


def test_calibration_takes_no_more_batches_than_it_may() -> None:
    taken: list[int] = []

    def endless() -> Any:
        while True:
            taken.append(1)
            yield torch.randn(4, 16)

    quantize(row("mlp").build(), calibration=endless(), calibration_batches=3)
    assert len(taken) <= 4  # one that is looked at and not used may have been drawn


def test_calibration_decides_the_range() -> None:
    model = row("mlp").build().eval()
    x = row("mlp").inputs(0)[0][0]
    right = quantize(model, calibration=[x])
    wrong = quantize(model, calibration=[x / 100])
    assert (right(x) - model(x)).abs().max() < (wrong(x) - model(x)).abs().max()


def test_a_lightning_module_on_its_own_is_quantized_as_it_is() -> None:
    # P19: an unattached LightningModule raises at `hasattr(module, "trainer")`.
    module = Classifier().eval()
    x = torch.randn(32, 16)
    int8 = quantize(module, calibration=[(x, torch.zeros(32))])
    assert isinstance(int8, Classifier)
    assert agreement(module(x), int8(x)) > 0.99


def test_calibration_step_takes_the_place_of_forward() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 4)

        def calibration_step(self, batch: dict[str, Tensor]) -> Tensor:
            return self.net(batch["deep"])

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("isn't what its steps call")

    x = torch.randn(16, 8)
    int8 = quantize(Step(), calibration=[{"deep": x}])
    assert int8_layers(int8) == ["net"]


def test_dynamic_leaves_other_layers_float() -> None:
    int8 = quantize(row("lstm").build(), "int8_dynamic", calibration=batches(row("lstm")))
    coded = {name.rpartition(".")[0] for name, value in int8.named_parameters() if value.dtype == torch.int8}
    assert coded == {"rnn", "head"}


class AsksForType(nn.Module):
    """Calls what is a linear layer by its very type."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if type(layer) is nn.Linear else F.gelu(x)
        return x


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_weight_only", "nf4"])
def test_layers_that_a_forward_passes_over_once_they_are_quantized_are_an_error(scheme: str) -> None:
    x = torch.randn(4, 8)
    with pytest.raises(CompressionError, match="`layers.0` left out"):
        quantize(AsksForType().eval(), scheme, calibration=[x])


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic", "int8_weight_only"])
@pytest.mark.parametrize("first", ["int8_static", "int8_dynamic"])
def test_a_part_that_is_quantized_already_stays_as_it_is(first: str, scheme: str) -> None:
    x = torch.randn(16, 8)
    part = quantize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval(), first, calibration=[x])
    model = nn.Sequential(part, nn.ReLU(), nn.Linear(8, 4)).eval()
    before, state = part(x), copy.deepcopy(part.state_dict())
    quantized = quantize(model, scheme, calibration=[x], overrides={"2": scheme} if scheme != "int8_static" else None)
    assert torch.equal(quantized[0](x), before) and torch.equal(model[0](x), before)
    assert all(torch.equal(value, state[key]) for key, value in quantized[0].state_dict().items())
    revert_(model, "float")  # nothing was done to it as a whole
    assert not quantized.state_dict()["2.weight"].is_floating_point()
    prepared = copy.deepcopy(model)
    prepare_for_training_(prepared, x, StaticInt8())
    revert_(prepared, "float")
    assert torch.equal(prepared(x), model(x))
