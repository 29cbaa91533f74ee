"""A checkpoint whose state of a callback is damaged is refused before anything is changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_compress import CompressionError, DistillationModule, EMATeacher, Rewind, ScheduledPruning, Window
from lightning_compress.callback import CompressionCallback
from lightning_compress.distillation.callback_base import ModuleCallback
from tests.contracts.rows import ROWS, Row
from tests.support.data import TinyData
from tests.support.fits import fit
from tests.support.modules import Classifier
from tests.support.oracles import assert_same_state, snapshot

STATELESS = {"report", "export", "ptq static", "ptq dynamic", "post-training pruning"}
OPTIONAL = {"pace", "last", "asked", "calibrated", "average"}
"""What callbacks write only when it differs from what a new one has; ``asked`` is optional for pruning alone."""

rows = pytest.mark.parametrize("row", [row for row in ROWS if row.name not in STATELESS], ids=str)
NOT_A_STATE: list[Any] = ["foreign", 7, ["version"], {"foreign": 1}, {"version": "1"}, {"version": True}]


def damages(tree: Any) -> Iterator[Any]:
    """Copies of a state in which one value, at whatever depth, is of another type."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in children:
        wrong: list[Any] = [{7}] if value is None else [{7}, 7 if isinstance(value, str) else "foreign"]
        wrong += [-1, True] if type(value) is int else []
        for other in (*wrong, *damages(value)):
            damaged = copy.copy(tree)
            damaged[key] = other
            yield damaged


def refused(callback: CompressionCallback, state: Any) -> None:
    with pytest.raises(CompressionError, match=rf"state of {type(callback).__name__} must .*Received: "):
        callback.check_state(state)


def state_of(callback: Any, folder: Path, key: str = "") -> dict[str, Any]:
    checkpoint = torch.load(folder / "epoch=0.ckpt", weights_only=True)
    state: dict[str, Any] = checkpoint["callbacks"][key or callback.state_key]
    callback.check_state(state)
    return state


def refuses_all_damages(callback: CompressionCallback, state: dict[str, Any]) -> int:
    tried = [*damages(state), *NOT_A_STATE]
    tried += [{**state, "version": 2}, *({**state, "version": other} for other in (None, "1", 1.0))]
    tried += [
        {name: value for name, value in state.items() if name != left_out} for left_out in state.keys() - OPTIONAL
    ]
    for damaged in tried:
        refused(callback, damaged)
    return len(tried)


@rows
def test_whatever_is_damaged_in_a_state_is_refused(row: Row, tmp_path: Path) -> None:
    fit(row.make(), folder=tmp_path, max_epochs=1)
    callback: Any = row.make()
    assert refuses_all_damages(callback, state_of(callback, tmp_path)) >= 10


def test_a_rewind_point_and_a_teachers_average_are_checked_too(tmp_path: Path) -> None:
    pruning = ScheduledPruning("l1_unstructured", 0.5, window=Window(1, 5, "step", every_n_steps=2), rewind=Rewind())
    fit(pruning, folder=tmp_path / "a", max_epochs=1)
    assert refuses_all_damages(pruning, {**state_of(pruning, tmp_path / "a"), "pace": [0.5, 0.25]}) >= 30
    module = DistillationModule(Classifier(), EMATeacher())
    windows = {**state_of(pruning, tmp_path / "a"), "bounds": [5, 5]}
    refused(pruning, windows)
    fit(module=module, data=TinyData(), folder=tmp_path / "b", max_epochs=1)
    callback = ModuleCallback()
    assert refuses_all_damages(callback, state_of(callback, tmp_path / "b", "_ModuleTeaching")) >= 10


def test_every_public_callback_that_writes_a_state_says_what_it_is() -> None:
    for row in ROWS:
        callback: Any = row.make()
        assert (callback.saved_form is None) == (row.name in STATELESS)


class Untouched(Callback):
    """Tells, after a fit was refused, whether its module is as it was when the checkpoint was opened."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.before = snapshot(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.after = snapshot(pl_module)


@rows
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_fit_is_refused_before_anything_is_changed(row: Row, tmp_path: Path) -> None:
    fit(row.make(), folder=tmp_path, max_epochs=1)
    path = tmp_path / "epoch=0.ckpt"
    whole = torch.load(path, weights_only=True)
    callback: Any = row.make()
    key, name = callback.state_key, type(callback).__name__
    for damage, words in (({"foreign": 1}, "version None"), ({"version": 2}, "version=2. Update lightning_compress")):
        torch.save({**whole, "callbacks": {**whole["callbacks"], key: damage}}, path)
        untouched = Untouched()
        with pytest.raises(CompressionError, match=rf"The checkpoint's state of {name} must .*{words}"):
            fit(row.make(), untouched, ckpt_path=path)
        if not row.adapts:  # it has adapters before
            assert_same_state(untouched.before, untouched.after)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"version": 1, "quantization": {}}, "The checkpoint must fit Classifier. Received: KeyError: 'form'"),
        ({"version": 1, "quantization": 7}, "The checkpoint must fit Classifier. Received: TypeError"),
        ({"version": 1, "channels": {"shapes": 7}}, "The checkpoint must fit Classifier. Received: AttributeError"),
        ({"version": 1, "callbacks": [1]}, "`callbacks` must be a dict. Received: list"),
    ],
)
def test_a_damaged_entry_is_refused(entry: Any, words: str, tmp_path: Path) -> None:
    fit(ROWS[0].make(), folder=tmp_path, max_epochs=1)
    path = tmp_path / "epoch=0.ckpt"
    torch.save({**torch.load(path, weights_only=True), "lightning_compress": entry}, path)
    untouched = Untouched()
    with pytest.raises(CompressionError, match=words):
        fit(ROWS[0].make(), untouched, ckpt_path=path)
    assert_same_state(untouched.before, untouched.after)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"masks": {"body.weight": {"shape": [3], "bits": torch.zeros(2, dtype=torch.uint8)}}}, "a bit for each"),
        ({"masks": {"body.weight": {"shape": [8], "bits": torch.zeros(1, dtype=torch.uint8)}}}, "weight's shape"),
        ({"masks": {"bodi.weight": {"shape": [8], "bits": torch.zeros(1, dtype=torch.uint8)}}}, "Nearest: body.weight"),
        ({"scores": {"bodi.weight": torch.zeros(8)}}, "`scores` must be of targeted weights"),
        ({"aside": {"body.weight": torch.zeros(8)}}, "`scores` must be of targeted weights"),
    ],
)
def test_a_state_of_other_weights_is_refused(damage: Any, words: str, tmp_path: Path) -> None:
    fit(ROWS[0].make(), folder=tmp_path, max_epochs=1)
    path = tmp_path / "epoch=0.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"][ROWS[0].make().state_key] |= damage  # type: ignore[attr-defined]
    torch.save(checkpoint, path)
    with pytest.raises(CompressionError, match=words):
        fit(ROWS[0].make(), ckpt_path=path)
