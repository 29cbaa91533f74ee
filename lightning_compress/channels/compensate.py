"""Fits the layers behind removed channels to what the whole model computes, as far as samples held out agree better."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_compress.channels.cutting.cut import cut_, fits_of, note_fit_
from lightning_compress.channels.cutting.skipped import SKIPPED
from lightning_compress.channels.planning.plan import RemovalPlan
from lightning_compress.compensation.guard import Guard, Samples
from lightning_compress.compensation.in_order import Visit, Visits
from lightning_compress.compensation.layer_rows import input_dim, matrix_of, weight_from
from lightning_compress.compensation.least_squares import LeastSquares
from lightning_compress.compensation.pairs import Call
from lightning_compress.compensation.parts import Part, parameter_of
from lightning_compress.compensation.runner import Runner, layers_of_
from lightning_compress.compensation.sampling import sample_rows
from lightning_compress.modules.agreement import Agreement
from lightning_compress.modules.paths import modules_of, named_tensors
from lightning_compress.modules.resizing import KeptIndices

RIDGES = (0.1, 1.0, 10.0)
Fits = Mapping[str, Tensor]
"""Tensors by name."""


@dataclass(frozen=True)
class Compensation:
    """Says what layers were fitted to, and what came of it.

    Attributes:
        source: where the samples come from.
        samples: how many they were fitted to.
        held_out: how many samples decided which fits stay.
        fitted: paths of the layers whose fits stay.
        refused: paths of the layers that had better stay as they were.
        before: agreement with the whole model on the samples that were held out, without any fit.
        after: with them.
    """

    source: str
    samples: int
    held_out: int
    fitted: tuple[str, ...]
    refused: tuple[str, ...]
    before: Agreement
    after: Agreement

    def to_plain(self) -> dict[str, Any]:
        """Return plain data, as a checkpoint holds it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Compensation:
        """Return what `to_plain` was called on."""
        paths = {name: tuple(plain[name]) for name in ("fitted", "refused")}
        agreements = {name: Agreement(**plain[name]) for name in ("before", "after")}
        return cls(**{**plain, **paths, **agreements})

    def __str__(self) -> str:
        return (
            f"{len(self.fitted)} of {len(self.fitted) + len(self.refused)} layers behind removed channels were fitted "
            f"to {self.samples} samples of {self.source}; on {self.held_out} others, agreement with the whole model: "
            f"{self.after} "
            f"({self.before} without fits)"
        )


def compensate_(
    reference: Runner,
    narrow: Runner,
    kept: Mapping[str, KeptIndices],
    batches: Sequence[Any],
    source: str,
    seed: int = 0,
) -> Compensation:
    """Fit each layer of a narrow model that has lost inputs to what it puts out in the whole one.

    In the order of calls, ``min ||V x - y||^2 + l ||V - W||^2`` with ``x`` of the narrow model by then, and ``y`` what
    the whole model puts out there, plus ``h0 - h`` where it is added to a stream ``h``: see `LeastSquares`. A fifth of
    the samples is held out, and `strangers` stand beside both parts. They choose the ridge by the layer's output, and
    whether its fit stays by the model's. Running statistics move as the moments of what norms get have moved.

    References:
        He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", 2017 (arXiv:1707.06168), section 3.1.
    """
    samples = Samples.of(reference, batches, seed)
    layers = layers_of_(narrow.twin())
    modules = modules_of(narrow.model)
    blocks = [path for path, module in modules.items() if SKIPPED in vars(module)]
    paths = {path for path, layer in layers.items() if isinstance(layer, _NormBase) or _lost_inputs(path, layer, kept)}
    if blocks:  # what is added to a stream can make up for what has left it
        paths |= Visits(reference, narrow, samples.own[:1], layers, needs_sums=True).sums[1].of.keys()
    guard = Guard(reference, narrow, samples)
    before = guard.agreement()
    visits = Visits(reference, narrow, samples.all, paths, needs_sums=True, blocks=blocks)
    norms = {layer: (path, modules[path]) for path, layer in visits.sums[1].normed.items()}
    fitter = _Fitter(kept, norms, samples, guard, torch.Generator().manual_seed(seed))
    for visit in visits:
        if isinstance(visit.fitted, _NormBase):
            fitter.move_(visit)
        else:
            fitter.fit_(visit)
    fitted, refused = tuple(fitter.fitted), tuple(fitter.refused)
    return Compensation(source, *samples.counts(), fitted, refused, before, guard.agreement())


def _lost_inputs(path: str, layer: nn.Module, kept: Mapping[str, KeptIndices]) -> bool:
    return input_dim(layer) in kept.get(parameter_of(path, layer), {})


