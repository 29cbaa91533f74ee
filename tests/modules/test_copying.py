"""Copies share what they are told to share, and no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import CompressionError
from lightning_compress.modules.copying import copy_batch, copy_module, copy_tensors


def test_a_computed_tensor_is_detached_in_the_copy() -> None:
    model: Any = nn.Linear(2, 2)
    model.outputs = [model(torch.ones(1, 2))]
    copied = copy_module(model)
    assert copied.weight is not model.weight and copied.weight.equal(model.weight)
    assert copied.outputs[0].grad_fn is None and model.outputs[0].grad_fn is not None


def test_parameters_are_shared_or_replaced_where_asked() -> None:
    model = nn.Linear(2, 2)
    assert copy_module(model, [model.weight]).weight is model.weight
    alias = nn.Parameter(model.weight.detach())
    copied = copy_module(model, {id(model.weight): alias})
    assert copied.weight is alias and copied.bias is not model.bias


def test_what_can_not_be_copied_is_an_error_that_says_so() -> None:
    model: Any = nn.Linear(2, 2)
    model.batches = (batch for batch in ())
    with pytest.raises(CompressionError, match=r"can be deep-copied. Received: cannot pickle 'generator' object"):
        copy_module(model)


class Batch(list[Tensor]):
    """A batch that can't be copied as a whole."""

    def __deepcopy__(self, memo: Any) -> Batch:
        raise RuntimeError


@pytest.mark.parametrize("copied", [copy_tensors, copy_batch])
def test_a_nest_has_tensors_of_its_own(copied: Any) -> None:
    batch = {"x": torch.ones(2), "rest": [torch.zeros(1), "name"]}
    other = copied(batch)
    other["x"].zero_()
    other["rest"].clear()
    assert batch["x"].tolist() == [1, 1] and len(batch["rest"]) == 2
    unusual = Batch([torch.ones(1)])
    assert copy_batch([unusual])[0] is unusual
