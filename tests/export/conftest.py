"""Every test of exports: files aren't timed, and torch reads its table of ONNX operators once, in a second."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from torch.onnx._internal.exporter._registration import ONNXRegistry

FACTS = importlib.import_module("lightning_compress.export.facts")


def run_once(runs: Sequence[Callable[[], Any]], **_: Any) -> list[tuple[float, ...]]:
    """Run all of them, and say that they took a second each."""
    for run in runs:
        run()
    return [tuple(1.0 for _ in runs)]


@pytest.fixture(autouse=True)
def timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FACTS, "time_in_turns", run_once)


@pytest.fixture(scope="session", autouse=True)
def one_table() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield
