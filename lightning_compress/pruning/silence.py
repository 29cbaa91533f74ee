"""Whether pruned units are silent, measured: some are zeroed on a copy, and what they become is watched while it runs.

Every operator that reaches torch's kernels is seen. Beside the outputs of a targeted weight goes a map that says which
entry is of which unit; operators that move entries move the map. Where a unit's entries meet the next weights, a sum
with something else, or the end, they must be zero. Norms shift them, and activations that aren't zero at zero; where a
parameter with an entry for each unit does it, that parameter's entries are taken out too.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_compress.modules.fast_path import without_fast_path
from lightning_compress.modules.paths import clean_name, compressible_modules
from lightning_compress.pruning.dependents import Observations, magnitudes
from lightning_compress.pruning.layout import Layout, UnitView
from lightning_compress.pruning.unit_maps import CONTRACTIONS, Call, Map, Maps, broadcasts, units_of_entries
from lightning_compress.targets import Target

_SUMS = ("add", "add_", "sub", "sub_", "rsub", "lerp", "lerp_", "where")
_CLAMPS = ("relu", "relu_", "clamp", "clamp_", "clamp_min", "clamp_min_", "hardtanh", "hardtanh_", "threshold")
"""Operators behind which a constant of the one sign is zero and one of the other isn't."""
_SILENT = 1e-6  # what rounding may leave of a zero
_LARGEST = 1 << 16  # entries of a parameter that may have one for each unit


