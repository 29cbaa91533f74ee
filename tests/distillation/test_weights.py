"""A teacher's weights are found in a file by one rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_compress.distillation import load_weights_
from lightning_compress.errors import CompressionError
from tests.distillation.nets import ConvNet, assert_same_bits, bits


@pytest.mark.parametrize("prefix", ["", "model.", "student._orig_mod.", "a.b.net."])
@pytest.mark.parametrize("lightning", [True, False])
def test_weights_are_found_under_one_prefix(tmp_path: Path, prefix: str, lightning: bool) -> None:
    source, target = ConvNet(), ConvNet()
    weights: dict[str, Any] = {prefix + name: value for name, value in source.state_dict().items()}
    weights["other.weight"] = torch.zeros(3)
    path = str(tmp_path / "teacher.ckpt")
    torch.save({"state_dict": weights, "epoch": 3} if lightning else weights, path)
    load_weights_(target, path)
    assert_same_bits(bits(source), bits(target))


def test_a_compiled_teacher_loads_plain_weights(tmp_path: Path) -> None:
    source, target = ConvNet(), torch.compile(ConvNet(), backend="eager")
    torch.save(source.state_dict(), tmp_path / "t.pt")
    load_weights_(target, str(tmp_path / "t.pt"))
    assert torch.equal(source.head.weight, target.head.weight)


def prefixed(*prefixes: str) -> dict[str, Tensor]:
    state = ConvNet().state_dict()
    return {prefix + name: value for prefix in prefixes for name, value in state.items()}


def test_the_empty_prefix_wins(tmp_path: Path) -> None:
    source, target = ConvNet(), ConvNet()
    torch.save({**prefixed("ema."), **source.state_dict()}, tmp_path / "t.pt")
    load_weights_(target, str(tmp_path / "t.pt"))
    assert_same_bits(bits(source), bits(target))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "`teacher_checkpoint` must be an existing file"),
        (b"not a checkpoint", "must be readable as a checkpoint"),
        (torch.zeros(3), "must hold a state dict"),
        ({k: v for k, v in prefixed("net.").items() if "bias" not in k}, r"Missing: net\.features\.0\.bias"),
        ({"unrelated": torch.zeros(1)}, "Missing: features.0.weight.* and 4 more"),
        (prefixed("student.", "teacher."), "All of these fit: student., teacher."),
        (ConvNet(8).state_dict(), r"teacher's shape \(4, 1, 3, 3\).*The file has shape \(8, 1, 3, 3\)"),
    ],
)
def test_bad_files_are_refused_and_change_nothing(tmp_path: Path, content: Any, message: str) -> None:
    path, net = tmp_path / "t.ckpt", ConvNet()
    before = bits(net)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CompressionError, match=message):
        load_weights_(net, str(path))
    assert_same_bits(before, bits(net))


@pytest.mark.parametrize(
    ("wrap", "keys"),
    [
        (lambda state: {"model": state, "epoch": 3}, r"\['model'\]"),
        (lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {}}}, r"\['model_state_dict'\]"),
        (lambda state: {"state": {"teacher": {f"net.{key}": value for key, value in state.items()}}},
         r"\['state'\]\['teacher'\]"),
        (lambda state: {"model": state, "model_ema": state}, r"\['model'\], \['model_ema'\]"),
        (lambda state: {"state_dict": {}, "net": state}, r"\['net'\]"),
    ],
)  # fmt: skip
def test_weights_under_another_key_are_named_by_it(tmp_path: Path, wrap: Any, keys: str) -> None:
    source, target = ConvNet(), ConvNet()
    torch.save(wrap(source.state_dict()), tmp_path / "teacher.pt")
    before = bits(target)
    with pytest.raises(CompressionError, match=rf"`teacher_checkpoint` must hold.*They stand under {keys}\. Save them"):
        load_weights_(target, str(tmp_path / "teacher.pt"))
    assert_same_bits(before, bits(target))
