"""Every test of exports: files aren't timed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest

FACTS = importlib.import_module("lightning_compress.export.facts")


def run_once(runs: Sequence[Callable[[], Any]], **_: Any) -> list[tuple[float, ...]]:
    """Run all of them, and say that they took a second each."""
    for run in runs:
        run()
    return [tuple(1.0 for _ in runs)]


@pytest.fixture(autouse=True)
def timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FACTS, "time_in_turns", run_once)
