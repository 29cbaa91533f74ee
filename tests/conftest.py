"""Every test: one thread, fixed seeds, an empty current folder, an environment that is put back, and no waiting."""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import os
import random
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch.onnx._internal.exporter._registration import ONNXRegistry

from lightning_compress import CompressionReport
from lightning_compress.channels import speed as channel_speed
from lightning_compress.choosing import speed

QUANTIZE = import_module("lightning_compress.quantization.quantize")  # the room's attribute is the function


# The machine's load must not decide a test, nor chance: the same examples every time.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")

torch.set_num_threads(1)

# A seed for a device that isn't there waits for it, and each time torch writes down the whole stack to say from where.
for device in (torch.cuda, torch.xpu, torch.mtia):
    if not device.is_available():
        device.manual_seed_all = lambda seed: None


def drops_weights_only(method: Any) -> Any:
    @functools.wraps(method)
    def run(*args: Any, weights_only: bool = True, **options: Any) -> Any:
        return method(*args, **options)

    return run


if "weights_only" not in inspect.signature(Trainer.fit).parameters:  # before 2.6 Lightning read all files whole
    for kind in (Trainer, import_module("pytorch_lightning").Trainer):
        for verb in ("fit", "validate", "test", "predict"):
            setattr(kind, verb, drops_weights_only(getattr(kind, verb)))


gc.disable()  # until all is imported: none of that is garbage


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
    # pytest visits each logger that doesn't propagate six times a test; torch has fifty of them.
    for name, logger in logging.root.manager.loggerDict.items():
        if name.partition(".")[0] == "torch" and isinstance(logger, logging.Logger):
            logger.propagate = True


@pytest.fixture(scope="session", autouse=True)
def one_table() -> Iterator[None]:
    """torch reads its table of ONNX operators once, not in every export: that takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(autouse=True)
def repeatable() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def equally_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models aren't timed against what they were: what the log says must not depend on the machine's load."""
    for room in (QUANTIZE, channel_speed):
        monkeypatch.setattr(room, "round_ratios", lambda *_, **__: (1.0,) * 3)


@pytest.fixture(autouse=True)
def brief_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where models are timed for some seconds, a few milliseconds do: no test looks at the times themselves."""
    monkeypatch.setitem(CompressionReport.__init__.__kwdefaults__, "max_seconds", 0.01)
    monkeypatch.setattr(speed, "SECONDS", 0.01)


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
