"""Adapters: every rule, every refusal, and loading without having seen the teacher."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_compress.distillation import adapt, make_adapter
from lightning_compress.distillation.adapters import Adapters
from lightning_compress.errors import CompressionError

PAIRS = [
    ((2, 3), (2, 5), nn.Linear),
    ((2, 7, 3), (2, 7, 5), nn.Linear),
    ((2, 3, 7), (2, 5, 7), nn.Conv1d),
    ((2, 3, 8, 8), (2, 5, 8, 8), nn.Conv2d),
    ((2, 3, 8, 8), (2, 5, 4, 2), nn.Conv2d),
    ((2, 3, 4, 4), (2, 5, 8, 8), nn.Conv2d),
    ((2, 3, 8, 8), (2, 3, 4, 4), type(None)),
    ((2, 3, 4, 4, 4), (2, 5, 2, 2, 2), nn.Conv3d),
    ((2, 6), (2, 6), type(None)),
]


@pytest.mark.parametrize(("student", "teacher", "kind"), PAIRS)
def test_the_adapter_brings_the_students_shape_to_the_teachers(
    student: tuple[int, ...], teacher: tuple[int, ...], kind: type
) -> None:
    adapter = make_adapter(student, teacher)
    assert type(adapter) is kind
    features = torch.randn(student, requires_grad=True)
    adapted = adapt(features, teacher, adapter)
    assert adapted.shape == teacher
    adapted.sum().backward()
    assert features.grad is not None


def test_pooling_before_the_convolution_is_pooling_after_it() -> None:
    adapter, x = nn.Conv2d(3, 5, 1), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(adapt(x, (2, 5, 4, 4), adapter), F.avg_pool2d(adapter(x), 2))


def test_the_resolution_follows_the_batch() -> None:
    adapter = make_adapter((2, 3, 8, 8), (2, 5, 4, 4))
    assert adapt(torch.randn(2, 3, 12, 12), (2, 5, 6, 6), adapter).shape == (2, 5, 6, 6)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((2, 3), (2, 5, 4)), ((2, 3, 4), (2, 5, 6)), ((2,), (3,)), ((2, 3, 4, 4), (2, 3)), ((2, 3), (4, 3))],
)
def test_shapes_without_a_rule_are_refused_with_both_shapes(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    with pytest.raises(CompressionError, match="`student_layer` must have features") as error:
        make_adapter(student, teacher)
    assert str(student) in str(error.value) and str(teacher) in str(error.value)


@pytest.mark.parametrize("shapes", [pair[:2] for pair in PAIRS if pair[2] is not type(None)])
def test_a_state_dict_makes_the_adapters_it_holds_and_draws_nothing(shapes: tuple[tuple[int, ...], ...]) -> None:
    layer = make_adapter(*shapes)
    assert layer is not None
    source, target = Adapters({"feature_mse": layer.half()}), Adapters()
    before = torch.get_rng_state()
    target.load_state_dict(source.state_dict())
    assert torch.equal(torch.get_rng_state(), before)
    assert type(target["feature_mse"]) is type(layer)
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value) and target.state_dict()[name].dtype == value.dtype


def test_a_missing_adapter_still_fails() -> None:
    with pytest.raises(RuntimeError, match="Missing key"):
        Adapters({"feature_mse": nn.Linear(2, 3)}).load_state_dict({})
