"""What static int8 stands on, and what it leaves as it was."""

from __future__ import annotations

import ast
import logging
import re
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_compress
from lightning_compress import PostTrainingQuantization, quantize
from tests.quantization.static.children import REPOSITORY, child
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.zoo import row

PACKAGE = REPOSITORY / "lightning_compress"


def imported(file: Path) -> list[str]:
    """What a file imports from an upstream that could go away."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module" and node.args:
            found += [str(getattr(node.args[0], "value", ""))]
    return [name for name in found if f"{name}.".startswith(("torch.ao.", "torchao."))]


def test_nothing_of_torch_ao_is_imported_and_torchao_by_one_file() -> None:
    # Q24. torch.ao ships up to torch 2.15; torchao moves its parts about.
    found = {str(file.relative_to(PACKAGE)): imported(file) for file in PACKAGE.rglob("*.py")}
    users = {path: names for path, names in found.items() if names}
    assert users.keys() == {"quantization/layers/fake_quantizers.py"}
    assert not [name for names in users.values() for name in names if name.startswith("torch.ao")]


GLOBALS = """
import sys, warnings, logging
import torch, torch._dynamo.config, torch._inductor.config
import lightning  # has filters and loggers of its own

def backends():
    for kind in ("quantized", "mkldnn", "mkl", "nnpack", "openmp", "opt_einsum", "cudnn", "cpu"):
        module = getattr(torch.backends, kind)
        for name in dir(module):
            value = None if name.startswith("_") else getattr(module, name, None)
            if isinstance(value, (bool, int, str)):
                yield f"{kind}.{name}", value

def loggers():
    for name in ("", "lightning.pytorch", "lightning_compress", "torch", "torchao"):
        logger = logging.getLogger(name)
        yield f"logger {name}", (logger.level, logger.propagate, logger.disabled, len(logger.handlers))

def state():
    return {
        **{f"inductor.{key}": value for key, value in torch._inductor.config.get_config_copy().items()},
        **{f"dynamo.{key}": value for key, value in torch._dynamo.config.get_config_copy().items()},
        **dict(backends()), **dict(loggers()),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "filters": list(warnings.filters), "showwarning": warnings.showwarning,
        "threads": torch.get_num_threads(), "dtype": torch.get_default_dtype(), "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(), "autocast": torch.is_autocast_enabled("cpu"),
        "anomaly": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(), "hook": sys.excepthook,
        "disabled": logging.root.manager.disable,
    }

def compare(what):
    now = state()
    for key in before:
        assert before[key] == now[key], f"{what} changed {key}: {before[key]} -> {now[key]}"

from torch import nn
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
x = torch.ones(4, 3, 8, 8)
before = state()
import lightning_compress
compare("importing the package")
int8 = lightning_compress.quantize(model, calibration=[x])
compare("quantizing")
int8(x)
compare("int8")
lightning_compress.quantize(model, lightning_compress.StaticInt8(observer="histogram"), calibration=[x])
compare("a histogram")
"""


@pytest.fixture(scope="module")
def globals_run() -> subprocess.CompletedProcess[str]:
    return child(GLOBALS)


def test_importing_and_quantizing_change_no_global_flags(globals_run: Any) -> None:
    assert globals_run.returncode == 0, globals_run.stderr


def test_importing_and_quantizing_say_nothing(globals_run: Any) -> None:
    # But for what it takes on this CPU.
    expected = ("slower than float", "Dequantized on this CPU", "warnings.warn(", "self.build_(")
    said = [line for line in globals_run.stderr.splitlines() if line != "quantize:"]
    assert not [line for line in said if not any(part in line for part in expected)]


def test_logging_that_the_user_disabled_stays_disabled() -> None:
    before = logging.root.manager.disable
    try:
        logging.disable(logging.INFO)
        quantize(row("mlp").build(), calibration=[torch.randn(4, 16)])
        assert logging.root.manager.disable == logging.INFO
    finally:
        logging.disable(before)


def test_what_another_thread_logs_meanwhile_is_not_lost(caplog: pytest.LogCaptureFixture) -> None:
    # Only torch is to be silenced.
    stop, said = threading.Event(), 0

    def speak() -> None:
        nonlocal said
        while not stop.wait(0.005):
            logging.getLogger("a.user").warning("heartbeat")
            said += 1

    thread = threading.Thread(target=speak)
    thread.start()
    try:
        quantize(row("conv_bn_relu").build(), calibration=[torch.randn(4, 3, 8, 8)])
    finally:
        stop.set()
        thread.join()
    assert said > 10
    assert [entry.name for entry in caplog.records].count("a.user") == said


NOISE = """
import sys, warnings
# As `-W error::...`, but for what others than torch are to blame for.
for category in (DeprecationWarning, FutureWarning, UserWarning):
    warnings.simplefilter("error", category)
warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning)
warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers", UserWarning)
import torch
import lightning_compress as package
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
way, path, scheme = sys.argv[1:]
module = Classifier()
if way == "load":
    package.load_compressed(path, module).eval()(torch.ones(4, 16))
elif way == "train":
    trainer = quiet_trainer(callbacks=[package.QuantizationAwareTraining()])
    trainer.fit(module, TinyData())
    trainer.test(module, TinyData(), verbose=False)
else:
    if way == "histogram":
        scheme = package.StaticInt8(observer="histogram")
    trainer = quiet_trainer(callbacks=[package.PostTrainingQuantization(scheme, keep=True)])
    trainer.test(module, TinyData(), verbose=False)
    trainer.save_checkpoint(path)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "scheme"),
    [
        *[("train", ""), ("test", "int8_static"), ("load", "int8_static"), ("histogram", "")],
        ("test", "int8_dynamic"),
    ],
)
def test_no_warning_of_torch_reaches_a_user(way: str, scheme: str, tmp_path: Path) -> None:
    # In a process of its own each, as many a warning comes only once.
    if way == "load":
        trainer = quiet_trainer(callbacks=[PostTrainingQuantization(scheme, keep=True)])
        trainer.test(Classifier(), TinyData(), verbose=False)
        trainer.save_checkpoint(tmp_path / "int8.ckpt")
    run = child(NOISE, way, str(tmp_path / "int8.ckpt"), scheme)
    assert run.returncode == 0, run.stderr
    said = [line for line in run.stderr.splitlines() if re.search("warning|deprecated|torchao", line, re.IGNORECASE)]
    assert not said, run.stderr


def test_lightning_compress_is_imported_from_this_tree() -> None:
    # The subprocesses above test what this process does.
    assert Path(lightning_compress.__file__).parents[1] == REPOSITORY