class _Fitter:
    def __init__(
        self,
        kept: Mapping[str, KeptIndices],
        norms: Mapping[str, tuple[str, nn.Module]],
        samples: Samples,
        guard: Guard,
        generator: torch.Generator,
    ) -> None:
        self._kept, self._norms, self._samples, self._guard, self._generator = kept, norms, samples, guard, generator
        self._moved = set[str]()
        self.fitted: list[str] = []
        self.refused: list[str] = []

    def fit_(self, visit: Visit) -> None:
        """Fit a layer, if the outputs for what is held out come nearer to the whole model's so."""
        layer, (path, norm) = visit.fitted, self._norms.get(visit.path, ("", None))
        tensors = [layer.weight, *([] if layer.bias is None else [layer.bias])]
        tensors += [] if norm is None else [norm.running_mean, norm.running_var]
        before = [tensor.detach().clone() for tensor in tensors]
        self._solve_(visit, norm)
        if self._guard.accepts(tensors):
            self.fitted.append(visit.path)
            self._moved.add(path)
        else:
            for tensor, value in zip(tensors, before, strict=True):
                tensor.data.copy_(value)
            self.refused.append(visit.path)

    def _solve_(self, visit: Visit, norm: nn.Module | None) -> None:
        """Fit a layer by the ridge whose output is nearest on what is held out, and a norm behind it with it."""
        layer, weight = visit.fitted, matrix_of(visit.fitted).detach().float()
        x, y = self._rows(visit, self._samples.fitted_calls(visit))
        check_x, check_y = self._rows(visit, self._samples.held_out_calls(visit))
        shifts = layer.bias is not None or norm is not None
        found = []
        for matrix in LeastSquares(x, centred=shifts).ridges(y, weight, RIDGES):
            shift = (y.mean(1, keepdim=True) - x.mean(1, keepdim=True) @ matrix.mT) * shifts
            found.append((float((check_x @ matrix.mT + shift - check_y).square().sum()), matrix, shift))
        _, matrix, shift = min(found, key=lambda entry: entry[0])
        layer.weight.data.copy_(weight_from(layer, matrix))
        if layer.bias is not None:
            layer.bias.data.copy_(shift.flatten())
        if norm is not None:
            x, y = self._rows(visit, self._samples.own_calls(visit))
            got = x @ matrix.mT + (shift if layer.bias is not None else 0.0)
            _move_(norm, *(torch.var_mean(rows.transpose(0, 1).flatten(1), 0) for rows in (got, y)))

    def move_(self, visit: Visit) -> None:
        """Move the statistics of a norm that stands behind no fitted layer, as what it gets has moved."""
        if visit.path in self._moved:
            return
        calls = self._samples.own_calls(visit)
        now = _moments([call.fitted for call in calls])
        before = _moments([call.reference for call in calls if call.reference is not None])
        indices = self._kept.get(f"{visit.path}.running_mean".lstrip("."), {}).get(0)
        _move_(visit.fitted, now, before if indices is None else (before[0][indices], before[1][indices]))
        self._guard.renew([visit.fitted.running_mean, visit.fitted.running_var])

    def _rows(self, visit: Visit, calls: Sequence[Call]) -> tuple[Tensor, Tensor]:
        x, y, _ = sample_rows(visit, calls, self._generator, self._outputs(visit))
        return x, y

    def _outputs(self, visit: Visit) -> Tensor | None:
        """Return which outputs of the whole layer the narrow one has."""
        layer = visit.reference
        dims = self._kept.get(parameter_of(visit.path, visit.fitted), {})
        indices = dims.get(1 - input_dim(layer))
        if indices is None or not isinstance(layer, Part):
            return indices
        inside = (indices >= layer.first_row) & (indices < layer.first_row + layer.out_features)
        return indices[inside] - layer.first_row


Moments = tuple[Tensor, Tensor]


def _move_(norm: Any, now: Moments, before: Moments) -> None:
    """Move running statistics by variances and means: ``mean += m - m0, var *= v / v0``."""
    (var, mean), (var0, mean0) = now, before
    norm.running_mean.add_((mean - mean0).to(norm.running_mean))
    norm.running_var.mul_(torch.where(var0 > 1e-12, var / var0.clamp_min(1e-12), 1.0).to(norm.running_var))


def _moments(given: Sequence[Tensor]) -> Moments:
    values = torch.cat([x.transpose(0, 1).flatten(1) for x in given], 1).float()
    return torch.var_mean(values, 1)


def fitted_narrow(
    reference: Runner, plan: RemovalPlan, batches: Sequence[Any], source: str, seed: int = 0
) -> tuple[Fits, Compensation]:
    """Carry a plan out on a copy of a model, fit it to the model, and return the tensors that this has changed."""
    narrow = reference.copy(reference.model, {})
    cut_(narrow, plan.kept, plan.numbers)
    cut = {name: tensor.detach().clone() for name, tensor in named_tensors(narrow).items()}
    compensation = compensate_(reference, replace(reference, model=narrow), plan.kept, batches, source, seed)
    changed = named_tensors(narrow).items()
    return {name: tensor.detach() for name, tensor in changed if not torch.equal(tensor, cut[name])}, compensation


@torch.no_grad()
def take_fits_(model: nn.Module, fits: Fits, compensation: Compensation, copies: Iterable[nn.Module] = ()) -> None:
    """Give a model that was cut alike what was fitted in a copy; averaged ``copies`` of it move as it does."""
    tensors, averages = named_tensors(model), [named_tensors(copied) for copied in copies]
    for name, value in fits.items():
        for average in averages:
            if isinstance(tensors[name], nn.Parameter):
                average[name].add_(value.to(average[name]) - tensors[name].to(average[name]))
            else:
                average[name].copy_(value)
        tensors[name].copy_(value)
    note_fit_(model, compensation.to_plain())


def last_fit(model: nn.Module) -> Compensation | None:
    """Return what a model's layers were fitted to last, as its record says."""
    fits = fits_of(model)
    return Compensation.from_plain(fits[-1]) if fits else None
