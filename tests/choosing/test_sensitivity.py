"""The table: what it says, what it evaluates, and that it goes on where it was interrupted."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from lightning_compress import SensitivityTable, Targets, WeightOnly, quantize, sensitivity
from lightning_compress.choosing.evaluations import rank_correlation
from lightning_compress.choosing.sensitivity import worst_first
from lightning_compress.errors import CompressionError
from tests.choosing.networks import batches, small

X = torch.cat(batches(4, 16))
WANTED = small()(X).argmax(1)


@torch.no_grad()
def loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(20 * model(X), WANTED, reduction="none")


def levels() -> list[Any]:
    return [WeightOnly(8, group_size=4), WeightOnly(2, group_size=4)]


def table(**options: Any) -> SensitivityTable:
    return sensitivity(small(), options.pop("evaluate", loss), batches(), "weights", levels(), mode="min", **options)


def test_drops_are_those_of_quantized_models_and_paired_by_sample() -> None:
    found = table(method="measured")
    before = loss(small())
    assert found.metric == pytest.approx(float(before.mean()))
    assert {(row.layer, row.level) for row in found.rows} == {
        (layer, level) for layer in ("conv", "deep", "quiet", "head") for level in found.levels
    }
    row = next(row for row in found.rows if (row.layer, row.level) == ("head", "int2 g4"))
    alone = quantize(small(), WeightOnly(2, group_size=4), batches(), targets=Targets(include=["head"]))
    rise = (loss(alone) - before).detach().double()
    assert row.drop == pytest.approx(float(rise.mean()), rel=1e-3)
    assert row.drop_error == pytest.approx(float(rise.std()) / len(rise) ** 0.5, rel=1e-3)
    drops = [row.drop for row in found.rows if row.drop is not None]
    assert drops == sorted(drops, reverse=True)
    assert len(drops) == 8


def test_taylor_evaluates_the_worst_layers_alone() -> None:
    calls = []

    def counted(model: nn.Module) -> Tensor:
        calls.append(model)
        return loss(model)

    found = table(evaluate=counted, top=2)
    evaluated = [row for row in found.rows if row.drop is not None]
    assert len(calls) == 3
    assert len(evaluated) == 2
    assert {row.level for row in evaluated} == {"int2 g4"}
    scores = {row.layer: row.score for row in found.rows if row.level == "int2 g4"}
    assert {row.layer for row in evaluated} == set(sorted(scores, key=lambda layer: -(scores[layer] or 0))[:2])
    assert "evaluated: 2 of 8 rows" in str(found)


def test_int8_has_its_parts_first_and_each_layer_left_out() -> None:
    found = sensitivity(small(), loss, batches(), "int8", mode="min", top=4)
    lines = str(found).splitlines()
    assert lines[1] == "all layers together:"
    assert [line.split("  ")[1] for line in lines[2:5]] == [
        "weights alone",
        "activations alone",
        "weights and activations",
    ]
    assert all(row.drop_left_out is not None and row.drop is not None for row in found.rows)
    assert yaml.safe_load(found.to_yaml(math.inf)) == {"scheme": "int8_static"}
    assert list(worst_first(small(), batches())) == sorted(
        (row.layer for row in found.rows), key=lambda layer: -next(r.score or 0 for r in found.rows if r.layer == layer)
    )


def test_a_metric_without_samples_has_no_error_and_says_so() -> None:
    found = table(evaluate=lambda model: float(loss(model).mean()), method="measured")
    assert all(row.drop_error is None for row in found.rows)
    assert "drops have no standard error" in str(found)


def test_a_metric_that_becomes_nan_falls_without_end() -> None:
    calls = iter([0.5, *[math.nan] * 99])
    found = table(evaluate=lambda _: next(calls), top=1)
    assert found.rows[0].drop == math.inf


class Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    path, whole = tmp_path / "deep" / "run.jsonl", table(method="measured")
    calls = 0

    def stops(model: nn.Module) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Interrupted
        return loss(model)

    with pytest.raises(Interrupted):
        table(evaluate=stops, method="measured", path=path)
    assert len(path.read_text().splitlines()) == 1 + 3
    path.write_text(path.read_text() + '{"layer": "he')  # it was being written
    calls = 10
    resumed = table(evaluate=stops, method="measured", path=path)
    assert calls == 10 + 1 + 8 - 3
    for row, other in zip(resumed.rows, whole.rows, strict=True):
        assert (row.layer, row.level, row.score) == (other.layer, other.level, other.score)
        assert row.drop == pytest.approx(other.drop, abs=1e-9)
        assert row.error == pytest.approx(other.error, rel=1e-6)
    assert [json.loads(line) for line in path.read_text().splitlines()]
    calls = 20
    table(evaluate=stops, method="measured", path=path)
    assert calls == 21


@pytest.mark.parametrize(
    ("options", "another"),
    [
        ({"evaluate": lambda model: 2 * loss(model)}, "another metric"),
        ({"of": "int8", "levels": None}, "another of, another levels"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).eval()}, "another model, another metric"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, options: dict[str, Any], another: str) -> None:
    path = tmp_path / "run.jsonl"
    table(top=1, path=path)
    before = path.read_text()
    given = {"model": small(), "evaluate": loss, "of": "weights", "levels": levels(), **options}
    with pytest.raises(CompressionError, match=f"`path` must hold .* with {another}") as error:
        sensitivity(batches=batches(), mode="min", path=path, **given)
    assert "Give another path, or delete the file" in str(error.value)
    assert path.read_text() == before


def test_a_file_of_something_else_altogether_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("a: 1\nb: 2\n")
    with pytest.raises(CompressionError, match="`path` must hold measurements of this model"):
        table(top=1, path=path)
    assert path.read_text() == "a: 1\nb: 2\n"


def test_saved_loaded_and_drawn(tmp_path: Path) -> None:
    found = table(method="measured")
    assert SensitivityTable.load(found.save(tmp_path / "table.json")) == found
    with found.save(tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == [row.layer for row in found.rows]
    assert [float(row["drop"]) for row in rows] == [row.drop for row in found.rows]
    assert found.plot(tmp_path / "table.png").stat().st_size > 5000
    assert table(top=0).plot(tmp_path / "scores.svg").exists()
    with pytest.raises(CompressionError, match=r"`path` must end in .json or .csv"):
        found.save(tmp_path / "table.txt")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(CompressionError, match="`path` must be a table that `save` wrote"):
        SensitivityTable.load(tmp_path / "other.json")


def test_the_yaml_has_each_layer_at_the_most_that_it_takes_alone() -> None:
    found = table(method="measured")
    drops = {(row.layer, row.level): row.drop or 0.0 for row in found.rows}
    limit = sorted(drops.values())[5]
    said = yaml.safe_load(found.to_yaml(limit))
    eight = {"class_path": "lightning_compress.WeightOnly", "init_args": {"group_size": 4}}
    two = {"class_path": "lightning_compress.WeightOnly", "init_args": {"bits": 2, "group_size": 4}}
    for layer in ("conv", "deep", "quiet", "head"):
        if drops[layer, "int2 g4"] <= limit:
            assert said["overrides"][layer] == two
        elif drops[layer, "int8 g4"] <= limit:
            assert said["overrides"][layer] == eight
        else:
            assert layer in said["targets"]["exclude"]
    assert said["scheme"] in (eight, two)
    nothing = yaml.safe_load(found.to_yaml(0.0)) or {}
    assert set(nothing.get("overrides", {})) == set(found.choice(0.0))
    with pytest.raises(CompressionError, match="`max_drop` must be at least 0"):
        found.to_yaml(-1.0)


def test_rows_that_were_not_evaluated_are_bounded_by_those_with_higher_scores() -> None:
    found = table(top=1)
    worst = found.rows[0]
    assert worst.drop is not None
    assert all(found.bound(row) == worst.drop for row in found.rows if (row.score or 0) < (worst.score or 0))
    assert set(found.choice(worst.drop)) == {"conv", "deep", "quiet", "head"}
    assert table(top=0).choice(1e9) == {}


def test_spearman_is_that_of_scipy() -> None:
    from scipy.stats import spearmanr

    generator = torch.Generator().manual_seed(0)
    first = torch.randint(6, (30,), generator=generator).double().tolist()
    second = torch.randint(6, (30,), generator=generator).double().tolist()
    assert rank_correlation(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert math.isnan(rank_correlation([1.0, 1.0], [1.0, 2.0]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"of": "int9"}, r"`of` must be one of int8, weights, pruning, channels. Received: of='int9'. Nearest: int8"),
        ({"method": "tailor"}, "`method` must be 'taylor' or 'measured'"),
        ({"mode": "best"}, "`mode` must be 'max' or 'min'"),
        ({"top": -1}, "`top` must be a whole number"),
        ({"batches": []}, "`batches` must give at least one batch"),
        ({"batches": X}, "`batches` must be batches"),
        ({"levels": "gptq"}, "`levels` must be a list"),
        ({"levels": []}, "`levels` must be a list"),
        ({"evaluate": lambda _: None}, "`evaluate` must return a number, or a tensor with one for each sample"),
        ({"evaluate": lambda _: torch.ones(2, 2)}, r"Received: a tensor of shape \(2, 2\)"),
        ({"model": nn.Sequential(nn.Flatten()).eval()}, "must have"),
    ],
)
def test_arguments_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(CompressionError, match=words):
        sensitivity(**{"model": small(), "evaluate": loss, "batches": batches(), "of": "weights", **options})


def test_a_layer_with_a_shared_weight_is_left_out_by_the_yaml() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).eval()
    model[4].weight = model[0].weight
    x = torch.randn(8, 6)
    found = sensitivity(model, lambda model: float(model(x).sum()), [x], "weights", levels(), method="measured")
    said = yaml.safe_load(found.to_yaml(math.inf))
    assert said["targets"] == {"exclude": ["0", "4"]}
    assert list(said["overrides"]) == ["2"]
