"""A function in two processes on the CPU, as `strategy="ddp"` launches them."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
IGNORED = (
    "The '\\w+_dataloader' does not have many workers",
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    "It is recommended to use `self.log",  # the modules of the tests log without `sync_dist`
    "torch.ao.quantization is deprecated",
    "Please use quant_min and quant_max",
    "Using `DistributedSampler` with the dataloaders",
    "The dirpath has changed",
    "Be aware that when using `ckpt_path`",
    "Checkpoint directory",
    ".*The teacher's accuracy is near chance",
    ".*The teacher is behind",
    "Dequantized on this CPU",
)


def run_ranks(function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(*args)`` returned on each rank: plain data and tensors; it launches by fitting under "ddp"."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "call.pickle").write_bytes(pickle.dumps((function, args)))
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "tests.support.ddp", folder]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=240, env={**os.environ, "PYTHONPATH": path}
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return [torch.load(Path(folder, f"rank{rank}.pt"), weights_only=True) for rank in (0, 1)]


def main(folder: Path) -> None:
    warnings.simplefilter("error")
    for message in IGNORED:
        warnings.filterwarnings("ignore", message)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    function, args = pickle.loads((folder / "call.pickle").read_bytes())
    result = function(*args)
    torch.save(result, folder / f"rank{os.environ.get('LOCAL_RANK', 0)}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
