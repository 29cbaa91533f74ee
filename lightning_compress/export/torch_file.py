"""Writes a program as a file of torch's own (`.pt2`), which a process without this package loads."""

from __future__ import annotations

from pathlib import Path

import torch

from lightning_compress.export.lowering import in_plain_operators
from lightning_compress.export.program import Program
from lightning_compress.export.recurrent import in_torchs_
from lightning_compress.quantization.static.trace import quiet


@torch.no_grad()
def write_torch(program: Program, path: Path) -> None:
    """Write a program in torch's operators alone; weights stay codes with their scales."""
    with quiet():
        exported = torch.export.export(
            in_plain_operators(program.graph), program.example, dynamic_shapes=program.dynamic_shapes
        )
        in_torchs_(exported.graph_module)
        for node in exported.graph.nodes:  # whose lines and folders are nobody's business
            node.meta.pop("stack_trace", None)
        torch.export.save(exported, path)
