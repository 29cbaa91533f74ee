"""Most teachers of this room's tests were never trained, which a fit says."""

from __future__ import annotations

from pathlib import Path

import pytest

UNTRAINED = (r"ignore:.*teacher's accuracy is near chance:UserWarning", r"ignore:.*teacher is behind:UserWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            # First, so that a test's own filters win.
            item.own_markers.insert(0, pytest.mark.filterwarnings(*UNTRAINED).mark)
