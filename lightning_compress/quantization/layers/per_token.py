"""Finds the dynamic layers that need a scale for each token, by what the whole model computes on one batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_compress.modules.paths import clean_name
from lightning_compress.modules.routing import CHILD
from lightning_compress.quantization.layers.linear import DynamicLinear

ENOUGH = 0.985
"""Where the outputs' cosine to the float model's is as high, one scale for a call's activations does."""

_FAR_OFF = (0.1, 0.03, 0.0)
"""Layers that are off by so much of their outputs' norm, in the mean over tokens, get scales for each token first."""


def give_tokens_scales_(model: nn.Module, paths: Collection[str], cosine: Callable[[], float]) -> list[str]:
    """Switch the worst of ``paths`` to a scale for each token until ``cosine`` is `ENOUGH`; returns those.

    None is switched where that brings the outputs less than half of the way to the float ones. ``cosine`` runs the
    converted model, and compares its outputs with those of the float model.
    """
    forms = {path: _forms(model, path) for path in paths}
    with _errors_of([form for found in forms.values() for form in found]) as errors:
        before = after = cosine()
    if before >= ENOUGH or not forms:
        return []
    worst = {path: max((errors.get(form, 0.0) for form in found), default=0.0) for path, found in forms.items()}
    switched: list[str] = []
    for bound in _FAR_OFF:
        switched = [path for path in paths if worst[path] > bound]
        _switch_(forms, switched, True)
        after = cosine()
        if after >= ENOUGH:
            return switched
    if 1.0 - after > 0.5 * (1.0 - before):
        _switch_(forms, switched, False)
        return []
    return switched


def _forms(model: nn.Module, path: str) -> list[DynamicLinear]:
    """Return the dynamic linear layers that stand for the layer at ``path``, in a traced unit or not."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, DynamicLinear)
        and f"{clean_name(name)}.".replace(f"{CHILD}.graph.", "").startswith(f"{path}.{CHILD}.".lstrip("."))
    ]


def _switch_(forms: dict[str, list[DynamicLinear]], paths: Collection[str], per_token: bool) -> None:
    for path in paths:
        for form in forms[path]:
            form.per_token = per_token


@contextmanager
def _errors_of(forms: list[DynamicLinear]) -> Iterator[dict[DynamicLinear, float]]:
    """Measure, while a run goes on, how far each layer's outputs are from those with a scale for each token."""
    errors: dict[DynamicLinear, float] = {}

    def hook(form: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        form.per_token = True
        exact = form.forward(*args).reshape(-1, output.shape[-1])
        form.per_token = False
        off = (output.reshape(exact.shape) - exact).norm(dim=1) / exact.norm(dim=1)
        off = off[off.isfinite()].clamp_max(1.0)
        errors[form] = max(errors.get(form, 0.0), off.mean().item() if len(off) else 0.0)

    with ExitStack() as hooks:
        for form in forms:
            hooks.callback(form.register_forward_hook(hook).remove)
        yield errors
