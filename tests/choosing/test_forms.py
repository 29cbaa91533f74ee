"""Layers alone in their compressed forms compute what the callbacks' own functions make of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import (
    GPTQ,
    StaticInt8,
    Targets,
    WeightOnly,
    plan_removal,
    prune_,
    quantize,
    remove_channels_,
    search,
)
from lightning_compress.choosing.channel_forms import ChannelForms
from lightning_compress.choosing.forms import Forms
from lightning_compress.choosing.int8_forms import LEVEL, Int8Forms
from lightning_compress.choosing.weight_forms import PruningForms, WeightForms
from lightning_compress.errors import CompressionError
from lightning_compress.modules.calls import way_without_trainer
from tests.choosing.networks import batches, small
from tests.support.oracles import assert_same_state, same_random_state

KINDS: dict[str, Callable[..., Forms]] = {
    "int8": Int8Forms,
    "weights": WeightForms,
    "pruning": PruningForms,
    "channels": ChannelForms,
}


def forms_of(kind: str, model: nn.Module, **options: Any) -> Any:
    return KINDS[kind](model, batches(), way_without_trainer(model), **options)


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(x)
    return y


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_compressed_is_the_model_and_all_is_put_back(kind: str) -> None:
    model, [x, *_] = small(), batches()
    before, expected = {name: value.clone() for name, value in model.state_dict().items()}, run(model, x)
    with same_random_state():
        forms = forms_of(kind, model)
        worst = {layer: levels[-1] for layer, levels in forms.layers.items()}
        with forms.compressed(worst) as compressed:
            assert not torch.allclose(run(compressed, x), expected, atol=1e-5)
        forms.taylor(batches(), 0)
    with forms.compressed({}) as whole:
        torch.testing.assert_close(run(whole, x), expected, rtol=1e-5, atol=1e-6)
        assert not any(module.training for module in whole.modules())
    assert_same_state(model.state_dict(), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_levels_that_leave_every_channel_are_none() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2), nn.ReLU(), nn.Linear(2, 3)).eval()
    assert forms_of("channels", model).layers == {"1": ("0.5", "0.25")}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.rnn(x.mean(1))[0][:, -1])
        return y


def test_what_no_kernel_computes_is_skipped_and_counts_as_float() -> None:
    torch.manual_seed(0)
    model = Recurrent().eval()
    forms = forms_of("int8", model)
    assert set(forms.layers) == {"head"}
    recurrent = 6 * 3 * 8 * (6 + 8)  # of six steps
    assert forms.cost({}).macs == recurrent + 8 * 4
    assert forms.cost({"head": LEVEL}).macs == recurrent
    assert set(forms_of("weights", model).skipped) == {"rnn"}
    with pytest.raises(CompressionError, match=r"`budget` must be within reach.* Stays as it is: rnn: "):
        search(model, lambda model: float(run(model, batches()[0]).sum()), batches(), budget=0.3)


def test_layers_that_a_choice_leaves_out_stay_whole_by_its_settings_too() -> None:
    model, settings = small(), forms_of("pruning", small()).settings({"deep": "0.5"})
    masks = prune_(model, method="l1_unstructured", **settings)
    assert {name for name, mask in masks.items() if not mask.all()} == {"deep.weight"}
    settings = forms_of("channels", small()).settings({"deep": "0.5"})
    plan = plan_removal(small(), batches()[0], **settings)
    remove_channels_(model := small(), plan)
    assert (model.conv.out_channels, model.deep.out_channels) == (8, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_what_fails_inside_is_put_back(kind: str) -> None:
    model, [x, *_] = small(), batches()
    forms = forms_of(kind, model)
    worst = {layer: levels[-1] for layer, levels in forms.layers.items()}
    with pytest.raises(KeyError), forms.compressed(worst):
        raise KeyError
    with forms.compressed({}) as whole:
        torch.testing.assert_close(run(whole, x), run(model, x), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Dequantized on this CPU")
@pytest.mark.parametrize("layers", [["conv"], ["deep", "head"], ["conv", "deep", "quiet", "head"]])
def test_int8_layers_alone_are_those_of_quantize(layers: list[str]) -> None:
    """Without equalization, which moves ranges between the layers that are quantized."""
    model, [x, *_], scheme = small(), batches(), StaticInt8(equalize=False, smooth=False)
    forms = forms_of("int8", model, levels=[scheme])
    assert set(forms.layers) == {"conv", "deep", "quiet", "head"}
    expected = run(quantize(model, scheme, batches(), targets=Targets(include=layers)), x)
    with forms.compressed(dict.fromkeys(layers, LEVEL)) as alone:
        got = run(alone, x)
    error = (expected - run(model, x)).square().sum()
    assert (got - expected).square().sum() < 0.01 * error


def test_weights_and_activations_alone_make_up_the_whole_of_int8() -> None:
    model, [x, *_] = small(), batches()
    forms, expected, errors = forms_of("int8", model), run(model, x), {}
    for name, form in forms.splits().items():
        with form as rounded:
            errors[name] = float((run(rounded, x) - expected).square().sum())
    assert list(errors) == ["weights alone", "activations alone", "weights and activations"]
    *parts, both = errors.values()
    assert all(part > 0 for part in parts)
    assert 0.5 * sum(parts) < both < 2 * sum(parts)
    with forms.rounded(forms.layers, ()) as rounded:
        weight = rounded.get_parameter("head.weight").detach()
        codes = (127 * weight / weight.abs().amax(1, keepdim=True)).round()
        torch.testing.assert_close(codes * weight.abs().amax(1, keepdim=True) / 127, weight)


@pytest.mark.parametrize("scheme", [WeightOnly(3, group_size=4), GPTQ(4, group_size=8), "nf4"])
def test_weights_in_few_bits_are_those_of_quantize(scheme: Any) -> None:
    model, [x, *_] = small(), batches()
    forms = forms_of("weights", model, levels=["int8_weight_only", scheme])
    choice = dict.fromkeys(("deep", "head"), forms.levels[1]) | {"conv": forms.levels[0]}
    overrides = {"deep": scheme, "head": scheme, "conv": "int8_weight_only"}
    small_model = quantize(model, scheme, batches(), overrides=overrides, targets=Targets(exclude=["quiet"]))
    with forms.compressed(choice) as compressed:
        torch.testing.assert_close(run(compressed, x), run(small_model, x), rtol=1e-4, atol=1e-5)


def test_attention_in_few_bits_is_that_of_quantize() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    inputs = [torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    forms = WeightForms(model, inputs, way_without_trainer(model), [WeightOnly(4, group_size=8)])
    assert "self_attn" in forms.layers
    only = quantize(model, WeightOnly(4, group_size=8), inputs, targets=Targets(include=["self_attn"]))
    with forms.compressed({"self_attn": forms.levels[0]}) as compressed:
        torch.testing.assert_close(run(compressed, inputs[0]), run(only, inputs[0]), rtol=1e-4, atol=1e-5)


def test_zeros_are_those_of_prune() -> None:
    model, [x, *_] = small(), batches()
    forms = forms_of("pruning", model)
    pruned = small()
    prune_(pruned, 0.5, "l1_unstructured", "layer", overrides={"deep": 0.9, "conv": 0.0, "quiet": 0.0})
    with forms.compressed({"deep": "0.9", "head": "0.5"}) as compressed:
        assert torch.equal(run(compressed, x), run(pruned, x))
    weights = [model.get_parameter(f"{layer}.weight").numel() for layer in ("conv", "deep", "quiet", "head")]
    cost = forms.cost({"deep": "0.9", "head": "0.5"})
    assert cost.parameters == sum(weights) - round(0.9 * weights[1]) - 0.5 * weights[3]


def test_channels_are_those_of_remove_channels() -> None:
    model, [x, *_] = small(), batches()
    forms = forms_of("channels", model)
    cut = small()
    shares = {"conv": 0.5, "deep": 0.75}
    plan = plan_removal(cut, channels=0.6, overrides=shares, round_to=1, min_layer_channels=0.0, calibration=batches())
    remove_channels_(cut, plan)
    choice = {layer: f"{share:g}" for layer, share in shares.items()}
    with forms.compressed(choice) as compressed:
        torch.testing.assert_close(run(compressed, x), run(cut, x))
    cost = forms.cost(choice)
    assert cost.parameters == sum(parameter.numel() for parameter in cut.parameters())
    assert cost.macs == plan.after.macs


def test_bytes_are_counted_on_the_quantized_model() -> None:
    model = small()
    forms = forms_of("weights", model, levels=[WeightOnly(4, group_size=8)])
    choice = dict.fromkeys(forms.layers, forms.levels[0])
    packed = quantize(model, WeightOnly(4, group_size=8), batches(), overrides={"head": WeightOnly(4, group_size=8)})
    tensors = {id(tensor): tensor for tensor in packed.state_dict().values()}.values()
    assert forms.cost(choice).size_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert forms.cost({}).size_bytes == sum(4 * parameter.numel() for parameter in model.parameters())


def test_multiply_accumulates_are_those_of_layers() -> None:
    forms = forms_of("weights", small())
    macs = {layer: fact.macs for layer, fact in forms.facts.items()}
    assert macs == {"conv": 36 * 8 * 9, "deep": 36 * 16 * 8 * 9, "quiet": 256, "head": 64}
    assert all(fact.latency_ms > 0 for fact in forms.facts.values())


def test_what_shares_its_weight_is_skipped() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)).eval()
    model[2].weight = model[0].weight
    forms = WeightForms(model, [torch.randn(4, 6)], way_without_trainer(model))
    assert set(forms.layers) == {"1"}
    assert forms.skipped == dict.fromkeys(("0", "2"), "its weight is shared with another layer")


@pytest.mark.parametrize(
    ("kind", "levels", "words"),
    [
        ("int8", ["int8_dynamic"], "`levels` must be one scheme of static int8"),
        ("int8", ["int8_static", "int8_static"], "`levels` must be one scheme of static int8"),
        ("weights", ["int8_dynamic"], "`levels` must be schemes for weights alone"),
        ("weights", ["int4_weight_onl"], "`scheme` must be the name of a scheme"),
        ("pruning", [0.5, 1.0], r"`levels` must be fractions in \(0, 1\)"),
        ("channels", [0.0], r"`levels` must be fractions in \(0, 1\)"),
    ],
)
def test_levels_that_cannot_be(kind: str, levels: list[Any], words: str) -> None:
    with pytest.raises(CompressionError, match=words):
        forms_of(kind, small(), levels=levels)
