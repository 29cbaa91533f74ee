"""Samples of no kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.compensation.runner import Runner
from lightning_compress.compensation.strangers import strangers
from tests.support.oracles import same_random_state

CLS, END, PAD, WORDS = 1, 2, 0, 50


class Sentences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return (self.words(ids) * mask[..., None]).sum(1)


def sentences() -> dict[str, Tensor]:
    """A first and a last word that all have, and gaps behind."""
    torch.manual_seed(0)
    ids = torch.randint(3, WORDS, (16, 12))
    lengths = torch.randint(5, 12, (16,))
    places = torch.arange(12)
    mask = (places < lengths[:, None]).long()
    ids[:, 0] = CLS
    ids[torch.arange(16), lengths - 1] = END
    return {"ids": torch.where(mask.bool(), ids, PAD), "mask": mask}


def stranger(model: nn.Module, batch: Any, seed: int = 0) -> Any:
    with same_random_state():
        (found,) = strangers(Runner(model), [batch], seed)
    return found


def test_words_are_drawn_anew_and_what_marks_beginnings_ends_and_gaps_stays():
    batch = sentences()
    drawn = stranger(Sentences(), batch)
    marks = (batch["ids"] == CLS) | (batch["ids"] == END) | (batch["ids"] == PAD)
    assert torch.equal(drawn["ids"][marks], batch["ids"][marks])
    assert torch.equal(drawn["mask"], batch["mask"])
    words = drawn["ids"][~marks]
    assert (words != batch["ids"][~marks]).float().mean() > 0.9
    assert words.min() >= 0 and words.max() < WORDS and len(words.unique()) > 30


def test_numbers_keep_mean_and_range_and_lose_what_hangs_together():
    torch.manual_seed(0)
    x = torch.randn(64, 1) @ torch.ones(1, 20) * 3 + 5  # all columns are alike
    (drawn,) = strangers(Runner(nn.Linear(20, 2)), [x])
    assert abs(float(drawn.mean() - x.mean())) < 0.2 and x.min() <= drawn.min() and drawn.max() <= x.max()
    assert float(torch.corrcoef(x.T)[0, 1]) > 0.999 and float(torch.corrcoef(drawn.T)[0, 1]) < 0.7


def test_the_same_seed_draws_the_same_and_the_batch_stays_as_it_was():
    batch = sentences()
    before = {name: value.clone() for name, value in batch.items()}
    first, again, other = (stranger(Sentences(), batch, seed)["ids"] for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert all(torch.equal(batch[name], before[name]) for name in batch)


def test_labels_single_numbers_and_what_is_no_tensor_stay():
    labels = torch.arange(20)
    x, same, scale, name = stranger(
        nn.Sequential(nn.Linear(4, 2)), [torch.randn(20, 4), labels, torch.tensor([2.0]), "a"]
    )
    assert x.shape == (20, 4)
    assert torch.equal(same, labels) and torch.equal(scale, torch.tensor([2.0])) and name == "a"
