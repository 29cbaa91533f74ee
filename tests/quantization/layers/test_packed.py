"""Layers with weights of few bits: what they compute, for inputs of any shape and type."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import (
    GPTQ,
    NF4,
    WeightOnly,
    quantize,
)
from lightning_compress.quantization.layers import packed
from lightning_compress.quantization.layers.schemes import Packed
from tests.quantization.layers.packed_cases import CASES, FEW, Lookup, build, fully, layers_of, stored_in
from tests.quantization.test_quantize import agreement
from tests.support.few_bits import NF4_CONSTANTS, rounded
from tests.support.oracles import assert_same_state, same_random_state, snapshot

ROUNDED: list[Packed] = [
    WeightOnly(8),
    WeightOnly(4, 16),
    WeightOnly(3, 5, symmetric=False),
    WeightOnly(2, None, symmetric=False),
    WeightOnly(2, 8),
    WeightOnly(5, 1000),
    NF4(64),
    NF4(6),
]


FITTED: list[Packed] = [GPTQ(4, 16), GPTQ(3, 5, symmetric=False, activation_order=True)]


SCHEMES = ROUNDED + FITTED


EXACT: list[Packed] = [WeightOnly(8), WeightOnly(4, 8, symmetric=False), GPTQ(3, 8)]
"""Their values are few bits times few bits, without rounding."""


def next_bfloat16(numbers: Tensor) -> Tensor:
    """The least bfloat16 that isn't below each positive number, in float64."""
    near = numbers.to(torch.bfloat16)
    above = torch.nextafter(near, torch.full_like(near, torch.inf))
    return torch.where(near.double() < numbers.double() * (1 - 1e-6), above, near).double()


# What is computed.


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_output_is_the_float_one_with_the_weights_that_are_stored(scheme: Packed, case: str) -> None:
    model, batch = build(case)
    before = snapshot(model)
    with same_random_state():
        quantized = fully(model, scheme, batch)
    assert_same_state(before, model)
    assert set(stored_in(quantized)) == set(layers_of(model))
    stored = rounded(model, quantized)
    assert not any(
        torch.equal(a, b) for a, b in zip(stored.parameters(), model.parameters(), strict=True) if a.dim() > 1
    )
    with torch.no_grad():
        got, expected = quantized(**batch), stored(**batch)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
    if getattr(scheme, "bits", 4) >= 4:
        assert agreement(model(**batch), got) > 0.9


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scheme", ROUNDED, ids=str)
def test_each_stored_weight_is_within_half_a_step(scheme: Packed, case: str) -> None:
    model, _ = build(case)
    stored = rounded(model, fully(model, scheme))
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        exact, got = (one.detach().flatten(1).double() for one in (parameter, stored.get_parameter(name)))
        size = (scheme.block_size if isinstance(scheme, NF4) else scheme.group_size) or exact.shape[1]
        for start in range(0, exact.shape[1], size):
            part, error = exact[:, start : start + size], (exact - got)[:, start : start + size].abs().amax(1)
            high, low = part.amax(1).clamp(min=0), part.amin(1).clamp(max=0)
            if isinstance(scheme, NF4):
                # Half the widest gap, and scales that are off by a little.
                limit = part.abs().amax(1) * ((1 + NF4_CONSTANTS[1]) / 2 + 0.03)
            elif scheme.symmetric:
                limit = torch.maximum(high / (2 ** (scheme.bits - 1) - 1), -low / 2 ** (scheme.bits - 1)) / 2
            else:
                limit = (high - low) / (2**scheme.bits - 1) / 2
            if scheme.bits >= 4 or not scheme.symmetric:
                assert (error <= limit * (1 + 2**-7 + 1e-3)).all(), name
                continue
            # Below 4 bits the step is made smaller where the few values that it clips matter less than all others.
            step = next_bfloat16((2 * limit).clamp(min=1e-38))[:, None]
            zero = 2 ** (scheme.bits - 1)
            plain = step * ((part / step).round().add(zero).clamp(0, 2**scheme.bits - 1) - zero)
            squares, reached = ((one - part).square().sum(1) for one in (got[:, start : start + size], plain))
            assert (squares <= reached * (1 + 1e-3) + 1e-12).all(), name
        assert (got[exact == 0] == 0).all()


@pytest.mark.parametrize("scheme", FEW, ids=str)
def test_several_blocks_of_rows_and_gradients_to_the_input(scheme: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_BLOCK", 50)
    for case in ("linear", "conv2d", "attention", "decoder"):
        model, batch = build(case)
        quantized = fully(model, scheme, batch)
        stored = rounded(model, quantized)
        outputs = []
        for one in (quantized, stored):
            inputs = {key: value.clone().requires_grad_() for key, value in batch.items()}
            output = one(**inputs)
            output = output[0] if isinstance(output, tuple) else output
            outputs.append((output, *torch.autograd.grad(output.square().sum(), list(inputs.values()))))
        assert outputs[0][1].abs().max() > 1e-3
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", FEW, ids=str)
def test_derivatives_by_differences(scheme: Packed) -> None:
    model, batch = build("linear")
    quantized = fully(model.double(), scheme, {"input": batch["input"].double()})
    x = batch["input"][:2].double().requires_grad_()
    assert torch.autograd.gradcheck(quantized, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: quantized(x).square(), (x,), fast_mode=True)
    one = torch.func.vmap(torch.func.jacrev(quantized))(x.detach())
    expected = torch.func.vmap(torch.func.jacrev(rounded(model, quantized)))(x.detach())
    torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-6)


