"""`export`: from a model to a file that another runtime runs, proven there before it stands where it was asked for."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.deployable import deployable
from lightning_compress.errors import CompressionError, in_a_line, invalid
from lightning_compress.export.executorch_file import Lowered, write_executorch
from lightning_compress.export.facts import ExportedModel, dequantized_layers, facts_of, in_float, latency_of
from lightning_compress.export.formats import FORMATS, refuse_unready, resolve_target
from lightning_compress.export.lowering import (
    absorb_paddings_,
    round_again_,
    shift_codes_,
    store_biases_,
)
from lightning_compress.export.nest import described, gathered
from lightning_compress.export.onnx_file import write_onnx
from lightning_compress.export.program import BATCH, Program, trace_program
from lightning_compress.export.proof import Sample, compared, prove
from lightning_compress.export.runtimes import RUNTIMES
from lightning_compress.export.sidecar import sidecar_of, write_sidecar
from lightning_compress.export.tensorrt_rules import tensorrt_faults
from lightning_compress.export.torch_file import write_torch
from lightning_compress.messages import named
from lightning_compress.modules.calls import Call, bind_example
from lightning_compress.modules.isolation import isolated_evaluation
from lightning_compress.modules.written import writing_file
from lightning_compress.report.inputs import batch_size_of, resize_batch, to_device

_WRITERS: dict[str, Callable[[Program, Path], Lowered | None]] = {
    ".onnx": write_onnx,
    ".pt2": write_torch,
    ".pte": write_executorch,
}


def export(
    model: nn.Module,
    inputs: Any,
    path: str | os.PathLike[str],
    target: str | None = None,
    *,
    calibration: Iterable[Any] = (),
    dynamic_batch: bool = True,
    dynamic: Mapping[str, Collection[int]] | None = None,
    verify: bool = True,
) -> ExportedModel:
    """Write a model as a file that another runtime runs, and prove that it computes there what the model computes.

    Args:
        model: any that this package leaves, or any other: float, pruned, narrowed, quantized, or one that distils,
            whose student is written. It is left as it is.
        inputs: an example of a call: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        path: of the file; ``.onnx``, ``.pt2`` or ``.pte``.
        target: ``onnxruntime``, ``openvino`` or ``tensorrt`` (``.onnx``), ``torch`` (``.pt2``), ``executorch``
            (``.pte``); by default what the suffix says, ``onnxruntime`` for ``.onnx``.
        calibration: more examples of calls, on which file and model are compared too.
        dynamic_batch: whether the file takes batches of any size: dimension 0 of each tensor that has as many of it
            as the first one.
        dynamic: further dimensions that may vary, by the name of the argument: ``{"ids": [1]}``.
        verify: whether the file is run and compared, at three batch sizes and every level of the runtime's
            optimization: cosine 0.999 at least (or that of the model whose roundings fall otherwise, where that is
            less), differences of no more than rounding explains, the same classes.

    Returns:
        What was written. The same facts stand in ``path + ".json"``.

    Raises:
        CompressionError: a package is missing, the target or suffix isn't known, the inputs don't fit, the model can't
            be traced or translated, the path can't be written, the runtime rejects the file, or the file computes
            something else. No file is left then.

    Example:
        >>> import os, tempfile
        >>> from lightning_compress import quantize
        >>> x = torch.randn(8, 4)
        >>> int8 = quantize(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), calibration=[x])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     exported = export(int8, x, os.path.join(folder, "model.onnx"))
        >>> exported.int8, exported.facts["parity"]["batch_sizes"]
        (('0', '2'), (1, 8, 17))
    """
    if not isinstance(model, nn.Module):
        raise invalid("model", "be a torch.nn.Module", type(model).__name__)
    calls = [bind_example(example) for example in (inputs, *calibration)]
    return export_call(model, calls, path, target, dynamic_batch=dynamic_batch, dynamic=dynamic or {}, verify=verify)


def export_call(
    model: nn.Module,
    calls: Sequence[Call],
    path: str | os.PathLike[str],
    target: str | None = None,
    *,
    dynamic_batch: bool = True,
    dynamic: Mapping[str, Collection[int]],
    verify: bool = True,
    float_model: nn.Module | None = None,
) -> ExportedModel:
    """Do what `export` does, for calls ``(args, kwargs)``, the first of which is the example.

    The file is timed beside ``float_model``, or the model in float, where its float weights are still there.
    """
    path, target = Path(path), resolve_target(path, target)
    runtime = RUNTIMES[FORMATS[target].runtime]
    refuse_unready(path, target)
    served = deployable(model).cpu().eval()
    calls = [to_device(call, torch.device("cpu")) for call in calls]
    if batch_size_of(calls[0], "inputs") == 1 and dynamic_batch:
        calls[0] = resize_batch(calls[0], 2)  # a batch of one would be traced as always one
    kernels = FORMATS[target].kernels
    program = trace_program(served, *calls[0], dynamic_batch, dynamic, kernels)
    if target == "executorch" and (layers := dequantized_layers(served, program)):
        raise CompressionError(
            f"`model` must have no weights of few bits alone for ExecuTorch. Received: {named(layers)}. XNNPACK takes "
            "their codes for weights, and ends the process. Quantize it with StaticInt8(target='executorch')."
        )
    lower_(program, target)
    write = _WRITERS[path.suffix]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as aside:
            begun = Path(aside, path.name)
            lowered = write(program, begun)
            if target == "tensorrt" and (faults := tensorrt_faults(begun)):
                raise CompressionError(f"The file must keep TensorRT's rules. Received: {'; '.join(faults[:5])}.")
            samples = _samples(served, program, calls, kernels, lowered) if verify else []
            facts = {
                **facts_of(served, program, target, runtime, begun, lowered),
                "parity": asdict(prove(program, begun, runtime, write, samples)) if samples else None,
                "latency": latency_of(float_model or in_float(model), served, program, runtime, begun, calls[0]),
            }
            facts = write_sidecar(begun, facts)
            os.replace(begun, path)
            os.replace(sidecar_of(begun), sidecar_of(path))
    except OSError as error:
        raise invalid("path", "be a file that can be written", str(path), f"{in_a_line(error)}.") from error
    return ExportedModel(str(path), facts)


def lower_(program: Program, target: str) -> None:
    """Bring a program's graph into the form that the target's kernels take; its values stay."""
    shift_codes_(program.graph, FORMATS[target].activations)
    if target == "openvino":
        absorb_paddings_(program.graph)
    round_again_(program.graph)
    if target in ("onnxruntime", "openvino"):  # TensorRT takes no codes of int32
        store_biases_(program.graph)


def _samples(
    model: nn.Module, program: Program, calls: Sequence[Call], kernels: str, lowered: Lowered | None
) -> list[Sample]:
    """Return calls, the first at three batch sizes where it may have any, with what the model gives for them."""
    size = batch_size_of(calls[0])
    most = min(
        2 * size + 1, program.largest.get(BATCH) or 2 * size + 1, (lowered and lowered.max_batch) or 2 * size + 1
    )
    sizes = sorted({1, size, most}) if program.has_batch else [size]
    found: list[Sample] = []
    for args, kwargs in (*(resize_batch(calls[0], size) for size in sizes), *calls[1:]):
        tensors: list[Tensor] = []
        if described((args, kwargs), tensors) != program.call:
            raise invalid("calibration", "hold calls like `inputs`", "others", "Give them all in the same way.")
        try:
            found.append(_sample(model, program, tensors, kernels, again=not found))
        except CompressionError:
            raise
        except Exception as error:
            name = "inputs" if len(found) < len(sizes) else "calibration"
            must = f"be what the model takes in evaluation, in batches of {len(tensors[0])}"
            raise invalid(name, must, in_a_line(error)) from error
    if any(set(names.values()) - {BATCH} for names in program.sizes):
        halved = [_halved(tensor, names) for tensor, names in zip(program.example, program.sizes, strict=True)]
        with suppress(Exception):  # a size that the model doesn't take
            found.append(_sample(model, program, halved, kernels))
    return found


def _sample(model: nn.Module, program: Program, tensors: list[Tensor], kernels: str, again: bool = False) -> Sample:
    """Run a call; where it is to be run ``again``, both must give the same."""
    outputs, own = list[Tensor](), list[Tensor]()
    args, kwargs = gathered(program.call, tensors)
    with isolated_evaluation(model), torch.no_grad():
        described(model(*args, **kwargs), own)
    with isolated_evaluation(model), torch.no_grad(), writing_file(kernels):
        described(model(*args, **kwargs), outputs)
        if again:
            _refuse_others(program, outputs, model(*args, **kwargs))
    if any(output.is_floating_point() and output.numel() and not output.isfinite().any() for output in outputs):
        raise CompressionError(
            "`model` must give finite values, which can be compared. Received: an output of NaN or infinity alone. "
            "Look at its weights and at `inputs`."
        )
    return Sample(tensors, *([output.detach().clone() for output in found] for found in (outputs, own)))


def _halved(tensor: Tensor, names: Mapping[int, str]) -> Tensor:
    for place in (place for place, name in names.items() if name != BATCH):
        tensor = tensor.narrow(place, 0, (tensor.shape[place] + 1) // 2)
    return tensor


def _refuse_others(program: Program, outputs: Sequence[Tensor], result: Any) -> None:
    """Raise where a model gives other values when it is called again, which no file does."""
    again: list[Tensor] = []
    described(result, again)
    for name, before, after in zip(program.outputs, outputs, again, strict=True):
        if compared(before, after, 0.0).failure:
            raise CompressionError(
                "`model` must give the same again for the same inputs in evaluation. Received: another "
                f"`{name}` in the second call. Take noise, and state that calls change, out of its `forward`; dropout "
                "by torch.nn.functional needs training=self.training. What is random on purpose: verify=False."
            )
