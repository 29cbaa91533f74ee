"""Tiny datasets: deterministic, unshuffled, in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset


class TinyData(L.LightningDataModule):
    """(x, y) with x (16,) and y one of four classes that a linear map tells apart.

    The 50 training samples in batches of 8 leave an uneven last batch of 2.
    """

    def __init__(self, samples: int = 50, batch_size: int = 8) -> None:
        super().__init__()
        self.samples = samples
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(3 * self.samples, 16, generator=generator)
        y = (x @ torch.randn(16, 4, generator=generator)).argmax(1)
        parts = zip(x.split(self.samples), y.split(self.samples), strict=True)
        self.train, self.val, self.test = (TensorDataset(*part) for part in parts)

    def loader(self, dataset: Dataset[tuple[Tensor, ...]]) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(dataset, batch_size=self.batch_size)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self.loader(self.train)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self.loader(self.val)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self.loader(self.test)

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self.loader(self.test)


class DigitsData(TinyData):
    """scikit-learn's bundled handwritten digits: (1, 8, 8) in [0, 1] and ten classes, split 1077 / 360 / 360."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__(batch_size=batch_size)

    def setup(self, stage: str) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
        x = torch.as_tensor(digits.images, dtype=torch.float32).div(16).unsqueeze(1)[order]
        y = torch.as_tensor(digits.target)[order]
        parts = zip(x.split([1077, 360, 360]), y.split([1077, 360, 360]), strict=True)
        self.train, self.val, self.test = (TensorDataset(*part) for part in parts)


def keyword_loader(samples: int = 24, batch_size: int = 8) -> DataLoader[dict[str, Tensor]]:
    """Dict batches for `KeywordClassifier`: ids (B, 5), mask (B, 5), label (B,)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, (samples, 5), generator=generator)
    mask = (torch.arange(5) < torch.randint(1, 6, (samples, 1), generator=generator)).float()
    rows = [{"ids": ids[i], "mask": mask[i], "label": ids[i, 0] % 4} for i in range(samples)]
    return DataLoader(rows, batch_size=batch_size)


class Resumable:
    """A loader that knows where it was; plain Lightning resumes in mid-epoch bit-equal with such a one only."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.at, self.resumed = batches, 0, False

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        if not self.resumed:
            self.at = 0
        self.resumed = False
        while self.at < len(self.batches):
            self.at += 1
            yield self.batches[self.at - 1]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at, self.resumed = state["at"], True


class ResumableData(TinyData):
    def train_dataloader(self) -> Any:
        return Resumable(list(super().train_dataloader()))
