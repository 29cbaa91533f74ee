"""Masks as data: packed, checked, read, grown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils import prune

from lightning_compress import CompressionError
from lightning_compress.pruning.budget import SparsityBudget
from lightning_compress.pruning.masks import check_masks, pack, read_masks, sparsity_of, unpack
from lightning_compress.pruning.recipe import find_method

SHAPES = st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple)


@st.composite
def random_masks(draw: st.DrawFn) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    shapes = draw(st.lists(st.lists(st.integers(1, 7), max_size=4).map(tuple), max_size=4))
    return {f"layer{i}.weight": torch.rand(shape, generator=generator) < 0.5 for i, shape in enumerate(shapes)}


@given(random_masks())
def test_pack_and_unpack_are_inverse(masks: dict[str, Tensor]) -> None:
    again = unpack(pack(masks))
    assert list(again) == list(masks)
    for name, mask in masks.items():
        assert again[name].dtype == torch.bool
        assert again[name].shape == mask.shape
        assert torch.equal(again[name], mask), name


@given(random_masks())
def test_packed_masks_take_one_bit_an_element(masks: dict[str, Tensor]) -> None:
    for name, entry in pack(masks).items():
        assert entry["bits"].numel() == -(-masks[name].numel() // 8)


def test_packed_masks_load_with_weights_only(tmp_path: Path) -> None:
    masks = {"a": torch.tensor([[True, False, True]])}
    torch.save(pack(masks), tmp_path / "packed.pt")
    assert torch.equal(unpack(torch.load(tmp_path / "packed.pt", weights_only=True))["a"], masks["a"])


def test_packing_a_mask_that_is_not_contiguous() -> None:
    mask = (torch.arange(12).view(3, 4) % 5 < 2).T
    assert torch.equal(unpack(pack({"a": mask}))["a"], mask)


def grow(weights: dict[str, Tensor], masks: dict[str, Tensor], sparsity: float, scope: Any) -> dict[str, Tensor]:
    return SparsityBudget(sparsity, scope).grow(find_method("l1_unstructured"), weights, masks, {})


@given(
    st.lists(SHAPES, min_size=1, max_size=3), st.floats(0, 0.99), st.floats(0, 0.99), st.booleans(), st.integers(0, 9)
)
def test_growing_keeps_what_is_pruned_and_is_exact(
    shapes: list[tuple[int, ...]], first: float, second: float, everywhere: bool, seed: int
) -> None:
    low, high = sorted((first, second))
    generator = torch.Generator().manual_seed(seed)
    weights = {str(i): torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    scope = "global" if everywhere else "layer"
    early = grow(weights, masks, low, scope)
    # The weights move between two events.
    moved = {name: torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}
    late = grow(moved, early, high, scope)
    for name in weights:
        assert not (late[name] & ~early[name]).any()
        if scope == "layer":
            assert int((~late[name]).sum()) == round(high * weights[name].numel())
    if scope == "global":
        total = sum(weight.numel() for weight in weights.values())
        assert sum(int((~mask).sum()) for mask in late.values()) == round(high * total)


def test_growing_to_less_than_there_is_changes_nothing() -> None:
    weight = torch.arange(1.0, 11.0)
    mask = weight > 8
    for scope in ("global", "layer"):
        grown = grow({"a": weight}, {"a": mask}, 0.5, scope)
        assert torch.equal(grown["a"], mask)


def test_masked_elements_are_counted_and_not_zeros() -> None:
    # Half of the weights happen to be zero before anything is pruned.
    weight = torch.tensor([0.0, 0.0, 3.0, 4.0])
    grown = grow({"a": weight}, {"a": torch.ones(4, dtype=torch.bool)}, 0.25, "global")
    assert int((~grown["a"]).sum()) == 1


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"b": torch.ones(2, 3)}, r"must name targeted weights\. Received: 'b'"),
        ({"a.wieght": torch.ones(2, 3)}, r"Nearest: a\.weight"),
        ({"a.weight": torch.ones(3, 2)}, r"weight's shape \(2, 3\)\. Received: a\.weight with \(3, 2\)"),
        ({"a.weight": [[1, 1, 1]] * 2}, r"Received: a\.weight with list"),
        ({"a.weight": torch.full((2, 3), 0.5)}, "only 0 and 1"),
        ({"a.weight": torch.full((2, 3), float("nan"))}, "only 0 and 1"),
    ],
    ids=["unknown", "near", "shape", "no tensor", "half", "nan"],
)
def test_masks_that_do_not_fit(masks: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        check_masks(masks, {"a.weight": torch.ones(2, 3)})


def test_a_weight_without_a_mask_stays_dense() -> None:
    checked = check_masks({"a": torch.tensor([1.0, 0.0])}, {"a": torch.ones(2), "b": torch.ones(3)})
    assert checked["a"].tolist() == [True, False]
    assert checked["b"].tolist() == [True, True, True]


@pytest.mark.parametrize("content", ["missing", "text", "list", "nested", "pickle"])
def test_files_that_hold_no_masks(content: str, tmp_path: Path) -> None:
    path = tmp_path / "masks.pt"
    if content == "text":
        path.write_text("no masks")
    elif content != "missing":
        torch.save(
            {"list": [1], "nested": {"a": {"b": torch.ones(1)}}, "pickle": {"a": prune.L1Unstructured}}[content], path
        )
    with pytest.raises(CompressionError, match=r"`mask_file` must (be a readable file|hold a dict).*masks\.pt"):
        read_masks(str(path))


def test_sparsity_of_nothing_is_zero() -> None:
    assert sparsity_of({}) == 0.0
    assert sparsity_of({"a": torch.tensor([True, False]), "b": torch.zeros(2, dtype=torch.bool)}) == 0.75
