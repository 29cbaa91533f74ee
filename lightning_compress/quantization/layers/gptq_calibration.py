"""Runs calibration batches for GPTQ: gathers what each layer is given, a few layers at a time, and packs its weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_compress.compensation.layer_rows import columns_of, count_rows, groups_of, has_memory, rows_of
from lightning_compress.compensation.parts import AttentionInParts
from lightning_compress.errors import CompressionError
from lightning_compress.modules.calls import run_step
from lightning_compress.modules.copying import copy_tensors
from lightning_compress.modules.isolation import isolated_evaluation
from lightning_compress.modules.paths import compressible_modules
from lightning_compress.modules.routing import route_, unroute_
from lightning_compress.quantization.layers.plan import quantized_form
from lightning_compress.quantization.numerics.scheme import Scheme

_SHARE = 4
"""Hessians that are held at a time take at most one part in so many of the model's own memory (or there is one)."""

_PATCHES = 2**22
"""Values of the rows that a layer multiplies that are held at a time."""

Run = Callable[[nn.Module, Any], Any]


class _Enough(BaseException):
    """Ends a pass that has seen all it is for; no handler of the model's own is to stop it."""


def calibrated_weights(
    model: nn.Module, layers: Mapping[str, Scheme], batches: Sequence[Any], run: Run = run_step
) -> dict[str, Any]:
    """Pack the weights of ``layers``, each fitted to the inputs that it gets from quantized layers before it.

    Layers are taken in the order in which they are called, as many at a time as their Hessians have room for: within
    a pass they see each other's float outputs, as the layers of a block do in the authors' code. The model is in
    evaluation mode, and float again afterwards. An attention layer's projections stand below its path in the result.

    Raises:
        CompressionError: there is no batch, or a layer's inputs aren't finite.
    """
    if not batches:
        raise CompressionError("`calibration` must give at least one batch. Received: an empty loader.")
    modules = compressible_modules(model)
    room = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) // _SHARE
    made: dict[str, Any] = {}
    with isolated_evaluation(model), ExitStack() as routed:
        parts: dict[str, _Part] = {}
        for path, scheme in layers.items():
            layer: Any = modules[path]
            if isinstance(layer, nn.MultiheadAttention):
                # Its projections are called as layers of their own, so that what they are given can be seen.
                attention = AttentionInParts(layer)
                route_(layer, attention)
                routed.callback(unroute_, layer)
                named = {**dict(attention.named_modules()), "out_proj": layer.out_proj}
                parts |= {
                    f"{path}.{name}".lstrip("."): _Part([part], scheme)
                    for name, part in named.items()
                    if isinstance(part, nn.Linear)
                }
            elif not isinstance(layer, nn.Embedding):  # its Hessian is diagonal: to the nearest is the best there
                tied = [part for part in parts.values() if part.layers[0].weight is layer.weight]
                if tied:
                    tied[0].layers.append(layer)
                else:
                    parts[path] = _Part([layer], scheme)
        counts: list[Counter[str]] = []
        for stage in _stages(_in_order(model, parts, batches[0], run), room):
            hessians = _hessians(model, parts, stage, counts, batches, run)
            for path, part in stage.items():
                made[path] = _fit(part, hessians.pop(path, None), path)
                for layer in part.layers:
                    route_(layer, quantized_form(layer, part.scheme, made, path))
                    routed.callback(unroute_, layer)
    return made


class _Part(NamedTuple):
    """Names the layers that one weight belongs to: nearly always one."""

    layers: list[Any]
    scheme: Scheme


def _fit(part: _Part, hessian: Tensor | None, path: str) -> Any:
    if hessian is None:
        raise CompressionError("`calibration` must hold samples. Received: empty batches.")
    try:
        return part.scheme.fit(part.layers[0].weight, hessian)
    except CompressionError as error:
        raise CompressionError(f"{error} Seen by `{path}`.") from error


def _stages(parts: Mapping[str, _Part], room: int) -> Iterator[dict[str, _Part]]:
    """Yield runs of ``parts`` whose Hessians fit into ``room`` bytes together, or one by itself."""
    stage: dict[str, _Part] = {}
    taken = 0
    for path, part in parts.items():
        layer = part.layers[0]
        size = 4 * groups_of(layer) * columns_of(layer) ** 2
        if stage and taken + size > room:
            yield stage
            stage, taken = {}, 0
        stage[path] = part
        taken += size
    if stage:
        yield stage


def _in_order(model: nn.Module, parts: Mapping[str, _Part], batch: Any, run: Run) -> dict[str, _Part]:
    """Return those of ``parts`` that a batch calls, in the order of their first calls."""
    called: dict[str, _Part] = {}
    with _watched(parts, lambda path, *_: called.setdefault(path, parts[path])):
        run(model, copy_tensors(batch))
    return called


def _hessians(
    model: nn.Module,
    parts: Mapping[str, _Part],
    stage: Mapping[str, _Part],
    counts: list[Counter[str]],
    batches: Sequence[Any],
    run: Run,
) -> dict[str, Tensor]:
    """Return ``X^T X`` of the inputs of a ``stage`` of ``parts``: ``(groups, columns, columns)`` each.

    The first pass fills in ``counts``, how often each batch calls each part; later ones stop once a stage was seen.
    """
    found: dict[str, Tensor] = {}
    left: Counter[str] = Counter()
    counting = not counts

    def see(path: str, layer: nn.Module, x: Tensor) -> None:
        left[path] -= 1
        for rows in _rows(layer, x) if path in stage else ():
            square = rows.mT @ rows
            found[path] = found[path].add_(square) if path in found else square
        if not counting and not any(left.values()):
            raise _Enough

    for index, batch in enumerate(batches):
        left.clear()
        if not counting:
            left.update({path: counts[index][path] for path in stage})
        if counting or any(left.values()):
            with _watched(parts if counting else stage, see), suppress(_Enough):
                run(model, copy_tensors(batch))
        if counting:
            counts.append(Counter({path: -count for path, count in left.items()}))
    return found


@contextmanager
def _watched(parts: Mapping[str, _Part], see: Callable[[str, nn.Module, Tensor], Any]) -> Iterator[None]:
    """Call ``see`` with the path, the layer and its input when a layer of ``parts`` is called with what can be read."""

    def hook(path: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if has_memory(x := args[0] if args else kwargs["input"]):
            see(path, layer, x)

    with ExitStack() as hooks, torch.compiler.set_stance("force_eager"):
        for path, part in parts.items():
            for layer in part.layers:
                hooks.callback(layer.register_forward_pre_hook(partial(hook, path), with_kwargs=True).remove)
        yield


def _rows(layer: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Find what the weight's matrix is multiplied with in a call, in portions: see `rows_of`."""
    count = count_rows(layer, x) if x.numel() else 0
    portion = max(1, _PATCHES // (columns_of(layer) * groups_of(layer)))
    for start in range(0, count, portion):
        yield rows_of(layer, x, None if count <= portion else torch.arange(start, min(start + portion, count)))
