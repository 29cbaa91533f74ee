"""Files of torch's own, loaded where this package isn't installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_compress.export.runtimes import RUNTIMES
from lightning_compress.export.torch_file import write_torch
from tests.export.networks import Residual, Words, program_for

ELSEWHERE = """
import sys, torch
sys.modules["lightning_compress"] = None  # whoever imports it fails
program = torch.export.load(sys.argv[1])
inputs, expected = torch.load(sys.argv[2])
assert all(torch.allclose(program.module()(x)[0], y, atol=1e-5) for x, y in zip(inputs, expected))
names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
assert names and all(name.startswith(("aten.", "<built-in")) for name in names), names
print("ran", len(inputs), sum(tensor.dtype == torch.int8 for tensor in program.state_dict.values()))
"""


@pytest.mark.parametrize(("kind", "layers"), [(Residual, 4), pytest.param(Words, 3, marks=pytest.mark.slow)])
def test_it_runs_in_a_process_without_this_package(kind: type[nn.Module], layers: int, tmp_path: Path) -> None:
    program = program_for(kind, "torch")
    write_torch(program, tmp_path / "model.pt2")
    inputs = [torch.randn(size, *program.example[0].shape[1:]) for size in (1, 2, 9)]
    with torch.no_grad():
        torch.save((inputs, [program.graph(x)[0] for x in inputs]), tmp_path / "calls.pt")
    command = [sys.executable, "-I", "-W", "ignore", "-c", ELSEWHERE]
    files = [str(tmp_path / name) for name in ("model.pt2", "calls.pt")]
    done = subprocess.run([*command, *files], capture_output=True, text=True)
    assert done.stdout.split() == ["ran", "3", str(layers)], done.stderr[-500:]


def test_its_session_runs_with_the_threads_asked_for(tmp_path: Path) -> None:
    program = program_for(Residual, "torch")
    write_torch(program, tmp_path / "model.pt2")
    before = torch.get_num_threads()
    [got] = RUNTIMES["torch"].open(tmp_path / "model.pt2", threads=before + 1)(program.example)
    assert torch.equal(got, program.graph(*program.example)[0]) and torch.get_num_threads() == before
