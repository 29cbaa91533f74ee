"""The command line: what LightningCLI has to reach, from YAML and from arguments, and what a user sees who mistypes."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from torch import nn

import lightning_compress
from lightning_compress.__main__ import HELP
from lightning_compress.__main__ import main as entry
from lightning_compress.cli import CompressCLI, main
from lightning_compress.deployable import deployable
from lightning_compress.errors import invalid
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.onnx_sessions import open_session

ROOT = Path(__file__).parents[1]
QUIET = [
    *("--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_checkpointing=false"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.max_epochs=1"),
]
RUN = ["--data=tests.support.data.TinyData", *QUIET]


class Seen(Callback):
    """Remembers the last run, for the test to look at."""

    last: tuple[Trainer, LightningModule]

    def __init__(self, share: float = 0.5) -> None:
        if not 0 <= share < 1:
            raise invalid("share", "lie in [0, 1)", share, "Give a fraction, not a percentage.")
        self.share = share

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Seen.last = trainer, pl_module


class Chooses(Classifier):
    """Takes its optimizer from the configuration."""

    def __init__(self, optimizer: OptimizerCallable = torch.optim.Adam) -> None:
        super().__init__()
        self.optimizer = optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


class Grows(Classifier):
    """Gets parameters in `setup`, as a distillation module does for its regressors."""

    def setup(self, stage: str) -> None:
        self.late = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.late(super().forward(x))


class Remembers(Classifier):
    """Saves its hyperparameters, a network among them."""

    def __init__(self, width: int = 8, network: nn.Module | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.unused = nn.Linear(width, 2)


@pytest.fixture(autouse=True)
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])


def fit(*args: str, model: str = "tests.support.modules.Classifier") -> tuple[Trainer, LightningModule]:
    main(["fit", f"--model={model}", *RUN, "--trainer.callbacks+=tests.test_cli.Seen", *args])
    return Seen.last


def test_callback_appended_and_configured_by_arguments() -> None:
    trainer, _ = fit("--trainer.callbacks.share=0.25")
    assert [callback.share for callback in trainer.callbacks if isinstance(callback, Seen)] == [0.25]


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_other_commands(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([command, "--model=tests.support.modules.Classifier", *RUN])
    assert ("loss" in capsys.readouterr().out) == (command != "predict")


@pytest.mark.parametrize("network", [None, nn.Linear(2, 2)])
def test_a_checkpoint_of_a_plain_trainer(network: nn.Module | None, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = quiet_trainer()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attribute 'network'")  # Lightning would rather not save it
        module = Remembers(12, network)
    trainer.fit(module, TinyData())
    trainer.save_checkpoint("plain.ckpt")
    trainer.test(module, TinyData())
    capsys.readouterr()
    model = ["--model=tests.test_cli.Remembers", "--model.width=12"]
    # Before 2.6 Lightning had no such argument, and read all files so.
    whole = ["--weights_only=false"] * ("weights_only" in inspect.signature(Trainer.test).parameters)
    main(["test", *model, "--ckpt_path=plain.ckpt", *whole, *RUN])
    assert str(float(trainer.callback_metrics["test_loss"]))[:12] in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_a_checkpoint_of_the_command_line_says_how_its_model_is_built(own_folder: Path) -> None:
    save = [*QUIET, "--trainer.enable_checkpointing=true", "--trainer.callbacks+=ModelCheckpoint"]
    save += ["--trainer.callbacks.dirpath=saved", "--trainer.callbacks.filename=saved"]
    main(["fit", "--model=tests.test_cli.Remembers", "--model.width=12", "--data=tests.support.data.TinyData", *save])
    main(["test", "--model=tests.test_cli.Remembers", "--ckpt_path=saved/saved.ckpt", *RUN])  # of 8, it would not load


def test_a_checkpoint_that_cannot_be_read(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own_folder / "cut.ckpt").write_bytes(b"PK\x03\x04")
    with pytest.raises(SystemExit) as stop:
        main(["test", "--model=tests.support.modules.Classifier", "--ckpt_path=cut.ckpt", *RUN])
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("lightning-compress: error: `ckpt_path` must be a readable checkpoint. Received: ")


def test_modules_of_the_current_folder(own_folder: Path) -> None:
    sys.modules.pop("my_project", None)  # another test may have one of its own
    (own_folder / "my_project.py").write_text(
        "from tests.support.modules import Classifier\nclass Mine(Classifier):\n    pass\n"
    )
    _, module = fit(model="my_project.Mine")
    assert type(module).__module__ == "my_project"
    assert sys.path[0] == str(own_folder)


def test_optimizer_callable_from_yaml(own_folder: Path) -> None:
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.3, "momentum": 0.8}}
    model = {"class_path": "tests.test_cli.Chooses", "init_args": {"optimizer": optimizer}}
    (own_folder / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    main(["fit", "--config=config.yaml", *RUN, "--trainer.callbacks+=tests.test_cli.Seen"])
    (made,) = Seen.last[0].optimizers
    assert isinstance(made, torch.optim.SGD)
    assert (made.defaults["lr"], made.defaults["momentum"]) == (0.3, 0.8)
    assert yaml.safe_load((own_folder / "config.yaml").read_text()) == {"model": model}
    assert "momentum: 0.8" in (own_folder / "resolved_config.yaml").read_text()


@pytest.mark.filterwarnings("ignore:`Grows.configure_optimizers` will be overridden:UserWarning")
def test_optimizer_argument_reaches_parameters_made_in_setup() -> None:
    scheduler = ["--lr_scheduler=StepLR", "--lr_scheduler.step_size=1", "--lr_scheduler.gamma=0.5"]
    trainer, module = fit("--optimizer=SGD", "--optimizer.lr=0.1", *scheduler, model="tests.test_cli.Grows")
    (group,) = trainer.optimizers[0].param_groups
    assert {id(parameter) for parameter in group["params"]} == {id(parameter) for parameter in module.parameters()}
    assert len(group["params"]) == len(list(module.parameters()))
    assert group["lr"] == 0.05


def test_input_that_cannot_be_honoured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        fit("--trainer.callbacks.share=50")
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "lightning-compress: error: `share` must lie in [0, 1). Received: share=50.0. "
        "Give a fraction, not a percentage.\n"
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration, and a checkpoint of a model that was trained for int8 by it."""
    folder = tmp_path_factory.mktemp("trained")
    save = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": str(folder / "saved")},
    }
    trainer = {
        "callbacks": [{"class_path": "lightning_compress.QuantizationAwareTraining"}, save],
        **dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False),
        **{"max_epochs": 1, "accelerator": "cpu", "default_root_dir": str(folder)},
    }
    save["init_args"]["filename"] = "best"  # type: ignore[index]
    classes = {"model": "tests.support.modules.Classifier", "data": "tests.support.data.TinyData"}
    config = {**{name: {"class_path": path} for name, path in classes.items()}, "trainer": trainer}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", f"--config={folder / 'config.yaml'}"])
    return folder


