"""Lists the arms of `compensation.py` that train nothing: weights, channels or blocks leave, and that is all.

An arm whose arguments this version doesn't have yet raises `Missing`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from compensation_networks import Batches, Row
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress import plan_removal, prune_, remove_channels_
from lightning_compress.channels.planning import search
from lightning_compress.modules.paths import modules_of

Arm = Callable[[Row, nn.Module, Batches, int], nn.Module]
"""From a row, its network, calibration of its kind and a seed to the smaller network; the one given may be changed."""

ORIGINAL, TODAY = "original", "today"
_BY_COST = search._Search._by_cost
CALIBRATION, BLOCKS = "calibration", "blocks"


class Missing(Exception):
    """The arm can't be measured here, and says why."""


def require(function: Callable[..., Any], *arguments: str) -> None:
    absent = [name for name in arguments if name not in inspect.signature(function).parameters]
    if absent:
        raise Missing(f"{function.__name__} has no {' and no '.join(absent)}")


@torch.no_grad()
def macs(model: nn.Module, sample: Tensor) -> int:
    """Multiply-accumulates of a sample, counted by torch; of oneDNN's LSTM it would see none."""
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        model.eval()(sample)
    return counter.get_total_flops() // 2


@torch.no_grad()
def estimate_statistics_(model: nn.Module, batches: Batches) -> nn.Module:
    """Average the statistics of all batches in BatchNorms, and leave everything in evaluation mode."""
    norms = [module for module in model.eval().modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train().momentum = None
    for batch in batches if norms else ():
        model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def _sparse(calibrated: bool, **how: Any) -> Arm:
    """Weights become zeros."""

    def arm(row: Row, model: nn.Module, calibration: Batches, seed: int) -> nn.Module:
        if calibrated:
            require(prune_, CALIBRATION)
        prune_(model, **how, **({CALIBRATION: calibration} if calibrated else {}))
        return model

    return arm


def _narrow(budget: float, plan: tuple[str, ...] = (), cut: tuple[str, ...] = ()) -> Arm:
    """Channels leave; ``plan`` and ``cut`` name the arguments that are given beside the budget."""

    def arm(row: Row, model: nn.Module, calibration: Batches, seed: int) -> nn.Module:
        require(plan_removal, *plan)
        require(remove_channels_, *cut)
        given: dict[str, Any] = {CALIBRATION: calibration, BLOCKS: True}
        removal = plan_removal(model, calibration[0][:4], macs=budget, **{name: given[name] for name in plan})
        remove_channels_(model, removal, **{name: given[name] for name in cut})
        return model if cut else estimate_statistics_(model, calibration)

    return arm


def _by_kind(search: Any, whole: Any) -> list[Tensor]:
    """Ranks units among those of their kind: groups with the same sorts of layers in the same places.

    Fang et al., "Isomorphic Pruning for Vision Models", 2024 (arXiv:2407.04616).
    """
    scores, modules = _BY_COST(search, whole), modules_of(search.subject.model)
    kinds: dict[Any, list[int]] = {}
    for number, group in enumerate(search._widths):
        sorts = sorted((type(modules[m.layer]).__name__, m.dim, m.makes) for m in group.members)
        kinds.setdefault(tuple(sorts), []).append(number)
    for numbers in kinds.values():
        ranks = torch.cat([scores[number] for number in numbers]).argsort().argsort().double()
        parts = (ranks / len(ranks)).split([len(scores[number]) for number in numbers])
        scores = [dict(zip(numbers, parts, strict=True)).get(place, own) for place, own in enumerate(scores)]
    return scores


def _isomorphic(budget: float) -> Arm:
    def arm(row: Row, model: nn.Module, calibration: Batches, seed: int) -> nn.Module:
        with mock.patch.object(search._Search, "_by_cost", _by_kind):
            return _narrow(budget, plan=(CALIBRATION,), cut=(CALIBRATION,))(row, model, calibration, seed)

    return arm


def _original(row: Row, model: nn.Module, calibration: Batches, seed: int) -> nn.Module:
    return model


def _arms() -> dict[str, Arm]:
    """What stands before the first comma is a table of its own, whose base is what follows as `TODAY`."""
    arms: dict[str, Arm] = {ORIGINAL: _original}
    for name, sparsity in (("50 %", 0.5), ("60 %", 0.6)):
        arms[f"{name}, {TODAY}"] = _sparse(False, sparsity=sparsity)
        for method in ("wanda", "least_squares"):
            for scope in ("layer", "global"):
                arms[f"{name}, {method}, {scope}"] = _sparse(True, sparsity=sparsity, method=method, scope=scope)
    arms[f"2:4, {TODAY}"] = _sparse(False, n_m="2:4")
    for method in ("wanda", "least_squares"):
        arms[f"2:4, {method}"] = _sparse(True, n_m="2:4", method=method)
    both = (CALIBRATION,)
    for budget in (0.75, 0.5, 0.25):
        arms |= {
            f"MACs {budget}, {TODAY}": _narrow(budget),
            f"MACs {budget}, calibrated plan": _narrow(budget, plan=both),
            f"MACs {budget}, calibrated cut": _narrow(budget, cut=both),
            f"MACs {budget}, calibrated": _narrow(budget, plan=both, cut=both),
            f"MACs {budget}, calibrated, isomorphic": _isomorphic(budget),
            f"MACs {budget}, calibrated, blocks": _narrow(budget, plan=(*both, BLOCKS), cut=both),
        }
    return arms


ARMS = _arms()
