"""Runs a module's own steps on copies of it: which step a batch goes through, and what comes by.

Values matter to calibration: there, batches go through a `Feed`. Shapes matter to a look at what is called: `look`, and
`example_calls` for what is measured.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.errors import CompressionError, in_a_line
from lightning_compress.modules.call_log import record_calls
from lightning_compress.modules.calls import Call, Forward, run_example
from lightning_compress.modules.copying import copy_module, copy_tensors
from lightning_compress.modules.isolation import (
    evaluation_mode,
    isolated_evaluation,
    isolated_random_state,
    isolated_state,
)
from lightning_compress.modules.outputs import outer_outputs
from lightning_compress.modules.paths import clean_name
from lightning_compress.structure.change import is_converted, to_float_

Seen = TypeVar("Seen")
Way = Callable[[Any, Any], Any]

_SILENT = ("log", "log_dict", "print", "manual_backward", "toggle_optimizer", "untoggle_optimizer", "clip_gradients")
_READ = ("optimizers", "lr_schedulers")
_FED = "_fed"
"""Where a copy counts the batches that went through the steps of a stage, whose start hooks it has seen then."""


def make_probe(
    trainer: pl.Trainer, pl_module: pl.LightningModule, shared: Collection[nn.Parameter] = ()
) -> pl.LightningModule:
    """A deep copy whose steps can be run without a trace: it logs nothing, and its metrics are its own."""
    probe = copy_module(pl_module, shared)
    silence_(probe, trainer)
    return probe


def silence_(probe: pl.LightningModule, trainer: pl.Trainer) -> None:
    """Let a copy of a module run steps, which log nowhere and see a Trainer that they can't write to."""
    silent = _silent_trainer(trainer, probe)
    for module in probe.modules():
        if "_trainer" in vars(module):
            vars(module).update(dict.fromkeys(_SILENT, _nothing))
            vars(module).update({name: _AsIs(trainer, name) for name in _READ})
            module.__dict__["_trainer"] = silent


def unsilence_(probe: pl.LightningModule) -> None:
    """A copy that is handed on belongs to no Trainer, and logs again."""
    for module in probe.modules():
        if "_trainer" in vars(module):
            for name in (*_SILENT, *_READ):
                del vars(module)[name]
            module.__dict__["_trainer"] = None


def _silent_trainer(trainer: pl.Trainer, probe: pl.LightningModule) -> pl.Trainer:
    """The Trainer as a step on ``probe`` sees it: what is set on it stays there, and no logger is the real one."""
    silent = copy.copy(trainer)
    silent.__class__ = _silent_kind(type(trainer))  # type: ignore[arg-type]
    silent.__dict__["_probe"] = weakref.ref(probe)
    silent.loggers = [DummyLogger() for _ in trainer.loggers]
    connector = silent._logger_connector = copy.copy(trainer._logger_connector)
    for name in ("_progress_bar_metrics", "_logged_metrics", "_callback_metrics"):
        setattr(connector, name, dict(getattr(connector, name)))
    return silent


