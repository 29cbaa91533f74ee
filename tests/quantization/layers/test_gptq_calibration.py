"""What GPTQ is given: the Hessians of each layer, and the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from lightning_compress import GPTQ, CompressionError, WeightOnly, quantize
from lightning_compress.quantization.convert import record_of
from lightning_compress.quantization.layers import gptq_calibration, schemes
from tests.quantization.numerics.test_gptq import output_error
from tests.support.few_bits import rounded
from tests.support.oracles import assert_same_state, hooks, snapshot

# The Hessians.


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The Hessians that GPTQ is given, in the order of the layers: ``(groups, columns, columns)`` each."""
    found: list[Tensor] = []
    inner = schemes.gptq

    def spy(matrix: Tensor, hessian: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(hessian.double().clone())
        return inner(matrix, hessian, *args, **kwargs)

    monkeypatch.setattr(schemes, "gptq", spy)
    return found


def squares(rows: Tensor) -> Tensor:
    rows = rows.detach().double().reshape(-1, rows.shape[-1])
    return rows.T @ rows


def by_derivative(layer: Any, x: Tensor) -> list[Tensor]:
    """X^T X of each group of a convolution: its output is linear in the kernel, so the derivative is the input patch.

    It comes from torch's own convolution and so knows of every stride, padding and dilation.
    """
    weight = layer.weight.detach()
    jacobian = torch.autograd.functional.jacobian(lambda w: functional_call(layer, {"weight": w}, (x,)), weight)
    if x.dim() == weight.dim() - 1:
        jacobian = jacobian.unsqueeze(0)
    found = []
    for group in range(layer.groups):
        channel = group * layer.out_channels // layer.groups
        patches = jacobian[:, channel].movedim(-weight.dim(), 0)[channel]
        found.append(squares(patches.flatten(-weight.dim() + 1)))
    return found


CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")  # torch's own
@settings(max_examples=40)
@given(
    dims=st.sampled_from([1, 2, 2, 3]),
    groups=st.sampled_from([1, 2, 4]),
    kernel=st.tuples(*[st.integers(1, 3)] * 3),
    stride=st.tuples(*[st.integers(1, 2)] * 3),
    dilation=st.tuples(*[st.integers(1, 2)] * 3),
    padding=st.sampled_from([(0, 0, 0), (1, 0, 2), "same", "valid"]),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    batched=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_of_any_convolution(
    dims: int, groups: int, kernel: Any, stride: Any, dilation: Any, padding: Any, mode: str, batched: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = CONVOLUTIONS[dims](
        4,
        4,
        kernel[:dims],
        stride=1 if padding == "same" else stride[:dims],
        padding=padding if isinstance(padding, str) else padding[:dims],
        dilation=dilation[:dims],
        groups=groups,
        padding_mode=mode,
    )
    x = torch.randn(*[2] * batched, 4, *[6, 5, 5][:dims])
    found: list[Tensor] = []
    inner = schemes.gptq
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schemes, "gptq", lambda m, h, *rest: found.append(h.double()) or inner(m, h, *rest))
        quantize(nn.Sequential(layer), GPTQ(4, None), calibration=[x, 2 * x])
    [hessian] = found
    expected = torch.stack(by_derivative(layer, x))
    torch.testing.assert_close(hessian, 5 * expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_of_a_convolution_in_portions(seen: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq_calibration, "_PATCHES", 300)
    layer, x = nn.Conv2d(3, 4, 3, padding=1), torch.randn(7, 3, 6, 6)
    quantize(nn.Sequential(layer), GPTQ(4, None), calibration=[x])
    patches = F.unfold(x, 3, padding=1).transpose(1, 2)
    torch.testing.assert_close(seen[0][0], squares(patches), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(6,), (9, 6), (3, 4, 6), (2, 3, 4, 6)])
def test_of_a_linear_layer_with_inputs_of_any_shape(shape: tuple[int, ...], seen: list[Tensor]) -> None:
    batches = [torch.randn(shape) for _ in range(3)]
    quantize(nn.Sequential(nn.Linear(6, 4)), GPTQ(4, None), calibration=batches)
    assert len(seen) == 1 and seen[0].shape == (1, 6, 6)
    torch.testing.assert_close(seen[0][0], sum(squares(x) for x in batches), rtol=1e-5, atol=1e-5)


def test_as_many_batches_as_were_asked_for_and_no_more(seen: list[Tensor]) -> None:
    drawn = []

    def endless() -> Any:
        while True:
            drawn.append(torch.randn(5, 6))
            yield drawn[-1]

    quantize(nn.Sequential(nn.Linear(6, 4)), GPTQ(4, None), calibration=endless(), calibration_batches=3)
    assert len(drawn) == 3
    torch.testing.assert_close(seen[0][0], sum(squares(x) for x in drawn), rtol=1e-5, atol=1e-5)


class Often(nn.Module):
    """One layer called three times with inputs of its own, once by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(input=self.body(self.body(x).tanh()).relu())


def test_of_a_layer_that_is_called_several_times(seen: list[Tensor]) -> None:
    model, x = Often(), torch.randn(9, 6)
    quantize(model, GPTQ(3, None), calibration=[x, x + 1])
    inputs = []
    for batch in (x, x + 1):
        first = model.body(batch).tanh()
        inputs += [batch, first, model.body(first).relu()]
    torch.testing.assert_close(seen[0][0], sum(map(squares, inputs)), rtol=1e-5, atol=1e-4)


def test_a_later_layer_sees_what_quantized_ones_before_it_give(seen: list[Tensor]) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(40, 16)
    quantized = quantize(model, GPTQ(2, None), calibration=[x], overrides={"4": GPTQ(2, None)})
    stored = rounded(model, quantized)
    assert len(seen) == 3
    for index, length in enumerate((0, 2, 4)):
        torch.testing.assert_close(seen[index][0], squares(stored[:length](x)), rtol=1e-4, atol=1e-3)
    assert (seen[2][0] - squares(model[:4](x))).abs().max() > 0.1


def test_layers_are_fitted_in_the_order_of_their_calls(seen: list[Tensor]) -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(8, 4), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))

    model, x = Backwards(), torch.randn(20, 8)
    quantized = quantize(model, GPTQ(4, 8), calibration=[x], overrides={"last": GPTQ(2, 8)})
    torch.testing.assert_close(seen[0][0], squares(x), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(seen[1][0], squares(rounded(model, quantized).first(x)), rtol=1e-4, atol=1e-3)
    assert {layer["path"]: layer["scheme"]["bits"] for layer in record_of(quantized)["layers"]} == {
        "first": 4,
        "last": 2,
    }


@pytest.mark.parametrize("width", [None, 12])
def test_of_attentions_projections(width: int | None, seen: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq_calibration, "_SHARE", 10**9)  # one layer at a time

    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True, kdim=width, vdim=width)

        def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            return self.attention(x, y, z, need_weights=False)[0]

    model = Crossed()
    x, y, z = torch.randn(3, 5, 16), *torch.randn(2, 3, 7, width or 16)
    quantized = quantize(model, GPTQ(3, None), calibration=[{"x": x, "y": y, "z": z}])
    assert len(seen) == 4
    for hessian, inputs in zip(seen, (x, y, z), strict=False):
        torch.testing.assert_close(hessian[0], squares(inputs), rtol=1e-5, atol=1e-4)
    # What is attended to comes from the quantized projections.
    stored = rounded(model, quantized).attention
    weights = stored.in_proj_weight.chunk(3) if width is None else None
    weights = weights or (stored.q_proj_weight, stored.k_proj_weight, stored.v_proj_weight)
    q, k, v = (
        F.linear(one, weight, bias).unflatten(-1, (4, 4)).transpose(1, 2)
        for one, weight, bias in zip((x, y, z), weights, stored.in_proj_bias.chunk(3), strict=True)
    )
    attended = ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen[3][0], squares(attended), rtol=1e-3, atol=1e-3)


class TwoOfOneWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.b.weight = self.a.weight
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(3 * self.a(x).relu()))


def test_layers_of_one_weight_share_its_codes() -> None:
    model, x = TwoOfOneWeight(), torch.randn(50, 8)
    quantized = quantize(model, GPTQ(3, None), calibration=[x])
    assert quantized.a._parameters["weight"] is quantized.b._parameters["weight"]
    stored = rounded(model, quantized)
    torch.testing.assert_close(quantized.eval()(x), stored(x), rtol=1e-4, atol=1e-5)


def test_layers_of_one_weight_are_fitted_to_the_inputs_of_both(seen: list[Tensor]) -> None:
    model, x = TwoOfOneWeight(), torch.randn(50, 8)
    quantize(model, GPTQ(3, None), calibration=[x])
    both = squares(x) + squares(3 * model.a(x).relu())
    torch.testing.assert_close(seen[-1][0], both, rtol=1e-4, atol=1e-3)


# The whole.


TWO_BITS = pytest.mark.xfail(
    reason="rounding to the nearest fits symmetric scales of 2 bits, GPTQ takes the published ones"
)


@pytest.mark.parametrize(
    "scheme",
    [
        GPTQ(4, 16),
        GPTQ(4, None),
        GPTQ(3, None, False),
        GPTQ(2, 8, False, activation_order=True),
        pytest.param(GPTQ(2, 8, activation_order=True), marks=TWO_BITS),
    ],
    ids=str,
)
def test_every_layer_of_a_transformer_is_nearer_to_its_output_than_with_rounding_to_the_nearest(scheme: GPTQ) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval()
    x = torch.randn(16, 12, 32) @ torch.randn(32, 32) / 5
    rtn = WeightOnly(scheme.bits, scheme.group_size, scheme.symmetric)
    ours, theirs = (rounded(model, quantize(model, one, calibration=[x])) for one in (scheme, rtn))
    inputs: dict[str, Tensor] = {}
    for name, module in ours.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("out_proj"):
            module.register_forward_pre_hook(lambda m, args, name=name: inputs.__setitem__(name, args[0]))
    ours.train()  # the fast path calls no layers
    with torch.no_grad():
        ours(x)
    assert len(inputs) == 4
    for name, got in inputs.items():
        float_weight = model.get_submodule(name).weight.detach()
        a, b = (
            output_error(got.flatten(0, 1), float_weight, m.get_submodule(name).weight.detach()) for m in (ours, theirs)
        )
        assert a < 0.95 * b, name


def test_the_model_is_left_as_it_is_and_so_are_batches_and_hooks() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)  # in evaluation too

    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), Noise(), nn.Linear(8, 4), nn.Linear(4, 4)).train()
    batches = [torch.randn(6, 8) for _ in range(3)]
    before, given_, had = snapshot(model), snapshot(batches), [set(vars(m)) for m in model.modules()]
    random = torch.get_rng_state()
    quantize(model, GPTQ(4, 8), calibration=batches)
    assert_same_state(before, model)
    assert_same_state(given_, batches)
    assert [set(vars(m)) for m in model.modules()] == had
    assert hooks(model) == [] and all(module.training for module in model.modules())
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_calibration_that_is_not_finite_names_the_layer(value: float) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4))
    before, had = snapshot(model), [set(vars(m)) for m in model.modules()]
    batches = [torch.randn(6, 8), torch.full((1, 8), value)]
    with pytest.raises(CompressionError, match=r"`calibration` must be finite\. Received: NaN or inf.*Seen by `0`"):
        quantize(model, "gptq", calibration=batches)
    assert_same_state(before, model)
    assert [set(vars(m)) for m in model.modules()] == had and hooks(model) == []


def test_bfloat16_weights_and_inputs_are_fitted_in_float32(seen: list[Tensor]) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)).bfloat16(), torch.randn(300, 8).bfloat16()
    quantize(model, GPTQ(4, None), calibration=[x])
    torch.testing.assert_close(seen[0][0], squares(x), rtol=1e-5, atol=1e-3)


def test_an_empty_batch_adds_nothing(seen: list[Tensor]) -> None:
    layer, x = nn.Conv2d(2, 4, 3), torch.randn(3, 2, 5, 5)
    quantize(nn.Sequential(layer), GPTQ(4, None), calibration=[x, x[:0]])
    torch.testing.assert_close(seen[0][0], squares(F.unfold(x, 3).transpose(1, 2)), rtol=1e-5, atol=1e-4)


class Expert(nn.Module):
    """Which of two layers a batch goes through, its sign decides."""

    def __init__(self) -> None:
        super().__init__()
        self.plus, self.minus, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.plus(x) if x.mean() > 0 else self.minus(x))


@pytest.mark.xfail(reason="what the first batch doesn't call stays float, which the report says")
@pytest.mark.parametrize("scheme", [GPTQ(3, None), WeightOnly(3)], ids=str)
def test_a_layer_that_only_a_later_batch_calls_is_quantized_with_what_it_gets(scheme: Any, seen: list[Tensor]) -> None:
    model, noise = Expert(), torch.randn(2, 9, 8) / 10
    batches = [noise[0] + 1, noise[1] - 1]
    quantized = quantize(model, scheme, calibration=batches)
    assert [layer["path"] for layer in record_of(quantized)["layers"]] == ["plus", "minus"]
    if isinstance(scheme, GPTQ):
        for hessian, batch in zip(seen, batches, strict=True):
            torch.testing.assert_close(hessian[0], squares(batch), rtol=1e-5, atol=1e-4)


class Steps(nn.Module):
    """One layer called once for each of any number of time steps."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), 8)
        for step in x.unbind(1):
            state = (self.cell(state) + step).tanh()
        return self.head(state)


@pytest.mark.parametrize("lengths", [(2, 6), (6, 2)], ids=str)
def test_batches_that_call_a_layer_more_often_than_the_first_did(lengths: Any, seen: list[Tensor]) -> None:
    model, batches = Steps(), [torch.randn(4, length, 8) for length in lengths]
    inputs: list[Tensor] = []
    handle = model.cell.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for batch in batches:
        model(batch)
    handle.remove()
    quantize(model, GPTQ(4, None), calibration=batches)
    torch.testing.assert_close(seen[0][0], sum(map(squares, inputs)), rtol=1e-5, atol=1e-4)


def test_a_step_that_uses_up_its_batch_gets_a_whole_one_each_time(seen: list[Tensor]) -> None:
    class Eats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))

        def calibration_step(self, batch: dict[str, Tensor]) -> Tensor:
            x = batch.pop("x")
            return self.net(x.mul_(2))

    batches = [{"x": torch.randn(5, 8)} for _ in range(2)]
    before = snapshot(batches)
    quantize(Eats(), GPTQ(4, None), calibration=batches)
    assert_same_state(before, batches)
    torch.testing.assert_close(seen[0][0], 4 * sum(squares(x) for x in before.values()), rtol=1e-5, atol=1e-4)
