"""GPTQ against the published algorithm, written slowly, and the Hessians that it is given against brute force."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
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
from lightning_compress.quantization.numerics.gptq import gptq
from tests.support.few_bits import CHILD, rounded
from tests.support.oracles import assert_same_state, hooks, snapshot

Array = np.ndarray[Any, Any]


# The reference.


def bfloat16_above(number: float) -> float:
    """The least bfloat16 that isn't below a positive number: its 24-bit significand, cut to 8 bits, and one up."""
    fraction, exponent = math.frexp(number)
    return math.ldexp(math.ceil(fraction * 2**8 * (1 - 1e-12)), exponent - 8)


def scale_and_zero(block: Array, bits: int, symmetric: bool) -> tuple[float, float]:
    high, low = max(block.max(), 0.0), min(block.min(), 0.0)
    half = 2 ** (bits - 1)
    if symmetric:
        return bfloat16_above(max(high / (half - 1), -low / half)), half
    scale = bfloat16_above((high - low) / (2**bits - 1))
    return scale, float(np.rint(-low / scale))


def damped(hessian: Array, damping: float) -> Array:
    """A fraction of the mean diagonal more; inputs that never came have the mean of the others."""
    hessian = hessian.copy()
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = np.diag(hessian)[~dead].mean() if not dead.all() else 1.0
    return hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))


def by_elimination(
    matrix: Array, hessian: Array, bits: int, group: int | None, symmetric: bool, damping: float, order: bool
) -> tuple[Array, Array, Array]:
    """Optimal Brain Quantization in a fixed order (section 3.2): one row and one weight at a time, in float64.

    The inverse Hessian of what is left comes from Gaussian elimination of the weight that was just rounded, equation 3.
    """
    rows, columns = matrix.shape
    size = group or columns
    inverse = np.linalg.inv(damped(hessian, damping))
    turns = np.argsort(-np.diag(hessian), kind="stable") if order else np.arange(columns)
    shape = rows, -(-columns // size)
    codes, scales, zeros = np.zeros(matrix.shape), np.zeros(shape), np.zeros(shape)
    for row in range(rows):
        w, h = matrix[row].astype(np.float64).copy(), inverse.copy()
        if order:
            for block in range(shape[1]):
                part = w[block * size : (block + 1) * size]
                scales[row, block], zeros[row, block] = scale_and_zero(part, bits, symmetric)
        for i in turns:
            block = i // size
            if not order and i % size == 0:
                scales[row, block], zeros[row, block] = scale_and_zero(w[i : i + size], bits, symmetric)
            s, z = scales[row, block], zeros[row, block]
            codes[row, i] = np.clip(np.rint(w[i] / s) + z, 0, 2**bits - 1)
            w -= (w[i] - s * (codes[row, i] - z)) / h[i, i] * h[i]
            h -= np.outer(h[:, i], h[i]) / h[i, i]
    return codes, scales, zeros


def by_cholesky(
    matrix: Array, hessian: Array, bits: int, group: int | None, symmetric: bool, damping: float
) -> tuple[Array, Array, Array]:
    """Algorithm 1 of the paper with one block of columns, in float64."""
    rows, columns = matrix.shape
    size = group or columns
    upper = np.linalg.cholesky(np.linalg.inv(damped(hessian, damping))).T
    w = matrix.astype(np.float64).copy()
    shape = rows, -(-columns // size)
    codes, scales, zeros = np.zeros(matrix.shape), np.zeros(shape), np.zeros(shape)
    for j in range(columns):
        if j % size == 0:
            for row in range(rows):
                found = scale_and_zero(w[row, j : j + size], bits, symmetric)
                scales[row, j // size], zeros[row, j // size] = found
        s, z = scales[:, j // size], zeros[:, j // size]
        codes[:, j] = np.clip(np.rint(w[:, j] / s) + z, 0, 2**bits - 1)
        error = (w[:, j] - s * (codes[:, j] - z)) / upper[j, j]
        w[:, j:] -= np.outer(error, upper[j, j:])
    return codes, scales, zeros


def problem(rows: int, columns: int, seed: int = 0, samples: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix, inputs that are correlated, and their X^T X."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(samples or 4 * columns, columns, generator=generator)
    mixing = torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=generator) / columns**0.5
    x = x @ mixing * (0.2 + torch.rand(columns, generator=generator))
    return weight, x, x.T @ x


def output_error(x: Tensor, weight: Tensor, values: Tensor) -> float:
    return float((x.double() @ (weight.double() - values.double()).T).square().sum())


def values_of(codes: Tensor, scale: Tensor, zero: Tensor, group: int | None) -> Tensor:
    size = group or codes.shape[-1]
    each = torch.arange(codes.shape[-1]) // size
    return scale[..., each].double() * (codes.double() - zero[..., each].double())


def nearest(weight: Tensor, bits: int, group: int | None, symmetric: bool) -> Tensor:
    size = group or weight.shape[1]
    values = torch.zeros(weight.shape, dtype=torch.float64)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], size):
            block = weight[row, start : start + size].double().numpy()
            s, z = scale_and_zero(block, bits, symmetric)
            q = np.clip(np.rint(block / s) + z, 0, 2**bits - 1)
            values[row, start : start + size] = torch.from_numpy(s * (q - z))
    return values


# The algorithm.


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 8, 7, 24, 100])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_those_of_the_published_algorithm(bits: int, group: int | None, symmetric: bool, order: bool) -> None:
    weight, _, hessian = problem(4, 24, seed=bits)
    codes, scale, zero = gptq(weight, hessian, bits, group, symmetric, 0.01, order)
    got = [each.double().numpy() for each in (codes, scale, zero)]
    expected = by_elimination(weight.numpy(), hessian.double().numpy(), bits, group, symmetric, 0.01, order)
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert np.array_equal(one, other)
    if not order:
        other = by_cholesky(weight.numpy(), hessian.double().numpy(), bits, group, symmetric, 0.01)
        assert all(np.array_equal(a, b) for a, b in zip(expected, other, strict=True))