def test_bias_and_float_layers_train_on_and_stored_weights_do_not() -> None:
    model, batch = build("encoder")
    quantized = quantize(model, "nf4").train()
    packed = {key for key, value in quantized.state_dict().items() if value.dtype == torch.uint8}
    packed |= {f"{key}_{name}" for key in packed for name in ("scale_offset", "scale_step")}
    trainable = [name for name, parameter in quantized.named_parameters() if parameter.requires_grad]
    assert trainable == [name for name, _ in model.named_parameters() if name not in packed]
    before = snapshot(quantized)
    optimizer = torch.optim.SGD(quantized.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = (quantized(**batch) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = quantized.state_dict()
    assert all(torch.equal(before[key], after[key]) == (key in packed) for key in before)


# 4 bits on the CPU, in blocks of 32 and more: torch has a kernel for few rows of activations.


def kernel_sized(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64))


KERNEL: list[Packed] = [WeightOnly(4, 32), WeightOnly(4, 64, symmetric=False), WeightOnly(4), NF4(64)]


@pytest.mark.parametrize("scheme", KERNEL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_rows_of_any_shape_for_the_kernel(scheme: Packed, dtype: torch.dtype) -> None:
    model = kernel_sized().to(dtype)
    quantized = fully(model, scheme)
    before = snapshot(quantized)
    stored = rounded(model, quantized)
    for shape in ((128,), (1, 128), (2, 3, 128), (16, 128), (17, 128), (0, 128)):
        x = torch.randn(shape).to(dtype)
        with torch.no_grad():
            got, expected = quantized(x), stored(x)
        assert got.dtype == dtype and got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=3e-2, atol=3e-2)
    assert_same_state(before, quantized)
    assert_same_state(before, copy.deepcopy(quantized))
    assert_same_state(rounded(model, quantized), stored)


@pytest.mark.parametrize("scheme", KERNEL, ids=str)
def test_few_rows_compute_what_many_do_but_for_activations_in_bfloat16(scheme: Packed) -> None:
    model, x = kernel_sized(), torch.randn(40, 128)
    quantized = fully(model, scheme)
    with torch.no_grad():
        many = quantized(x)
        few = quantized(x[:3])
    assert (few - many[:3]).norm() / many[:3].norm() < (1e-2 if isinstance(scheme, WeightOnly) else 1e-5)
    torch.testing.assert_close(quantized(x.requires_grad_()), many, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", KERNEL, ids=str)
def test_parameters_and_states_can_be_copied_at_any_time(scheme: Packed) -> None:
    x = torch.randn(3, 128)
    used, fresh = fully(kernel_sized(), scheme), fully(kernel_sized(1), scheme)
    taken, state = (
        {key: value.clone() for key, value in tensors.items()}
        for tensors in (dict(used.named_parameters()), used.state_dict())
    )
    expected = used(x)
    assert torch.equal(torch.func.functional_call(used, taken, (x,)), expected)
    taken["0.weight"] = torch.zeros_like(taken["0.weight"])
    assert not torch.equal(torch.func.functional_call(used, taken, (x,)), expected)
    assert torch.equal(used(x), expected)
    average = torch.optim.swa_utils.AveragedModel(fully(kernel_sized(), scheme))
    average.update_parameters(used)
    assert torch.equal(average(x), expected)
    assert_same_state(state, used)
    fresh(x)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), expected)


def test_a_tied_embedding_looks_up_the_same_after_a_product() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"words": nn.Embedding(64, 128), "head": nn.Linear(128, 64, bias=False)})
    model["head"].weight = model["words"].weight
    quantized = fully(model, WeightOnly(4, 32))
    ids = torch.tensor([0, 5, 63, 5, 31, 32])
    before = quantized["words"](ids)
    for rows in (1, 4, 20):
        quantized["head"](torch.randn(rows, 128))
        assert torch.equal(quantized["words"](ids), before)
    twin = copy.deepcopy(quantized)
    twin.load_state_dict(quantized.state_dict())
    assert torch.equal(twin["words"](ids), before)


# Shapes of inputs.


@pytest.mark.parametrize("scheme", FEW, ids=str)
def test_empty_batches_single_rows_and_unbatched_images(scheme: Packed) -> None:
    model, batch = build("linear")
    quantized = fully(model, scheme, batch)
    stored = rounded(model, quantized)
    for shape in ((24,), (0, 24), (3, 0, 24), (2, 3, 4, 24)):
        x = torch.randn(shape)
        torch.testing.assert_close(quantized(x), stored(x), rtol=1e-4, atol=1e-5)
    for case in ("conv1d", "conv2d", "conv3d"):
        model, batch = build(case)
        quantized = fully(model, scheme, batch)
        stored = rounded(model, quantized)
        if case != "conv2d":  # BatchNorm takes no single image
            torch.testing.assert_close(quantized(batch["input"][0]), stored(batch["input"][0]), rtol=1e-4, atol=1e-5)
        assert quantized(batch["input"][:0]).shape == stored(batch["input"][:0]).shape


