"""Scores units by how much the outputs would change without them, on samples that are given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.channels.tracing.groups import Group, Member
from lightning_compress.compensation.hold_out import pieces
from lightning_compress.compensation.layer_rows import groups_of, input_dim
from lightning_compress.compensation.parts import linear_parts_, parameter_of
from lightning_compress.compensation.runner import Runner
from lightning_compress.errors import CompressionError
from lightning_compress.modules.calls import samples_in
from lightning_compress.modules.copying import copy_tensors
from lightning_compress.modules.fast_path import without_fast_path
from lightning_compress.modules.isolation import isolated_random_state
from lightning_compress.modules.output_probe import WithGradients, random_loss
from lightning_compress.modules.outputs import outer_outputs


def output_changes(runner: Runner, groups: Sequence[Group], batches: Iterable[Any], seed: int = 0) -> dict[str, Tensor]:
    """Estimate, to first order, the squared change of the outputs without each unit: a group's name to ``(units,)``.

    ``I_u = sum over samples (sum over positions and channels of the unit of a dL/da)^2``, where ``a`` is what the
    layers behind the unit get, and ``L = <y, v>`` with the outputs ``y`` over their standard deviations and ``v``
    drawn from a normal distribution: so the mean of ``(a dL/da)^2`` is ``||dy/da a||^2``. What is recurrent, and
    products that are no layers, are summed over the samples of a batch first, which has the same mean.

    Raises:
        CompressionError: no output has gradients.

    References:
        Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019 (arXiv:1906.10771), equation 8, with
        a loss of labels; here the outputs themselves are kept.
    """
    generator = torch.Generator().manual_seed(seed)
    with isolated_random_state(), without_fast_path(), torch.inference_mode(False), torch.enable_grad():
        scores = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}
        readers = _Readers(runner.twin(), groups)
        for batch in (piece for whole in batches for piece in pieces(whole)):
            for group, squares in zip(groups, readers.squares(runner, batch, generator), strict=True):
                scores[group.name] += squares
    if groups and not any(bool(score.any()) for score in scores.values()):
        raise CompressionError(
            "`importance='outputs'` must have outputs that have gradients. Received: none from "
            f"{type(runner.model).__name__}. Its code may detach them, or run in inference mode. Use importance='l1'."
        )
    return scores


class _Readers:
    """What reads the units of groups: layers by what they are given, other weights by their gradients."""

    def __init__(self, twin: nn.Module, groups: Sequence[Group]) -> None:
        self.twin, self.groups = twin, groups
        layers: dict[str, list[str]] = {}
        self.layers = linear_parts_(twin)
        for path, layer in self.layers.items():
            layers.setdefault(parameter_of(path, layer), []).append(path)
        self.of_layers: list[tuple[int, str, Member]] = []
        self.of_weights: list[tuple[int, nn.Parameter, Member]] = []
        parameters = dict(twin.named_parameters())
        for number, group in enumerate(groups):
            for member in group.members:
                if member.makes:
                    continue
                paths = layers.get(member.name, [])
                if paths and all(_reads(self.layers[path], member) for path in paths):
                    self.of_layers += [(number, path, member) for path in paths]
                elif (weight := parameters.get(member.name)) is not None and weight.is_floating_point():
                    self.of_weights.append((number, weight, member))
        self._given: dict[str, list[Tensor]] = {}
        for path in {path for _, path, _ in self.of_layers}:
            self.layers[path].register_forward_pre_hook(partial(self._see, path), with_kwargs=True)

    def _see(self, path: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["input"]
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        self._given.setdefault(path, []).append(x)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "input": x})

    def squares(self, runner: Runner, batch: Any, generator: torch.Generator) -> list[Tensor]:
        """Return the sum over a batch's samples of the squares, for each group."""
        self._given = {}
        with outer_outputs(self.twin) as calls, WithGradients():
            runner.run(self.twin, copy_tensors(batch))
        loss = random_loss(calls, generator)
        given = [(path, x) for path, found in self._given.items() for x in found]
        weights = [weight for _, weight, _ in self.of_weights if weight.requires_grad]
        if loss is None or not (given or weights):
            return [torch.zeros(group.size, dtype=torch.float64) for group in self.groups]
        gradients = torch.autograd.grad(loss, [*(x for _, x in given), *weights], allow_unused=True)
        count = samples_in(batch)
        found: Mapping[str, list[Tensor]] = {path: [] for path in self._given}
        for (path, x), gradient in zip(given, gradients, strict=False):
            if gradient is not None:
                found[path].append(_by_sample(self.layers[path], (x * gradient).detach(), count))
        of_weight = {
            id(w): w.detach() * g for w, g in zip(weights, gradients[len(given) :], strict=True) if g is not None
        }
        return [self._squares(number, found, of_weight) for number in range(len(self.groups))]

    def _squares(self, number: int, found: Mapping[str, list[Tensor]], of_weight: Mapping[int, Tensor]) -> Tensor:
        size = self.groups[number].size
        terms = [
            _by_unit(term, member, size)
            for owner, path, member in self.of_layers
            if owner == number
            for term in found.get(path, ())
        ]
        for owner, weight, member in self.of_weights:
            if owner == number and id(weight) in of_weight:
                term = of_weight[id(weight)].movedim(member.dim, 0).flatten(1).sum(1)[None]
                terms.append(_by_unit(term, member, size))
        if len({len(term) for term in terms}) > 1:
            terms = [term.sum(0, keepdim=True) for term in terms]
        return torch.stack(terms).sum(0).square().sum(0) if terms else torch.zeros(size, dtype=torch.float64)


def _reads(layer: nn.Module, member: Member) -> bool:
    """Whether what a layer is given shows all that it reads; recurrent layers read within their kernel."""
    is_recurrent = member.name.rpartition(".")[2].startswith(("weight_ih", "weight_hh"))
    return member.dim == input_dim(layer) and not is_recurrent


def _by_sample(layer: nn.Module, product: Tensor, count: int) -> Tensor:
    """Sum what a layer's channels contribute over positions: ``(samples, channels)``, or one row for all samples."""
    linear = isinstance(layer, nn.Linear)
    samples = count if product.dim() > 1 and product.shape[0] % count == 0 else 1
    product = product.reshape(samples, -1, *product.shape[1:]) if product.dim() > 1 else product[None, None]
    if linear:
        flat: Tensor = product.flatten(1, -2).sum(1).double()
        return flat
    channels: Tensor = product.flatten(3).sum(3).sum(1) if product.dim() > 3 else product.sum(1)
    by_group: Tensor = channels.unflatten(1, (groups_of(layer), -1))
    return by_group.sum(1).double()


def _by_unit(terms: Tensor, member: Member, size: int) -> Tensor:
    inside = member.units >= 0
    units = torch.zeros(len(terms), size, dtype=torch.float64)
    return units.index_add_(1, member.units[inside], terms.cpu()[:, inside].double())
