"""Kernels that inductor compiles compute what they do uncompiled, or aren't used."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.errors import NoEffectWarning
from lightning_compress.quantization.static import compiled
from lightning_compress.quantization.static.compiled import Compiled, as_operators
from lightning_compress.quantization.static.int8_layer import Int8Layer
from lightning_compress.quantization.static.kernels import lower
from tests.quantization.static.forms import reference_form
from tests.quantization.static.test_kernels import VNNI, Sums, far, run, small


def form_of(model: nn.Module, *shape: int) -> tuple[Any, list[Tensor]]:
    torch.manual_seed(0)
    return reference_form(model, torch.randn(*shape))


@VNNI
def test_operators_are_what_the_kernels_call() -> None:
    form, tensors = form_of(Sums(), 2, 8, 6, 6)
    kernels = lower(form, additions=False)
    with torch.no_grad():
        operators = as_operators(kernels, tuple(tensors))
    assert not any(isinstance(module, Int8Layer) for module in operators.modules())
    assert torch.equal(run(operators, tensors)[0], run(kernels, tensors)[0])


@VNNI
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # inductor's own
def test_compiled_kernels_give_the_same_at_any_batch_and_in_copies() -> None:
    form, tensors = form_of(Sums(), 2, 8, 6, 6)
    model = Compiled(form)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoEffectWarning)
        for size in (2, 5):
            x = torch.randn(size, 8, 6, 6, generator=torch.Generator().manual_seed(size))
            assert far(run(form, [x])[0], run(model, [x])[0]) < 1e-3
        assert model._compiled is not None
        assert far(run(form, tensors)[0], run(copy.deepcopy(model), tensors)[0]) < 1e-3


@VNNI
@pytest.mark.parametrize("fault", ["raises", "is off"])
def test_kernels_run_uncompiled_where_the_compiler_fails(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    form, _, tensors = small()

    def compile(forward: Any, **_: Any) -> Any:
        def call(*inputs: Tensor) -> Any:
            if fault == "raises":
                raise RuntimeError("no compiler")
            model._compilations += 1
            return tuple(output * 1.1 for output in forward(*inputs))

        return call

    monkeypatch.setattr(compiled.torch, "compile", compile)
    model = Compiled(form)
    reason = "no compiler" if fault == "raises" else "compute something else"
    with pytest.warns(NoEffectWarning, match=reason):
        first = run(model, tensors)[0]
    assert torch.equal(first, run(lower(form), tensors)[0])
    assert torch.equal(first, run(model, tensors)[0])  # it warns once
