"""Files that earlier code wrote load as they did: `write.py` says what they are, `expected.json` what they gave."""

from __future__ import annotations

import json
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import load_compressed, save_compressed
from tests.golden.cases import CASES, FOLDER, Case, facts, quiet_trainer
from tests.golden.networks import inputs, loader

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step`",  # a distillation module has one
)
EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())

each = pytest.mark.parametrize("case", CASES, ids=str)
each_resuming = pytest.mark.parametrize("case", [case for case in CASES if case.resumes], ids=str)
FLOAT = 1e-4
"""How far float outputs may be off, as a fraction of what tells samples apart: CPUs sum up in different orders."""
TRAINED = 1e-3
"""The same after an epoch of training, which amplifies it."""
PARTS = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "callbacks", "lightning_compress")
ROUNDED = 0.05
"""How far int8 outputs may be off, as such a fraction, where a rounding comes out otherwise."""


def fresh(case: Case) -> Any:
    """The float model with other weights than those that were trained."""
    torch.manual_seed(2)
    return case.build()


def assert_close(got: Tensor, expected: list[list[float]], rounded: bool, trained: bool = False) -> None:
    """Equal but for what depends on the CPU.

    Where one forward pass is rounded to int8, most outputs are the same on any CPU; a fit carries a rounding that comes
    out otherwise into all of them.
    """
    wanted, tolerance = torch.tensor(expected), TRAINED if trained else FLOAT
    assert got.shape == wanted.shape
    off = (got - wanted).abs() / (wanted - wanted.mean(0)).abs().max()
    assert off.max() < (ROUNDED if rounded else tolerance), f"off by {off.max():.2g}"
    assert (rounded and trained) or off.median() < tolerance, f"off by {off.median():.2g} in the median"


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping | list | tuple):
        items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for key, value in items:
            yield from leaves(value, f"{name}.{key}")
    else:
        yield name, (tree.dtype, tree.tolist()) if isinstance(tree, Tensor) else tree


def read(case: Case) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(case.path, weights_only=True)
    return checkpoint


def assert_same(got: Mapping[str, Any], saved: Mapping[str, Any], *parts: str) -> None:
    """The same values, bit for bit, under the same keys in these parts of two checkpoints."""
    for part in parts:
        a, b = (dict(leaves(checkpoint.get(part, {}))) for checkpoint in (got, saved))
        different = {name for name in a.keys() | b.keys() if a.get(name, "none") != b.get(name, "none")}
        # What a resumed fit never had: a fingerprint of an average.
        different -= {f".Distillation.teacher.{name}" for name in ("class", "fingerprint")}
        assert different == set(), part


class Witness(Callback):
    """Counts and saves what a fit starts with, after all was loaded and before anything is changed."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self.facts = facts(pl_module, callbacks)
        trainer.save_checkpoint("again.ckpt")


def test_every_case_has_a_small_file_and_no_file_is_left_over() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.glob("*.ckpt")}
    assert files.keys() == {f"{case.name}.ckpt" for case in CASES}
    assert EXPECTED.keys() == {case.name for case in CASES}
    assert max(files.values()) < 60_000 and sum(files.values()) < 500_000


@each
def test_holds_plain_data_and_no_class_of_ours(case: Case) -> None:
    entry = read(case).get("lightning_compress", {"version": 1})
    assert entry["version"] == 1
    with zipfile.ZipFile(case.path) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("data.pkl")]
        operations = list(pickletools.genops(archive.read(name)))
    named = [str(argument).split() for operation, argument, _ in operations if operation.name == "GLOBAL"]
    assert named and {module for module, _ in named} <= {"collections", "torch", "torch._utils"}
    assert not [name for _, name in named if re.match(r"q|Q|_rebuild_q|per_", name)]  # no quantized dtype
    assert not any(operation.name in ("STACK_GLOBAL", "INST") for operation, _, _ in operations)


@each
def test_gives_the_outputs_that_it_gave(case: Case, tmp_path: Path) -> None:
    model, checkpoint = fresh(case), read(case)
    expected = EXPECTED[case.name]["outputs"]
    with pytest.raises(AssertionError, match="off by"):
        assert_close(case.outputs(model), expected, case.rounded)
    model = load_compressed(case.path, model)
    got = case.outputs(model)
    assert_close(got, expected, case.rounded)
    path = str(tmp_path / "again.ckpt")
    save_compressed(model, path)
    again = torch.load(path, weights_only=True)
    if case.compress is not None:
        assert_same(again, checkpoint, *PARTS)
    for part in ("channels", "quantization"):
        assert_same(again["lightning_compress"], checkpoint.get("lightning_compress", {}), part)
    assert torch.equal(case.outputs(load_compressed(path, fresh(case))), got)


@pytest.mark.parametrize("case", [case for case in CASES if case.callbacks and not case.resumes], ids=str)
def test_predicts_with_a_trainer(case: Case) -> None:
    assert case.callbacks is not None
    x = inputs(case.kind)
    data = DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=len(x))
    [got] = quiet_trainer(case.callbacks()).predict(fresh(case), data, ckpt_path=case.path) or []
    assert isinstance(got, Tensor)
    assert_close(got, EXPECTED[case.name]["outputs"], case.rounded)


@each_resuming
def test_a_fit_resumes_where_it_was_and_ends_where_it_ended(case: Case) -> None:
    assert case.callbacks is not None
    expected, witness, module = EXPECTED[case.name], Witness(), fresh(case)
    trainer = quiet_trainer([witness, *case.callbacks()])
    trainer.fit(module, loader(case.kind), ckpt_path=case.path)
    assert trainer.current_epoch == 2
    again = torch.load("again.ckpt", weights_only=True)
    assert read(case)["callbacks"]
    assert_same(again, read(case), *PARTS)
    assert witness.facts == expected["saved"]
    assert facts(module, trainer.callbacks) == expected["resumed"]  # type: ignore[attr-defined]
    assert expected["resumed_outputs"] != expected["outputs"]
    assert_close(case.outputs(module), expected["resumed_outputs"], case.rounded, trained=True)


@pytest.mark.parametrize("case", [case for case in CASES if case.name.startswith("masked")], ids=str)
def test_a_new_fit_of_what_was_loaded_begins_with_its_masks(case: Case) -> None:
    assert case.callbacks is not None
    callbacks, witness = case.callbacks(), Witness()
    module = load_compressed(case.path, fresh(case))
    [saved] = (read(case).get("callbacks") or read(case)["lightning_compress"]["callbacks"]).values()
    quiet_trainer([witness, *callbacks]).fit(module, loader(case.kind))
    [started] = torch.load("again.ckpt", weights_only=True)["callbacks"].values()
    assert saved["masks"]
    assert_same(started, saved, "masks")
    assert witness.facts["pruned"][0] > 0 == started["step"]
