"""`QLoRA` under activation checkpoints: the adapters learn what they learn without, and say where they can't."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import QLoRA, Targets
from tests.support.modules import quiet_trainer
from tests.support.oracles import assert_same_state

PLAIN = checkpoint.CheckpointFunction


def layer(*, inplace: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(16, 24), nn.Dropout(0.2), nn.ReLU(inplace=inplace), nn.Linear(24, 16))


class Language(L.LightningModule):
    """Frozen embeddings before blocks that are checkpointed, or aren't."""

    def __init__(self, way: str, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 16)
        self.blocks = nn.Sequential(*(layer() for _ in range(3)))
        self.head = nn.Linear(16, 11)
        self.way, self.reentrant = way, reentrant

    def call(self, function: Any, *args: Any) -> Any:
        if self.reentrant is None:
            return function(*args)
        return checkpoint.checkpoint(function, *args, use_reentrant=self.reentrant)

    def whole(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(ids)))

    def forward(self, ids: Tensor) -> Tensor:
        if self.way == "no float input":
            return self.call(self.whole, ids)
        x = F.one_hot(ids, 16).float() if self.way == "raw input" else self.embedding(ids)
        if self.way == "nested":
            x = self.call(lambda x: self.call(self.blocks, x), x)
        elif self.way == "sequential" and self.reentrant is not None:
            x = checkpoint.checkpoint_sequential(self.blocks, 2, x, use_reentrant=self.reentrant)
        elif self.way == "several outputs":
            x, _ = self.call(lambda x: (self.blocks(x), len(x)), x)
        else:
            for block in self.blocks:
                x = self.call(block, x)
        return self.head(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.way == "no gradients":
            with torch.no_grad():
                x = self.blocks(self.embedding(batch[0]))
            return F.cross_entropy(self.head(x).flatten(0, 1), batch[0].flatten())
        return F.cross_entropy(self(batch[0]).flatten(0, 1), batch[0].roll(1).flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)

    def train_dataloader(self) -> Any:
        ids = torch.randint(11, (16, 5), generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(ids), batch_size=4)


def fit(way: str, reentrant: bool | None, **options: Any) -> tuple[Language, QLoRA]:
    module, qlora = Language(way, reentrant), QLoRA(rank=2, **options)
    torch.manual_seed(1)
    quiet_trainer(callbacks=[qlora]).fit(module)
    return module, qlora


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("by block", {}),
        ("no float input", {}),
        ("raw input", {}),
        ("sequential", {}),
        ("several outputs", {"dropout": 0.3}),
        ("nested", {}),
        ("by block", {"targets": Targets(include=["blocks.2"])}),  # the first blocks hold nothing that trains
        ("by block", {"modules_to_train": ["embedding", "head"]}),
    ],
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # torch, of the inner one of two
def test_adapters_in_a_reentrant_checkpoint_learn_what_they_learn_without(way: str, options: dict[str, Any]) -> None:
    plain, reentrant = (fit(way, how, **options)[0] for how in (None, True))
    learnt = [value for name, value in plain.named_parameters() if name.endswith("lora_B")]
    assert learnt and all(value.detach().any() for value in learnt)
    assert_same_state(plain, reentrant)


def test_torchs_own_function_is_back_after_a_fit_and_after_an_error() -> None:
    fit("by block", True)
    assert checkpoint.CheckpointFunction is PLAIN
    module = Language("by block", True)
    module.on_train_epoch_end = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        quiet_trainer(callbacks=[QLoRA(rank=2)]).fit(module)
    assert checkpoint.CheckpointFunction is PLAIN


def test_adapters_that_no_gradient_reaches_are_named() -> None:
    with pytest.warns(
        UserWarning, match=r"no gradient reached the adapters of `blocks\.\{0-2\}\.\{0,3\}`.*torch.no_grad"
    ):
        module, qlora = fit("no gradients", None, modules_to_train=["head"])
    assert not any(value.detach().any() for name, value in module.named_parameters() if name.endswith("lora_B"))
    assert len([note for note in qlora.report_notes() if "no gradient reached" in note]) == 1
    assert "no gradient" not in "".join(fit("by block", True)[1].report_notes())
