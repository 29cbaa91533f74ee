from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.oracles import assert_same_state, count_zeros


@pytest.mark.slow
@pytest.mark.parametrize("method", ["random_unstructured", "tests.pruning.rules.Noisy", "taylor", "ln_structured"])
def test_t11_masks_are_equal_on_ranks_with_different_seeds(method: str, tmp_path: Path) -> None:
    # T11, W8, sparseml#429; Noisy draws from whatever generator there is. T12: gradients are the mean over ranks.
    script = Path(__file__).with_name("ddp_script.py")
    command = [sys.executable, "-W", "error", str(script), method, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(first["events"]) == 6
    assert_same_state(first["events"], second["events"])
    parameters = [name for name in first["weights"] if "running" not in name]
    for name in parameters:
        assert torch.equal(first["weights"][name], second["weights"][name]), name
    assert count_zeros([first["weights"]["body.weight"]])[0] == (
        16 * round(0.7 * 32) if method == "ln_structured" else round(0.7 * 512)
    )
    assert not torch.equal(first["drawn"], second["drawn"])
