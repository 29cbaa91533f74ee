"""Which of the selected weights a rule can prune: an error for what it can't rank, a reason for what is left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_compress.errors import CompressionError
from lightning_compress.modules.layer_weights import PRUNABLE
from lightning_compress.pruning.layout import Layout
from lightning_compress.pruning.methods import LowestScores, PruningMethod
from lightning_compress.targets import Selection


def in_groups(
    rule: LowestScores, size: int, selection: Selection, modules: Mapping[str, nn.Module]
) -> tuple[PruningMethod, Selection]:
    """The rule with each weight's input dimension, and the weights whose inputs divide into groups."""
    dims, targets, skipped = {}, [], dict(selection.skipped)
    for target in selection.targets:
        layer = modules[target.layer]
        dim = 0 if isinstance(layer, _ConvTransposeNd) else 1
        if target.parameter.dim() < 2:
            skipped[target.name] = "it has no inputs"
        elif not isinstance(layer, PRUNABLE):
            skipped[target.name] = f"which dimension of a {type(layer).__name__}'s weight are its inputs isn't known"
        elif target.parameter.shape[dim] % size:
            skipped[target.name] = f"{target.parameter.shape[dim]} inputs are no multiple of {size}"
        else:
            dims[target.name] = dim
            targets.append(target)
    if not targets:
        reasons = "; ".join(f"{name}: {skipped[name]}" for name in list(skipped)[:5])
        raise CompressionError(
            f"`n_m` must have layers whose inputs divide into groups of {size}. Received: {reasons}."
        )
    return replace(rule, dims=dims), replace(selection, targets=tuple(targets), skipped=skipped)


def check_weights(rule: PruningMethod, weights: Mapping[str, Tensor], layouts: Mapping[str, Layout]) -> None:
    """Raise if a weight can't be ranked or changed, or a structured rule's ``dim`` isn't a dimension of it."""
    dim: Any = getattr(rule, "dim", 0)
    for name, weight in weights.items():
        if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise CompressionError(
                f"`targets` must select real floating-point weights. Received: {name} of {weight.dtype}. Exclude it."
            )
        if weight.is_inference() or 0 in weight.stride():
            kind = "made in inference mode" if weight.is_inference() else "expanded, with one value in many places"
            raise CompressionError(
                f"`targets` must select weights that can be changed in place. Received: {name}, {kind}. Clone it first."
            )
        if rule.structured and weight.dim() < 2:
            raise CompressionError(
                f"`targets` must select weights of two dimensions and more for a method that takes whole units. "
                f"Received: {name} of shape {tuple(weight.shape)}. Exclude it; a bias goes with its layer's units."
            )
        shape = layouts[name].outputs_first(weight).shape if name in layouts else weight.shape
        if rule.structured and not -len(shape) <= dim < len(shape):
            raise CompressionError(
                f"`dim` must be a dimension of every target. Received: dim={dim} for {name} of shape "
                f"{tuple(shape)}. Exclude the layer, or choose another dim."
            )
