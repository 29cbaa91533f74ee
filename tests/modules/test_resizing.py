"""Parameters, gradients and optimizers' state change their size together."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_compress.modules.resizing import Cut, assign_, cut_state, lies_along, resize_, resize_state_, take
from tests.support.oracles import assert_same_state

sizes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(sizes, st.data())
def test_slices_are_those_of_numpy(shape: list[int], data: st.DataObject) -> None:
    tensor = torch.arange(float(np.prod(shape))).view(shape)
    kept_indices = _indices(shape, data)
    expected = tensor.numpy()
    for dim, indices in kept_indices.items():
        expected = np.take(expected, indices, axis=dim)
    got = take(tensor, {dim: torch.tensor(indices) for dim, indices in kept_indices.items()})
    assert_same_state(got, torch.from_numpy(expected.copy()))


@given(sizes, st.data())
def test_cut_twice_is_cut_once_to_what_stays_in_both(shape: list[int], data: st.DataObject) -> None:
    first, second = _indices(shape, data), _indices(shape, data)
    twice, once = (nn.Parameter(torch.arange(float(np.prod(shape))).view(shape)) for _ in range(2))
    twice.grad, once.grad = twice.detach() + 0.5, once.detach() + 0.5
    both = {dim: sorted(set(first.get(dim, range(size))) & set(second.get(dim, range(size)))) for dim, size in
            enumerate(shape)}  # fmt: skip
    resize_(twice, {dim: torch.tensor(indices) for dim, indices in first.items()})
    left = {dim: [first[dim].index(index) for index in indices if index in first[dim]] if dim in first else indices
            for dim, indices in second.items()}  # fmt: skip
    resize_(twice, {dim: torch.tensor(indices, dtype=torch.int64) for dim, indices in left.items()})
    resize_(once, {dim: torch.tensor(indices, dtype=torch.int64) for dim, indices in both.items()})
    assert_same_state([twice, twice.grad], [once, once.grad])


def _indices(shape: list[int], data: st.DataObject) -> dict[int, list[int]]:
    kept_indices = {}
    for dim, size in enumerate(shape):
        if data.draw(st.booleans()):
            kept_indices[dim] = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1)))
    return kept_indices


def test_state_of_an_unknown_layout_starts_anew() -> None:
    weight, other = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight, other], 0.1)
    optimizer.state[weight] = {"factors": [torch.eye(5)], "step": 3}
    optimizer.state[other] = {"momentum_buffer": torch.ones(2)}
    kept_indices = {0: torch.tensor([1, 2])}
    resize_(weight, kept_indices)
    assert resize_state_([optimizer], {weight: (torch.Size([4, 3]), kept_indices)}) == ["SGD"]
    assert weight not in optimizer.state
    assert_same_state(optimizer.state[other], {"momentum_buffer": torch.ones(2)})


def test_a_tensor_stays_the_same_object_with_its_hooks_and_memory_format() -> None:
    weight = nn.Parameter(torch.arange(48.0).view(2, 2, 3, 4).to(memory_format=torch.channels_last))
    calls: list[torch.Size] = []
    weight.register_hook(lambda gradient: calls.append(gradient.shape))
    resize_(weight, {1: torch.tensor([1])})
    assert weight.is_contiguous(memory_format=torch.channels_last) and weight.shape == (2, 1, 3, 4)
    weight.square().sum().backward()
    assert calls == [torch.Size([2, 1, 3, 4])]
    with torch.inference_mode():
        buffer = torch.ones(3)
    assign_(buffer, torch.zeros(2))
    assert buffer.tolist() == [0, 0]


def test_a_cut_is_told_to_a_part_by_the_names_in_that() -> None:
    kept_indices = {0: torch.tensor([1])}
    cut = Cut({"net.weight": kept_indices, "network.weight": {}}, {"net.out_features": 1}, {})
    below = cut.below("net")
    assert below.kept_indices == {"weight": kept_indices} and below.attributes == {"out_features": 1}
    assert cut.below("").kept_indices == cut.kept_indices
    assert below.of("weight", torch.tensor([3.0, 4.0])).tolist() == [4]
    assert below.of("bias", torch.tensor([3.0, 4.0])).tolist() == [3, 4]


def test_state_lies_along_its_parameter_or_has_no_known_layout() -> None:
    weight, size = nn.Parameter(torch.ones(4, 3)), torch.Size([4, 3])
    kept_indices = {0: torch.tensor([0, 2])}
    state = {"step": 3, "rows": torch.arange(4.0).view(4, 1), "columns": torch.ones(1, 3)}
    cut = cut_state(state, size, kept_indices)
    assert cut is not None and cut["rows"].tolist() == [[0], [2]] and cut["columns"].shape == (1, 3)
    assert cut_state({"mean": torch.ones(3)}, size, kept_indices) is None
    optimizer = torch.optim.SGD([weight])
    optimizer.state[weight] = {"mean": torch.ones(3)}
    assert not lies_along(optimizer) and lies_along(optimizer, means_follow=True)
    optimizer.state[weight], optimizer.state["shared"] = {}, {"history": torch.ones(5)}  # type: ignore[index]
    assert not lies_along(optimizer, means_follow=True)
