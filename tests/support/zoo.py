"""The model zoo: every network shape that the package has to survive, one row each.

`pytest.mark.parametrize("row", ZOO, ids=str)` runs a test over all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.support import architectures as nets

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One network: `build()` makes it, `inputs(seed)` makes a batch for it as (args, kwargs)."""

    name: str
    architecture: Callable[[], nn.Module]
    make_inputs: Callable[[torch.Generator], Inputs]
    notes: str = ""

    def __str__(self) -> str:
        return self.name

    def build(self, seed: int = 0) -> nn.Module:
        """The network, with the same weights each time; the global random state stays."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.architecture()

    def inputs(self, seed: int = 0) -> Inputs:
        """A batch as (args, kwargs), the same each time for the same seed."""
        return self.make_inputs(torch.Generator().manual_seed(seed))


def floats(*shape: int) -> Callable[[torch.Generator], Inputs]:
    return lambda generator: ((torch.randn(*shape, generator=generator),), {})


def ids(generator: torch.Generator) -> Inputs:
    return (torch.randint(20, (4, 5), generator=generator),), {}


def _keywords(generator: torch.Generator) -> Inputs:
    a, b = torch.randn(2, 4, 8, generator=generator)
    return (a,), {"b": b, "softmax": True}


def _dict(generator: torch.Generator) -> Inputs:
    features: Tensor = torch.randn(4, 8, generator=generator)
    return ({"features": features, "mask": torch.tensor([1.0] * 12 + [0.0] * 4)},), {}


_VECTORS, _IMAGES, _SEQUENCES = floats(4, 16), floats(4, 3, 8, 8), floats(4, 5, 16)

ZOO: tuple[Row, ...] = (
    Row("mlp", nets.mlp, _VECTORS),
    Row("conv_bn_relu", nets.conv_bn_relu, _IMAGES, "folds and fuses"),
    Row("residual", nets.Residual, _IMAGES, "channels tied by a sum"),
    Row("depthwise", nets.depthwise, _IMAGES, "groups equal channels"),
    Row("grouped", nets.grouped, _IMAGES, "groups of several channels; flatten multiplies a channel"),
    Row("concat", nets.Concat, _IMAGES, "channels tied by an offset"),
    Row("attention", nets.Attention, _SEQUENCES, "weights that are read, not called"),
    Row("transformer", nets.transformer, _SEQUENCES, "has a fast path in evaluation"),
    Row("lstm", lambda: nets.Recurrent(nn.LSTM), floats(4, 5, 8), "flat weights"),
    Row("gru", lambda: nets.Recurrent(nn.GRU), floats(4, 5, 8), "flat weights"),
    Row("tied", nets.TiedLanguageModel, ids, "one tensor, two names; Long ids"),
    Row("shared", nets.SharedModule, _VECTORS, "one module, two names, two calls"),
    Row("keyword_only", nets.KeywordOnly, _keywords, "an option steers control flow"),
    Row("dict", nets.DictInDictOut, _dict, "dict in, dict out"),
    Row("inplace_relu", lambda: nets.conv_bn_relu(inplace=True), _IMAGES, "activations are overwritten"),
    Row("functional_dropout", nets.FunctionalDropout, _VECTORS, "`self.training` in forward; draws random numbers"),
    Row("auxiliary_head", nets.AuxiliaryHead, _VECTORS, "output type depends on the mode"),
    Row("weight_norm", nets.weight_normed, _VECTORS, "the weight is computed"),
    Row("int_weight", nets.int_weight, _VECTORS, "`weight` is an int, `bias` is None"),
)


def row(name: str) -> Row:
    """The row called `name`."""
    return next(row for row in ZOO if row.name == name)
