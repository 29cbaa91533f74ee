"""Prunes layer by layer in the order of calls, so that later layers make up for what earlier ones have lost."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm

from lightning_compress.compensation.guard import Guard, Samples
from lightning_compress.compensation.hold_out import HoldOut
from lightning_compress.compensation.in_order import Visits
from lightning_compress.compensation.layer_rows import LINEAR
from lightning_compress.compensation.parts import Part, parameter_of
from lightning_compress.compensation.runner import Runner, layers_of_
from lightning_compress.messages import by_reason, named
from lightning_compress.modules.agreement import Agreement
from lightning_compress.modules.calls import first_batches
from lightning_compress.modules.paths import clean_name, modules_of
from lightning_compress.pruning.layer_fit import LayerFit, LayerRows, fit_layer, write_
from lightning_compress.pruning.methods import Calibrated, Masks, pruned
from lightning_compress.pruning.plan import PruningPlan
from lightning_compress.pruning.shares import TRIED, counts_of, share

_FEW = 32
"""So many samples tell how sensitive a layer is."""


@dataclass
class Outcome:
    """What calibrated pruning makes of a model; nothing is changed yet.

    Attributes:
        values: new values of the parameters that change, by name.
        masks: that go with them.
        samples: how many there were to calibrate on, and how many were held out.
        agreement: with the reference on what was held out.
        plain: layers whose re-solved weights made the outputs worse there, and weren't taken.
        by_magnitude: weights that calibration can't judge, with the reasons.
    """

    values: dict[str, Tensor]
    masks: Masks
    samples: tuple[int, int]
    agreement: Agreement
    plain: list[str] = field(default_factory=list)
    by_magnitude: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        fitted_to, held_out = self.samples
        said = f"calibrated on {fitted_to} samples; on {held_out} others the outputs agree with those from before by "
        said += str(self.agreement)
        return said + (f"; not re-solved, as that was worse there: {named(self.plain)}" if self.plain else "")

    @property
    def warning(self) -> str:
        """Says what went by magnitude; empty if nothing did."""
        reasons = by_reason(self.by_magnitude).items()
        return "; ".join(f"{named(names)} went by magnitude: {reason}" for reason, names in reasons)


def prune_copy(
    reference: Runner, plan: PruningPlan, masks: Masks, batches: Sequence[Any], fraction: float = 1.0, seed: int = 0
) -> Outcome:
    """Prune a copy of the reference's model, which is left as it is, to ``fraction`` of the plan's budget.

    Args:
        reference: whose outputs are to be kept.
        plan: which weights, and how much; its method calibrates.
        masks: what is pruned already and stays so.
        batches: the last of them are held out, and decide whether re-solved weights stay.
        fraction: of the budget.
        seed: of the positions that are looked at.
    """
    fit = _Fit(reference, plan, batches, seed)
    errors = fit.errors(masks) if plan.budget.scope == "global" and fit.method.pattern is None else {}
    return fit.prune(masks, counts_of(plan, masks, fraction, errors))


@dataclass(frozen=True)
class _Slot:
    """Some rows of a weight, and the layers that multiply with them.

    Attributes:
        name: of the weight.
        rows: of its first dimension.
        paths: of the layers; several where they share the weight.
    """

    name: str
    rows: slice
    paths: list[str]


class _Fit:
    """Prunes a copy of a model, again and again."""

    def __init__(self, reference: Runner, plan: PruningPlan, batches: Sequence[Any], seed: int) -> None:
        assert isinstance(plan.method, Calibrated)
        self.reference, self.plan, self.method, self.seed = reference, plan, plan.method, seed
        self.fitted = replace(reference, model=reference.copy(reference.model, {}))
        self.samples = Samples.of(reference, batches, seed)
        layers = layers_of_(reference.twin())
        called = Visits(reference, self.fitted, self.samples.own[:1], layers).order
        self.slots, self.unjudged = _slots(plan, reference.model, {path: layers[path] for path in called})

    def errors(self, masks: Masks) -> dict[str, float]:
        """Measure the outputs' error with only one layer pruned, and add it up for each weight."""
        few = list(first_batches(self.samples.own, _FEW))
        hold_out = HoldOut(self.reference, self.fitted, list(first_batches(self.samples.held_out, _FEW)))
        names = {slot.name for slot in self.slots if slot.name not in self.plan.fractions}
        counts = {name: max(round(TRIED * masks[name].numel()), pruned([masks[name]])) for name in names}
        errors = dict.fromkeys(names, 0.0)
        for slot, places, fit in self._fits(few, counts, masks):
            before = _state(places)
            _take(places, fit)
            errors[slot.name] += hold_out.error(before)
            _restore(before)
        return errors

    def prune(self, masks: Masks, counts: Mapping[str, int]) -> Outcome:
        """Prune so many elements of each weight, and keep what was re-solved where the outputs get better by it."""
        grown, plain = self._by_magnitude(masks, counts, self.unjudged), list[str]()
        guard = Guard(self.reference, self.fitted, self.samples)
        strange = self.samples.strange if self.method.refits else []
        for slot, places, fit in self._fits([*self.samples.own, *strange], counts, grown):
            before = _state(places)
            write_(places[0].layer, fit.plain)
            if fit.fitted is not None:
                guard.renew(before)
                _take(places, fit)
                if not guard.accepts(before):
                    _restore(before)
                    write_(places[0].layer, fit.plain)
                    plain += slot.paths
            grown[slot.name][slot.rows] = fit.mask
        return Outcome(self._values(), grown, self.samples.counts(), guard.agreement(), plain, self.unjudged)

    def _values(self) -> dict[str, Tensor]:
        pairs = zip(self.fitted.model.named_parameters(), self.reference.model.parameters(), strict=True)
        return {clean_name(name): new.detach() for (name, new), old in pairs if not torch.equal(new, old)}

    def _by_magnitude(self, masks: Masks, counts: Mapping[str, int], names: Collection[str]) -> Masks:
        grown = {name: mask.clone() for name, mask in masks.items()}
        weights = {clean_name(name): weight for name, weight in self.fitted.model.named_parameters()}
        for name in names:
            grown |= self.method.grow({name: weights[name]}, grown, counts[name])
            weights[name].data.mul_(grown[name])
        return grown

    def _fits(
        self, batches: Sequence[Any], counts: Mapping[str, int], masks: Masks
    ) -> Iterator[tuple[_Slot, list[LayerRows], LayerFit]]:
        """Yield what becomes of each layer that has a count, when all before it are what they are by then."""
        slots = {path: slot for slot in self.slots if slot.name in counts for path in slot.paths}
        of_parts = _of_parts(self.slots, counts, masks)
        visits = Visits(self.reference, self.fitted, batches, slots, needs_sums=self.method.refits)
        places: dict[str, list[LayerRows]] = {}
        generator = torch.Generator().manual_seed(self.seed)
        for visit in visits:
            slot = slots[visit.path]
            held = places.setdefault(slot.paths[0], [])
            held.append(LayerRows.of(visit, self.samples, generator))
            if len(held) == len(slot.paths):
                dim = self.method.dims.get(slot.name, 1)
                mask, count = masks[slot.name][slot.rows], of_parts[slot.paths[0]]
                yield slot, held, fit_layer(held, mask, count, self.method, dim)
                del places[slot.paths[0]]


