"""`take_smallest` against lists that are sorted."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress.pruning import smallest
from lightning_compress.pruning.smallest import take_smallest
from tests.support.oracles import assert_same_state, snapshot

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SPECIAL = (0.0, -0.0, 1.0, -1.0, 0.5, -0.5, math.inf, -math.inf, math.nan, 1e-7, -1e-7, 1e-42, 3.0, 65504.0)


def obvious(
    tensors: list[Tensor], masks: list[Tensor], count: int, allowed: list[Tensor] | None = None, signed: bool = False
) -> list[list[bool]]:
    """All entries that may go in one Python list, sorted by value, then by their place; the first `count` go."""
    dtype = reduce(torch.promote_types, {tensor.dtype for tensor in tensors})
    entries = []
    for i, (tensor, mask) in enumerate(zip(tensors, masks, strict=True)):
        values = (tensor if signed else tensor.abs()).to(dtype).flatten().tolist()
        may = mask.flatten().tolist()
        if allowed is not None:
            may = [a and b for a, b in zip(may, allowed[i].flatten().tolist(), strict=True)]
        entries += [((math.isnan(v), 0.0 if math.isnan(v) else v, i, j)) for j, v in enumerate(values) if may[j]]
    left = [mask.flatten().tolist() for mask in masks]
    for _, _, i, j in sorted(entries)[:count]:
        left[i][j] = False
    return left


def check(tensors: list[Tensor], masks: list[Tensor], count: int, **kwargs: Any) -> None:
    before = snapshot([tensors, masks, kwargs.get("allowed")])
    found = take_smallest(tensors, masks, count, **kwargs)
    assert_same_state(before, snapshot([tensors, masks, kwargs.get("allowed")]))
    taken = sum(int(mask.sum()) for mask in masks) - sum(int(mask.sum()) for mask in found)
    assert taken == count
    for got, mask in zip(found, masks, strict=True):
        assert got.dtype == torch.bool and got.shape == mask.shape
        assert got.data_ptr() != mask.data_ptr()
    assert [mask.flatten().tolist() for mask in found] == obvious(tensors, masks, count, **kwargs)


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES, nan: bool = True) -> dict[str, Any]:
    """A few tensors of random shapes, values with many ties, some taken already, some not allowed, and a count."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    special = [value for value in SPECIAL if nan or not math.isnan(value)]
    kinds = draw(st.lists(st.sampled_from(["normal", "ties", "special", "zeros"]), min_size=1, max_size=4))
    tensors, masks = [], []
    for kind in kinds:
        shape = draw(st.lists(st.integers(1, 6), max_size=3).map(tuple))
        dtype = draw(st.sampled_from(dtypes))
        if kind == "normal":
            values = torch.randn(shape, generator=generator)
        elif kind == "ties":
            values = torch.randint(-2, 3, shape, generator=generator).float()
        elif kind == "special":
            values = torch.tensor(special)[torch.randint(len(special), shape, generator=generator)]
        else:
            values = torch.zeros(shape)
        tensors.append(values.to(dtype))
        masks.append(torch.rand(shape, generator=generator) < draw(st.sampled_from([0.4, 0.9, 1.1])))
    allowed = None
    if draw(st.booleans()):
        allowed = [torch.rand(mask.shape, generator=generator) < 0.6 for mask in masks]
    free = masks if allowed is None else [m & a for m, a in zip(masks, allowed, strict=True)]
    most = sum(int(mask.sum()) for mask in free)
    if most == 0:
        masks[0] = torch.ones_like(masks[0])
        allowed, most = None, masks[0].numel() + sum(int(mask.sum()) for mask in masks[1:])
    return {"tensors": tensors, "masks": masks, "count": draw(st.integers(1, most)), "allowed": allowed}


@given(case=cases())
@settings(max_examples=150)
def test_it_is_what_sorting_says(case: dict[str, Any]) -> None:
    check(**case)


@given(case=cases(nan=False))
@settings(max_examples=100)
def test_signed_it_is_what_sorting_by_value_says(case: dict[str, Any]) -> None:
    check(**case, signed=True)


