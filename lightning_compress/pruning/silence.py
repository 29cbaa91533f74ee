"""Whether pruned units are silent, measured: some are zeroed on a copy, and what they become is watched while it runs.

Every operator that reaches torch's kernels is seen. Beside the outputs of a targeted weight goes a map that says which
entry is of which unit; operators that move entries move the map. Where a unit's entries meet the next weights, a sum
with something else, or the end, they must be zero. Norms shift them, and activations that aren't zero at zero; where a
parameter with an entry for each unit does it, that parameter's entries are taken out too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lightning_compress.messages import named
from lightning_compress.modules.paths import clean_name, compressible_modules
from lightning_compress.pruning.dependents import Dependent, Source
from lightning_compress.pruning.layout import Layout
from lightning_compress.pruning.watch import Heard, Watch
from lightning_compress.targets import Target


class Silence(Heard):
    """What was heard of pruned units, and what follows from it."""

    def dependents(self, model: nn.Module, layouts: Mapping[str, Layout]) -> list[Dependent]:
        """The parameters of ``model`` that go with units, where every call of theirs had such units."""
        parameters = {clean_name(name): parameter for name, parameter in model.named_parameters()}
        found = []
        for name in sorted(set[str]().union(*self.relied_on.values())):
            calls = self.calls[name]
            covered = [torch.stack(list(call.values())).amax(0) != -1 for call in calls if call]
            alone = torch.stack(covered).all(0)
            if not all(calls) or not alone.any():
                continue
            sources = []
            for weight in dict.fromkeys(weight for call in calls for weight in call):
                units = torch.stack([call[weight] for call in calls if weight in call]).amax(0).where(alone, -1)
                sources.append(Source(weight, layouts[weight], units.to(parameters[name].device)))
            found.append(Dependent(name, parameters[name], tuple(sources)))
        return found

    def unmasked_norms(self, dependents: Iterable[Dependent]) -> dict[str, str]:
        """Weights whose pruned units aren't silent, each with where that comes from."""
        follows = {(dependent.name, source.name) for dependent in dependents for source in dependent.sources}
        shared = {
            weight: f"`{name}`, which others use too"
            for weight, names in self.relied_on.items()
            for name in sorted(names)
            if (name, weight) not in follows
        }
        return dict(sorted({**shared, **self.loud}.items()))


def warning(loud: Mapping[str, str]) -> str:
    """What a user is told of units that aren't silent."""
    by_place: dict[str, list[str]] = {}
    for weight, place in loud.items():
        by_place.setdefault(place, []).append(weight)
    told = "; ".join(f"{named(weights)} behind {place}" for place, weights in by_place.items())
    return f"pruned units may still put out a constant: those of {told}."


@torch.no_grad()
def observe(
    model: nn.Module, run: Callable[[], Any], targets: Iterable[Target], layouts: Mapping[str, Layout], seen: Silence
) -> Silence:
    """Watch what half of the units of each target become when they are zero, and note it in ``seen``.

    Args:
        model: a copy, whose values change meanwhile: all away from values that are silent by chance.
        run: runs it.
        targets: the weights, as named in the model.
        layouts: of the targets.
        seen: what was seen before.
    """
    modules = compressible_modules(model)
    tensors = {clean_name(name): tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    fast_path = torch.backends.mha.get_fastpath_enabled()  # one operator for a whole layer
    torch.backends.mha.set_fastpath_enabled(False)
    handles: list[Any] = []
    try:
        generator = torch.Generator().manual_seed(0)
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                noise = 0.1 * torch.rand(tensor.shape, generator=generator).to(tensor.device, tensor.dtype) - 0.05
                noise = noise.abs() if "var" in name else noise  # a variance stays positive
                tensor.add_(noise * tensor.abs().masked_fill(tensor == 0, 1.0))
        watch = Watch(model, [target for target in targets if target.name in tensors], layouts, seen)
        for path, module in modules.items():
            handles += watch.hooks(path, module)
        with torch.compiler.set_stance("force_eager"), watch:
            outputs = run()
        watch.end(outputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for handle in handles:
            handle.remove()
        for name, value in before.items():
            tensors[name].copy_(value)
    return seen