class Watch(TorchDispatchMode):
    """Carries maps of units beside the tensors of a run.

    ``_places`` says where units began to be nonzero, and whether this is hidden by the sign alone. ``_static`` has what
    was computed from parameters and buffers alone: the name of the parameter that it is a part or a copy of, and a map
    of that one's entries. Tensors are held with it, so that no other gets their id.
    """

    def __init__(self, model: nn.Module, tensors: dict[str, Tensor], units: UnitView, seen: Observations) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = seen
        self._maps: dict[int, tuple[Tensor, Maps]] = {}
        self._static: dict[int, tuple[Tensor, str, Map | None]] = {}
        self._places: dict[tuple[int, str], tuple[str, bool]] = {}
        self._gone: dict[str, Tensor] = {}
        self._sizes: dict[str, int] = {}
        self._paths = [""]
        layers = compressible_modules(model)
        watched: dict[str, Target] = {}
        for target in units.outputs:
            # A recurrent unit is silent by its arithmetic, in one operator with all others: it begins at the outputs.
            if not isinstance(layer := layers.get(target.layer), nn.RNNBase | nn.RNNCellBase):
                watched[target.name] = target
            elif "weight_ih" in target.name and target.name in tensors:
                self._choose(target.name, layer.hidden_size, target.parameter.device)
        for name, tensor in tensors.items():
            entries, self._sizes[name] = None, tensor.numel()
            if name in watched:
                self._begin(watched[name], tensor, units.numbered[name], tensors)
            elif isinstance(tensor, nn.Parameter) and 1 < tensor.numel() <= _LARGEST:
                entries = torch.arange(1, tensor.numel() + 1, device=tensor.device).view(tensor.shape)
            self._static[id(tensor)] = (tensor, name, entries)

    def _begin(self, target: Target, weight: Tensor, layout: Layout, tensors: Mapping[str, Tensor]) -> None:
        """Zero half of a weight's units, or of the magnitudes that a weight norm has for them."""
        name, ordered = target.name, layout.outputs_first(weight)
        count = len(ordered)
        rows = torch.arange(1, count + 1, device=weight.device).view(-1, *[1] * (ordered.dim() - 1))
        units = layout.undo(rows.expand(ordered.shape))
        gone = self._choose(name, count, weight.device)[units]
        for dependent in magnitudes([target]):
            stays = dependent.mask({name: ~gone})
            tensors[dependent.name].masked_fill_(~stays, 0.0)
            gone = gone & stays
        weight.masked_fill_(gone, 0.0)
        self._maps[id(weight)] = (weight, {name: units})

    def _choose(self, name: str, count: int, device: torch.device) -> Tensor:
        """Choose the units that go: half of them, at random, or those of two weights that meet would be the same."""
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        chosen = torch.randperm(count, generator=generator)[: count // 2] + 1
        self._gone[name] = torch.zeros(count + 1, dtype=torch.bool, device=device)
        self._gone[name][chosen.to(device)] = True
        return self._gone[name]

    def _begin_recurrent(self, path: str, layer: nn.RNNBase | nn.RNNCellBase, output: Any) -> None:
        """Zero units in what a recurrent layer puts out: of its last layer, both ways side by side; all in states."""
        ways = ["", "_reverse"] if getattr(layer, "bidirectional", False) else [""]
        suffixes = [f"_l{number}{way}" for number in range(getattr(layer, "num_layers", 0)) for way in ways] or [""]
        names = [f"{path}.weight_ih{suffix}".lstrip(".") for suffix in suffixes]
        size, device = layer.hidden_size, next(layer.parameters()).device
        codes = torch.arange(1, size + 1, device=device)
        rows_of = torch.eye(len(names), dtype=torch.long, device=device)[:, :, None] * codes
        hidden, *states = output if isinstance(output, tuple) and not isinstance(layer, nn.RNNCellBase) else (output,)
        hidden = hidden.data if isinstance(hidden, PackedSequence) else hidden
        for tensor in pytree.tree_leaves([hidden, states]):
            maps: Maps = {}
            for name, rows in zip(names, rows_of, strict=True):
                last = rows[-len(ways) :].reshape(-1)
                units = last if tensor is hidden or not states else rows.view(-1, *[1] * (tensor.dim() - 2), size)
                if name in self._gone and units.any() and broadcasts(units.shape, tensor.shape):
                    maps[name] = units
                    tensor.masked_fill_(self._gone[name][units], 0.0)
            self._static.pop(id(tensor), None)
            self._maps[id(tensor)] = tensor, maps

    def hooks(self, path: str, module: nn.Module) -> list[Any]:
        """Add the hooks by which it knows where it is."""

        def leave(layer: nn.Module, args: Any, output: Any) -> None:
            self._paths.pop()
            if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
                self._begin_recurrent(path, layer, output)

        enter = module.register_forward_pre_hook(lambda *_: self._paths.append(path))
        return [enter, module.register_forward_hook(leave, always_call=True)]

    def end(self, outputs: Any) -> None:
        """Check what a run puts out, which must be silent too: who reads it isn't known."""
        for leaf in pytree.tree_leaves(outputs):
            if isinstance(leaf, Tensor) and id(leaf) not in self._static:
                for target in self._of(leaf):
                    self._check(leaf, target)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(getattr(func, "overloadpacket", None), "__name__", "")
        if name == "glu":  # one operator for what gates and what is gated
            with self:
                first, second = args[0].chunk(2, args[1] if len(args) > 1 else -1)
                return first * second.sigmoid()
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        static = all(id(tensor) in self._static for tensor in tensors)
        targets = {target for tensor in tensors for target in self._of(tensor)} - self._ended(name, tensors)
        in_place = bool(tensors) and name.endswith("_") and not name.endswith("__")
        out = tensors[0] if in_place else func(*args, **kwargs)
        outs = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        call = Call(func, name, args, kwargs, static)
        maps = {target: self._carry(call, target, tensors, outs) for target in targets}
        masked_with, silent = dict[int, Tensor](), set[str]()
        if not static and outs:
            masked_with, silent = self._without_affine(tensors, None if in_place else outs[0], maps, name)
        if in_place or masked_with:
            args, kwargs = pytree.tree_map(lambda leaf: masked_with.get(id(leaf), leaf), (args, kwargs))
            out = func(*args, **kwargs)
        if not in_place:
            outs = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        for number, tensor in enumerate(outs):
            self._note(tensor, {target: results[number] for target, results in maps.items()}, tensors, name, silent)
            if static:
                source, part_of, entries = self._static[id(tensors[0])] if len(tensors) == 1 else (tensor, "", None)
                self._static[id(tensor)] = (tensor, part_of, call.entries(source, entries, outs, number))
            else:
                self._static.pop(id(tensor), None)
        return out

    def _of(self, tensor: Tensor) -> Maps:
        return self._maps.get(id(tensor), (None, {}))[1]

    def _ended(self, name: str, tensors: list[Tensor]) -> set[str]:
        """Find the targets whose units are read here, and must be silent."""
        ended = set()
        for target in {target for tensor in tensors for target in self._of(tensor)}:
            held = [tensor for tensor in tensors if target in self._of(tensor)]
            read = [tensor for tensor in held if id(tensor) not in self._static]
            if name in CONTRACTIONS or name.startswith("_scaled_dot_product"):
                ends = len(read) == len(held)
            elif name in _SUMS:
                ends = self._differ(read, target) or any(self._is_other(tensor, target, read) for tensor in tensors)
            else:
                continue
            if ends or name in CONTRACTIONS:
                for tensor in read:
                    self._check(tensor, target)
            if ends and read:
                ended.add(target)
        return ended

    def _is_other(self, tensor: Tensor, target: str, beside: Iterable[Tensor]) -> bool:
        """Tell whether what is added to units comes from elsewhere: it shifts no unit, nor is computed from them."""
        if not tensor.is_floating_point() or tensor.numel() < 2 or target in self._of(tensor):
            return False
        _, parameter, entries = self._static.get(id(tensor), (tensor, "", None))
        if id(tensor) not in self._static or sum(size > 1 for size in tensor.shape) < 2:
            return id(tensor) not in self._static
        maps = [units for other in beside if (units := self._of(other).get(target)) is not None]
        of_entries = (
            None if entries is None or not maps else units_of_entries(entries, maps[0], "", self._sizes[parameter])
        )
        # An embedding of positions has several entries for a unit.
        return of_entries is None or bool(of_entries[of_entries >= 0].bincount().max() > 1)

    def _differ(self, tensors: list[Tensor], target: str) -> bool:
        """Tell whether what is added are entries of different units."""
        maps = [units for tensor in tensors if (units := self._of(tensor)[target]) is not None]
        return len(maps) > 1 and not torch.equal(maps[0], maps[1])

    def _carry(self, call: Call, target: str, tensors: list[Tensor], outs: list[Tensor]) -> list[Map | None]:
        """Compute the map of each result."""
        held = [(tensor, units) for tensor in tensors if (units := self._of(tensor).get(target)) is not None]
        held.sort(key=lambda pair: (id(pair[0]), target) not in self._places)  # of two factors the nonzero one
        if not held or not outs:
            return [None] * len(outs)
        mapped = {id(tensor): units for tensor, units in held}
        weights = {key: units for key, units in mapped.items() if key in self._static}
        contracted = call.name in CONTRACTIONS and bool(weights)
        fits = [next((units for tensor, units in held if broadcasts(tensor.shape, out.shape)), None) for out in outs]
        if not contracted and not call.moves and all(units is not None for units in fits):
            return fits
        moved = call.carried(weights if contracted else mapped, len(self._gone[target]) - 1, contracted, outs)
        if contracted and not call.static and moved[0] is None and call.fills_all(weights):
            self._seen.nonzero[target] = f"its layer, whose outputs aren't along `dim` ({call.name})"
        if contracted or call.moves:
            return moved
        return [units if units is not None else other for units, other in zip(fits, moved, strict=True)]

    def _without_affine(
        self, tensors: list[Tensor], out: Tensor | None, maps: Mapping[str, list[Map | None]], name: str
    ) -> tuple[dict[int, Tensor], set[str]]:
        """Replace parameters with an entry for each unit, where these put out something; say for which targets."""
        masked_with, silent = dict[int, Tensor](), set[str]()
        for tensor in tensors:
            _, parameter, entries = self._static.get(id(tensor), (tensor, "", None))
            if entries is None or self._of(tensor):
                continue
            found: dict[str, Tensor] = {}
            for target, results in maps.items():
                units = results[0]
                of_entries = None if units is None else units_of_entries(entries, units, name, self._sizes[parameter])
                if units is None or of_entries is None or (name in _SUMS and self._is_other(tensor, target, tensors)):
                    continue
                found[target] = of_entries
                hidden = any(self._places.get((id(held), target), ("", False))[1] for held in tensors)
                if out is None or hidden or self._is_nonzero(out, units, target):
                    silent.add(target)
                    self._seen.relied_on.setdefault(target, set()).add(parameter)
                    gone = self._gone[target][(of_entries + 1).clamp(min=0)][entries - 1]
                    masked_with[id(tensor)] = masked_with.get(id(tensor), tensor).masked_fill(gone, 0.0)
            self._seen.calls.setdefault(parameter, []).append(found)
        return masked_with, silent

    def _note(self, tensor: Tensor, maps: Maps, operands: list[Tensor], name: str, silent: set[str]) -> None:
        """Keep a result's maps, and where its units began to be nonzero."""
        self._maps.pop(id(tensor), None)
        if maps:
            self._maps[id(tensor)] = (tensor, maps)
        for target, units in maps.items():
            places = [place for operand in operands if (place := self._places.get((id(operand), target)))]
            nonzero = units is not None and self._is_nonzero(tensor, units, target)
            hidden = any(was_hidden for _, was_hidden in places) or (name in _CLAMPS and bool(places))
            if target in silent or (name in ("mul", "mul_") and self._has_silent_factor(operands, units, target)):
                hidden = False
            key = id(tensor), target
            self._places.pop(key, None)
            if nonzero or hidden:
                here = f"`{self._paths[-1]}`" if self._paths[-1] else "the module's own"
                self._places[key] = places[0][0] if places else f"{here} ({name.strip('_')})", hidden

    def _has_silent_factor(self, operands: list[Tensor], units: Map | None, target: str) -> bool:
        maps = [self._of(operand).get(target) for operand in operands if (id(operand), target) not in self._places]
        return any(factor is not None and units is not None and torch.equal(factor, units) for factor in maps)

    def _check(self, tensor: Tensor, target: str) -> None:
        units = self._of(tensor).get(target)
        if units is not None and ((id(tensor), target) in self._places or self._is_nonzero(tensor, units, target)):
            self._seen.nonzero.setdefault(target, self._places.get((id(tensor), target), (f"`{self._paths[-1]}`",))[0])

    def _is_nonzero(self, tensor: Tensor, units: Map, target: str) -> bool:
        return tensor.is_floating_point() and bool((~(tensor.abs() <= _SILENT) & self._gone[target][units]).any())


@torch.no_grad()
def observe(model: nn.Module, run: Callable[[], Any], units: UnitView, seen: Observations) -> None:
    """Watch what half of the units of each target become when they are zero, and note it in ``seen``.

    ``run`` runs ``model``, a copy whose values change meanwhile: all away from values that are silent by chance.
    """
    tensors = {clean_name(name): tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    generator = torch.Generator().manual_seed(0)
    with ExitStack() as stack:
        for name, tensor in tensors.items():
            stack.callback(tensor.copy_, tensor.clone())
            if tensor.is_floating_point():
                noise = 0.1 * torch.rand(tensor.shape, generator=generator).to(tensor.device, tensor.dtype) - 0.05
                noise = noise.abs() if "var" in name else noise  # a variance stays positive
                tensor.add_(noise * tensor.abs().masked_fill(tensor == 0, 1.0))
        watch = Watch(model, tensors, units, seen)
        for path, module in compressible_modules(model).items():
            for handle in watch.hooks(path, module):
                stack.enter_context(handle)
        with torch.compiler.set_stance("force_eager"), without_fast_path(), watch:
            result = run()
        watch.end(result)
