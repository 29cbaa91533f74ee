"""Lists the tables of `peers.py`: their networks, and their rows with what a user writes for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peers_code as code

ONNXRUNTIME, OPENVINO, EAGER = "onnxruntime", "OpenVINO", "torch"


@dataclass(frozen=True)
class Row:
    """A way to a smaller network.

    Attributes:
        name: of the row.
        code: what a user writes.
        base: the row that it is held against; empty where it is ours.
        packages: what has to be installed for it, by the names of imports.
        runtime: what runs its file.
    """

    name: str
    code: Callable[..., Any]
    base: str = ""
    packages: tuple[str, ...] = ()
    runtime: str = ONNXRUNTIME


@dataclass(frozen=True)
class Table:
    """Rows that are compared.

    Attributes:
        title: of the table.
        about: what every row begins with and gets.
        networks: by their names in `defaults_rows.py`.
        rows: ours, its peers, and what does nothing.
        said: what is known of the causes, under the table.
    """

    title: str
    about: str
    networks: tuple[str, ...]
    rows: tuple[Row, ...]
    said: tuple[str, ...] = ()


SPARSE, NARROW, TAUGHT = "`ScheduledPruning`", "`ChannelPruning`", "`Distillation`"
STATIC, STATIC_OPENVINO, STATIC_EAGER = (f"`int8_static`, {place}" for place in (ONNXRUNTIME, OPENVINO, EAGER))

TABLES = {
    "sparsity": Table(
        "Nine of ten weights become zeros",
        f"From scratch, {code.EPOCHS} epochs.",
        ("cnn-bn", "transformer"),
        (
            Row(SPARSE, code.our_sparsity),
            Row("Lightning's `ModelPruning`, its defaults", code.lightning_defaults, SPARSE),
            Row("Lightning's `ModelPruning`, by a schedule", code.lightning_by_hand, SPARSE),
            Row("FasterAI's `SparsifyCallback`", code.fasterai, SPARSE, ("fasterai", "fastai")),
            Row("dense", code.plain, SPARSE),
        ),
        (
            "Zeros alone make nothing faster, and only a compressed file smaller.",
            "`ModelPruning` as it comes prunes biases and norms too, and takes the weights back to their beginning in "
            "each epoch; by a schedule on the weights alone it is held against ours on equal terms.",
        ),
    ),
    "channels": Table(
        "Half of the multiply-accumulates leave",
        f"From a trained network, then {code.TUNING} epochs.",
        ("cnn-bn", "transformer", "pitch"),
        (
            Row(NARROW, code.our_channels),
            Row("torch-pruning by hand", code.torch_pruning_by_hand, NARROW, ("torch_pruning",)),
            Row("all channels", code.plain_tuning, NARROW),
        ),
        (
            "By hand a user names the last layer, heads, and layers whose width the code names; here they are found.",
            "Part of our time is for the calibration, by which channels are chosen and the next layers fitted.",
            "**The pretrained network is slower for its cut**, by either way: its widths suit the kernels less. "
            "The log of `ChannelPruning` says so; a budget of `latency` avoids it.",
        ),
    ),
    "int8": Table(
        "Int8 without training, for a CPU",
        "From a trained network and 64 samples.",
        ("cnn-bn", "transformer", "pitch", "sentences"),
        (
            Row(STATIC, code.our_onnxruntime),
            Row("onnxruntime's `quantize_static`", code.onnxruntime_static, STATIC),
            Row("float32, onnxruntime", code.plain_onnx, STATIC),
            Row(STATIC_OPENVINO, code.our_openvino, packages=("openvino",), runtime=OPENVINO),
            Row("NNCF, OpenVINO", code.nncf_openvino, STATIC_OPENVINO, ("openvino", "nncf"), OPENVINO),
            Row(STATIC_EAGER, code.our_eager, runtime=EAGER),
            Row("torchao's pt2e by hand, compiled", code.torchao_by_hand, STATIC_EAGER, ("torchao",), EAGER),
        ),
        (
            "**A CPU without VNNI takes more instructions for 8-bit products**: in onnxruntime a small network is "
            "slower in int8 than in float there.",
            "On such a CPU sums of 8-bit products overflow in OpenVINO. NNCF takes 7-bit weights by itself; here a "
            "user writes `reduce_range=True`, which the error of the export says.",
            "**Embedding tables stay float in ours**: 47 MB of the sentence encoder's file, which NNCF makes int8.",
            "**Ours takes longer to make a file than the runtimes' own toolkits**: `export` runs it at every level of "
            "optimization and at three batch sizes against the model, and times it.",
            "**In torch ours runs operator by operator**, which takes most of the time of a small transformer: what "
            'torchao leaves is compiled. `engine="inductor"` compiles ours; it wasn\'t measured here.',
            "torchao's graph is compiled without `freezing`, which gives int8 kernels but fails with these versions "
            "(`UnsupportedOperatorException: onednn.qconv_prepack.default`). Its file has the float weights too.",
        ),
    ),
    "distillation": Table(
        "A student learns from a teacher",
        f"{code.LABELLED} labelled digits, {code.STUDENT_EPOCHS} epochs; the teacher has seen {code.TAUGHT}.",
        ("cnn-bn", "transformer"),
        (
            Row(TAUGHT, code.our_distillation),
            Row("by hand", code.distillation_by_hand, TAUGHT),
            Row("torchdistill", code.torchdistill, TAUGHT, ("torchdistill",)),
            Row("without a teacher", code.no_distillation, TAUGHT),
        ),
        ("All three compute one loss; what differs is how much has to be written, and the time.",),
    ),
}
