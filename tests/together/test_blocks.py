"""Blocks that leave whole in a fit: resumed, averaged, masked, quantized, on two processes, in files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_compress import (
    ChannelPruning,
    Distillation,
    EMATeacher,
    FeatureMSE,
    Linear,
    OneShot,
    QuantizationAwareTraining,
    Rewind,
    ScheduledPruning,
    SoftTarget,
    Steps,
    Window,
    export,
    load_compressed,
)
from lightning_compress.cli import main
from tests.support.data import TinyData
from tests.support.ddp import run_ranks
from tests.support.fits import fit, read_checkpoint, resume
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state, hooks, snapshot
from tests.support.residual import ResidualClassifier

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed", "ignore:Be aware that when using `ckpt_path`", "ignore:Swapping scheduler"
)
EPOCHS = 4


def shrink(**settings: Any) -> ChannelPruning:
    """Blocks leave in epochs 0 to 2."""
    window = Window(5, 20, unit="step", every_n_steps=5)
    rounds = {"schedule": Linear(), "window": window, "calibration_batches": 0}
    return ChannelPruning(**{"macs": 0.5, "blocks": True, "round_to": 1, **rounds, **settings})


def prune(method: str = "taylor", **settings: Any) -> ScheduledPruning:
    return ScheduledPruning(method, 0.7, window=Window(3, 24, unit="step", every_n_steps=3), **settings)


def taught() -> Distillation:
    torch.manual_seed(7)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 4))
    return Distillation(teacher, [SoftTarget(), FeatureMSE("blocks.1", "1")], task_weight=0.5)


class Filtered(ResidualClassifier):
    """Its optimizer gets what is trained, as many people write it."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([parameter for parameter in self.parameters() if parameter.requires_grad], lr=0.01)


CASES: dict[str, tuple[Callable[[], list[Callback]], type[Classifier]]] = {
    "sgd": (lambda: [shrink()], ResidualClassifier),
    "adam": (lambda: [shrink()], Filtered),
    "at once": (lambda: [shrink(schedule=OneShot())], Filtered),
    "taylor": (lambda: [shrink(importance="taylor")], Filtered),
    "averaged": (lambda: [EMAWeightAveraging(decay=0.9), shrink()], Filtered),
    "averaged at the end": (lambda: [shrink(), StochasticWeightAveraging(0.01, swa_epoch_start=2)], ResidualClassifier),
    "pruned": (lambda: [prune(), shrink()], Filtered),
    "pruned with regrowth": (lambda: [shrink(), prune(regrow=True)], Filtered),
    "pruned by rows": (lambda: [shrink(), prune("ln_structured", scope="layer")], Filtered),
    "rewound": (lambda: [prune("l1_unstructured", schedule=Steps(), rewind=Rewind(2)), shrink()], Filtered),
    "taught": (lambda: [taught(), shrink()], Filtered),
    "taught by an average": (lambda: [shrink(), Distillation(EMATeacher(0.9), [SoftTarget()])], Filtered),
    "quantized": (lambda: [QuantizationAwareTraining(window=Window(0.8)), shrink()], Filtered),
}


def left(checkpoint: dict[str, Any]) -> set[str]:
    """The blocks of which nothing is in a file."""
    state = checkpoint["state_dict"]
    return {name.rpartition(".up")[0] for name in state if name.endswith("up.weight") and not state[name].numel()}


def run(case: str, folder: Path, ckpt_path: Path | None = None) -> Any:
    make, kind = CASES[case]
    return fit(*make(), module=kind(), folder=folder, ckpt_path=ckpt_path, max_epochs=EPOCHS)


def read(path: Path) -> dict[str, Any]:
    checkpoint = read_checkpoint(path)
    # What a fingerprint is of, a student's average here, a fit that was resumed never had.
    checkpoint["callbacks"].get("Distillation", {}).pop("teacher", None)
    return checkpoint


# The others go the ways of test_channels_resume.py.
QUICK = ("adam", "at once", "averaged", "pruned", "taught by an average", "quantized")


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case not in QUICK)) for case in CASES])
def test_resumed_between_blocks_equals_uninterrupted(case: str, tmp_path: Path) -> None:
    resume(partial(run, case), tmp_path, 1, read=read)
    early, late = (left(read_checkpoint(tmp_path / "whole" / f"epoch={epoch}.ckpt")) for epoch in (0, EPOCHS - 1))
    assert early <= late and late


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, fit(shrink(), module=Filtered(), folder=folder, max_epochs=EPOCHS)[1]


def by_hand(path: Path) -> tuple[nn.Module, set[str]]:
    """A file's weights in a module that was written without the blocks that left, at the widths of the file."""
    state = read_checkpoint(path)["state_dict"]
    gone = {name.rpartition(".up")[0] for name in state if name.endswith("up.weight") and not state[name].numel()}
    module = ResidualClassifier()
    for number, block in enumerate(module.blocks):
        if f"blocks.{number}" in gone:
            module.blocks[number] = nn.Identity()
        else:
            hidden, width = state[f"blocks.{number}.up.weight"].shape
            block.up, block.norm = nn.Linear(width, hidden), nn.BatchNorm1d(hidden)
            block.down = nn.Linear(hidden, width)
    width = len(state["body.bias"])
    module.body, module.norm, module.head = nn.Linear(16, width), nn.BatchNorm1d(width), nn.Linear(width, 4)
    module.load_state_dict({name: value for name, value in state.items() if not name.startswith(tuple(gone))})
    return module.eval(), gone


