"""Paths of modules as users write them, compiled or not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress import CompressionError
from lightning_compress.modules.paths import compressible_modules, device_of, is_at_or_below, module_at


class Helper(nn.Linear):
    training_only = True


# The first torch.compile of a process imports parts of torch that script themselves.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_compiled_module_has_the_path_of_the_one_inside() -> None:
    inner = nn.Sequential(nn.Linear(2, 2))
    model = nn.ModuleDict({"net": torch.compile(inner)})
    assert module_at(model, "net") is inner and module_at(model, "net.0") is inner[0]
    assert list(compressible_modules(model)) == ["", "net", "net.0"]
    with pytest.raises(CompressionError, match=r"a module at 'net.1'. Received: no such module"):
        module_at(model, "net.1")


def test_what_only_helps_in_training_has_no_part_in_compression() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "help": nn.Sequential(Helper(2, 2)), "helper": shared})
    model["help"].training_only = True
    assert list(compressible_modules(model)) == ["", "a"]
    assert list(compressible_modules(model, every_name=True)) == ["", "a", "helper"]


def test_a_model_is_where_its_first_tensor_is() -> None:
    assert device_of(nn.ReLU()).type == "cpu" and device_of(nn.Linear(1, 1, device="meta")).type == "meta"
    assert device_of(nn.BatchNorm1d(1, affine=False, device="meta")).type == "meta"


def test_a_path_is_at_itself_and_below_the_root() -> None:
    assert is_at_or_below("net", "net") and is_at_or_below("net.0", "net") and is_at_or_below("net", "")
    assert not is_at_or_below("network", "net") and not is_at_or_below("net", "net.0")