def _slots(plan: PruningPlan, model: nn.Module, layers: Mapping[str, nn.Module]) -> tuple[list[_Slot], dict[str, str]]:
    """Find the layers that multiply with each targeted weight; and the weights of which that isn't known, and why."""
    owners: dict[nn.Parameter, list[str]] = {}
    for path, module in modules_of(model).items():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append(f"{path}.{name}".lstrip("."))
    shared = {names[0]: names for names in owners.values()}
    by_name: dict[str, list[tuple[str, slice]]] = {}
    for path, layer in layers.items():
        if not isinstance(layer, LINEAR):
            continue
        rows = slice(layer.first_row, layer.first_row + len(layer.weight)) if isinstance(layer, Part) else slice(None)
        by_name.setdefault(_weight_name(path, layer), []).append((path, rows))
    slots, unjudged = list[_Slot](), dict[str, str]()
    for target in plan.selection.targets:
        names = shared[target.name]
        if not all(name in by_name for name in names):
            unjudged[target.name] = "calibration doesn't reach it, or it isn't a matrix"
            continue
        found: dict[int | None, _Slot] = {}
        for path, rows in (place for name in names for place in by_name[name]):
            found.setdefault(rows.start, _Slot(target.name, rows, [])).paths.append(path)
        slots += found.values()
    return slots, unjudged


def _weight_name(path: str, layer: Any) -> str:
    kept: Any = getattr(layer, "parametrizations", {})
    if "weight" in kept and len(kept.weight) == 1 and isinstance(kept.weight[0], _WeightNorm):
        return f"{path}.parametrizations.weight.original1".lstrip(".")
    return parameter_of(path, layer)


def _of_parts(slots: Sequence[_Slot], counts: Mapping[str, int], masks: Masks) -> dict[str, int]:
    """Share the count of each weight out among its parts, by their first layers."""
    found: dict[str, int] = {}
    for name in {slot.name for slot in slots} & counts.keys():
        parts = {slot.paths[0]: masks[name][slot.rows] for slot in slots if slot.name == name}
        sizes = {path: mask.numel() for path, mask in parts.items()}
        found |= share(sizes, {path: pruned([mask]) for path, mask in parts.items()}, sizes, counts[name], {})
    return found


def _take(places: Sequence[LayerRows], fit: LayerFit) -> None:
    write_(places[0].layer, fit.plain if fit.fitted is None else fit.fitted)
    for place, bias in zip(places, fit.biases, strict=True):
        if bias is not None:
            place.layer.bias.data.copy_(bias)


def _state(places: Sequence[LayerRows]) -> dict[Tensor, Tensor]:
    """Return the tensors of layers, and copies of them."""
    parameters = (parameter.data for place in places for parameter in place.layer.parameters())
    return {tensor: tensor.clone() for tensor in parameters}


def _restore(state: Mapping[Tensor, Tensor]) -> None:
    for tensor, before in state.items():
        tensor.copy_(before)
