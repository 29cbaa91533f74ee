"""Taps: hooks that hold what layers get or put out in one step, by the layers' paths."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_compress.distillation.losses.base import DistillationLoss, FeatureLoss
from lightning_compress.errors import CompressionError, invalid, nearest
from lightning_compress.modules.paths import clean_name


@dataclass(frozen=True)
class Spot:
    """A place in a model: a layer, its input or its output, and which part of that.

    Attributes:
        layer: Dotted path of the layer; empty is the whole model.
        side: What of the layer.
        keys: From the outside in, how to reach the tensor: positions of a tuple, keys or attributes of anything else.
    """

    layer: str
    side: Literal["input", "output"] = "output"
    keys: tuple[str, ...] = ()


def parse(path: str, argument: str = "layer") -> Spot:
    """Read a path such as ``features.4``, ``features.4:input``, ``encoder:output.hidden.2`` or ``:output.logits``.

    Without keys, a tuple's first tensor is meant (recurrent and attention layers: the hidden states come first). Of an
    input, positions count the positional arguments, and names are keyword arguments.

    Raises:
        CompressionError: If what follows the colon begins with neither ``input`` nor ``output``.

    Example:
        >>> parse("encoder:output.hidden.2")
        Spot(layer='encoder', side='output', keys=('hidden', '2'))
    """
    layer, colon, rest = path.partition(":")
    if not colon:
        return Spot(layer)
    side, *keys = rest.split(".")
    if side == "input":
        return Spot(layer, "input", tuple(keys))
    if side == "output":
        return Spot(layer, "output", tuple(keys))
    raise invalid(argument, "have `input` or `output` after the colon", path, "Such as encoder:output.hidden.2.")


def find_layer(model: nn.Module, layer: str, argument: str = "layer") -> nn.Module:
    """Find the submodule of ``model`` at the dotted path ``layer``, in which `torch.compile` leaves no ``_orig_mod``.

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
    if layer:
        with suppress(AttributeError):  # compiled on the way, or not there
            return model.get_submodule(layer)
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        # The compiled wrapper comes before what it wraps, and its hooks run outside the compiled graph: prefer it.
        layers.setdefault(clean_name(name), module)
    layers.pop("", None)
    if layer not in layers:
        raise invalid(argument, f"name a layer of the {type(model).__name__}", layer, nearest(layer, layers))
    return layers[layer]


class Tap:
    """A hook that holds what its layer got or put out last, while it listens.

    A layer may be called several times in a step: the last call wins, but a call without gradients (a metric's, say)
    doesn't replace a call with gradients. The tap does nothing while a model is traced, and refers to nothing but the
    tensor. The tensor is a copy: an in-place operation would rewrite the original.
    """

    def __init__(self, path: str, argument: str = "layer") -> None:
        self.path = path
        self.spot = parse(path, argument)
        self.listening = False
        self.value: Tensor | None = None
        self._with_graph = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], last: Any) -> None:
        """A forward hook, whose last argument is the output; or a forward pre-hook, where it is the keywords."""
        if not self.listening or (self._with_graph and not torch.is_grad_enabled()):
            return
        found = {**dict(enumerate(args)), **last} if self.spot.side == "input" else last
        for key in self.spot.keys:
            found = self._part(found, key)
        if not self.spot.keys and not isinstance(found, Tensor):
            found = self._first(found)
        if isinstance(found, torch.fx.Proxy):
            return
        if not isinstance(found, Tensor):
            spot = ".".join([f"{self.spot.layer}:{self.spot.side}", *self.spot.keys])
            part = next(iter(found), 0) if isinstance(found, Mapping) else 0
            raise CompressionError(
                f"Layer `{self.path}` must have a tensor there, or a tuple that starts with one. "
                f"Received: {_describe(found)}. Name a part of it, such as {spot}.{part}, or a layer inside or after "
                "it."
            )
        self.value, self._with_graph = found.clone(), torch.is_grad_enabled()

    def listen(self, listening: bool) -> None:
        """Begin or end to listen; both forget the tensor."""
        self.listening, self.value, self._with_graph = listening, None, False

    def _part(self, value: Any, key: str) -> Any:
        index = int(key) if key.removeprefix("-").isdigit() else key
        try:
            if isinstance(value, Mapping):
                return value[index] if index in value else value[key]
            return getattr(value, key) if isinstance(index, str) else value[index]
        except (KeyError, IndexError, AttributeError, TypeError):
            raise CompressionError(
                f"Layer `{self.path}` must have `{key}` there. Received: {_describe(value)}."
            ) from None

    def _first(self, value: Any) -> Any:
        if self.spot.side == "input":  # positional arguments come before keywords
            return next((part for part in value.values() if isinstance(part, Tensor)), value)
        return value[0] if isinstance(value, tuple | list) and value else value

    def __getstate__(self) -> dict[str, Any]:
        # A tensor with a graph can be neither copied nor pickled, and belongs to this step of this model alone.
        return {**self.__dict__, "listening": False, "value": None, "_with_graph": False}