@cache
def _silent_kind(kind: type[pl.Trainer]) -> type[pl.Trainer]:
    def probe(silent: Any) -> Any:
        return vars(silent)["_probe"]()

    hidden = {"lightning_module": property(probe), "model": property(probe), "save_checkpoint": _nothing}
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, **hidden})


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What is logged, printed or saved while nobody is to notice."""


class _Still:
    """An optimizer or a scheduler of the original's, which a step of a copy may read and not move."""

    def __init__(self, held: Any) -> None:
        self._held = held

    def __getattr__(self, name: str) -> Any:
        return getattr(self._held, name)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    zero_grad = step

    def toggle_model(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        """Nothing."""
        return nullcontext()


class _AsIs:
    """``optimizers()`` or ``lr_schedulers()`` of the module itself; a copy of a copy asks the same Trainer."""

    def __init__(self, trainer: pl.Trainer, name: str) -> None:
        self.trainer, self.name = trainer, name

    def __deepcopy__(self, memo: Any) -> _AsIs:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = getattr(self.trainer.lightning_module, self.name)(*args, **kwargs)
        return [_Still(one) for one in found] if isinstance(found, list) else found and _Still(found)


def is_own(owner: Any, method: str) -> bool:
    """Whether a module or datamodule has a method that isn't Lightning's own, under either name of the package."""
    function: Any = getattr(owner, method, None)
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    home = getattr(function, "__module__", None) or ""
    return function is not None and not home.startswith(("lightning.pytorch.", "pytorch_lightning."))


def to_module(trainer: pl.Trainer, probe: pl.LightningModule, batch: Any) -> Any:
    """A batch of a loader as steps get it: Lightning's hooks of batches, of the datamodule or else of the copy."""
    datamodule = getattr(trainer, "datamodule", None)

    def call(hook: str, *args: Any) -> Any:
        owner = datamodule if datamodule is not None and is_own(datamodule, hook) else probe
        return getattr(owner, hook)(*args, 0)

    batch = call("on_before_batch_transfer", trainer.precision_plugin.convert_input(batch))
    return call("on_after_batch_transfer", call("transfer_batch_to_device", batch, probe.device))


@dataclass(frozen=True)
class Step:
    """A step of a module's evaluation as a way for batches, with the hooks of the module that come before it.

    Attributes:
        stage: ``test``, ``validation`` or ``predict``.
    """

    stage: str

    @property
    def __name__(self) -> str:
        return f"{self.stage}_step"

    def __call__(self, module: Any, batch: Any) -> Any:
        fed = module.__dict__.setdefault(_FED, {})
        if self.stage not in fed:
            getattr(module, f"on_{self.stage}_start")()
            getattr(module, f"on_{self.stage}_epoch_start")()
        index = fed[self.stage] = fed.get(self.stage, -1) + 1
        _call(getattr(module, f"on_{self.stage}_batch_start"), batch, index)
        return _call(getattr(module, self.__name__), batch, index)


def _call(method: Callable[..., Any], batch: Any, index: int) -> Any:
    """As Lightning calls it: with the batch's number if there is room, and a loader's where it is asked for by name."""
    parameters = inspect.signature(method).parameters
    takes_any = any(one.kind is one.VAR_POSITIONAL for one in parameters.values())
    args = (batch, index) if len(parameters) > 1 or takes_any else (batch,)
    return method(*args, **({"dataloader_idx": 0} if "dataloader_idx" in parameters else {}))


class Feed:
    """A way of batches through a module and its copies; where it fails on one, the next is tried.

    Args:
        trainer: that runs the module.
        ways: in the order in which they are tried.
        remedy: what to do where none works.

    Attributes:
        failures: the ways that were given up, and why.
    """

    def __init__(self, trainer: pl.Trainer, ways: Sequence[Way], remedy: str) -> None:
        self.ways = list(ways)
        self.remedy = remedy
        self.failures: dict[str, str] = {}
        self._context: Callable[[], AbstractContextManager[Any]] = trainer.precision_plugin.forward_context

    def __call__(self, module: nn.Module, batch: Any) -> Any:
        """Run a batch by the first way that works; a quantized module by the one that was chosen for the float one."""
        if is_converted(module):
            return self._run(self.ways[0], module, batch)
        failures = dict(self.failures)
        for way in self.ways:
            try:
                return self._run(way, module, batch)
            except Exception as error:  # of code of the user's
                failures[way.__name__] = in_a_line(error)
        raise self._no_way(failures)

    def _run(self, way: Way, module: nn.Module, batch: Any) -> Any:
        with self._context():
            return way(module, _own_copy(batch))  # a step may change or empty what it is given

    def choose(self, module: nn.Module, batches: Iterator[Any]) -> Iterator[Any]:
        """Settle on the first way that brings a batch to the layers; returns the batches, such a one first.

        Raises:
            CompressionError: there is no such way; each is named with what was wrong.
        """
        seen: list[Any] = []

        def peeked() -> Iterator[Any]:
            yield from list(seen)
            for batch in batches:
                seen.append(batch)
                yield batch

        for number, way in enumerate(self.ways):
            reason = "it calls no layer"
            try:
                for place, batch in enumerate(peeked()):
                    if reason := self._fault(way, module, batch):
                        continue
                    self.ways = self.ways[number:]
                    return chain([seen.pop(place)], seen, batches)
            except Exception as error:
                reason = in_a_line(error)
            self.failures[way.__name__] = reason
        if seen or not self.ways:
            raise self._no_way(self.failures)
        return iter(())

    def _fault(self, way: Way, module: nn.Module, batch: Any) -> str:
        """Why a way that runs is none for a batch; empty if it is one."""
        with isolated_evaluation(module):
            reached = _reached(module, lambda: self._run(way, module, batch))
        if not reached:
            return "it calls no layer"
        if isinstance(way, Step) and isinstance(batch, Tensor) and batch.dim():
            # A step that takes the first of what it is given gets the first sample, where a loader gives inputs alone.
            twice = torch.cat([batch, batch])
            with isolated_evaluation(module):
                if _reached(module, lambda: self._run(way, module, twice)) == reached:
                    raise CompressionError("it reads one sample of each batch, which is a single tensor")
        return ""

    def _no_way(self, failures: Mapping[str, str]) -> CompressionError:
        tried = "; ".join(f"`{name}`: {reason.rstrip('.')}" for name, reason in failures.items())
        return CompressionError(f"The module must run one batch. Received: {tried}. {self.remedy}")

    def __str__(self) -> str:
        tried = "".join(f"; not by `{name}` ({reason})" for name, reason in self.failures.items())
        return f"batches go through `{self.ways[0].__name__}`{tried}"


def data_feed(trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> Feed:
    """The way of data through a copy of a module, as its own evaluation feeds it.

    That is ``calibration_step(batch)`` where there is one; else ``test_step``, ``validation_step`` or ``predict_step``;
    else ``forward``.

    Args:
        trainer: that runs the module.
        module: whose steps can be run: see `make_probe`.
        stage: ``test``, ``validation`` or ``predict``: that step comes first.
    """
    remedy = (
        "Define `calibration_step(batch)` on the module, which runs a batch as the module is used, or "
        "`calibration_dataloader()` with batches that one of these takes."
    )
    ways = _evaluation(module, stage)
    return Feed(trainer, ways if calibration_step in ways else [*ways, Forward()], remedy)


def shape_feed(trainer: pl.Trainer, module: pl.LightningModule, stage: str, *, train: bool) -> Feed:
    """The way of a batch through a copy of a module where shapes matter and values don't.

    Args:
        trainer: that runs the module.
        module: whose steps can be run: see `make_probe`.
        stage: as in `data_feed`.
        train: whether ``training_step`` is a way too; one that optimizes by itself comes last.
    """
    ways = _evaluation(module, stage)
    trains: list[Way] = [training_step] if train and is_own(module, "training_step") else []
    if module.automatic_optimization:
        ways += trains
    if getattr(module, "example_input_array", None) is not None:
        ways.append(example_input_array)
    remedy = "Set `example_input_array`, or define `calibration_step(batch)` on the module."
    # A step that optimizes by itself may do without its optimizers, and run.
    return Feed(trainer, [*ways, Forward(), *([] if module.automatic_optimization else trains)], remedy)


def _evaluation(module: Any, stage: str) -> list[Way]:
    if getattr(module, "calibration_step", None) is not None:
        return [calibration_step]
    stages = dict.fromkeys((stage, "test", "validation", "predict"))
    return [Step(one) for one in stages if is_own(module, f"{one}_step")]


def calibration_step(module: Any, batch: Any) -> Any:
    """The way of a module that has a step for this."""
    return module.calibration_step(batch)


def training_step(module: Any, batch: Any) -> Any:
    """The way of a module that is only trained."""
    return _call(module.training_step, batch, 0)


def example_input_array(module: nn.Module, batch: Any) -> Any:
    """The way without a batch."""
    return run_example(module)


def _own_copy(batch: Any) -> Any:
    try:
        return copy.deepcopy(batch)
    except Exception:  # a batch of the user's own that can't be copied as a whole
        return copy_tensors(batch)


def _reached(module: nn.Module, run: Callable[[], Any]) -> int:
    """How many numbers reach the modules with parameters in a run; what they do with these is their own affair."""
    count = 0

    def see(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal count
        count += sum(leaf.numel() for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))

    hookable = (layer for layer in module.modules() if not isinstance(layer, torch.jit.ScriptModule))
    layers = [layer for layer in hookable if next(layer.parameters(), None) is not None]
    handles = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
    try:
        with torch.compiler.set_stance("force_eager"):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return count


def look(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, watch: Callable[..., Seen]
) -> list[Seen]:
    """What ``watch(module, run)`` sees of the module's own training step, of its evaluation and of its forward.

    All run on a deep copy that is float, and under a random state of their own, so that nothing is left behind.

    Raises:
        CompressionError: none of them runs.
    """
    probe = make_probe(trainer, pl_module)
    to_float_(probe)
    feed, seen = shape_feed(trainer, probe, "validation", train=not probe.automatic_optimization), list[Seen]()
    with isolated_random_state(), trainer.precision_plugin.train_step_context():
        if pl_module.automatic_optimization:
            try:
                seen.append(watch(probe, lambda: probe.training_step(_own_copy(batch), batch_idx)))
            except Exception as error:  # it is the user's, and evaluation may do
                feed.failures["training_step"] = in_a_line(error)
        # Forward need not be what the steps call.
        forwards = [Feed(trainer, [Forward()], feed.remedy)] if len(feed.ways) > 1 else []
        for evaluation in (feed, *forwards):
            with evaluation_mode(probe), nullcontext() if not seen else suppress(CompressionError):
                evaluation.choose(probe, iter([batch]))  # what fails calls nothing that is to be seen
                seen.append(watch(probe, partial(evaluation, probe, batch)))
    return seen


def example_calls(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, stage: str) -> dict[str, Call]:
    """What a module is called with, for its shapes: the path of what a step calls (``""`` is ``forward``) to its call.

    It is seen in a step of the module's own on ``batch``; else ``forward`` on the ``example_input_array``, else on the
    batch. No trace is left.

    Args:
        trainer: that runs the module.
        module: or a copy of it.
        batch: on the module's device; None for the ``example_input_array`` alone.
        stage: ``test``, ``validation`` or ``predict``: that step comes first.

    Raises:
        CompressionError: nothing runs.
    """
    feed = shape_feed(trainer, module, stage, train=True)
    if trainer.world_size > 1:  # a step may wait for ranks that don't look
        feed.ways = [way for way in feed.ways if way is example_input_array or isinstance(way, Forward)]
    if batch is None:
        feed.ways = [way for way in feed.ways if way is example_input_array]
        feed.failures["training_step"] = "no batch was seen"
    with isolated_state(module.modules()):
        silence_(module, trainer)
        feed.choose(module, iter([batch]))
        with isolated_evaluation(module):
            log = record_calls(module, lambda: feed(module, batch))
    layers = {clean_name(path): layer for path, layer in module.named_modules()}
    called = [path for path, callers in log.callers.items() if None in callers]
    if "" in called:
        called = [""]
    return {path: log.inputs[path] for path in called if any(True for _ in layers[path].parameters())}


def outputs_of_calls(module: nn.Module, run: Callable[[], Any]) -> list[Any]:
    """What a run gives back, with what ``forward`` gave to it; without a ``forward``, what its last child gave."""
    with outer_outputs(module) as outputs:
        returned = run()
    whole = [output for inner, output in outputs if inner is module]
    parts = [output for inner, output in outputs if any(True for _ in inner.parameters())]
    return [returned, *(whole or parts[-1:])]
