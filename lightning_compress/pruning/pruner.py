"""`Pruner`: masks on the weights of one model, and everything that must be zero along with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from lightning_compress.errors import CompressionError, invalid
from lightning_compress.messages import named
from lightning_compress.modules.isolation import isolated_random_state
from lightning_compress.modules.paths import clean_name
from lightning_compress.modules.resizing import Cut, forget_, lies_along, with_inner
from lightning_compress.pruning import dependents
from lightning_compress.pruning.calibrated import Outcome
from lightning_compress.pruning.criteria import CRITERIA
from lightning_compress.pruning.dependents import Dependent, Observations, reduce_mask
from lightning_compress.pruning.masks import check_masks
from lightning_compress.pruning.methods import LowestScores, Masks, pruned
from lightning_compress.pruning.plan import make_plan
from lightning_compress.pruning.recipe import PruningRecipe


class Pruner:
    """Holds the masks of a model's weights, grows them, and brings weights, gradients and moments in line with them.

    Making it changes nothing in the model; ``masks`` are what is pruned already.

    Raises:
        CompressionError: no weight is targeted, or recipe and masks don't fit the weights.
    """

    def __init__(self, recipe: PruningRecipe, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        self._recipe, self.plan = recipe, make_plan(recipe, model)
        self.method, self.units = self.plan.method, self.plan.units
        self.weights: dict[str, Tensor] = {target.name: target.parameter for target in self.plan.selection.targets}
        self.scores: dict[str, Tensor] = {}  # what a criterion of gradients carries along
        self.regrow_values: dict[str, Tensor] = {}  # what pruned weights are when they come back, zero elsewhere
        self.unmasked_norms: dict[str, str] = {}  # weights whose pruned units aren't silent, and what makes them so
        self.unknown: set[str] = set()  # paths of what may keep units from being silent, which only a run can tell
        self.given: Masks | None = None  # taken over as they are, in place of growing
        self._dependents = dependents.magnitudes(self.plan.selection.targets)
        self._applied: Masks = {}
        self._tensors: dict[str, Tensor] = {}
        self.masks = check_masks(masks, self.weights)
        if self.units.outputs:  # else nothing goes with a weight
            known, self.unknown = dependents.in_sequence(model, self.units)
            self._depend(model, known)

    def follow(self, model: nn.Module, seen: Observations) -> str:
        """Mask what was seen to shift pruned units too; returns a warning of `unmasked_norms` that are new, if any."""
        self._depend(model, seen.dependents(model, self.units.numbered))
        known, found = self.unmasked_norms, seen.unmasked_norms(self._dependents)
        self.unmasked_norms = {**known, **found}
        by_place: dict[str, list[str]] = {}
        for weight in [weight for weight in found if weight not in known]:
            by_place.setdefault(found[weight], []).append(weight)
        shown = "; ".join(f"{named(weights)} behind {place}" for place, weights in by_place.items())
        return f"pruned units may still put out a constant: those of {shown}." if shown else ""

    def _depend(self, model: nn.Module, found: list[Dependent]) -> None:
        names = {dependent.name for dependent in found}
        own = [bias for bias in dependents.biases(model, self.units) if bias.name not in names]
        self._dependents = [*dependents.magnitudes(self.plan.selection.targets), *own, *found]
        self.masks = self._masks

    @property
    def criterion_state(self) -> dict[str, dict[str, Tensor]]:
        """What another pruner of the same weights needs to go on, by the names that it has in a checkpoint."""
        return {"scores": self.scores, "aside": self.regrow_values}

    @criterion_state.setter
    def criterion_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, tensor in ((name, tensor) for kind in state.values() for name, tensor in kind.items()):
            if name not in self.weights or tensor.shape != self.weights[name].shape:
                raise invalid("scores", "be of targeted weights, in their shapes", f"{name} of {tuple(tensor.shape)}")
        self.scores, self.regrow_values = (
            {name: tensor.to(self.weights[name].device) for name, tensor in state.get(kind, {}).items()}
            for kind in ("scores", "aside")
        )

    def cut(self, model: nn.Module, cut: Cut) -> Pruner:
        """Make the pruner of a model that channels have left, with masks and state of the weights that it still has."""
        pruner = Pruner(self._recipe, model, {})

        def left(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: cut.of(name, tensor) for name, tensor in tensors.items() if name in pruner.weights}

        pruner.masks = check_masks(left(self.masks), pruner.weights)
        pruner.criterion_state = {kind: left(tensors) for kind, tensors in self.criterion_state.items()}
        pruner.unmasked_norms = self.unmasked_norms
        pruner.given = None if self.given is None else left(self.given)
        return pruner

    @property
    def masks(self) -> Masks:
        return self._masks

    @masks.setter
    def masks(self, masks: Masks) -> None:
        self._masks = masks
        whole = dict(masks)
        self._tensors = dict(self.weights)
        for dependent in self._dependents:
            mask = dependent.mask(masks)
            self._tensors[dependent.name], whole[dependent.name] = dependent.parameter, mask
            if dependent.magnitude:
                [source] = dependent.sources
                whole[source.name] = whole[source.name] | ~mask
        self._applied = {
            name: _factor(mask, self._tensors[name], self._applied.get(name))
            for name, mask in whole.items()
            if not mask.all()
        }

    @torch.no_grad()
    def update_scores(self, optimizer: Optimizer | None = None) -> None:
        """Update the scores of a criterion that needs gradients, of all weights or of those that an optimizer steps."""
        if not isinstance(self.method, LowestScores) or not self.method.needs_gradients:
            return
        for name, weight in self._stepped_by(optimizer).items():
            if name in self.weights and weight.grad is not None:
                gradient = weight.grad.to_dense() if weight.grad.is_sparse else weight.grad
                self.scores[name] = self.method.next_scores(self._value(name), gradient, self._score(name))

    def _value(self, name: str) -> Tensor:
        return self.weights[name] + self.regrow_values[name] if name in self.regrow_values else self.weights[name]

    @torch.no_grad()
    def grow_(self, fraction: float, seed: int, regrow: bool = False) -> None:
        """Let the masks grow to ``fraction`` of the budget, under a random state of their own.

        With ``regrow`` all weights are ranked anew, and what comes back takes the value that it had when it went.
        """
        if self.method.needs_gradients and fraction > 0 and not self.scores:
            raise CompressionError(
                "`method` must have seen gradients before masks grow. Received: none. "
                "Start the window later; step the optimizers of self.optimizers(); or call backward before prune_."
            )
        if self.given is not None:
            self.masks = {name: mask & self.given[name] for name, mask in self.masks.items()}
            return
        start = check_masks({}, self.weights) if regrow else self.masks
        # Not for ours, which draw nothing: setting torch's seeds takes longer than small masks do.
        draws_nothing = isinstance(self.method, LowestScores) and self.method.criterion in CRITERIA.values()
        with nullcontext() if draws_nothing else isolated_random_state(seed):
            ranked = {
                name: self._score(name) if self.method.needs_gradients else self.method.scores(self._effective(name))
                for name in self.weights
            }
            grown = self.plan.grow(ranked, start, fraction)
        if not regrow:
            self.masks = grown
        elif pruned(grown.values()) > pruned(self.masks.values()):
            for name, weight in self.weights.items():
                value = self._value(name).clone()
                self.regrow_values[name] = value.masked_fill(grown[name], 0.0)
                weight.copy_(value)
            self.masks = grown

    @torch.no_grad()
    def take_(self, model: nn.Module, outcome: Outcome, copies: Iterable[nn.Module] = ()) -> None:
        """Take over masks and values of the model; averaged copies of it are shifted as it is."""
        own, *others = ({clean_name(name): tensor for name, tensor in m.named_parameters()} for m in (model, *copies))
        for name, value in outcome.values.items():
            for tensors in others:
                tensors[name].add_(value.to(own[name].device) - own[name])
            own[name].copy_(value)
        self.masks = check_masks(outcome.masks, self.weights)
        self.settle_()

    @torch.no_grad()
    def refit_(self, fraction: float, seed: int) -> None:
        """Bring the masks to ``fraction`` of a budget that shrank with the weights: more of it, or less again."""
        if self.method.needs_gradients and not self.scores:
            return
        before = pruned(self.masks.values())
        if not self.method.fixes_sparsity:
            grown, self.masks = self.masks, check_masks({}, self.weights)
            self.grow_(fraction, seed)
            if pruned(self.masks.values()) >= before:
                self.masks = grown
        self.grow_(fraction, seed)

    def _effective(self, name: str) -> Tensor:
        """Compute the weight that the layer computes with: a weight norm's direction at its magnitude."""
        value = self._value(name)
        for dependent in self._dependents:
            if dependent.magnitude and dependent.sources[0].name == name:
                shape = tuple(dependent.parameter.shape) or (1,) * value.dim()
                dims = [dim for dim, size in enumerate(shape) if size == 1]
                length: Tensor = torch.linalg.vector_norm(value, dim=dims, keepdim=True)
                return value * (dependent.parameter.view(shape) / length)
        return value

    def _score(self, name: str) -> Tensor:
        known = self.scores.get(name)
        return torch.zeros_like(self.weights[name], dtype=torch.float32) if known is None else known

    def apply_(self, optimizer: Optimizer | None = None) -> None:
        """Zero what is masked, of all or of what an optimizer steps; a weight that is inf or NaN becomes NaN.

        The others may be part of a graph that is still to be run backwards.
        """
        multiply_(self._stepped_by(optimizer), self._applied)

    def settle_(self, copy: nn.Module | None = None) -> None:
        """Do what `apply_` does, in the model or a copy of it, and make negative zeros positive, which compress."""
        tensors = self._tensors
        if copy is not None:
            tensors = {clean_name(name): tensor for name, tensor in copy.named_parameters(remove_duplicate=False)}
        multiply_(tensors, self._applied)
        with torch.no_grad():
            for name in self._applied:
                tensors[name].add_(0.0)

    def _stepped_by(self, optimizer: Optimizer | None) -> dict[str, Tensor]:
        if optimizer is None:
            return self._tensors
        groups = [group for inner in with_inner([optimizer]) for group in inner.param_groups]
        stepped = {id(parameter) for group in groups for parameter in group["params"]}
        return {name: tensor for name, tensor in self._tensors.items() if id(tensor) in stepped}

    def apply_to_gradients_(self, optimizer: Optimizer) -> None:
        """Zero the gradients of what is masked: they count in no norm, and moments of zero stay zero."""
        dense = {}
        for name, tensor in self._stepped_by(optimizer).items():
            gradient = tensor.grad if name in self._applied else None
            if gradient is not None and gradient.is_sparse:
                gradient._values().mul_(self._applied[name][tuple(gradient._indices())])
            elif gradient is not None:
                dense[name] = gradient
        multiply_(dense, self._applied)

    def apply_to_moments_(self, optimizers: Iterable[Optimizer]) -> None:
        """Zero what optimizers remember of what is masked, entry by entry or slice by slice, where it lies along it."""
        for optimizer in _followed(optimizers):
            for name, factor in self._applied.items():
                for moment in pytree.tree_leaves(optimizer.state.get(self._tensors[name], {})):
                    if isinstance(moment, Tensor) and moment.numel() > 1 and moment.dim() == factor.dim():
                        same = moment.shape == factor.shape
                        multiply_({name: moment}, {name: factor if same else reduce_mask(factor != 0, moment.shape)})

    @torch.no_grad()
    def bring_back_(self, optimizers: Iterable[Optimizer], before: Masks) -> None:
        """Give what isn't masked any more its weight in the copies of the weights that optimizers keep beside moments.

        Such a copy, an average or an iterate, lies near the weights, which no moment does.
        """
        for optimizer in _followed(optimizers):
            for name, mask in self.masks.items():
                weight, stays = self.weights[name], mask & before[name]
                back = mask & ~stays
                if not back.any():
                    continue
                for held in pytree.tree_leaves(optimizer.state.get(weight, {})):
                    along = isinstance(held, Tensor) and held.shape == weight.shape
                    if along and (held - weight)[stays].norm() < 0.5 * weight[stays].norm():
                        held[back] = weight[back].to(held.dtype)

    def forget_(self, optimizers: Iterable[Optimizer], before: Masks | None = None) -> list[str]:
        """Let optimizers start anew whose state can't follow what became of ``before``; returns their names."""
        changed = {name for name, mask in self.masks.items() if before is None or not torch.equal(mask, before[name])}
        changed |= {tensor.name for tensor in self._dependents if changed & {source.name for source in tensor.sources}}
        stale = {self._tensors[name]: self._tensors[name].shape for name in changed}
        return forget_(optimizers, stale, means_follow=True)


@torch.no_grad()
def multiply_(tensors: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> None:
    """Multiply each tensor by the factor of the same name, in place."""
    names = [name for name in factors if name in tensors]
    if names:
        changed = [tensors[name] for name in names]
        torch._foreach_mul_(changed, [factors[name].to(tensors[name].device) for name in names])


def _followed(optimizers: Iterable[Optimizer]) -> list[Optimizer]:
    """Pick the optimizers whose state lies along the parameters."""
    return [optimizer for optimizer in with_inner(optimizers) if lies_along(optimizer, means_follow=True)]


def _factor(mask: Tensor, weight: Tensor, old: Tensor | None) -> Tensor:
    """Make of ``mask`` what is multiplied in; on a CPU, of the weight's type and layout: ten times faster than bools.

    Written over the ``old`` one, as two of them at a time would take memory of the weights' size.
    """
    if weight.device.type != "cpu":
        return mask
    return (torch.empty_like(weight) if old is None else old).copy_(mask)
