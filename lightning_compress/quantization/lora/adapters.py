"""Low-rank adapters over 4-bit weights (QLoRA): how a module gets them, and how it gets rid of them again."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_compress.errors import CompressionError, invalid
from lightning_compress.modules.fast_path import quiet_fast_path_, restore_fast_path_
from lightning_compress.modules.paths import clean_name, compressible_modules
from lightning_compress.modules.routing import Form, has_forgotten, route_, routed_modules, settle_, unroute_
from lightning_compress.quantization.layers.packed import product
from lightning_compress.quantization.layers.packed_weight import NF4Weight
from lightning_compress.quantization.layers.plan import plan_layers
from lightning_compress.quantization.layers.schemes import NF4
from lightning_compress.quantization.layers.without_kernel import without_kernel
from lightning_compress.targets import Targets, matches


@dataclass(frozen=True)
class LowRank:
    """Says what adapters look like.

    Attributes:
        rank: r, rows of A and columns of B.
        alpha: the update is scaled by ``alpha / rank``.
        dropout: of the adapter's input while it trains.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise invalid("rank", "be at least 1", self.rank)
        if not isinstance(self.alpha, int | float) or not 0 < self.alpha < math.inf:
            raise invalid("alpha", "be above 0", self.alpha, "The update is scaled by alpha / rank.")
        if not isinstance(self.dropout, int | float) or not 0.0 <= self.dropout < 1.0:
            raise invalid("dropout", "lie in [0, 1)", self.dropout)


class LowRankLinear(Form):
    """Computes ``y = x W^T + b + (alpha / rank) dropout(x) A^T B^T`` with a packed, frozen W.

    A and B are parameters of the layer, ``lora_A`` and ``lora_B``, as b is.

    References:
        Hu et al., "LoRA", 2021 (arXiv:2106.09685), equation 3; Dettmers et al., "QLoRA", 2023 (arXiv:2305.14314),
        equation 5.
    """

    weights: Mapping[str, NF4Weight]  # type: ignore[assignment]
    is_trained = True
    added = ("lora_A", "lora_B")

    def __init__(self, weight: NF4Weight, low_rank: LowRank) -> None:
        super().__init__({"weight": weight})
        self.scaling = low_rank.alpha / low_rank.rank
        self.dropout = low_rank.dropout

    def forward(self, module: Any, input: Tensor) -> Tensor:
        y = product(input, self.weights["weight"], module.bias)
        narrow = functional.linear(functional.dropout(input, self.dropout, module.training), module.lora_A)
        return y + functional.linear(narrow, module.lora_B) * self.scaling

    def float_value(self, module: Any, name: str) -> Tensor:
        """Return ``W + (alpha / rank) B A``, in the type of the adapters, to which gradients flow."""
        update = module.lora_B.float() @ module.lora_A.float()
        merged: Tensor = self.weights[name].values().add(update, alpha=self.scaling)
        return merged.to(module.lora_A.dtype)


def plan_adapters(
    model: nn.Module, targets: Targets | None, trained: Collection[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """Return paths of the linear layers that get adapters, and why others don't. Changes nothing.

    Raises:
        CompressionError: a pattern matches nothing, or nothing is left to adapt.
    """
    if targets is not None:
        targets.check_patterns(model)
    chosen, floats = plan_layers(model, None, NF4(), targets, {})
    floats = {path: reason for path, reason in (without_kernel(model, NF4()) | floats).items() if path not in chosen}
    modules = compressible_modules(model)
    owners = Counter(id(parameter) for module in modules.values() for parameter in module._parameters.values())
    for path in list(chosen):
        kind = type(modules[path])
        if kind is not nn.Linear or owners[id(modules[path].weight)] > 1:
            floats[path] = "its weight is tied" if kind is nn.Linear else f"no adapters for {kind.__name__}"
            del chosen[path]
        elif any(matches(path, pattern) for pattern in trained):
            floats[path] = "it trains as it is"
            del chosen[path]
    if not chosen:
        reasons = "; ".join(f"{path or 'the module'}: {reason}" for path, reason in list(floats.items())[:5])
        raise CompressionError(
            f"The model must have a linear layer to adapt. Received: none. {reasons or 'It has no linear layer'}."
        )
    return list(chosen), floats


def adapt_(
    model: nn.Module, layers: Collection[str], low_rank: LowRank, trained: Collection[str] = ()
) -> dict[str, Any]:
    """Put NF4 weights and adapters under ``layers``, and freeze everything else but modules that match ``trained``.

    The float weights stay aside. Returns the settings, and the names of the parameters that were frozen: plain data.
    """
    modules = compressible_modules(model)
    frozen = [clean_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for seed, path in enumerate(layers):
        layer: Any = modules[path]
        drawn = _drawn(layer, low_rank.rank, seed)
        route_(layer, LowRankLinear(NF4Weight(layer.weight, NF4().block_size), low_rank))
        layer.lora_A, layer.lora_B = drawn
    quiet_fast_path_(model)
    adapters = {id(parameter) for layer in _adapted(model) for parameter in (layer.lora_A, layer.lora_B)}
    trained_on = [modules[path] for path in modules if any(matches(path, pattern) for pattern in trained)]
    free = {
        id(parameter) for module in trained_on for parameter in module.parameters() if parameter.is_floating_point()
    }
    # What only helps in training (a distillation's regressors) isn't among the modules, and goes on as it was.
    owned = {id(parameter) for module in modules.values() for parameter in module._parameters.values()}
    for name, parameter in model.named_parameters():
        if id(parameter) in free:
            parameter.requires_grad_(True)
        elif id(parameter) in owned - adapters:
            if parameter.is_leaf:  # those of a copied scripted module aren't
                parameter.requires_grad_(False)
            continue
        if clean_name(name) in frozen:
            frozen.remove(clean_name(name))
    return {"low_rank": asdict(low_rank), "trained": list(trained), "frozen": frozen}


def _drawn(layer: nn.Linear, rank: int, seed: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A, drawn as a linear layer's weight is, from a generator of its own, and B, zero.

    So training starts from the layer as it was.
    """
    bound, like = 1 / math.sqrt(layer.in_features), layer.weight.detach()
    drawn = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
    return nn.Parameter(drawn.to(like)), nn.Parameter(like.new_zeros(layer.out_features, rank))


def merge_(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Make plain linear layers of adapted ones again, with the adapters in their weights, and thaw what was frozen.

    A layer that still has its float weight, as no training has begun, gets that back.
    """
    for layer in _adapted(model):
        if has_forgotten(layer):
            settle_(layer)
        else:
            unroute_(layer)
    restore_fast_path_(model)
    for name, parameter in model.named_parameters():
        if clean_name(name) in record["frozen"]:
            parameter.requires_grad_(True)


def _adapted(model: nn.Module) -> list[Any]:
    """Return the layers that have adapters."""
    return [layer for layer, form in routed_modules(model).items() if isinstance(form, LowRankLinear)]
