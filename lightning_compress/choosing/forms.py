"""What of a model can be compressed, at which levels, and the model with some of it compressed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.modules.isolation import evaluation_mode

Run = Callable[[nn.Module, Any], Any]
"""Runs a batch through a model."""

Choice = Mapping[str, str]
"""Layer to the level that it gets; layers that aren't named stay as they are."""


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        parameters: that aren't zero.
        macs: multiply-accumulates of one sample in full: in float, with weights that aren't zero.
        size_bytes: of parameters and scales; zeros of pruned weights weigh nothing.
    """

    parameters: float
    macs: float
    size_bytes: float

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.parameters - other.parameters, self.macs - other.macs, self.size_bytes - other.size_bytes)


class Forms(ABC):
    """A trained model whose layers can be compressed one by one, or several together.

    Attributes:
        levels: how much, by label: the first compresses least.
        layers: path of each layer that can be compressed to the labels that it can have. Channels that hang together
            go by the first layer that makes them.
        skipped: what can't be compressed, with the reason.
        floats: the model as it is, beside which others are timed.
    """

    floats: nn.Module
    levels: tuple[str, ...]
    layers: Mapping[str, tuple[str, ...]]
    skipped: Mapping[str, str]

    @abstractmethod
    def compressed(self, choice: Choice) -> AbstractContextManager[nn.Module]:
        """Yield the model with some layers compressed, in evaluation mode: the same object again and again, or a copy.

        The model that was given to the constructor isn't changed. Nothing is compressed by an empty choice.
        """

    def deployed(self, choice: Choice) -> nn.Module:
        """Return a copy as the callback leaves it, whose time is the real one; only where time may fall."""
        raise NotImplementedError

    @abstractmethod
    def cost(self, choice: Choice) -> Cost:
        """Return what the model costs with some layers compressed."""

    @abstractmethod
    def taylor(self, batches: Sequence[Any], seed: int) -> dict[tuple[str, str], float]:
        """Predict the relative squared error of the outputs for each layer and level alone, by gradients."""

    @abstractmethod
    def settings(self, choice: Choice) -> dict[str, Any]:
        """Return arguments of the callback that compresses so, as YAML can say them."""

    @property
    @abstractmethod
    def callback(self) -> str:
        """The import path of that callback."""

    def errors_in_training(self) -> dict[tuple[str, str], float]:
        """Return what to add up in place of Taylor scores where training follows; empty if those are right, too."""
        return {}

    def splits(self) -> dict[str, AbstractContextManager[nn.Module]]:
        """Return the model with one part of the whole compression alone, by a label; most kinds have no parts."""
        return {}


@contextmanager
def with_values(model: nn.Module, values: Sequence[tuple[Tensor, Tensor]]) -> Iterator[nn.Module]:
    """Yield ``model`` in evaluation mode with other values in some of its tensors, and put their own back.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> with with_values(layer, [(layer.weight, torch.zeros(1, 2))]):
        ...     bool(layer.weight.any())
        False
        >>> bool(layer.weight.any())
        True
    """
    with torch.inference_mode(False), torch.no_grad():
        before = [(tensor, tensor.detach().clone()) for tensor, _ in values]
        try:
            for tensor, value in values:
                tensor.data.copy_(value.view(tensor.shape))
            with evaluation_mode(model):
                yield model
        finally:
            for tensor, value in before:
                tensor.data.copy_(value)
