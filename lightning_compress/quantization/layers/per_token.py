"""Finds the dynamic layers that need a scale for each token, by what the whole model computes on one batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_compress.modules.paths import is_at_or_below, modules_of
from lightning_compress.modules.routing import form_of
from lightning_compress.quantization.layers.linear import DynamicProduct

ENOUGH = 0.985
"""Where the outputs' cosine to the float model's is as high, one scale for a call's activations does."""

_FAR_OFF = (0.1, 0.03, 0.0)
"""Layers that are off by so much of their outputs' norm, in the mean over tokens, get scales for each token first."""


def give_tokens_scales_(model: nn.Module, paths: Collection[str], cosine: Callable[[], float]) -> list[str]:
    """Switch the worst of ``paths`` to a scale for each token until ``cosine`` is `ENOUGH`; returns those.

    None is switched where that brings the outputs less than half of the way to the float ones. ``cosine`` runs the
    converted model, and compares its outputs with those of the float model.
    """
    products = {path: _products(model, path) for path in paths}
    with _errors_of([product for found in products.values() for product in found]) as errors:
        before = after = cosine()
    if before >= ENOUGH or not products:
        return []
    worst = {
        path: max((errors.get(product, 0.0) for product in found), default=0.0) for path, found in products.items()
    }
    switched: list[str] = []
    for bound in _FAR_OFF:
        switched = [path for path in paths if worst[path] > bound]
        _switch_(products, switched, True)
        after = cosine()
        if after >= ENOUGH:
            return switched
    if 1.0 - after > 0.5 * (1.0 - before):
        _switch_(products, switched, False)
        return []
    return switched


def _products(model: nn.Module, path: str) -> list[DynamicProduct]:
    """Return what multiplies in the layer at ``path``: of attention, whose output's projection is a child, several."""
    forms = [form_of(module) for name, module in modules_of(model).items() if is_at_or_below(name, path)]
    inner = (module for form in forms if form is not None for module in form.modules())
    return [module for module in inner if isinstance(module, DynamicProduct)]


def _switch_(products: dict[str, list[DynamicProduct]], paths: Collection[str], per_token: bool) -> None:
    for path in paths:
        for product in products[path]:
            product.per_token = per_token


@contextmanager
def _errors_of(products: list[DynamicProduct]) -> Iterator[dict[DynamicProduct, float]]:
    """Measure, while a run goes on, how far each product is from that with a scale for each token."""
    errors: dict[DynamicProduct, float] = {}

    def hook(product: Any, args: tuple[Any, ...], output: Tensor) -> None:
        product.per_token = True
        exact = product.forward(*args).reshape(-1, output.shape[-1])
        product.per_token = False
        off = (output.reshape(exact.shape) - exact).norm(dim=1) / exact.norm(dim=1)
        off = off[off.isfinite()].clamp_max(1.0)
        errors[product] = max(errors.get(product, 0.0), off.mean().item() if len(off) else 0.0)

    with ExitStack() as hooks:
        for product in products:
            hooks.callback(product.register_forward_hook(hook).remove)
        yield errors