@pytest.mark.parametrize("scheme", FEW, ids=str)
def test_ids_of_any_shape_and_none_out_of_range(scheme: Packed) -> None:
    model = nn.Sequential(nn.Embedding(11, 6, padding_idx=2))
    quantized = fully(model, scheme, {"input": torch.arange(11)})
    stored = rounded(model, quantized)
    assert not quantized(torch.tensor([2])).any()
    every = torch.arange(11)
    for ids in (every, torch.tensor(3), every[:0], every[:10].view(2, 5), torch.zeros(0, 5).long(), every.int()):
        torch.testing.assert_close(quantized(ids), stored(ids))
    for ids in (torch.tensor([-1]), torch.tensor([11])):
        with pytest.raises(IndexError):
            quantized(ids)


def test_keywords_reach_a_layer_as_they_did() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.mix, self.last = nn.Embedding(9, 8), nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.last(input=self.mix(input=self.words(input=ids).mT).mT)

    model, ids = Named().eval(), torch.randint(9, (2, 5))
    quantized = fully(model, WeightOnly(4, 4))
    torch.testing.assert_close(quantized(ids), rounded(model, quantized)(ids), rtol=1e-4, atol=1e-5)


# Types.


@pytest.mark.parametrize("case", ["linear", "conv2d", "embedding", "attention", "encoder", "decoder"])
@pytest.mark.parametrize("scheme", FEW, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_types(case: str, scheme: Packed, dtype: torch.dtype) -> None:
    model, batch = build(case)
    model = model.to(dtype)
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    quantized = fully(model, scheme, batch)
    stored = rounded(model, quantized)
    with torch.no_grad():
        got, expected = quantized(**batch), stored(**batch)
    got, expected = (one[0] if isinstance(one, tuple) else one for one in (got, expected))
    assert got.dtype == expected.dtype == dtype
    precise = dtype == torch.float64 and scheme in EXACT and case not in ("attention", "encoder")
    tolerance = 1e-9 if precise else {torch.float64: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", ["linear", "conv2d", "embedding", "attention", "encoder"])
@pytest.mark.parametrize("scheme", FEW, ids=str)
def test_autocast_computes_in_the_type_that_the_float_model_would(case: str, scheme: Packed) -> None:
    model, batch = build(case)
    quantized = fully(model, scheme, batch)
    stored = rounded(model, quantized)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = quantized(**batch), stored(**batch)
    got, expected = (one[0] if isinstance(one, tuple) else one for one in (got, expected))
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=8e-2, atol=8e-2)


def test_autocast_leaves_float64_alone() -> None:
    model, batch = build("linear")
    x = batch["input"].double()
    quantized = fully(model.double(), WeightOnly(8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert quantized(x).dtype == model(x).dtype == torch.float64


def test_on_the_meta_device() -> None:
    # No constant stays behind on the CPU; and what counts operations runs models there.
    for case in CASES:
        model, batch = build(case)
        for scheme in FEW:
            quantized = fully(model, scheme, batch).to("meta")
            output = quantized(**{key: value.to("meta") for key, value in batch.items()})
            expected = model(**batch)
            if isinstance(output, tuple):
                output, expected = output[0], expected[0]
            assert output.device.type == "meta" and output.shape == expected.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scheme", FEW, ids=str)
def test_moving_a_model_to_another_type_keeps_the_stored_weights(scheme: Packed, dtype: torch.dtype) -> None:
    model = Lookup()
    with torch.no_grad():
        model.body.weight *= 1e-4  # steps that float16 can't tell from zero
    ids = torch.randint(11, (3, 4))
    quantized = fully(model, scheme, {"ids": ids})
    before = snapshot(rounded(model, quantized))
    moved = quantized.to(dtype)
    assert moved is quantized and moved(ids).dtype == dtype
    assert_same_state(before, rounded(model, moved))
    reference = rounded(model, moved).to(dtype)
    torch.testing.assert_close(moved(ids).double(), reference(ids).double(), rtol=4e-2, atol=2e-2)


@pytest.mark.parametrize("scheme", FEW, ids=str)
def test_in_inference_mode_and_made_in_it(scheme: Packed) -> None:
    model, batch = build("encoder")
    expected = fully(model, scheme, batch)(**batch)
    with torch.inference_mode():
        quantized = fully(model, scheme, batch)
        inside = quantized(**batch)
    torch.testing.assert_close(inside, expected, rtol=1e-5, atol=1e-6)
    x = batch["x"].clone().requires_grad_()
    quantized(x, batch["padding"]).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert not any(tensor.is_inference() for tensor in quantized.state_dict(keep_vars=True).values())
