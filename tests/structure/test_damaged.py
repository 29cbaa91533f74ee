"""Files cut off, with flipped bits, or with another entry: an error in one line, and the model as it was."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_compress import CompressionError, ScheduledPruning, load_compressed, quantize, save_compressed
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state, snapshot

JUNK = (None, -1, 1.5, "x", [], {}, [None], True, torch.zeros(2), "../../x")


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def quantized(scheme: str) -> Callable[[Path], Callable[[], nn.Module]]:
    def write(path: Path) -> Callable[[], nn.Module]:
        save_compressed(quantize(network(), scheme, calibration=[torch.randn(8, 16)]), str(path))
        return network

    return write


def masked(path: Path) -> Callable[[], nn.Module]:
    saves = ModelCheckpoint(path.parent, path.stem, save_weights_only=True)
    quiet_trainer(callbacks=[ScheduledPruning(sparsity=0.5), saves], enable_checkpointing=True).fit(
        Classifier(), TinyData()
    )
    return Classifier


WRITERS = {"static": quantized("int8_static"), "few bits": quantized("int4_weight_only"), "masked": masked}
each_writer = pytest.mark.parametrize("name", WRITERS)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*path, key))


def refused(path: Path, build: Callable[[], nn.Module]) -> bool:
    """Load, and tell whether it was refused: in one line, with the model unchanged, or said to be changed."""
    model = build()
    before = snapshot(model)
    try:
        load_compressed(str(path), model)
    except CompressionError as error:
        assert "\n" not in str(error)
        if "It was changed: build it anew" not in str(error):
            assert_same_state(before, snapshot(model))
        return True
    return False


@each_writer
def test_bytes_that_are_missing_or_flipped(name: str, tmp_path: Path) -> None:
    path, draw = tmp_path / "a.ckpt", random.Random(0)
    build = WRITERS[name](path)
    whole = path.read_bytes()
    for end in (0, 1, 100, *(draw.randrange(len(whole)) for _ in range(10))):
        path.write_bytes(whole[:end])
        assert refused(path, build)
    for _ in range(20):
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        refused(path, build)  # or not, where a bit of a weight or of a name of nothing has changed


@each_writer
def test_an_entry_of_anything(name: str, tmp_path: Path) -> None:
    path, draw = tmp_path / "a.ckpt", random.Random(0)
    build = WRITERS[name](path)
    content = torch.load(path, weights_only=True)
    inner = [place for place in places(content["lightning_compress"]) if place]
    results = []
    for place in [(), *draw.sample(inner, min(len(inner), 20))]:
        for junk in draw.sample(JUNK, 3):
            changed = copy.deepcopy(content)
            at = changed
            keys = ("lightning_compress", *place)
            for key in keys[:-1]:
                at = at[key]
            at[keys[-1]] = junk
            torch.save(changed, path)
            results.append(refused(path, build))
    assert any(results)


@pytest.mark.parametrize("entry", ["state_dict", "callbacks"])
def test_a_part_that_is_no_dict(entry: str, tmp_path: Path) -> None:
    for junk in JUNK:
        if junk != {}:
            torch.save({"state_dict": network().state_dict(), entry: junk}, tmp_path / "a.ckpt")
            assert refused(tmp_path / "a.ckpt", network)
