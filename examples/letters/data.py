"""Draws the task: 28x28 pictures of three letters, in bad light and noise, of which the middle one is to be read.

Nothing is downloaded: the letters come from the fonts that matplotlib brings along.
"""

from __future__ import annotations

import string
from functools import cache
from pathlib import Path

import lightning as L
import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample
from torch.utils.data import DataLoader, TensorDataset

LETTERS = string.ascii_uppercase
SIZE, TILE, ADVANCE = 28, 32, 26
FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSansMono"),
    *("STIXGeneral", "STIXGeneralItalic", "STIXGeneralBol", "cmss10", "cmtt10"),
)


class Letters(L.LightningDataModule):
    """Draws pictures to train on, and others to validate and test on.

    Args:
        train: how many pictures to train on.
        test: how many to test on; a quarter as many validate.
        seed: of the pictures to train on. Those of validation and test are always the same.
        batch_size: of the training loader.
    """

    def __init__(self, train: int = 6000, test: int = 4000, seed: int = 0, batch_size: int = 64) -> None:
        super().__init__()
        self.train = train
        self.test = test
        self.seed = seed
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        self.train_set = TensorDataset(*draw(self.train, self.seed))
        self.val_set = TensorDataset(*draw(self.test // 4, 1_000_000))
        self.test_set = TensorDataset(*draw(self.test, 1_000_001))

    def train_dataloader(self) -> DataLoader:
        # A generator of its own: the order doesn't depend on how many random numbers a model drew.
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True, generator=generator)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, batch_size=500)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test_set, batch_size=500)

    def calibration_dataloader(self) -> DataLoader:
        """Yields the training pictures by which channels are chosen and files are proven."""
        return DataLoader(self.train_set, batch_size=64)


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw pictures ``(count, 1, 28, 28)`` of about unit variance, and the numbers of their middle letters."""
    generator = torch.Generator().manual_seed(seed)

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    words = torch.randint(len(LETTERS), (count, 3), generator=generator)
    fonts = torch.randint(len(FONTS), (count, 1), generator=generator)
    strips = torch.zeros(count, 1, TILE, 2 * ADVANCE + TILE)
    for place, tiles in enumerate(rendered()[fonts, words].unbind(1)):
        part = strips[:, 0, :, place * ADVANCE : place * ADVANCE + TILE]
        torch.maximum(part, tiles, out=part)

    turn, slant, zoom = between(-0.25, 0.25), between(-0.3, 0.3), between(0.9, 1.5)
    across, down = (zoom * side for side in (TILE / strips.shape[-1], 1.0))  # of a strip that is -1 to 1 both ways
    cos, sin = turn.cos(), turn.sin()
    rows = (
        torch.stack([across * cos, across * (slant * cos - sin), between(-0.12, 0.12) * TILE / strips.shape[-1]], 1),
        torch.stack([down * sin, down * (slant * sin + cos), between(-0.2, 0.2)], 1),
    )
    grid = affine_grid(torch.stack(rows, 1), [count, 1, SIZE, SIZE], align_corners=False)
    letters = grid_sample(strips, grid, align_corners=False)

    def each(low: float, high: float) -> Tensor:
        return between(low, high)[:, None, None, None]

    ink = each(0.5, 1.0) * (each(-1, 1)).sign()  # bright on dark, or dark on bright
    slope = torch.linspace(-1, 1, SIZE)
    light = each(-0.5, 0.5) + each(-0.4, 0.4) * slope + each(-0.4, 0.4) * slope[:, None]
    noise = each(0.08, 0.25) * torch.randn(letters.shape, generator=generator)
    return 2 * (ink * letters + light + noise), words[:, 1]


@cache
def rendered() -> Tensor:
    """Render every letter in every font once: ``(fonts, letters, 32, 32)``, 0 to 1."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    tiles = []
    for name in FONTS:
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 28)
        for letter in LETTERS:
            tile = Image.new("L", (TILE, TILE))
            ImageDraw.Draw(tile).text((TILE / 2, TILE / 2), letter, 255, font, anchor="mm")
            tiles.append(np.asarray(tile, dtype=np.float32) / 255)
    return torch.tensor(np.stack(tiles)).view(len(FONTS), len(LETTERS), TILE, TILE)
