"""How well do the outputs of two models agree on the same batches?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.modules.copying import copy_tensors
from lightning_compress.modules.isolation import isolated_evaluation
from lightning_compress.modules.outputs import least_cosine, outer_outputs

Run = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Agreement:
    """Says how well the outputs of a compressed model agree with those that are expected of it.

    Attributes:
        cosine: the least cosine similarity of an output, over the batches.
        same_class: the share of rows of matrices, such as logits ``(samples, classes)``, whose largest element is the
            same one; None where no output is a matrix.
        batches: on how many it was measured; those on which both run.
    """

    cosine: float
    same_class: float | None
    batches: int

    @classmethod
    def of(cls, expected: Sequence[Sequence[Any]], got: Sequence[Sequence[Any]]) -> Agreement:
        """Compare what `outputs_of` gave for two models."""
        batches = [calls for calls in zip(expected, got, strict=True) if all(calls)]
        cosine = min((least_cosine(*calls) for calls in batches), default=1.0)
        pairs = [pair for calls in batches for pair in zip(*calls, strict=False)]
        same = [a.argmax(dim=1) == b.argmax(dim=1) for a, b in pairs if _is_matrix(a) and a.shape == b.shape]
        return cls(cosine, torch.cat(same).float().mean().item() if same else None, len(batches))

    def __str__(self) -> str:
        same = "" if self.same_class is None else f", the same largest output for {self.same_class:.1%} of samples"
        return f"cosine {self.cosine:.4f}{same} ({self.batches} batches)"


def _is_matrix(output: Any) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point() and output.dim() == 2 and output.shape[1] > 1


def outputs_of(model: nn.Module, batches: Iterable[Any], run: Run) -> list[list[Any]]:
    """Return what the outermost calls of a model give, for each batch; nothing where it doesn't run."""
    found: list[list[Any]] = []
    for batch in batches:
        outputs: list[Any] = []
        with suppress(Exception), isolated_evaluation(model), outer_outputs(model) as calls:  # of a step of the user's
            run(model, copy_tensors(batch))
            outputs = [copy_tensors(output) for _, output in calls]
        found.append(outputs)
    return found