@pytest.mark.parametrize(
    ("columns", "group", "order"),
    [
        (300, None, False),
        (300, 96, False),  # 96 to 192 and 192 to 288 cross borders of 128 columns
        (300, 150, False),
        (290, 200, False),
        (256, 128, False),
        (300, 77, False),
        (129, 64, False),  # one column alone behind the first 128
        (300, 96, True),
    ],
)
def test_more_columns_than_are_updated_at_a_time(columns: int, group: int | None, order: bool) -> None:
    weight, _, hessian = problem(2, columns)
    codes, scale, zero = gptq(weight, hessian, 3, group, False, 0.1, order)
    expected = by_elimination(weight.numpy(), hessian.double().numpy(), 3, group, False, 0.1, order)
    for one, other in zip((codes, scale, zero), expected, strict=True):
        assert np.array_equal(one.double().numpy(), other)


@settings(max_examples=40)
@given(
    columns=st.integers(1, 40),
    group=st.sampled_from([None, 2, 5, 16]),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    order=st.booleans(),
    dead=st.integers(0, 3),
    magnitude=st.sampled_from([1e-4, 1.0, 1e4]),
    seed=st.integers(0, 2**16),
)
def test_any_problem_is_solved_as_the_reference_solves_it(
    columns: int, group: int | None, bits: int, symmetric: bool, order: bool, dead: int, magnitude: float, seed: int
) -> None:
    weight, x, _ = problem(2, columns, seed)
    x[:, :: max(1, columns // 3)][:, :dead] = 0.0
    hessian = x.T @ x
    codes, scale, zero = gptq(weight * magnitude, hessian, bits, group, symmetric, 0.01, order)
    expected = by_elimination(
        (weight * magnitude).numpy(), hessian.double().numpy(), bits, group, symmetric, 0.01, order
    )
    # Float32 decides a tie in ten thousand the other way, and what comes after in the row follows from it.
    if np.array_equal(scale.double().numpy(), expected[1]) and np.array_equal(codes.double().numpy(), expected[0]):
        return
    ours = values_of(codes, scale, zero, group)
    theirs = values_of(*map(torch.from_numpy, expected), group)
    a, b = (output_error(x, weight * magnitude, one) for one in (ours, theirs))
    assert a <= 1.1 * b


def test_matrices_side_by_side_are_each_their_own() -> None:
    parts = [problem(3, 20, seed) for seed in range(4)]
    for order in (False, True):
        together = gptq(
            torch.stack([w for w, *_ in parts]), torch.stack([h for *_, h in parts]), 3, 8, False, 0.01, order
        )
        for index, (weight, _, hessian) in enumerate(parts):
            alone = gptq(weight, hessian, 3, 8, False, 0.01, order)
            for one, other in zip(together, alone, strict=True):
                assert torch.equal(one[index], other)


def test_arguments_are_left_as_they_are() -> None:
    weight, _, hessian = problem(3, 20)
    before = snapshot([weight, hessian])
    gptq(weight, hessian, 3, 8, False, 0.01, True)
    assert_same_state(before, [weight, hessian])


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, None), (3, 16), (4, None), (4, 32), (8, None)])
def test_a_smaller_output_error_than_rounding_to_the_nearest(
    bits: int, group: int | None, symmetric: bool, order: bool
) -> None:
    for seed in range(3):
        weight, x, hessian = problem(32, 64, seed)
        values = values_of(*gptq(weight, hessian, bits, group, symmetric, 0.01, order), group)
        assert output_error(x, weight, values) < 0.98 * output_error(x, weight, nearest(weight, bits, group, symmetric))


