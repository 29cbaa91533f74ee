"""Samples that nothing is fitted to: they tell whether a fit stays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_compress.compensation.replay import Replay
from lightning_compress.compensation.runner import Runner
from lightning_compress.modules.agreement import Agreement, outputs_of
from lightning_compress.modules.calls import samples_in
from lightning_compress.modules.outputs import flatten

SHARE = 5
"""One sample of so many is held out, or more."""


def split(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Split batches into those to fit to and those that are held out: the last, with a fifth of the samples or more.

    Fewer than five batches are taken apart first, where all of their tensors have the same length.

    Example:
        >>> fitted, held_out = split([torch.arange(10)])
        >>> len(torch.cat(fitted)), held_out
        (8, [tensor([8, 9])])
    """
    found = list(batches)
    if len(found) < SHARE:
        found = [piece for batch in batches for piece in pieces(batch)]
    counts = [samples_in(piece) for piece in found]
    start = len(found)
    while start > 1 and SHARE * sum(counts[start:]) < sum(counts):  # the last batch may be a short one
        start -= 1
    return found[:start], found[start:]


def pieces(batch: Any, count: int = SHARE) -> list[Any]:
    """Take a batch apart along its samples, where all of its tensors have as many; else it is a piece by itself.

    Example:
        >>> [len(piece) for piece in pieces(torch.ones(7), 3)]
        [2, 2, 3]
    """
    tensors, structure = flatten(batch)
    sizes = {len(tensor) for tensor in tensors if tensor.dim()}
    if len(sizes) != 1 or (size := sizes.pop()) < count:
        return [batch]
    cuts = [size * number // count for number in range(count + 1)]
    return [
        structure.rebuild([tensor[start:end] if tensor.dim() else tensor for tensor in tensors])
        for start, end in pairwise(cuts)
    ]


class HoldOut:
    """Measures how far the outputs of a fitted model are from those of a reference.

    Args:
        reference: what is to be computed.
        fitted: what is fitted; it is looked at anew at each measurement.
        batches: that nothing is fitted to.
    """

    def __init__(self, reference: Runner, fitted: Runner, batches: Sequence[Any]) -> None:
        self.batches, self._run, self._twin = batches, fitted.run, fitted.twin()
        self._replay = Replay(self._twin, fitted.run)
        self._expected = outputs_of(reference.twin(), batches, reference.run)

    def error(self, changed: Iterable[Tensor] | None = None) -> float:
        """Return ``sum ||y - y0||^2 / sum ||y0 - mean y0||^2``, the mean over the outputs; scalars don't count.

        Args:
            changed: all tensors of the fitted model that have changed since this was asked before, but for those that
                were given then; None if any may have.
        """
        with self._replay.since(changed) as run:
            return relative_error(self._expected, outputs_of(self._twin, self.batches, run))

    def agreement(self) -> Agreement:
        """Compare as everywhere in the package."""
        return Agreement.of(self._expected, outputs_of(self._twin, self.batches, self._run))


def relative_error(expected: Sequence[Sequence[Any]], got: Sequence[Sequence[Any]]) -> float:
    """Return the mean over outputs of ``sum ||y - y0||^2 / sum ||y0 - mean y0||^2``, sums over all batches.

    Example:
        >>> relative_error([[torch.tensor([[0.0], [2.0]])]], [[torch.tensor([[1.0], [2.0]])]])
        0.5
    """
    pairs: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for calls, others in zip(expected, got, strict=True):
        tensors = zip(flatten(list(calls))[0], flatten(list(others))[0], strict=False)
        for place, (output, other) in enumerate(tensors):
            if output.is_floating_point() and output.numel() > 1:
                # Where detections are filtered their number may differ.
                other = other if other.shape == output.shape else torch.zeros_like(output)
                pairs.setdefault(place, []).append((output.flatten(1) if output.dim() > 1 else output[:, None], other))
    errors = []
    for found in pairs.values():
        apart = sum(float((output - other.reshape(output.shape)).double().square().sum()) for output, other in found)
        samples = [output.double() for output, _ in found]
        same = len({sample.shape[1:] for sample in samples}) == 1
        spread = sum(float((sample - _mean(samples, same)).square().sum()) for sample in samples)
        errors.append(apart / spread if spread > 0 else 0.0)
    return sum(errors) / len(errors) if errors else 0.0


def _mean(samples: Sequence[Tensor], same: bool) -> Tensor | float:
    return torch.cat(list(samples)).mean(0) if same else 0.0
