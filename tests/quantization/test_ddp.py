from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.oracles import assert_same_state


@pytest.mark.slow
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_q21_observers_and_the_int8_model_are_equal_on_both_ranks(start: float, tmp_path: Path) -> None:
    # Q21, PT#33648: each rank sees other data.
    script = Path(__file__).with_name("ddp_script.py")
    command = [sys.executable, "-W", "error", str(script), str(start), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(first["int8"]) == 2 and first["observers"]
    assert_same_state(first["observers"], second["observers"])
    assert_same_state(first["int8"], second["int8"])
    assert_same_state(first["outputs"], second["outputs"])
    assert_same_state(first["calibrated"], second["calibrated"])
