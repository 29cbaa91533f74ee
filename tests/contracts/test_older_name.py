"""The contracts for projects that import `pytorch_lightning`: the same tests, most in `make test-all` alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import pytorch_lightning as older
from packaging.version import Version

from tests.contracts import test_contracts as contracts
from tests.contracts.rows import Row
from tests.support import fits
from tests.support.older_name import data, modules

# Before, this name's Trainer took none of the other name's callbacks: "Expected a parent".
pytestmark = pytest.mark.skipif(Version(older.__version__) < Version("2.6"), reason="Lightning before 2.6.")

CONTRACTS: dict[str, Callable[..., None]] = {
    "resumed equals uninterrupted": contracts.test_resumed_equals_uninterrupted,
    "evaluation puts modes back": contracts.test_evaluation_puts_every_modules_mode_back,
    "an exception": lambda row, _: contracts.test_an_exception_leaves_a_plain_module(row, RuntimeError("stopped")),
    "users' keys": lambda row, path: contracts.test_a_checkpoint_holds_just_the_users_keys(row, False, path),
    "generators": lambda row, _: contracts.test_draws_nothing_from_the_global_generators(row),
    "leaves nothing": lambda row, _: contracts.test_leaves_nothing_behind(row),
    "fits twice": lambda row, _: contracts.test_fits_twice_and_a_second_model(row),
    "copies": lambda row, _: contracts.test_deepcopy_and_pickle(row),
    "other ways to train": lambda row, _: contracts.test_trains_with_manual_optimization_and_bf16_and_accumulation(row),
}
QUICK = ("resumed equals uninterrupted", "evaluation puts modes back")


@pytest.fixture(autouse=True)
def older_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contracts, "ManualClassifier", modules.ManualClassifier)
    monkeypatch.setattr(fits, "Checkpoint", older.callbacks.Checkpoint)
    for user in (contracts, fits):
        monkeypatch.setattr(user, "Classifier", modules.Classifier)
        monkeypatch.setattr(user, "quiet_trainer", modules.quiet_trainer)
        monkeypatch.setattr(user, "TinyData", data.TinyData)
        monkeypatch.setattr(user, "ModelCheckpoint", older.callbacks.ModelCheckpoint)


def test_the_two_names_share_no_class() -> None:
    trainer, module = contracts.fit(max_epochs=1)
    assert isinstance(module, older.LightningModule) and not isinstance(module, L.LightningModule)
    assert isinstance(trainer, older.Trainer) and not isinstance(trainer, L.Trainer)


@contracts.each_row
@contracts.other_folder
@pytest.mark.filterwarnings("ignore:Found [12] module")
@pytest.mark.parametrize(
    "contract", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CONTRACTS]
)
def test_a_contract_holds_under_the_older_name(row: Row, contract: str, tmp_path: Path) -> None:
    check: Any = CONTRACTS[contract]
    check(row, tmp_path)
