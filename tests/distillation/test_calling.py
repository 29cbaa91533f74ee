"""Masks of valid positions: each term takes what fits it, and the log says which don't take it as it is."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import FeatureMSE, SoftTarget
from lightning_compress.distillation import Distillation, DistillationModule
from lightning_compress.distillation.losses.base import DistillationLoss
from lightning_compress.errors import CompressionError
from tests.distillation.nets import trainer

TOKENS = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([5, 3, 0, 1, 4, 2])
LABELS = torch.tensor([0, 1, 0, 1, 1, 0])


class Pooled(nn.Module):
    """Tokens (B, L, 3) to features (B, L, 8) and, by their mean, to logits (B, 2)."""

    def __init__(self, dense: bool = False) -> None:
        super().__init__()
        self.body, self.head, self.dense = nn.Linear(3, 8), nn.Linear(8, 2), dense

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.head(y if self.dense else y.mean(1))


class Masked(DistillationModule):
    def split_batch(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        return batch[0], None

    def valid_positions(self, batch: Any) -> Tensor:
        return torch.arange(5) < batch[1][:, None]


class OfSamples(Masked):
    def valid_positions(self, batch: Any) -> Tensor:
        return batch[1] > 0


def build(
    kind: type[DistillationModule], losses: list[DistillationLoss], dense: bool = False
) -> tuple[DistillationModule, nn.Module]:
    torch.manual_seed(0)
    teacher = Pooled(dense)
    module = kind(Pooled(dense), teacher, losses=losses, task_weight=0)
    module.prepare_(TOKENS)
    return module, teacher


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")
def test_features_take_tokens_and_logits_the_samples_that_have_any(caplog: Any) -> None:
    module, teacher = build(Masked, [SoftTarget(temperature=1.0), FeatureMSE("body", "body")])
    _, terms, logits = module.distill((TOKENS, LENGTHS))
    keep, valid = LENGTHS > 0, torch.arange(5) < LENGTHS[:, None]
    with torch.no_grad():
        expected = F.kl_div(logits[keep].log_softmax(1), teacher(TOKENS)[keep].softmax(1), reduction="batchmean")
        squared = (module.student.body(TOKENS) - teacher.body(TOKENS)).square()
    torch.testing.assert_close(terms["soft_target"].detach(), expected)
    torch.testing.assert_close(terms["feature_mse"].detach(), squared[valid].mean())
    with caplog.at_level("INFO"):
        trainer().fit(module, DataLoader(TensorDataset(TOKENS, LENGTHS), batch_size=6))
    [said] = [record.message for record in caplog.records if "valid_positions" in record.message]
    assert "(6, 5) are no positions of soft_target (6, 2), where those of samples that have a valid one count." in said


def test_a_mask_of_samples_holds_for_all_positions_of_dense_logits() -> None:
    module, teacher = build(OfSamples, [SoftTarget(temperature=1.0), FeatureMSE("body", "body")], dense=True)
    _, terms, logits = module.distill((TOKENS, LENGTHS))
    keep = LENGTHS > 0
    with torch.no_grad():
        target = teacher(TOKENS)[keep].flatten(0, 1).softmax(1)
    expected = F.kl_div(logits[keep].flatten(0, 1).log_softmax(1), target, reduction="batchmean")
    torch.testing.assert_close(terms["soft_target"], expected)


def test_a_mask_that_fits_no_logits_is_an_error_where_these_alone_are_compared() -> None:
    module, _ = build(Masked, [SoftTarget()])
    with pytest.raises(CompressionError, match=r"`valid` must have the positions' shape \(6,\).*\(6, 5\)"):
        module.distill((TOKENS, LENGTHS))


def test_a_mask_of_pixels_leaves_features_of_another_size_whole_and_says_so() -> None:
    class Pixels(Masked):
        def valid_positions(self, batch: Any) -> Tensor:
            return torch.ones(6, 7, 7, dtype=torch.bool)

    module, _ = build(Pixels, [FeatureMSE("body", "body")])
    module.distill((TOKENS, LENGTHS))
    assert "are no positions of feature_mse (6, 5, 8), where all count." in module.objective.notes["feature_mse"]


def test_in_the_callback_validation_counts_the_same_samples() -> None:
    class Lit(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Pooled()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[2])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

    class Masks(Distillation):
        def targets(self, batch: Any) -> Any:
            return batch[2]

        def valid_positions(self, batch: Any) -> Tensor:
            return torch.arange(5) < batch[1][:, None]

    module, teacher = Lit(), Pooled()
    data = DataLoader(TensorDataset(TOKENS, LENGTHS, LABELS), batch_size=6)
    losses: list[DistillationLoss] = [SoftTarget(), FeatureMSE("net.body", "body")]
    fit = trainer(callbacks=[Masks(teacher, losses)])
    fit.fit(module, data, data)
    with torch.no_grad():
        same = (module(TOKENS).argmax(1) == teacher(TOKENS).argmax(1))[LENGTHS > 0].float().mean()
    torch.testing.assert_close(fit.callback_metrics["val_agreement"], same)