def export(folder: Path, *args: str, config: str = "config.yaml") -> None:
    main(["export", f"--config={folder / config}", f"--ckpt_path={folder / 'saved' / 'best.ckpt'}", *args])


CONFIGS = ["config.yaml", pytest.param("resolved_config.yaml", marks=pytest.mark.slow)]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_checkpoint_becomes_a_file(trained: Path, config: str, own_folder: Path) -> None:
    verify = "true" if config == "config.yaml" else "false"
    export(trained, "--output=out/model.onnx", f"--verify={verify}", config=config)
    assert set(json.loads(Path("out/model.onnx.json").read_text())["int8"]) == {"body", "head"}
    x = torch.randn(5, 16)
    session = open_session("out/model.onnx")
    [logits] = session.run(None, {"x": x.numpy()})
    model = lightning_compress.load_compressed(str(trained / "saved" / "best.ckpt"), Classifier())
    with torch.no_grad():
        expected = deployable(model).eval()(x)
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--output=model.tflite"], "`path` must end in .onnx"),
        (["--output=model.onnx", "--target=openvin"], "`target` must be one of"),
        (["--output=."], "`path` must end in"),
        (["--output=model.onnx", "--ckpt_path=no.ckpt"], "`path` must be a readable checkpoint"),
        (["--output=model.onnx", "--module=bodi"], "`module` must be the path of a module. Received: module='bodi'. N"),
        (
            ["--output=model.onnx", "--trainer.callbacks+=PostTrainingQuantization"],
            "`callbacks` must hold no PostTrainingQuantization to export",
        ),
    ],
)
def test_an_export_that_cannot_be(
    trained: Path, args: list[str], words: str, own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        export(trained, *args)
    assert stop.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lightning-compress: error: {words}")
    assert list(own_folder.iterdir()) == []


def test_a_checkpoint_is_measured(trained: Path, own_folder: Path) -> None:
    checkpoint = f"--ckpt_path={trained / 'saved' / 'best.ckpt'}"
    entry(["report", f"--config={trained / 'config.yaml'}", checkpoint, "--directory=measured"])
    rows = json.loads(Path("measured/report.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["before", "after"]
    assert rows[0]["measurement"]["size_bytes"] > rows[1]["measurement"]["size_bytes"]
    assert rows[1]["metrics"].keys() >= {"test_loss"} and Path("measured/report.html").is_file()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_what_a_narrowed_checkpoint_saves_is_measured(own_folder: Path) -> None:
    cut = ["--trainer.callbacks+=ChannelPruning", "--trainer.callbacks.channels=0.5", "--trainer.callbacks.round_to=1"]
    save = [
        "--trainer.callbacks+=ModelCheckpoint",
        "--trainer.callbacks.dirpath=saved",
        "--trainer.callbacks.filename=cut",
    ]
    main(["fit", "--model=tests.support.modules.Classifier", *RUN, "--trainer.enable_checkpointing=true", *cut, *save])
    config = ["--model=tests.support.modules.Classifier", *RUN, "--ckpt_path=saved/cut.ckpt"]
    entry(["report", *config, "--directory=by-test"])
    own = ["--trainer.callbacks+=CompressionReport", "--trainer.callbacks.directory=by-validation"]
    entry(["report", *config, *own, "--stage=validate"])
    for folder, metric in (("by-test", "test_loss"), ("by-validation", "val_loss")):
        before, after = json.loads(Path(folder, "report.json").read_text())["rows"]
        assert before["measurement"]["parameters"] > after["measurement"]["parameters"]
        assert metric in after["metrics"] and metric not in before["metrics"]  # of weights that nobody has trained


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["--ckpt_path=no.ckpt"],
            "`ckpt_path` must be a file, or one of best, last, hpc. Received: ckpt_path='no.ckpt'",
        ),
        (["--ckpt_path=cut.ckpt"], "`ckpt_path` must be a readable checkpoint"),
    ],
)
def test_a_checkpoint_that_cannot_be_measured(
    args: list[str], words: str, own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_folder / "cut.ckpt").write_bytes(b"PK")
    with pytest.raises(SystemExit) as stop:
        entry(["report", "--model=tests.support.modules.Classifier", *RUN, *args])
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lightning-compress: error: {words}")


