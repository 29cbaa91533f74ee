"""Promise 8: killed at a random moment, again and again, and resumed from the last file that loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

KILLS, SEED = 40, 0


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("kill_script.py")
    command = [sys.executable, str(script), str(tmp_path_factory.mktemp("kills")), str(KILLS), str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_resumed_after_sigkill_equals_uninterrupted(reports: list[dict[str, Any]]) -> None:
    assert len(reports) == KILLS and all(report["killed"] for report in reports)
    assert len({report["from"] for report in reports}) > 5 and len({report["hook"] for report in reports}) == 5
    for report in reports:
        found = {name: why for name, why in report["differences"].items() if not name.startswith("callback.")}
        assert not found, report


def test_what_the_callback_saves_after_the_fit_is_equal_too(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert not report["differences"], report
