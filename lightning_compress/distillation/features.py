"""Taps: the outputs of layers, by dotted name, for the length of one step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError, invalid, nearest


def find_layer(model: nn.Module, layer: str, argument: str = "layer") -> nn.Module:
    """The submodule of ``model`` at the dotted path ``layer``; ``_orig_mod`` (``torch.compile``) is left out of names.

    Args:
        model: The model that is searched.
        layer: Dotted path, such as ``features.4``.
        argument: What the error calls the path.

    Raises:
        CompressionError: If there is no such layer; the nearest names are listed.

    Example:
        >>> find_layer(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), "1")
        ReLU()
    """
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        # The compiled wrapper comes before what it wraps, and its hooks run outside the compiled graph: prefer it.
        layers.setdefault(_plain_name(name), module)
    layers.pop("", None)
    if layer not in layers:
        raise invalid(argument, f"name a layer of the {type(model).__name__}", layer, nearest(layer, layers))
    return layers[layer]


class Tap:
    """A forward hook that keeps what its layer put out last, while it listens.

    It never looks at the layer's inputs, may fire several times in a step (the last one wins), does nothing while
    a model is traced, and holds no reference to anything but the kept tensor. The tensor is a copy: an in-place
    operation after the layer would rewrite the original.
    """

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.listening = False
        self.value: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.listening:
            return
        if isinstance(output, tuple | list) and output:
            output = output[0]  # recurrent and attention layers: the hidden states come first
        if isinstance(output, torch.fx.Proxy):
            return
        if not isinstance(output, Tensor):
            raise CompressionError(
                f"Layer `{self.layer}` must put out a tensor, or a tuple that starts with one. "
                f"Received: {type(output).__name__}. Name a layer inside or after it."
            )
        self.value = output.clone()

    def __getstate__(self) -> dict[str, Any]:
        # A tensor with a graph can be neither copied nor pickled, and belongs to this step of this model alone.
        return {"layer": self.layer, "listening": False, "value": None}


class Taps:
    """One tap for each named layer of one model, shared by all losses that name the layer.

    Args:
        layers: Dotted paths within the model; duplicates share a tap.
        argument: What errors call these paths, ``student_layer`` or ``teacher_layer``.

    Example:
        >>> model, taps = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True)), Taps(["0"])
        >>> taps.attach(model)
        >>> with taps.listen():
        ...     y = model(torch.ones(1, 2))
        ...     taps["0"].shape
        torch.Size([1, 3])
        >>> taps.detach(model)
    """

    def __init__(self, layers: Iterable[str], argument: str = "layer") -> None:
        self.argument = argument
        self.attached = False
        self._taps = {layer: Tap(layer) for layer in layers}

    def attach(self, model: nn.Module) -> None:
        """Register the hooks, once; nothing is registered if a layer doesn't exist.

        Raises:
            CompressionError: If a layer doesn't exist.
        """
        found = self.find(model)
        self.detach(model)
        for layer, module in found.items():
            module.register_forward_hook(self._taps[layer])
        self.attached = True

    def find(self, model: nn.Module) -> dict[str, nn.Module]:
        """The tapped modules of ``model`` by layer name.

        Raises:
            CompressionError: If a layer doesn't exist.
        """
        return {layer: find_layer(model, layer, self.argument) for layer in self._taps}

    def detach(self, model: nn.Module) -> None:
        """Remove the hooks, if there are any. Works on a deep copy too, whose hooks are copies of its own."""
        ours = {id(tap) for tap in self._taps.values()}
        for module in model.modules():
            for key in [key for key, hook in module._forward_hooks.items() if id(hook) in ours]:
                del module._forward_hooks[key]
        self.attached = False
        if ours and is_compiled(model):
            # Compiled code has the hooks of its first call built in, and would neither lose nor see others.
            torch.compiler.reset()

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Keep outputs inside the block, and forget them at its end, so that no graph outlives its step."""
        self._switch(listening=True)
        try:
            yield
        finally:
            self._switch(listening=False)

    def _switch(self, listening: bool) -> None:
        for tap in self._taps.values():
            tap.listening, tap.value = listening, None

    def __getitem__(self, layer: str) -> Tensor:
        value = self._taps[layer].value
        if value is None:
            raise invalid(
                self.argument,
                "name a layer that the model calls in its forward",
                layer,
                "Layers whose weights are used without a call (such as `out_proj` in attention) can't be tapped: "
                "name the layer around them.",
            )
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._taps)

    def __len__(self) -> int:
        return len(self._taps)


def is_compiled(model: nn.Module) -> bool:
    """Whether ``model`` or a submodule of it went through ``torch.compile``.

    Example:
        >>> is_compiled(nn.Linear(1, 1))
        False
    """
    return any("_orig_mod" in module._modules for module in model.modules())


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
