"""How a LightningModule is called in a fit: its forward, its training step, and what other callbacks make of it."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from lightning_compress.callback import make_probe
from lightning_compress.channels.groups import Run
from lightning_compress.channels.steady import steady
from lightning_compress.channels.trial import Subject
from lightning_compress.errors import CompressionError
from lightning_compress.inputs import run_step
from lightning_compress.quantization.calls import copy_tensors

GUEST = "_guest"


def guests(trainer: Any, pl_module: Any) -> dict[int, Any]:
    """Callbacks that train layers of their own on what the module puts out, by their place in the list."""
    callbacks: list[Any] = trainer.callbacks
    return {
        number: callback
        for number, callback in enumerate(callbacks)
        if hasattr(callback, "compared") and callback.serves(pl_module)
    }


class Look:
    """A batch, and the ways to run a copy of the module on it.

    Attributes:
        host: a copy of the module that holds the layers of guests too.
        runs: its forward, its training step, and what guests make of it; those that work.
    """

    def __init__(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.trainer = trainer
        self.host = self._probe(pl_module)
        self._batch, self._batch_idx = batch, batch_idx
        self._modes = {name: module.training for name, module in pl_module.named_modules()}
        steps = [self._forward, self._step] if pl_module.automatic_optimization else [self._forward]
        self.runs, errors = list[Run](), []
        for run in steps:
            try:
                with steady():
                    run(self._probe(self.host))
                self.runs.append(run)
            except Exception as error:
                # Forward need not be what the step calls: one of the two is enough.
                errors.append(f"{type(error).__name__}: {error}")
        if not self.runs:
            raise CompressionError(
                f"The module must run one batch for a look at what it calls. Received: {'; '.join(errors)}"
            )
        for number, callback in guests(trainer, pl_module).items():
            self.host.add_module(f"{GUEST}{number}", copy.deepcopy(callback.objective.adapters))
            compare: Any = partial(self._compare, callback, f"{GUEST}{number}", self.runs[-1])
            compare.reason = "a distillation loss holds it against the teacher"
            self.runs.append(compare)

    def _probe(self, module: Any) -> Any:
        return make_probe(self.trainer, module)

    @property
    def subject(self) -> Subject:
        return Subject(self.host, self.runs, self._probe)

    def _forward(self, twin: Any) -> Any:
        return run_step(twin.eval(), copy_tensors(self._batch))

    def _step(self, twin: Any) -> Any:
        for name, module in twin.named_modules():
            module.training = self._modes.get(name, True)
        return twin.training_step(copy_tensors(self._batch), self._batch_idx)

    @staticmethod
    def _compare(callback: Any, guest: str, run: Run, twin: Any) -> Any:
        return callback.compared(twin, getattr(twin, guest), run)