def test_unknown_class(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--model=tests.support.modules.Clasifier", *RUN])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Clasifier" in error
    assert "--trainer.max_epochs" not in error


def test_only_the_subcommand_that_is_asked_for_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[CompressCLI] = []
    monkeypatch.setattr(CompressCLI, "_run_subcommand", lambda cli, name: built.append(cli))
    main(["test", "--model=tests.support.modules.Classifier", *RUN])
    parsers = built[0]._subcommand_parsers
    assert parsers.keys() == CompressCLI.subcommands().keys()
    assert [name for name, parser in parsers.items() if len(parser._actions) > 5] == ["test"]


@pytest.mark.parametrize("command", ["validate", "test"])
def test_sections_of_several_subcommands_in_a_file(
    command: str, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[CompressCLI] = []
    monkeypatch.setattr(CompressCLI, "_run_subcommand", lambda cli, name: built.append(cli))
    section = {"model": {"class_path": "tests.support.modules.Classifier"}}
    sections = {name: {**section, "verbose": name == "test"} for name in ("validate", "test")}
    (own_folder / "all.yaml").write_text(yaml.safe_dump(sections))
    main(["--config=all.yaml", command, *RUN])
    assert (built[0].subcommand, built[0].config[command].verbose) == (command, command == "test")


def test_print_config_is_a_config(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*args: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["fit", *args, "--print_config"])
        assert stop.value.code == 0
        return capsys.readouterr().out

    text = printed("--model=tests.support.modules.Classifier", *RUN, "--trainer.callbacks+=tests.test_cli.Seen")
    callbacks = yaml.safe_load(text)["trainer"]["callbacks"]
    assert callbacks == [{"class_path": "tests.test_cli.Seen", "init_args": {"share": 0.5}}]
    (own_folder / "config.yaml").write_text(text)
    assert printed("--config=config.yaml") == text


def program(*args: str, code: str = "") -> subprocess.CompletedProcess[str]:
    start = ["-c", code] if code else ["-m", "lightning_compress", *args]
    return subprocess.run([sys.executable, *start], cwd=ROOT, capture_output=True, text=True)


def test_help_is_there_before_torch_is() -> None:
    done = program(
        code="import sys, lightning_compress.__main__ as m; m.main(['-h']); sys.exit('torch' in sys.modules)"
    )
    assert (done.returncode, done.stdout) == (0, HELP)
    asked_nothing = program()
    assert (asked_nothing.returncode, asked_nothing.stdout, asked_nothing.stderr) == (2, "", HELP)


def test_help_names_every_callback() -> None:
    public = {name: getattr(lightning_compress, name) for name in lightning_compress.__all__}
    callbacks = [name for name, value in public.items() if isinstance(value, type) and issubclass(value, Callback)]
    assert len(callbacks) >= 7
    assert [name for name in callbacks if f"\n  {name} " not in HELP] == []


def test_what_help_shows_can_be_typed(own_folder: Path) -> None:
    config = textwrap.dedent("  trainer:\n" + HELP.partition("  trainer:\n")[2].partition("\n\n")[0])
    config = config.replace("my_project.MyModule", "tests.support.modules.Classifier")
    (own_folder / "config.yaml").write_text(config.replace("my_project.MyData", "tests.support.data.TinyData"))
    shown = [line.partition("   ")[0].split() for line in HELP.replace("  lightning-compress", "$").splitlines()]
    commands = [line[1:] for line in shown if line[:2] == ["$", "fit"]]
    assert len(commands) == 5
    for command in commands:
        runs = "--config" in command and "--print_config" not in command
        with pytest.raises(SystemExit) as stop:
            entry([*command, *(["--print_config"] if runs else [])])
        assert stop.value.code == 0
