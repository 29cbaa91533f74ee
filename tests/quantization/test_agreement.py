"""When two nests of outputs agree."""

from __future__ import annotations

import pytest
import torch

from lightning_compress.modules.compare_outputs import cosine, same_outputs, same_structure


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
