"""Loads handwritten digits: 1797 grey images of 8x8 pixels that come with scikit-learn, so nothing is downloaded."""

from __future__ import annotations

import lightning as L
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from torch.utils.data import DataLoader, Subset, TensorDataset

FOLDS = 5


class Digits(L.LightningDataModule):
    """Three of five folds train, one validates, one tests: 1077, 360 and 360 images.

    Args:
        fold: which fold tests, 0 to 4; the next one validates. Running all five is a cross-validation.
        batch_size: of the training loader.
    """

    def __init__(self, fold: int = 0, batch_size: int = 64) -> None:
        super().__init__()
        self.fold = fold
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        pixels, labels = load_digits(return_X_y=True)
        # Pixels are 0 to 16; this brings them to about zero mean and unit variance.
        images = (torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) - 4.9) / 6.0
        data = TensorDataset(images, torch.tensor(labels))
        splits = StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(pixels, labels)
        folds = [Subset(data, indices.tolist()) for _, indices in splits]
        self.test_set = folds.pop(self.fold)
        self.val_set = folds.pop(self.fold % len(folds))
        self.train_set = torch.utils.data.ConcatDataset(folds)

    def train_dataloader(self) -> DataLoader:
        # A generator of its own: the order of the images doesn't depend on how many random numbers a model drew.
        generator = torch.Generator().manual_seed(self.fold)
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True, generator=generator)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, batch_size=360)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test_set, batch_size=360)

    def calibration_dataloader(self) -> DataLoader:
        """Yields the training images by which `PostTrainingQuantization` chooses its ranges."""
        return DataLoader(self.train_set, batch_size=64)