@given(case=cases(), chunk=st.integers(1, 7), signed=st.booleans())
@settings(max_examples=100)
def test_entries_in_many_chunks_give_the_same(case: dict[str, Any], chunk: int, signed: bool) -> None:
    whole = take_smallest(**case, signed=signed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smallest, "_CHUNK", chunk)
        parts = take_smallest(**case, signed=signed)
    assert_same_state(whole, parts)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_count_from_one_to_all(dtype: torch.dtype, signed: bool) -> None:
    values = torch.tensor([2, -1, 0, 1, -2, 1, 0, 3, -3, 1], dtype=dtype)
    tensors, masks = [values[:4].view(2, 2), values[4:]], [torch.ones(2, 2) == 1, torch.ones(6) == 1]
    for count in range(1, 11):
        check(tensors, masks, count, signed=signed)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbouring_values_are_told_apart(dtype: torch.dtype, signed: bool) -> None:
    # The smallest difference that the type knows decides too, in both digits and for both signs.
    if signed and dtype == torch.float64:
        pytest.skip("values are ranked as float32, and say so")
    generator = torch.Generator().manual_seed(1)
    start = torch.tensor([1.0, -1.0, 0.0, 1000.0, -0.25]).to(dtype)
    ladder = [start]
    for _ in range(8):
        ladder.append(torch.nextafter(ladder[-1], torch.full_like(start, torch.inf)))
    values = torch.cat(ladder)
    values = values[torch.randperm(len(values), generator=generator)]
    for count in range(1, len(values)):
        check([values], [torch.ones_like(values) == 1], count, signed=signed)


@pytest.mark.parametrize("signed", [False, True])
def test_nan_ranks_above_infinity_whatever_its_sign(signed: bool) -> None:
    # 0 / 0 is a NaN with its sign bit set on many CPUs.
    negative = torch.tensor([-4194304], dtype=torch.int32).view(torch.float32)
    assert negative.isnan().all() and negative.signbit().all()
    values = torch.cat([negative, torch.tensor([torch.inf, torch.nan, 1.0, -2.0])])
    for count in range(1, 6):
        check([values], [torch.ones(5) == 1], count, signed=signed)


@given(seed=st.integers(0, 999), count=st.integers(1, 12), signed=st.booleans())
@settings(max_examples=60)
def test_tensors_and_masks_that_are_not_contiguous(seed: int, count: int, signed: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(-3, 4, (8, 6), generator=generator).float()
    tensors = [base.T[::2], torch.randn(3, 4, 2, generator=generator).permute(2, 0, 1), torch.ones(1).expand(5)]
    masks = [(torch.rand(8, 6, generator=generator) < 0.8).T[::2], torch.ones(3, 2, 4).mT.permute(2, 0, 1) == 1]
    masks.append(torch.ones(1).expand(5) == 1)
    allowed = [torch.rand(tensor.shape[::-1], generator=generator).T < 0.8 for tensor in tensors[:1]]
    allowed += [torch.ones_like(mask) for mask in masks[1:]]
    assert not tensors[0].is_contiguous() and not masks[0].is_contiguous() and not allowed[0].is_contiguous()
    check(tensors, masks, count, allowed=allowed, signed=signed)


def test_views_of_one_expanded_element_count_each() -> None:
    mask = torch.ones(1, dtype=torch.bool).expand(4)
    assert take_smallest([torch.ones(4)], [mask], 3)[0].tolist() == [False, False, False, True]
    assert mask.all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_entries_than_one_chunk(dtype: torch.dtype) -> None:
    size = (1 << 18) + 1000
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, generator=generator).to(dtype)
    small = torch.randn(77, generator=generator).to(dtype)
    masks = [torch.rand(size, generator=generator) < 0.9, torch.ones(77) == 1]
    free = int(masks[0].sum()) + 77
    for count in (1, free // 3, free - 1):
        found = take_smallest([weight, small], masks, count)
        assert sum(int(mask.sum()) for mask in found) == free - count
        gone = [mask & ~got for mask, got in zip(masks, found, strict=True)]
        highest_gone = max(
            float(t[g].abs().double().max()) for t, g in zip((weight, small), gone, strict=True) if g.any()
        )
        lowest_kept = min(
            float(t[k].abs().double().min()) for t, k in zip((weight, small), found, strict=True) if k.any()
        )
        assert highest_gone <= lowest_kept


def test_parameters_that_require_grad() -> None:
    weight = torch.nn.Parameter(torch.tensor([0.5, -0.1, 3.0, 0.2]))
    [mask] = take_smallest([weight], [torch.ones(4, dtype=torch.bool)], 2)
    assert mask.tolist() == [True, False, True, False] and not mask.requires_grad