def test_uncorrelated_inputs_leave_nothing_to_make_up_for() -> None:
    # A diagonal Hessian: every weight is rounded to the nearest.
    weight = torch.randn(8, 24)
    for order in (False, True):
        codes, scale, zero = gptq(weight, torch.diag(torch.rand(24) + 0.1), 4, 8, False, 0.01, order)
        assert torch.equal(values_of(codes, scale, zero, 8), nearest(weight, 4, 8, False))


def test_the_first_column_is_the_nearest_and_the_last_is_best_given_all_others() -> None:
    weight, x, hessian = problem(16, 12)
    codes, scale, zero = gptq(weight, hessian, 3, None, True, 1e-6)
    values = values_of(codes, scale, zero, None)
    best = output_error(x, weight, values)
    for change in (-1, 1):  # one step up or down in the last column makes no row better
        other = codes.int().clone()
        other[:, -1] = (other[:, -1] + change).clamp(0, 7)
        errors = (x.double() @ (weight.double() - values_of(other, scale, zero, None)).T).square().sum(0)
        now = (x.double() @ (weight.double() - values).T).square().sum(0)
        assert (errors >= now * (1 - 1e-9)).all()
    assert best > 0


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("factor", [1e-10, 0.5, 2.0, 1e10])
def test_the_unit_of_the_inputs_does_not_matter(factor: float, order: bool) -> None:
    weight, _, hessian = problem(8, 24)
    for one, other in zip(
        gptq(weight, hessian, 3, 8, False, 0.01, order),
        gptq(weight, hessian * factor, 3, 8, False, 0.01, order),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_a_dead_input_does_not_damp_the_others() -> None:
    weight, x, _ = problem(16, 24)
    x[:, 5] = 0.0
    errors = []
    for factor in (1.0, 1e-3):
        hessian = (factor * x).T @ (factor * x)
        errors.append(output_error(x, weight, values_of(*gptq(weight, hessian, 3, None, True), None)))
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


def test_with_activation_order_the_order_of_the_inputs_does_not_matter() -> None:
    weight, _, hessian = problem(8, 24)
    shuffle = torch.randperm(24)
    codes, scale, zero = gptq(weight, hessian, 3, None, False, 0.01, True)
    other = gptq(weight[:, shuffle], hessian[shuffle][:, shuffle], 3, None, False, 0.01, True)
    assert torch.equal(codes[:, shuffle], other[0])
    assert torch.equal(scale, other[1]) and torch.equal(zero, other[2])
    plain = gptq(weight, hessian, 3, None, False, 0.01, False)
    assert not torch.equal(plain[0], codes)


@pytest.mark.parametrize("order", [False, True])
def test_inputs_that_never_come_are_rounded_to_the_nearest_and_move_nothing(order: bool) -> None:
    weight, x, _ = problem(8, 24)
    x[:, [0, 7, 23]] = 0.0
    codes, scale, zero = gptq(weight, x.T @ x, 4, None, True, 0.01, order)
    values = values_of(codes, scale, zero, None)
    error = (values - weight.double()).abs()[:, [0, 7, 23]]
    assert (error <= scale.double() * (0.5 + 1e-4)).all()
    left = [i for i in range(24) if i not in (0, 7, 23)]
    assert output_error(x, weight, values) < output_error(x, weight, nearest(weight, 4, None, True))
    assert error.max() < (values - weight.double()).abs()[:, left].max()


@pytest.mark.parametrize("samples", [1, 3, 10])
def test_fewer_samples_than_inputs(samples: int) -> None:
    weight, x, hessian = problem(8, 40, samples=samples)
    for order in (False, True):
        for damping in (1e-9, 0.01):
            codes, scale, zero = gptq(weight, hessian, 3, 16, False, damping, order)
            values = values_of(codes, scale, zero, 16)
            assert values.isfinite().all()
            assert output_error(x, weight, values) < output_error(x, weight, nearest(weight, 3, 16, False))


def test_without_any_input_to_the_nearest() -> None:
    weight = torch.randn(4, 12)
    codes, scale, zero = gptq(weight, torch.zeros(12, 12), 4, None, True)
    assert torch.equal(values_of(codes, scale, zero, None), nearest(weight, 4, None, True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_hessian_that_is_not_finite_is_refused(value: float) -> None:
    weight, _, hessian = problem(4, 12)
    hessian[3, 4] = value
    with pytest.raises(CompressionError, match=r"`calibration` must be finite\. Received: NaN or infinity"):
        gptq(weight, hessian, 4, None, True)


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
    forms = [quantized.get_submodule(f"{name}.{CHILD}.weight") for name in "ab"]
    assert forms[0] is forms[1]
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
