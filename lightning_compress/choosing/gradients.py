"""What would the outputs lose by a change inside of a model? To first order, of one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.choosing.forms import Run, with_values
from lightning_compress.compensation.hold_out import pieces
from lightning_compress.errors import CompressionError
from lightning_compress.modules.calls import samples_in
from lightning_compress.modules.copying import copy_tensors
from lightning_compress.modules.fast_path import without_fast_path
from lightning_compress.modules.isolation import isolated_evaluation
from lightning_compress.modules.output_probe import WithGradients, outputs_with_gradients, random_loss
from lightning_compress.modules.outputs import flatten, outer_outputs

Values = Sequence[tuple[Tensor, Tensor]]
"""Tensors of a layer, each with the value that it would have."""


class Passes:
    """Runs batches forwards, and makes of each a loss whose gradients tell what a change does to the outputs.

    For a change that moves a layer's output y_s of sample s by d_s, the mean of ``(d_s dL/dy_s)^2`` over random losses
    is ``||dy/dx d_s||^2``, the squared change of the model's outputs to first order, over their variance.

    Args:
        model: in which something is watched; it has gradients.
        run: runs a batch through it.
        batches: to look at.
        seed: of the random losses.
        apart: whether batches are taken apart first, so that there are more losses, where sums over samples are all
            that is known.
    """

    def __init__(self, model: nn.Module, run: Run, batches: Iterable[Any], seed: int, *, apart: bool = False) -> None:
        self.model, self.run = model, run
        self.batches = [piece for batch in batches for piece in (pieces(batch) if apart else [batch])]
        self.generator = torch.Generator().manual_seed(seed)
        self.elements = 0
        """Of the outputs so far: a sum of squares over it is a relative error."""

    def __iter__(self) -> Generator[tuple[Any, Tensor], None, None]:
        """Yield each batch with its loss, while what was watched in its forward pass is there."""
        with isolated_evaluation(self.model), without_fast_path(), torch.enable_grad():
            for batch in self.batches:
                with outer_outputs(self.model) as calls, WithGradients():
                    self.run(self.model, copy_tensors(batch))
                if (loss := random_loss(calls, self.generator)) is not None:
                    self.elements += sum(output.numel() for output in outputs_with_gradients(calls))
                    yield batch, loss
        if not self.elements:
            raise CompressionError(
                "`batches` must give outputs that have gradients for Taylor scores. Received: none from "
                f"{type(self.model).__name__}. Its code may detach them. Use method='measured'."
            )


def sum_by_sample(product: Tensor, samples: int) -> Tensor:
    """Sum a product of a change and a gradient for each sample; as one, where its first dimension isn't the batch."""
    whole = product.dim() and len(product) % samples == 0
    return product.reshape(samples if whole else 1, -1).double().sum(1)


def layer_scores(
    model: nn.Module,
    run: Run,
    batches: Iterable[Any],
    layers: Mapping[str, nn.Module],
    changes: Callable[[str], Iterable[tuple[str, Values]]],
    seed: int = 0,
) -> dict[tuple[str, str], float]:
    """Predict the relative squared error of the outputs for changes of single layers' tensors.

    ``e = sum_s (dL/dy_s (f'(x_s) - f(x_s)))^2 / n``, where f is the layer, f' the changed one, x_s what it is given for
    sample s, and n the number of the outputs' elements.

    Args:
        model: that has these layers.
        run: runs a batch.
        batches: to look at.
        layers: by their paths.
        changes: of a layer's path, labels with what its tensors would be.
        seed: of the random losses.

    Returns:
        By path and label.
    """
    passes, sums = Passes(model, run, batches, seed), dict[tuple[str, str], float]()
    with _watched(layers) as calls, closing(iter(passes)) as losses:
        for batch, loss in losses:
            found = {path: list(made) for path, made in calls.items() if made}
            outputs = [y for made in found.values() for _, _, y in made]
            gradients = iter(torch.autograd.grad(loss, outputs, allow_unused=True))
            for path, made in found.items():
                here = [(args, kwargs, y.detach(), next(gradients)) for args, kwargs, y in made]
                for label, values in changes(path):
                    change = _change(layers[path], here, values, samples_in(batch))
                    sums[path, label] = sums.get((path, label), 0.0) + change
            calls.clear()
    return {key: total / passes.elements for key, total in sums.items()}


Called = tuple[tuple[Any, ...], dict[str, Any], Tensor]


@contextmanager
def _watched(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Called]]]:
    """List the calls of layers, with what they are given and the first of what they give, which gets gradients."""
    calls: dict[str, list[Called]] = {}

    def see(path: str) -> Callable[..., Any]:
        def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            tensors, structure = flatten(output)
            if not torch.is_grad_enabled() or not tensors or not tensors[0].requires_grad:
                return output
            calls.setdefault(path, []).append((args, kwargs, tensors[0]))
            return structure.rebuild([tensors[0].clone(), *tensors[1:]])  # what comes next may write into it

        return note

    with ExitStack() as hooks:
        for path, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(see(path), with_kwargs=True))
        yield calls


def _change(
    layer: nn.Module, calls: Sequence[tuple[Any, Any, Tensor, Tensor | None]], values: Values, samples: int
) -> float:
    """Return the sum over samples of the squared first-order change of the loss."""
    terms = []
    with with_values(layer, values):
        for args, kwargs, y, gradient in calls:
            if gradient is not None:
                changed = flatten(layer(*args, **kwargs))[0][0]
                terms.append(sum_by_sample((changed - y) * gradient, samples))
    if len({len(term) for term in terms}) > 1:
        terms = [term.sum(0, keepdim=True) for term in terms]
    return float(torch.stack(terms).sum(0).square().sum()) if terms else 0.0
