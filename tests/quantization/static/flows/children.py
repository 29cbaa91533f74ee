"""Processes of their own, and where the code is."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

REPOSITORY = Path(__file__).parents[4]


uncompiled = functools.partial(torch.compiler.set_stance, "force_eager")
"""A new one each time: made, it takes hold at once. Inductor takes ten seconds a model; one slow test is for it."""


def resized(inputs: Any, size: int) -> Any:
    """The same inputs with another batch size; the zoo's batches are of four, but for `keyword_only`'s two of them."""

    def resize(leaf: Any) -> Any:
        return torch.cat([leaf] * 3)[:size] if isinstance(leaf, Tensor) and len(leaf) == 4 else leaf

    return pytree.tree_map(resize, inputs)


# Files.


def child(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python that runs ``script``."""
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
    )
