"""Every test: one thread, fixed seeds, an empty folder as its current one, and an environment that is put back."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

QUANTIZE = import_module("lightning_compress.quantization.quantize")  # the room's attribute is the function


# The machine's load must not decide a test, nor chance: the same examples every time.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def repeatable() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def equally_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized models aren't timed against float ones: what the log says must not depend on the machine's load."""
    monkeypatch.setattr(QUANTIZE, "round_ratios", lambda *_, **__: (1.0,) * 3)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """`seed_everything` and the strategies leave variables that the next Trainer would read."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path
