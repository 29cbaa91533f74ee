"""Configurations with mistakes in them: each is one line and exit code 2, never a traceback, and nothing runs."""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_compress.cli import CompressCLI, main
from tests.contracts.rows import ROWS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of Lightning, about what it makes of the Trainer
CODE = {"class_path": "os.system", "init_args": {"command": "touch ran"}}
WRONG: list[Any] = [
    *(None, True, -1, 0, 1.5, math.inf, math.nan, 10**30, "", "foreign", "../x", "1:2", "é\n", [], {}, [1, 2]),
    *({"class_path": "torch.nn.Linear"}, CODE, ["a", None]),
]


def configuration(callbacks: list[Any]) -> dict[str, Any]:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return {
        "model": {"class_path": "tests.support.modules.Classifier"},
        "data": {"class_path": "tests.support.data.TinyData"},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "callbacks": callbacks, **quiet},
    }


def places(tree: Any, *place: Any) -> Iterator[tuple[Any, ...]]:
    if place:
        yield place
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, *place, key)


def at(tree: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        tree = tree[key]
    return tree


@st.composite
def mistaken(draw: st.DrawFn) -> dict[str, Any]:
    """A valid configuration in which one to three values are of another kind, missing, misnamed or misplaced."""
    config = configuration([copy.deepcopy(draw(st.sampled_from(ROWS)).yaml)])
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(list(places(config))))
        parent, key = at(config, place[:-1]), place[-1]
        match draw(st.sampled_from(["wrong", "wrong", "missing", "misnamed", "misplaced"])):
            case "wrong":
                parent[key] = copy.deepcopy(draw(st.sampled_from(WRONG)))
            case "missing":
                del parent[key]
            case "misnamed" if isinstance(parent, dict):
                parent[f"{key}x"] = parent.pop(key)
            case _:
                parent[key] = copy.deepcopy(at(config, draw(st.sampled_from(list(places(config))))))
    return config


def outcome(config: dict[str, Any], folder: Path) -> str:
    """What comes of a configuration: it is taken, or refused in a line."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            main(["fit", "--config=config.yaml"])
    except SystemExit as stop:
        [line] = [line for line in said.getvalue().splitlines() if not line.startswith("Seed set to")]
        assert stop.code == 2 and line.startswith("lightning-compress: error: "), line
        assert len(line) < 1500, line
        return "refused"
    finally:
        assert {path.name for path in folder.iterdir()} == {"config.yaml"}
    return "taken"


@pytest.mark.parametrize("examples", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_a_mistake_is_a_line(examples: int, own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompressCLI, "_run_subcommand", lambda cli, name: None)
    seen = Counter[str]()

    @settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
    )
    @given(config=mistaken())
    def fuzz(config: dict[str, Any]) -> None:
        seen[outcome(config, own_folder)] += 1

    fuzz()
    assert seen.total() >= examples and seen["refused"] > seen.total() / 2, seen
    assert outcome(configuration([row.yaml for row in ROWS[:1]]), own_folder) == "taken"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trainer": 1.5}, "`trainer` must hold arguments of the Trainer, by their names. Received: trainer=1.5."),
        (
            {"trainer": {"max_epochs": -7}},
            "`trainer` must hold arguments that Lightning accepts. Received: `max_epochs",
        ),
        ({"trainer": {"accelerator": "gpo"}}, "`trainer` must hold arguments that Lightning accepts. Received: You"),
        ({"trainer": {"callbacks": [0]}}, 'Parser key "trainer.callbacks": Not a valid subclass of Callback.'),
        ({"trainer": {"max_epoch": 1}}, "Subcommand 'fit' does not accept option 'trainer.max_epoch'."),
        ({"model": {"class_path": -1}}, 'Parser key "model": '),
        ({"model": "no.Such"}, 'Parser key "model": '),
        (
            {"trainer": {"callbacks": [{"class_path": "ScheduledPruning", "init_args": {"sparsty": 0.5}}]}},
            "Parser key \"trainer.callbacks\": Problem with given class_path 'lightning_compress.ScheduledPruning': "
            "Option 'sparsty' is not accepted.",
        ),
    ],
)
def test_what_a_line_says(
    change: dict[str, Any], words: str, own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_folder / "config.yaml").write_text(yaml.safe_dump({**configuration([]), **change}))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config=config.yaml"])
    *_, line = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith(f"lightning-compress: error: {words}")
