"""Files for ExecuTorch, run by its own runtime."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import export, quantize
from lightning_compress.errors import CompressionError, MissingExtraError
from lightning_compress.export.executorch_file import write_executorch
from lightning_compress.export.program import trace_program
from lightning_compress.export.runtimes import RUNTIMES
from tests.export.networks import Residual, Words, program_for

needs_executorch = pytest.mark.skipif(importlib.util.find_spec("executorch") is None, reason="needs executorch")
pytestmark = pytest.mark.filterwarnings("ignore")  # executorch warns of itself as it is imported


@needs_executorch
@pytest.mark.parametrize("kind", [Residual, Words])
def test_a_file_computes_what_its_program_computes_at_every_batch_size(kind: type[nn.Module], tmp_path: Path) -> None:
    program, path = program_for(kind, "executorch"), tmp_path / "model.pte"
    lowered = write_executorch(program, path, max_batch=20)
    assert lowered.max_batch == 20 and lowered.float_layers == {}
    session = RUNTIMES["executorch"].open(path)
    first = None
    for size in (1, 2, 20, 7, 20):
        x = torch.randn(size, *program.example[0].shape[1:])
        [expected], [got] = program.graph(x), session([x])
        assert torch.allclose(got, expected, atol=0.02 * float(expected.abs().max())), size
        first = (got, got.clone()) if first is None else first
    assert torch.equal(*first)  # no later call writes over an output


@needs_executorch
def test_the_example_may_be_larger_than_the_bound(tmp_path: Path) -> None:
    assert write_executorch(program_for(Residual, "executorch"), tmp_path / "model.pte", max_batch=2).max_batch == 4


class Fourier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x).abs()


@needs_executorch
def test_an_operator_that_it_lacks_is_named(tmp_path: Path) -> None:
    program = trace_program(Fourier(), (torch.randn(2, 8),), {}, False, {})
    with pytest.raises(CompressionError, match=r"its operator aten\.\w+"):
        write_executorch(program, tmp_path / "model.pte")
    assert list(tmp_path.iterdir()) == []


@needs_executorch
@pytest.mark.parametrize("scheme", ["int8_weight_only", "nf4"])
def test_weights_of_few_bits_are_refused(scheme: str, tmp_path: Path) -> None:
    model = quantize(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)).eval(), scheme)
    with pytest.raises(CompressionError, match="no weights of few bits"):
        export(model, torch.randn(4, 64), tmp_path / "model.pte")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("executorch") is not None, reason="executorch is installed")
def test_where_it_is_missing_the_command_to_install_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(MissingExtraError, match=r"pip install .*\[executorch\]"):
        RUNTIMES["executorch"].open(tmp_path / "model.pte")
