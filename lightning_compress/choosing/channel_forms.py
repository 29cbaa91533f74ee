"""A model without some channels of some layers, on copies that are cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.channels.cutting.cut import cut_
from lightning_compress.channels.planning.budget import Sizes
from lightning_compress.channels.planning.output_changes import output_changes
from lightning_compress.channels.planning.plan import RemovalPlan
from lightning_compress.channels.planning.recipe import make_recipe
from lightning_compress.channels.planning.removable import removable
from lightning_compress.channels.planning.search import make_plan
from lightning_compress.channels.remove_channels import check_module, runs_of
from lightning_compress.channels.tracing.find_groups import find_groups
from lightning_compress.channels.tracing.groups import Group
from lightning_compress.channels.tracing.verify import Subject
from lightning_compress.choosing.forms import Choice, Cost, Forms, Run
from lightning_compress.compensation.runner import Runner
from lightning_compress.errors import invalid
from lightning_compress.modules.calls import bind_batch, samples_in
from lightning_compress.modules.copying import copy_module
from lightning_compress.modules.isolation import evaluation_mode
from lightning_compress.targets import Targets

SHARES = (0.875, 0.75, 0.5, 0.25)
"""The levels of channels by default."""


class ChannelForms(Forms):
    """Groups of channels that hang together, of which those go first whose loss changes the outputs least.

    Args:
        model: any float module.
        batches: by which channels are ranked; what ``forward`` takes.
        run: how they run.
        levels: the fractions of a group's channels that stay, in (0, 1), falling.
    """

    callback = "lightning_compress.ChannelPruning"

    def __init__(self, model: nn.Module, batches: Sequence[Any], run: Run, levels: Sequence[float] = SHARES) -> None:
        if not all(isinstance(level, float) and 0.0 < level < 1.0 for level in levels):
            raise invalid("levels", "be fractions in (0, 1)", levels, "They are the parts of the channels that stay.")
        self._shares = {f"{level:g}": level for level in sorted(levels, reverse=True)}
        self.levels = tuple(self._shares)
        check_module(model)
        self.floats, self.model, self.run = model, copy_module(model), run
        self._recipe = make_recipe(1.0, None, None, None, "outputs", "layer", Targets(), None, 0.0, 1, 0, False, True)
        args, kwargs = bind_batch(self.model, batches[0])[0]
        with torch.inference_mode(False):
            self._subject = Subject(
                self.model, runs_of(self.model, args, kwargs), copy_module, samples_in((args, kwargs))
            )
            groups, fixed = removable(self._subject, find_groups(self._subject), self._recipe)
        self._groups, self.skipped = groups, dict(fixed)
        self._sizes = Sizes(groups)
        self._carried = self._scores(batches, 0)
        fewer = {
            group.name: tuple(level for level in self.levels if self._count(group, level) < group.size)
            for group in groups.all
        }
        self.layers = {name: found for name, found in fewer.items() if found}
        self._bytes = {parameter.element_size() for parameter in self.model.parameters()}

    def _scores(self, batches: Sequence[Any], seed: int) -> dict[str, Tensor]:
        return output_changes(Runner(self.model, self.run), self._groups.all, batches, seed)

    def plan(self, choice: Choice) -> RemovalPlan:
        """Return the plan that leaves so many channels; it is verified."""
        overrides = {group.name: 1.0 for group in self._groups.all}
        overrides |= {path: self._shares[level] for path, level in choice.items()}
        return make_plan(self._subject, self._groups, replace(self._recipe, overrides=overrides), self._carried)

    @contextmanager
    def compressed(self, choice: Choice) -> Iterator[nn.Module]:
        with torch.inference_mode(False), torch.no_grad():
            twin = copy_module(self.model)
            if choice:
                plan = self.plan(choice)
                cut_(twin, plan.kept, plan.numbers)
        with evaluation_mode(twin):
            yield twin

    def deployed(self, choice: Choice) -> nn.Module:
        with self.compressed(choice) as twin:
            return twin

    def _count(self, group: Group, level: str) -> int:
        return max(1, round(self._shares[level] * group.size))

    def _keep(self, choice: Choice) -> list[Tensor]:
        """Return what stays of each group, bool ``(units,)``: those that matter most."""
        kept = []
        for group in self._groups.all:
            count = self._count(group, choice[group.name]) if group.name in choice else group.size
            order = self._carried[group.name].argsort(descending=True)
            kept.append(torch.zeros(group.size, dtype=torch.bool).index_fill_(0, order[:count], True))
        return kept

    def cost(self, choice: Choice) -> Cost:
        keep = self._keep(choice)
        parameters = self._sizes.params(keep)
        return Cost(parameters, self._sizes.macs(keep) / self._subject.samples, parameters * max(self._bytes))

    def taylor(self, batches: Sequence[Any], seed: int) -> dict[tuple[str, str], float]:
        carried: Mapping[str, Tensor] = self._scores(batches, seed)
        total = sum(float(scores.sum()) for scores in carried.values()) or 1.0
        return {
            (group.name, level): float(carried[group.name][~self._keep({group.name: level})[number]].sum()) / total
            for number, group in enumerate(self._groups.all)
            if group.name in self.layers
            for level in self.layers[group.name]
        }

    def settings(self, choice: Choice) -> dict[str, Any]:
        left, whole = (self._sizes.channels(self._keep(some)) for some in (choice, {}))
        shares = {path: self._shares[choice[path]] if path in choice else 1.0 for path in self.layers}
        return {"channels": round(left / whole, 6), "min_layer_channels": 0.0, "round_to": 1, "overrides": shares}
