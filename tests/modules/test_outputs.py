"""Outputs as flat lists: any container comes back as it was; and when two nests of outputs agree."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_compress import quantize
from lightning_compress.modules.outputs import cosine, flatten, same_outputs, same_structure
from tests.support.foreign import Named, Outputs, Pair, Result
from tests.support.oracles import described


@dataclass(frozen=True, slots=True)
class Frozen:
    first: Tensor
    rest: list[Any] = field(default_factory=list)


class Attributes(dict[str, Tensor]):
    __getattr__ = dict.__getitem__


def in_lists(first: Tensor, second: Tensor) -> Any:
    made = defaultdict(list)
    made["a"].append(first)
    made["b"].append(second)
    return made


Point = namedtuple("Point", "x y")
CONTAINERS: dict[str, Any] = {
    "tensor": lambda a, b: a,
    "tuple with None": lambda a, b: (a, None, [b]),
    "ordered": lambda a, b: OrderedDict(z=a, y={"b": b, 3: "text"}),
    "defaultdict": in_lists,
    "namedtuple": Point,
    "typed namedtuple": Pair,
    "dataclass": lambda a, b: Result(a, (b, 1.5)),
    "frozen dataclass": lambda a, b: Frozen(a, [b]),
    "mapping": lambda a, b: Attributes(a=a, b=b),
    "mapping with attributes": lambda a, b: Named(a=a, b=b),
    "nothing": lambda a, b: None,
}


@pytest.mark.parametrize("contain", CONTAINERS.values(), ids=CONTAINERS)
def test_a_container_is_rebuilt_around_other_tensors(contain: Any) -> None:
    output = contain(torch.zeros(2), torch.zeros(3))
    tensors, structure = flatten(output)
    ones = [torch.ones_like(tensor) for tensor in tensors]
    again = structure.rebuild(ones)
    assert described(again) == described(output)
    assert all(tensor is got for tensor, got in zip(ones, flatten(again)[0], strict=True))
    assert all(not tensor.any() for tensor in flatten(output)[0])  # what it was made from stays


def test_attributes_of_a_mapping_are_its_items() -> None:
    int8 = quantize(Outputs(lambda a, b: Named(logits=a, hidden=b)).eval(), calibration=[torch.randn(4, 16)])
    output = int8(torch.randn(2, 16))
    assert torch.equal(output.logits, output["logits"]) and not torch.equal(output.logits, output.hidden[:, :4])


@pytest.mark.parametrize(
    "other", [{"a": torch.ones(2)}, OrderedDict(a=torch.ones(3)), OrderedDict(b=torch.ones(2)), OrderedDict(a=None)]
)
def test_other_containers_keys_shapes_and_constants_are_other_outputs(other: Any) -> None:
    assert same_outputs(OrderedDict(a=torch.ones(2)), OrderedDict(a=torch.ones(2)))
    assert not same_outputs(OrderedDict(a=torch.ones(2)), other)


def test_constants_are_of_the_traced_call() -> None:
    model = Outputs(lambda a, b: {"logits": a, "names": ["x", None], "count": 3}).eval()
    output = quantize(model, calibration=[torch.randn(4, 16)])(torch.randn(2, 16))
    assert described(output) == (dict, {"logits": (2, 4), "names": (list, ["x", None]), "count": 3})


def test_integers_must_be_equal_and_floats_close() -> None:
    # Token 1000 isn't token 1001, near as the numbers are.
    assert not same_outputs({"ids": torch.tensor([1000])}, {"ids": torch.tensor([1001])})
    assert same_outputs({"x": torch.tensor([1000.0])}, {"x": torch.tensor([1000.5])})
    assert not same_outputs({"x": torch.tensor([1000.0])}, {"x": torch.tensor([1010.0])})


@pytest.mark.parametrize("other", [torch.zeros(2), torch.zeros(3, dtype=torch.long), (torch.zeros(3),), 0.0])
def test_another_shape_kind_or_container_is_another_structure(other: object) -> None:
    assert same_structure(torch.zeros(3), torch.ones(3))
    assert not same_structure(torch.zeros(3), other)


def test_cosine_is_over_all_floats_together() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert cosine((a, b), (a, b)) == pytest.approx(1.0)
    assert cosine((a, b), (a, -b)) == pytest.approx(0.0)
    assert cosine(torch.tensor([3]), torch.tensor([4])) == 1.0


def test_what_has_another_shape_counts_as_zeros() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    assert cosine([a, b], [a, b[:2]]) == pytest.approx(0.5**0.5)
    assert cosine([a, b], [a]) == pytest.approx(0.5**0.5)
    assert cosine([a], [a, b]) == pytest.approx(1.0) and cosine(a, b) == 0.0
