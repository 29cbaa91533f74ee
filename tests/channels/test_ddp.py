from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_compress import ChannelPruning, CompressionError
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state, snapshot


@pytest.mark.slow
@pytest.mark.parametrize("importance", ["l2", "taylor", "random"])
def test_ranks_with_different_data_and_seeds_keep_the_same_channels(importance: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("ddp_script.py")
    command = [sys.executable, "-W", "error", str(script), importance, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    widths = [len(batch["weights"]["body.bias"]) for batch in first["batches"]]
    assert len(widths) == 12 and widths[0] == 32 and widths[-1] == 16 and len(set(widths)) == 3
    assert first["wrappers"] == second["wrappers"] == 3
    assert first["numbers"] == second["numbers"] == [16, 16, 16]
    # The cut keeps what is equal equal, and the wrapper goes on reducing gradients after it.
    assert_same_state(first["batches"], second["batches"])
    assert_same_state(first["gradients"], second["gradients"])
    assert first["gradients"][-1]["body.weight"].any()
    assert not torch.equal(first["drawn"], second["drawn"])


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_a_strategy_that_loses_structure_is_refused_in_setup(strategy: str) -> None:
    # Launched for real it would train in processes of its own: setup alone is asked.
    trainer = quiet_trainer(devices=2, strategy=strategy)
    module = Classifier()
    before = snapshot(module)
    with pytest.raises(CompressionError, match="returns weights from its processes without structure.*strategy='ddp'"):
        ChannelPruning(macs=0.5).setup(trainer, module, "fit")
    assert_same_state(before, snapshot(module))
    assert vars(module).keys() == vars(Classifier()).keys()


@pytest.mark.slow
def test_ddp_spawn_is_refused_before_anything_is_launched() -> None:
    trainer = quiet_trainer(devices=2, strategy="ddp_spawn", callbacks=[ChannelPruning(macs=0.5)])
    with pytest.raises(Exception, match="returns weights from its processes without structure"):
        trainer.fit(Classifier(), TinyData())
