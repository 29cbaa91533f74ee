"""`lightning-compress sensitivity` and `search`: from a configuration and a checkpoint to YAML that a test takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_compress import SensitivityTable
from lightning_compress.choosing.speed import Speed
from lightning_compress.cli import main


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration, and a checkpoint of a float model that was trained by it."""
    folder = tmp_path_factory.mktemp("plain")
    save = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": str(folder / "saved"), "filename": "best"},
    }
    trainer = {
        "callbacks": [save],
        **dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False),
        **{"max_epochs": 2, "accelerator": "cpu", "default_root_dir": str(folder)},
    }
    classes = {"model": "tests.support.modules.Classifier", "data": "tests.support.data.TinyData"}
    config = {**{name: {"class_path": path} for name, path in classes.items()}, "trainer": trainer}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", f"--config={folder / 'config.yaml'}"])
    return folder


def choose(folder: Path, command: str, *args: str) -> None:
    paths = [f"--config={folder / 'config.yaml'}", f"--ckpt_path={folder / 'saved' / 'best.ckpt'}"]
    main([command, *paths, *args])


def test_sensitivity_of_a_checkpoint(plain: Path, own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--monitor=val_loss", "--mode=min", "--of=weights", "--top=1", "--output=out/table.json")
    choose(plain, "sensitivity", *args, "--resume=run.jsonl")
    out = capsys.readouterr().out
    assert "sensitivity of weights: metric" in out
    table = SensitivityTable.load("out/table.json")
    assert {row.layer for row in table.rows} == {"body", "head"}
    printed = out.partition("# layers that alone")[2].partition("\n")[2]
    assert yaml.safe_load(printed) == yaml.safe_load(table.to_yaml(0.01))
    assert len(Path("run.jsonl").read_text().splitlines()) == 2


def test_search_of_a_checkpoint(plain: Path, own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    levels = "--levels=[int8_weight_only,{class_path: WeightOnly, init_args: {bits: 3, group_size: 8}}]"
    choose(plain, "search", "--monitor=val_loss", "--mode=min", "--budget=0.5", levels, "--output=front.png")
    out = capsys.readouterr().out
    said = yaml.safe_load(out[out.index("class_path:") :])
    assert said["class_path"] == "lightning_compress.PostTrainingQuantization"
    assert Path("front.png").stat().st_size > 5000
    config = yaml.safe_load((plain / "config.yaml").read_text())
    config["trainer"]["callbacks"].append(said)
    Path("with.yaml").write_text(yaml.safe_dump(config))
    main(["test", "--config=with.yaml", f"--ckpt_path={plain / 'saved' / 'best.ckpt'}"])
    assert "test_loss" in capsys.readouterr().out


def test_search_by_time(
    plain: Path, own_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Speed, "beside", lambda *_: Speed(2.0, 1.9, 2.1))
    args = ("--monitor=val_loss", "--mode=min", "--over=int8", "--cost=latency", "--max_drop=10", "--resume=run.jsonl")
    choose(plain, "search", *args)
    out = capsys.readouterr().out
    assert out.startswith("search over int8: latency ")
    assert "(0.500, quartiles 0.476 to 0.526)" in out
    assert yaml.safe_load(out[out.index("class_path:") :])["init_args"]["scheme"] == "int8_static"


def test_fractions_as_levels(plain: Path, own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choose(
        plain, "sensitivity", "--monitor=val_loss", "--of=pruning", "--levels=[0.25,0.5]", "--output=t.csv", "--top=0"
    )
    rows = Path("t.csv").read_text().splitlines()[1:]
    assert sorted(row.split(",")[:2] for row in rows) == [
        [layer, level] for layer in ("body", "head") for level in ("0.25", "0.5")
    ]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["sensitivity", "--monitor=val_los"],
            "`monitor` must be a metric that validation logs. Received: monitor='val_los'",
        ),
        (["sensitivity", "--monitor=val_loss", "--output=table.xls"], "`output` must end in .json, .csv"),
        (["sensitivity", "--monitor=val_loss", "--ckpt_path=no.ckpt"], "`path` must be a readable checkpoint"),
        (["search", "--monitor=val_loss"], "`budget` or `max_drop` must be given"),
        (["search", "--monitor=val_loss", "--budget=0.001"], "`budget` must be within reach"),
        (["search", "--monitor=val_loss", "--budget=0.5", "--over=pruning", "--cost=latency"], "`cost` must be one of"),
        (["search", "--monitor=val_loss", "--budget=0.5", "--levels=[int8_dynamic]"], "`levels` must be schemes for"),
    ],
)
def test_a_choice_that_cannot_be(
    plain: Path, args: list[str], words: str, own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        choose(plain, *args)
    assert stop.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lightning-compress: error: {words}")
    assert list(own_folder.iterdir()) == []


def test_advice_on_a_checkpoint(plain: Path, own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choose(plain, "advise", "--monitor=val_loss", "--mode=min")
    out = capsys.readouterr().out
    assert out.startswith("Classifier: ")
    assert "int8_static" in out and "channels" in out
    assert "where its time goes: " in out
    if "# for trainer.callbacks" not in out:
        assert "try first: nothing of this" in out
        return
    config = yaml.safe_load((plain / "config.yaml").read_text())
    said = yaml.safe_load(out.partition("# for trainer.callbacks")[2])
    config["trainer"] |= {"callbacks": [said], "enable_checkpointing": False}
    Path("with.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config=with.yaml"])