class Taps:
    """One tap for each named place of one model, shared by all losses that name it.

    Args:
        paths: Of layers within the model, as :func:`parse` reads them; duplicates share a tap.
        argument: What errors call these paths, ``student_layer`` or ``teacher_layer``.

    Raises:
        CompressionError: If a path can't be read.

    Example:
        >>> model, taps = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True)), Taps(["0"])
        >>> taps.attach(model)
        >>> with taps.listen():
        ...     y = model(torch.ones(1, 2))
        ...     taps["0"].shape
        torch.Size([1, 3])
        >>> taps.detach(model)
    """

    def __init__(self, paths: Iterable[str], argument: str = "layer") -> None:
        self.argument = argument
        self.attached = False
        self._taps = {path: Tap(path, argument) for path in paths}

    def attach(self, model: nn.Module) -> None:
        """Register the hooks, once; nothing is registered if a layer doesn't exist.

        Raises:
            CompressionError: If a layer doesn't exist.
        """
        found = self.find(model)
        self.detach(model)
        for path, module in found.items():
            tap = self._taps[path]
            if tap.spot.side == "input":
                module.register_forward_pre_hook(tap, with_kwargs=True)
            else:
                module.register_forward_hook(tap)
        if found and is_compiled(model):
            torch.compiler.reset()  # code that was compiled before wouldn't call them
        self.attached = True

    def find(self, model: nn.Module) -> dict[str, nn.Module]:
        """Find the tapped modules of ``model`` by path.

        Raises:
            CompressionError: If a layer doesn't exist.
        """
        return {
            path: model if path.startswith(":") else find_layer(model, tap.spot.layer, self.argument)
            for path, tap in self._taps.items()
        }

    def detach(self, model: nn.Module) -> None:
        """Remove the hooks, if there are any. Works on a deep copy too, whose hooks are copies of its own."""
        drop_taps_(model, {id(tap) for tap in self._taps.values()})
        self.attached = False

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Hold tensors inside the block, and forget them at its end, so that no graph outlives its step."""
        self._switch(listening=True)
        try:
            yield
        finally:
            self._switch(listening=False)

    def _switch(self, listening: bool) -> None:
        for tap in self._taps.values():
            tap.listen(listening)

    def __getitem__(self, path: str) -> Tensor:
        value = self._taps[path].value
        if value is None:
            raise invalid(
                self.argument,
                "name a layer that the model calls in its forward",
                path,
                "Layers whose weights are used without a call (such as `out_proj` in attention) can't be tapped: "
                "name the layer around them.",
            )
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._taps)

    def __len__(self) -> int:
        return len(self._taps)


def drop_taps_(model: nn.Module, ids: Collection[int] | None = None) -> None:
    """Take taps off a model: those whose `id` is among ``ids``; None: all."""
    dropped = False
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, Tap) and (ids is None or id(hook) in ids):
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
                    dropped = True
    if dropped and is_compiled(model):
        # Compiled code has the hooks of its first call built in, and would neither lose nor see others.
        torch.compiler.reset()


def is_compiled(model: nn.Module) -> bool:
    """Whether ``model`` or a submodule of it went through ``torch.compile``.

    Example:
        >>> is_compiled(nn.Linear(1, 1))
        False
    """
    return any("_orig_mod" in module._modules for module in model.modules())


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with {', '.join(map(str, value)) or 'nothing in it'}"
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, tuple | list) else type(value).__name__


def make_taps(losses: Mapping[str, DistillationLoss]) -> tuple[Taps, Taps]:
    """Make taps of student and teacher for the layers that feature losses name."""
    named = [loss for loss in losses.values() if isinstance(loss, FeatureLoss) and not loss.pairs]
    return (
        Taps([str(loss.student_layer) for loss in named], "student_layer"),
        Taps([str(loss.teacher_layer) for loss in named], "teacher_layer"),
    )
