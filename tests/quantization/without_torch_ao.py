"""Run as a script: loads files and computes where nothing of `torch.ao` can be imported."""

from __future__ import annotations

import importlib.abc
import sys
import warnings
from typing import Any

import torch


class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if f"{name}.".startswith("torch.ao."):
            raise ImportError(f"{name} is gone")


def main(folder: str, names: list[str]) -> None:
    for name in [name for name in sys.modules if f"{name}.".startswith("torch.ao.")]:
        del sys.modules[name]
    sys.meta_path.insert(0, Blocked())
    from lightning_compress import load_compressed
    from tests.quantization.networks import NETWORKS

    for name in names:
        kind = name.partition("-")[0]
        state = torch.load(f"{folder}/{name}.ckpt", weights_only=True)["state_dict"]
        assert all(not value.is_quantized for value in state.values())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = load_compressed(f"{folder}/{name}.ckpt", NETWORKS[kind]().eval())
            torch.save(model(*torch.load(f"{folder}/{name}.inputs")), f"{folder}/{name}.outputs")
    assert not [name for name in sys.modules if f"{name}.".startswith("torch.ao.")]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