def test_files_load_wherever_they_are_wanted(saved: tuple[Path, Any], tmp_path: Path) -> None:
    folder, module = saved
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    later = Filtered()
    for epoch in (3, 1, 3):  # into one that is full-size, one that is smaller, and one that is larger
        path = folder / f"epoch={epoch}.ckpt"
        expected, gone = by_hand(path)
        small = load_compressed(str(path), Filtered()).eval()
        torch.testing.assert_close(small(x), expected(x))
        quiet_trainer(callbacks=[shrink()]).test(later, TinyData(), ckpt_path=path, weights_only=True, verbose=False)
        torch.testing.assert_close(later.eval()(x), expected(x))
        trained = {
            name.rpartition(".up")[0] for name, p in later.named_parameters() if not p.numel() and "up.w" in name
        }
        assert trained == gone
    torch.testing.assert_close(module.eval()(x), expected(x))
    assert all(parameter.requires_grad for parameter in later.parameters())


def test_a_file_of_onnx_has_nothing_of_the_blocks(saved: tuple[Path, Any], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    folder, _ = saved
    module, gone = by_hand(folder / "epoch=3.ckpt")
    small = load_compressed(str(folder / "epoch=3.ckpt"), Filtered()).eval()
    export(small, torch.randn(4, 16), str(tmp_path / "small.onnx"))
    graph = onnx.load(tmp_path / "small.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("Gemm") + kinds.count("MatMul") == 2 + 2 * (4 - len(gone))
    held = sum(int(torch.tensor(tensor.dims).prod()) for tensor in graph.initializer if tensor.data_type == 1)
    assert held <= sum(parameter.numel() for parameter in module.parameters())


def test_a_fit_leaves_nothing_behind_and_says_what_left() -> None:
    module, channels = ResidualClassifier(), shrink()
    before = hooks(module)
    fit(channels, module=module, max_epochs=EPOCHS)
    assert hooks(module) == before
    gone = {row.layers[0] for row in channels.plans[-1].rows if row.block}
    assert gone == {name.rpartition(".up")[0] for name in left_in(module)}
    last = channels.plans[-1]
    assert last.before.params == sum(parameter.numel() for parameter in ResidualClassifier().parameters())
    assert last.after.params == sum(parameter.numel() for parameter in module.parameters())


def left_in(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if name.endswith("up.weight") and not len(parameter)]


def test_the_sparsity_is_that_of_what_survives() -> None:
    pruning = ScheduledPruning(sparsity=0.5, window=Window(2, 24, unit="step"))
    _, module = fit(shrink(), pruning, module=ResidualClassifier(), max_epochs=EPOCHS)
    weights = [parameter for name, parameter in module.named_parameters() if name in pruning.masks]
    assert sum(int((weight == 0).sum()) for weight in weights) == round(0.5 * sum(weight.numel() for weight in weights))


@pytest.mark.slow
def test_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(
        "trainer: {accelerator: cpu, max_epochs: 4, logger: false, callbacks: [{class_path: "
        "lightning_compress.ChannelPruning, init_args: {macs: 0.5, blocks: true, window: {start: 5, end: 20, unit: "
        "step}}}]}\nmodel: {class_path: tests.support.residual.ResidualClassifier}\n"
        "data: {class_path: tests.support.data.TinyData}\n"
    )
    main(["fit", "--config", "config.yaml"])
    [path] = tmp_path.rglob("*.ckpt")
    assert left(read_checkpoint(path))


def on_two_ranks(quantized: bool) -> dict[str, Any]:
    module, states, wrappers = ResidualClassifier(), [], []

    class Records(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            assert isinstance(trainer.strategy.model, DistributedDataParallel)
            wrappers.append(trainer.strategy.model)
            states.append(snapshot(dict(pl_module.named_parameters())))

    window = Window(2, 8, unit="step", every_n_steps=3)
    channels = ChannelPruning(macs=0.5, blocks=True, window=window, round_to=1)
    others = [QuantizationAwareTraining()] if quantized else [ScheduledPruning(sparsity=0.5, window=window)]
    trainer = quiet_trainer(devices=2, strategy="ddp", max_epochs=4, callbacks=[channels, Records(), *others])
    torch.manual_seed(100 + trainer.global_rank)  # ranks that draw differently must still cut the same
    trainer.fit(module, TinyData(samples=48))
    rows = channels.plans[-1].rows
    return {"states": states, "wrappers": len(set(map(id, wrappers))), "gone": [r.layers[0] for r in rows if r.block]}


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
def test_ranks_lose_the_same_blocks(quantized: bool) -> None:
    first, second = run_ranks(on_two_ranks, quantized)
    assert first["gone"] == second["gone"] != []
    assert first["wrappers"] > 1
    assert_same_state(first["states"], second["states"])
