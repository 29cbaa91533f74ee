"""What is left of a weight whose traced form holds no float values: type, shape, device, and an error for more."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import CompressionError, quantize


class Reads(nn.Module):
    """Looks at a weight, in code that can't be traced."""

    def __init__(self, read: Any) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 32), nn.Linear(32, 4)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() == 12345:
            raise ValueError("control flow")
        return self.head(self.read(self.body(x), self.body.weight))


READS: dict[str, Any] = {
    "dtype and device": lambda x, weight: x.to(weight.dtype).to(weight.device),
    "like it": lambda x, weight: x.to(weight).type_as(weight),
    "shape": lambda x, weight: x.view(-1, weight.shape[0]).reshape(-1, weight.size(0)),
    "others": lambda x, weight: x * (weight.ndim == weight.dim() == 2 and weight.is_floating_point()),
    "asks for more": lambda x, weight: x if getattr(weight, "quant_state", None) is None else None,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_code_may_ask_what_a_quantized_weight_is(read: Any) -> None:
    torch.manual_seed(0)
    model, x = Reads(read).eval(), torch.randn(16, 16)
    int8 = quantize(model, calibration=[x])
    assert not isinstance(int8.body.weight, Tensor)
    torch.testing.assert_close(int8(x), model(x), rtol=0.1, atol=0.1)
    assert torch.equal(copy.deepcopy(int8)(x), int8(x))


def test_code_that_computes_with_it_is_an_error_that_says_so() -> None:
    int8 = quantize(Reads(READS["shape"]).eval(), calibration=[torch.randn(16, 16)])
    for compute in (lambda weight: weight.sum(), torch.linalg.norm):
        with pytest.raises((AttributeError, CompressionError), match=r"the `weight` of this Linear are gone"):
            compute(int8.body.weight)


def test_a_layer_in_few_bits_can_still_be_pickled() -> None:
    model, x = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 16)
    packed = quantize(model, "int8_weight_only", calibration=[x])
    again = pickle.loads(pickle.dumps(packed))
    assert torch.equal(again(x), packed(x)) and again[0].weight.shape == (8, 16)
