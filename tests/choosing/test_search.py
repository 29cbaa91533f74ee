"""The search: within its limits, and its YAML gives the figures that it promised."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from lightning_compress import GPTQ, Targets, WeightOnly, prune_, quantize, search
from lightning_compress.choosing.sensitivity import make_forms
from lightning_compress.errors import CompressionError
from tests.choosing.networks import batches, small

X = torch.cat(batches(4, 16))
WANTED = small()(X).argmax(1)
BITS: list[Any] = [WeightOnly(bits, group_size=4, symmetric=False) for bits in (8, 4, 2)]


@torch.no_grad()
def loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(20 * model(X), WANTED, reduction="none")


def found(**options: Any) -> Any:
    given = {"model": small(), "evaluate": loss, "batches": batches(), "mode": "min", "levels": BITS, **options}
    return search(**given)


def built(said: Any) -> Any:
    """What YAML says, as LightningCLI makes it."""
    if isinstance(said, dict) and "class_path" in said:
        kind = {"WeightOnly": WeightOnly, "GPTQ": GPTQ}[said["class_path"].rpartition(".")[2]]
        return kind(**said.get("init_args", {}))
    return said


def quantized(result: Any) -> nn.Module:
    said = yaml.safe_load(result.to_yaml())
    assert said["class_path"] == "lightning_compress.PostTrainingQuantization"
    settings = said["init_args"]
    overrides = {layer: built(scheme) for layer, scheme in settings.get("overrides", {}).items()}
    targets = Targets(**settings["targets"]) if "targets" in settings else None
    return quantize(small(), built(settings["scheme"]), batches(), overrides=overrides, targets=targets)


@pytest.mark.parametrize("budget", [0.6, 0.35, 0.25])
def test_within_a_budget_of_bytes_and_the_yaml_gives_the_same_loss(budget: float) -> None:
    result = found(budget=budget)
    assert result.chosen.fraction <= budget
    model = quantized(result)
    assert float(loss(model).mean()) == pytest.approx(result.metric + result.chosen.drop, rel=1e-3)
    tensors = {id(tensor): tensor for tensor in model.state_dict().values()}.values()
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) == result.chosen.cost


def test_mixed_bits_are_ahead_of_uniform_ones_of_the_same_bytes() -> None:
    forms, _ = make_forms(small(), batches(), "weights", BITS)
    uniform = dict.fromkeys(forms.layers, "int4 g4 asym")
    with forms.compressed(uniform) as model:
        four_bits = float(loss(model).mean())
    result = found(budget=forms.cost(uniform).size_bytes / forms.cost({}).size_bytes)
    assert result.chosen.choice["quiet"] == "int2 g4 asym"
    assert result.metric + result.chosen.drop < four_bits


def test_uniform_bits_are_taken_where_they_are_better() -> None:
    """A metric that breaks where some layers are far off and others not, which no score of single layers can say."""

    def breaks(model: nn.Module) -> Tensor:
        far = far_off(model)
        return loss(model) + 100.0 * (0 < far < 4)

    forms, _ = make_forms(small(), batches(), "weights", BITS)
    uniform = dict.fromkeys(forms.layers, "int4 g4 asym")
    budget = forms.cost(uniform).size_bytes / forms.cost({}).size_bytes
    result = found(evaluate=breaks, budget=budget)
    assert (result.chosen.label, dict(result.chosen.choice)) == ("int4 g4 asym", uniform)


def far_off(model: nn.Module) -> int:
    """How many layers have weights of two bits."""
    pairs = zip(model.modules(), small().modules(), strict=True)
    layers = [(layer, other) for layer, other in pairs if isinstance(layer, nn.Conv2d | nn.Linear)]
    return sum(not torch.allclose(layer.weight, other.weight, atol=0.03) for layer, other in layers)


def test_within_a_drop_it_is_as_small_as_anything_that_was_evaluated() -> None:
    result = found(max_drop=0.02)
    assert result.chosen.drop <= 0.02
    assert all(point.cost >= result.chosen.cost for point in result.points if point.drop <= 0.02)
    assert float(loss(quantized(result)).mean()) <= float(loss(small()).mean()) + 0.0201
    assert found(max_drop=10.0).chosen.choice == dict.fromkeys(("conv", "deep", "quiet", "head"), "int2 g4 asym")


def test_steps_are_taken_back_where_the_sum_of_scores_was_wrong() -> None:
    """The metric breaks as soon as two layers are far off, which no score of single layers can say."""

    def breaks(model: nn.Module) -> float:
        return float(loss(model).mean()) + 100.0 * (far_off(model) > 1)

    result = found(evaluate=breaks, max_drop=1.0)
    assert 0 < result.chosen.fraction < 1
    assert result.chosen.drop <= 1.0
    assert list(result.chosen.choice.values()).count("int2 g4 asym") <= 1
    assert max(point.drop for point in result.points) > 99


def test_zeros_by_yaml_are_those_that_were_evaluated() -> None:
    result = search(small(), loss, batches(), over="pruning", budget=0.3, mode="min")
    said = yaml.safe_load(result.to_yaml())
    assert said["class_path"] == "lightning_compress.ScheduledPruning"
    model = small()
    masks = prune_(model, method="l1_unstructured", **said["init_args"])
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert kept == result.chosen.cost
    assert kept <= 0.3 * sum(mask.numel() for mask in masks.values())
    assert float(loss(model).mean()) == pytest.approx(result.metric + result.chosen.drop, rel=1e-4)


def kept_energy(model: nn.Module) -> float:
    """The product over layers of the part of the squared weights that stays."""
    whole, product = small(), 1.0
    for layer in ("conv", "deep", "quiet", "head"):
        weight, before = (of.get_parameter(f"{layer}.weight").detach() for of in (model, whole))
        product *= float(weight.square().sum() / before.square().sum())
    return product


def test_zeros_for_a_fit_keep_more_of_each_layer_than_uniform_and_global_ones() -> None:
    by_search, uniform, ranked = small(), small(), small()
    result = search(small(), loss, batches(), over="pruning", budget=0.1, mode="min")
    prune_(by_search, method="l1_unstructured", **result.settings)
    prune_(uniform, 0.9, "l1_unstructured", "layer")
    prune_(ranked, 0.9, "l1_unstructured", "global")
    assert kept_energy(by_search) > 1.02 * max(kept_energy(uniform), kept_energy(ranked))


def test_zeros_within_a_drop_go_by_what_the_outputs_lose() -> None:
    result = search(small(), loss, batches(), over="pruning", max_drop=0.05, mode="min")
    assert result.chosen.drop <= 0.05
    assert float(result.chosen.choice["quiet"]) == max(map(float, result.chosen.choice.values()))


def test_int8_leaves_out_what_hurts() -> None:
    result = search(small(), loss, batches(), over="int8", budget=0.5, mode="min")
    said = yaml.safe_load(result.to_yaml())["init_args"]
    assert said["scheme"] == "int8_static"
    macs = {"conv": 36 * 8 * 9, "deep": 36 * 16 * 8 * 9, "quiet": 256, "head": 64}
    floats = sum(macs[layer] for layer in said["targets"]["exclude"])
    assert floats == result.chosen.cost
    assert floats <= 0.5 * sum(macs.values())


def test_channels_within_a_budget_of_macs() -> None:
    result = search(small(), loss, batches(), over="channels", budget=0.5, mode="min")
    said = yaml.safe_load(result.to_yaml())
    assert said["class_path"] == "lightning_compress.ChannelPruning"
    assert result.chosen.fraction <= 0.5
    assert set(said["init_args"]["overrides"]) == {"conv", "deep"}


def test_the_front_is_kept_printed_and_drawn(tmp_path: Path) -> None:
    result = found(budget=0.3)
    costs, drops = zip(*((point.cost, point.drop) for point in result.front), strict=True)
    assert list(costs) == sorted(costs)
    assert list(drops) == sorted(drops, reverse=True)
    for point in result.points:
        assert any(other.cost <= point.cost and other.drop <= point.drop for other in result.front)
    text = str(result)
    assert text.count("\n  *") == len(result.front)
    assert "chosen" in text
    assert result.plot(tmp_path / "front.png").stat().st_size > 5000
    saved = json.loads(result.save(tmp_path / "result.json").read_text())
    assert saved["chosen"]["choice"] == dict(result.chosen.choice)


def test_a_search_goes_on_where_it_was(tmp_path: Path) -> None:
    calls = []

    def counted(model: nn.Module) -> Tensor:
        calls.append(1)
        return loss(model)

    first = found(evaluate=counted, max_drop=0.02, path=tmp_path / "run.jsonl")
    calls.clear()
    second = found(evaluate=counted, max_drop=0.02, path=tmp_path / "run.jsonl")
    assert len(calls) == 1
    assert second.chosen == first.chosen


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "`budget` or `max_drop` must be given, exactly one"),
        ({"budget": 0.5, "max_drop": 0.1}, "`budget` or `max_drop` must be given, exactly one"),
        ({"budget": 4}, r"`budget` must lie in \(0, 1\)"),
        ({"max_drop": -0.1}, "`max_drop` must be at least 0"),
        ({"budget": 0.5, "over": "bits"}, "`over` must be one of int8, weights, pruning, channels"),
        ({"budget": 0.5, "cost": "size"}, "`cost` must be one of bytes, params, macs"),
        ({"budget": 0.01}, "`budget` must be within reach. Received: budget=0.01 of bytes, where the least is 0"),
        ({"max_drop": 0.0, "levels": BITS[2:]}, "`max_drop` must leave something to compress"),
        ({"budget": 0.5, "mode": "up"}, "`mode` must be 'max' or 'min'"),
    ],
)
def test_arguments_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(CompressionError, match=words):
        found(**options)


def test_the_page_shows_what_is_refused() -> None:
    page = (Path(__file__).parents[2] / "docs" / "choosing.md").read_text()
    for options in ({"budget": 0.5, "max_drop": 0.1}, {"budget": 0.01}, {"max_drop": 0.0, "levels": BITS[2:]}):
        with pytest.raises(CompressionError) as error:
            found(**options)
        assert re.sub(r"\d\S*", "*", str(error.value)) in re.sub(r"\d\S*", "*", page)
    flat = nn.Sequential(nn.Flatten()).eval()
    for options in ({"levels": ["int8_dynamic"]}, {"over": "pruning", "levels": [90.0]}, {"model": flat}):
        with pytest.raises(CompressionError) as error:
            found(**{"budget": 0.5, "levels": None, **options})
        assert str(error.value) in page
