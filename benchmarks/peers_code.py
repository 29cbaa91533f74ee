"""Holds what a user writes for each row of `peers.py`.

Lines of code are those of a body, without docstring, comments, blank lines and imports. A row that trains takes a
LightningModule, whose network it gives back, and data; the rate falls to 0 by a cosine everywhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from defaults_rows import Data, Module
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn import functional

from lightning_compress import (
    ChannelPruning,
    Distillation,
    ScheduledPruning,
    SoftTarget,
    StaticInt8,
    export,
    quantize,
    save_compressed,
)
from lightning_compress.quantization.numerics.int8 import needs_reduced_range

EPOCHS, TUNING, STUDENT_EPOCHS = 10, 5, 60
LABELLED, TAUGHT = 150, 1100
SPARSITY, MACS, REDUCED = 0.9, 0.5, needs_reduced_range()
QUIET: dict[str, Any] = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
) | {"accelerator": "cpu", "devices": 1}
Batches = list[Tensor]


def lines_of_code(function: Callable[..., Any]) -> int:
    """The lines of a body that a user writes."""
    source = inspect.getsource(function)
    body = source.split(":\n", 1)[1].replace(f'"""{function.__doc__}"""', "", 1)
    lines = (line.strip() for line in body.splitlines())
    return sum(bool(line) and not line.startswith(("#", "import ", "from ")) for line in lines)


def plain(model: Module, data: Data) -> nn.Module:
    trainer = L.Trainer(max_epochs=EPOCHS, **QUIET)
    trainer.fit(model, data)
    return model.network


# Sparsity.


def our_sparsity(model: Module, data: Data) -> nn.Module:
    trainer = L.Trainer(max_epochs=EPOCHS, callbacks=[ScheduledPruning(sparsity=SPARSITY)], **QUIET)
    trainer.fit(model, data)
    return model.network


def lightning_defaults(model: Module, data: Data) -> nn.Module:
    amount = 1 - (1 - SPARSITY) ** (1 / EPOCHS)  # of what is left, once an epoch
    trainer = L.Trainer(max_epochs=EPOCHS, callbacks=[ModelPruning("l1_unstructured", amount=amount)], **QUIET)
    trainer.fit(model, data)
    return model.network


def lightning_by_hand(model: Module, data: Data) -> nn.Module:
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    count = sum(layer.weight.numel() for layer in layers)

    def zeros(epoch: int) -> int:
        done = min(max((epoch / EPOCHS - 0.1) / 0.5, 0.0), 1.0)
        return round(count * SPARSITY * (1 - (1 - done) ** 3))

    pruning = ModelPruning(
        "l1_unstructured",
        parameters_to_prune=[(layer, "weight") for layer in layers],
        amount=lambda epoch: zeros(epoch + 1) - zeros(epoch),
        use_lottery_ticket_hypothesis=False,
    )
    trainer = L.Trainer(max_epochs=EPOCHS, callbacks=[pruning], **QUIET)
    trainer.fit(model, data)
    return model.network


def fasterai(model: Module, data: Data) -> nn.Module:
    from fastai.callback.schedule import ParamScheduler, SchedCos
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper
    from fasterai.core.criteria import large_final
    from fasterai.core.schedule import agp
    from fasterai.sparse.sparsify_callback import SparsifyCallback

    kinds = (nn.Conv2d, nn.Linear)
    pruning = SparsifyCallback(SPARSITY, "weight", "global", large_final, schedule=agp, layer_type=kinds)
    cosine = ParamScheduler({"lr": SchedCos(model.lr, 0.0)})
    loaders = DataLoaders(data.train_dataloader(), data.test_dataloader(), device=torch.device("cpu"))
    adam = partial(OptimWrapper, opt=torch.optim.Adam)
    learner = Learner(loaders, model.network, model.task.loss, opt_func=adam, cbs=[pruning, cosine])
    with learner.no_bar(), learner.no_logging():
        learner.fit(EPOCHS, lr=model.lr)
    return learner.model


# Channels, of a trained network.


def plain_tuning(model: Module, data: Data) -> nn.Module:
    trainer = L.Trainer(max_epochs=TUNING, **QUIET)
    trainer.fit(model, data)
    return model.network


def our_channels(model: Module, data: Data) -> nn.Module:
    trainer = L.Trainer(max_epochs=TUNING, callbacks=[ChannelPruning(macs=MACS)], **QUIET)
    trainer.fit(model, data)
    return model.network


def torch_pruning_by_hand(model: Module, data: Data) -> nn.Module:
    import torch_pruning
    from compensation_arms import macs

    network, example = model.network.eval(), next(iter(data.train_dataloader()))[0][:1]
    heads = [layer for layer in network.modules() if hasattr(layer, "heads")]
    last = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
    written = [layer for name, layer in network.named_modules() if name == "conv6"]  # a view names its width
    pruner = torch_pruning.pruner.BasePruner(
        network,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(),
        global_pruning=True,
        pruning_ratio=1.0,
        max_pruning_ratio=0.9,
        iterative_steps=200,
        ignored_layers=[last, *written],
        num_heads={part: layer.heads for layer in heads for part in (layer.query, layer.key, layer.value)},
    )
    goal = MACS * macs(network, example)
    while macs(network, example) > goal:
        pruner.step()
    network.train()
    trainer = L.Trainer(max_epochs=TUNING, **QUIET)
    trainer.fit(model, data)
    return network


# Int8 without training: from a network and batches to a file, and to a module where torch runs it.


def plain_onnx(network: nn.Module, batches: Batches, folder: Path) -> Path:
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    torch.onnx.export(
        network, (batches[0],), folder / "float.onnx", dynamic_shapes=dynamic, external_data=False, verbose=False
    )
    return folder / "float.onnx"


def our_onnxruntime(network: nn.Module, batches: Batches, folder: Path) -> Path:
    quantized = quantize(network, "int8_static", calibration=batches)
    return Path(export(quantized, (batches[0],), folder / "ours.onnx").path)


def our_openvino(network: nn.Module, batches: Batches, folder: Path) -> Path:
    quantized = quantize(network, StaticInt8(target="openvino", reduce_range=REDUCED), calibration=batches)
    return Path(export(quantized, (batches[0],), folder / "ours_openvino.onnx", target="openvino").path)


def our_eager(network: nn.Module, batches: Batches, folder: Path) -> tuple[nn.Module, Path]:
    quantized = quantize(network, StaticInt8(reduce_range=REDUCED), calibration=batches)
    save_compressed(quantized, folder / "ours.pt")
    return quantized, folder / "ours.pt"


def onnxruntime_static(network: nn.Module, batches: Batches, folder: Path) -> Path:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source = plain_onnx(network, batches, folder)
    quant_pre_process(source, folder / "prepared.onnx", skip_symbolic_shape=True)
    name = next(iter(inspect.signature(network.forward).parameters))

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> Any:
            batch = next(self.batches, None)
            return None if batch is None else {name: batch.numpy()}

    quantize_static(
        folder / "prepared.onnx",
        folder / "static.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return folder / "static.onnx"


def nncf_openvino(network: nn.Module, batches: Batches, folder: Path) -> Path:
    import nncf
    import openvino

    source = openvino.convert_model(network, example_input=batches[0])
    data = nncf.Dataset([batch.numpy() for batch in batches])
    has_norms = any(isinstance(layer, nn.LayerNorm) for layer in network.modules())
    quantized = nncf.quantize(source, data, model_type=nncf.ModelType.TRANSFORMER if has_norms else None)
    openvino.save_model(quantized, folder / "nncf.xml", compress_to_fp16=False)
    return folder / "nncf.xml"


def torchao_by_hand(network: nn.Module, batches: Batches, folder: Path) -> tuple[nn.Module, Path]:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    exported = torch.export.export(network, (batches[0],)).module()
    settings = x86.get_default_x86_inductor_quantization_config(reduce_range=REDUCED)
    prepared = prepare_pt2e(exported, x86.X86InductorQuantizer().set_global(settings))
    for batch in batches:
        prepared(batch)
    converted = convert_pt2e(prepared)
    torch.export.save(torch.export.export(converted, (batches[0],)), folder / "torchao.pt2")
    return torch.compile(converted), folder / "torchao.pt2"


# Distillation: the module's network is the student.


def our_distillation(model: Module, data: Data, teacher: nn.Module) -> nn.Module:
    teaching = Distillation(teacher, [SoftTarget(temperature=4.0, weight=0.75)], task_weight=0.25)
    trainer = L.Trainer(max_epochs=STUDENT_EPOCHS, callbacks=[teaching], **QUIET)
    trainer.fit(model, data)
    return model.network


def no_distillation(model: Module, data: Data, teacher: nn.Module) -> nn.Module:
    trainer = L.Trainer(max_epochs=STUDENT_EPOCHS, **QUIET)
    trainer.fit(model, data)
    return model.network


def distillation_by_hand(model: Module, data: Data, teacher: nn.Module) -> nn.Module:
    class Distilled(Module):
        def training_step(self, batch: Batches, batch_idx: int) -> Tensor:
            logits = self(batch[0])
            with torch.no_grad():
                target = (teacher(batch[0]) / 4.0).softmax(1)
            soft = functional.kl_div((logits / 4.0).log_softmax(1), target, reduction="batchmean") * 4.0**2
            return 0.25 * self.task.loss(logits, batch[1]) + 0.75 * soft

    teacher.eval().requires_grad_(False)
    trainer = L.Trainer(max_epochs=STUDENT_EPOCHS, **QUIET)
    trainer.fit(Distilled(model.network, model.task, model.lr, model.cosine), data)
    return model.network


def torchdistill(model: Module, data: Data, teacher: nn.Module) -> nn.Module:
    from torchdistill.core.distillation import get_distillation_box

    order = {"generator": torch.Generator().manual_seed(data.seed)}
    loader = {
        "dataset_id": "train",
        "sampler": {"class_or_func": torch.utils.data.RandomSampler, "kwargs": order},
        "kwargs": {"batch_size": data.task.batch} | order,
    }
    settings_of_loss = {"temperature": 4.0, "alpha": 0.25, "reduction": "batchmean"}
    for end in ("student", "teacher"):
        settings_of_loss |= {f"{end}_module_path": ".", f"{end}_module_io": "output"}
    terms = {"kd": {"criterion": {"key": "KDLoss", "kwargs": settings_of_loss}, "weight": 1.0}}
    steps = STUDENT_EPOCHS * len(data.train_dataloader())
    settings = {
        "num_epochs": STUDENT_EPOCHS,
        "train_data_loader": loader,
        "teacher": {"requires_grad": False, "forward_proc": "forward_batch_only"},
        "student": {"forward_proc": "forward_batch_only"},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
        "optimizer": {"key": "Adam", "kwargs": {"lr": model.lr}},
        "scheduler": {"key": "CosineAnnealingLR", "kwargs": {"T_max": steps}, "scheduling_step": 1},
    }
    datasets, cpu = {"train": data.train}, torch.device("cpu")
    box = get_distillation_box(teacher, model.network, datasets, settings, cpu, None, False, 1.0)
    for epoch in range(STUDENT_EPOCHS):
        box.pre_epoch_process(epoch=epoch)
        for batch, targets, supplements in box.train_data_loader:
            box.pre_forward_process()
            loss = box.forward_process(batch, targets, supplements)
            box.post_forward_process(loss=loss)
        box.post_epoch_process()
    box.clean_modules()
    return model.network
