"""How a batch becomes the arguments of a forward."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import CompressionError
from lightning_compress.modules.calls import Forward, bind_batch, bind_example, run_example, run_step, to_device_of


class Text(nn.Module):
    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Any:
        return ids if mask is None else ids * mask


class Anything(nn.Module):
    def forward(self, **fields: Any) -> Any:
        return fields


@dataclass
class Fields:
    ids: int
    label: int


Named = namedtuple("Named", ["ids", "mask"])


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"ids": 1, "mask": 2, "label": 3}, ((), {"ids": 1, "mask": 2})),
        (Named(1, 2), ((), {"ids": 1, "mask": 2})),
        (Fields(1, 3), ((), {"ids": 1})),
        (({"ids": 1, "label": 3}, 4), ((), {"ids": 1})),
        ((1, 4), ((1,), {})),
        ([1], ((1,), {})),
        (1, ((1,), {})),
        ({"x": 1}, (({"x": 1},), {})),
    ],
)
def test_the_likeliest_way_comes_first(batch: Any, expected: Any) -> None:
    assert bind_batch(Text(), batch)[0] == expected


def test_keywords_of_any_name_take_a_whole_mapping() -> None:
    assert bind_batch(Anything(), {"x": 1, "y": 2}) == [((), {"x": 1, "y": 2})]
    with pytest.raises(CompressionError, match=r"must bind to Anything.forward.*Define `calibration_step"):
        bind_batch(Anything(), 1)
    with pytest.raises(CompressionError, match="it is empty"):
        bind_batch(Text(), ())


def test_the_way_that_has_worked_is_tried_first_from_then_on() -> None:
    class Whole(nn.Module):
        tried = 0

        def forward(self, ids: Any, mask: Any = None) -> Any:
            self.tried += 1
            return ids["ids"] + ids["mask"]

    model, forward = Whole(), Forward()
    assert forward(model, {"ids": torch.ones(1), "mask": torch.ones(1)}).item() == 2 and model.tried == 2
    assert forward(model, {"ids": torch.ones(1), "mask": torch.ones(1)}).item() == 2 and model.tried == 3
    with pytest.raises(CompressionError, match="KeyError"):
        forward(model, {"ids": {"ids": 1}})


def test_a_module_with_a_step_of_its_own_runs_that() -> None:
    model: Any = Text()
    model.calibration_step = lambda batch: batch + 1
    assert run_step(model, 1) == 2 and run_step(Text(), (1, 2)) == 1
    model.example_input_array = (torch.ones(2), torch.zeros(2))
    assert run_example(model).tolist() == [0, 0]
    assert bind_example({"x": 1}) == ((), {"x": 1}) and bind_example([1]) == (([1],), {})


def test_inputs_follow_a_module_in_device_and_floating_dtype() -> None:
    x, ids = to_device_of(({"x": torch.ones(1)}, [torch.ones(1, dtype=torch.int64)]), nn.Linear(1, 1).half())
    assert x["x"].dtype == torch.float16 and ids[0].dtype == torch.int64
    assert to_device_of("text", nn.Linear(1, 1)) == "text" and to_device_of(1, nn.ReLU()) == 1
