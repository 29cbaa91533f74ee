"""What can't become a file, or not be measured as one, is found out before a model is trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from lightning_compress.errors import CompressionError
from lightning_compress.export.program import trace_program
from lightning_compress.export.step_calls import feed_of_steps, served_part, step_calls, untested, why_untested
from lightning_compress.modules.isolation import isolated_random_state
from lightning_compress.probe import is_own
from lightning_compress.report.inputs import resize_batch, to_device
from lightning_compress.silent_copy import make_probe
from lightning_compress.structure.change import to_float_


def refuse_early(
    trainer: Any,
    model: Any,
    batch: Any,
    module: str,
    test: bool,
    dynamic_batch: bool,
    dynamic: Mapping[str, Collection[int]],
) -> None:
    """Raise if the float form of what is to be exported can't be traced, or a test wouldn't run it as a whole.

    Args:
        trainer: that trains the model.
        model: the LightningModule, which is left as it is.
        batch: of the training; where no step of an evaluation takes it, nothing is known yet.
        module: the path that the user named, or none.
        test: whether a test is to measure the file.
        dynamic_batch: whether the file is to take batches of any size.
        dynamic: further dimensions that may vary.
    """
    with isolated_random_state():
        try:
            probe = make_probe(trainer, model)
            to_float_(probe)
            feed, batches = feed_of_steps(trainer, probe, iter([batch]))
        except CompressionError:
            return
        path, calls = step_calls(probe, feed, batches, module, 1)
        if test and is_own(probe, "test_step") and (reason := why_untested(trainer, probe, batch, path)):
            raise untested(reason)
        part, [call] = served_part(None, probe, path).cpu().eval(), to_device(calls, torch.device("cpu"))
        args, kwargs = resize_batch(call, 2) if dynamic_batch else call
        trace_program(part, args, kwargs, dynamic_batch, dynamic)
