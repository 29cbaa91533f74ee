"""Taylor scores against what really happens to the outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import sensitivity
from lightning_compress.choosing.evaluations import rank_correlation
from lightning_compress.choosing.gradients import layer_scores, sum_by_sample
from lightning_compress.choosing.int8_forms import Int8Forms
from lightning_compress.choosing.weight_forms import PruningForms, WeightForms
from lightning_compress.compensation.hold_out import relative_error
from lightning_compress.errors import CompressionError
from lightning_compress.modules.agreement import outputs_of
from lightning_compress.modules.calls import run_step, way_without_trainer
from tests.choosing.networks import batches, small


def test_on_a_linear_network_the_mean_over_random_products_is_the_squared_change_over_the_variance() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    x, new = torch.randn(64, 6), model[0].weight.detach() + 0.1 * torch.randn(8, 6)
    with torch.no_grad():
        y = model(x)
        change = (x @ (new - model[0].weight).T) @ model[1].weight.T
    wanted = float(change.square().sum() / y.std() ** 2 / y.numel())
    found = [
        layer_scores(model, run_step, [x], {"0": model[0]}, lambda _: [("new", [(model[0].weight, new)])], seed)
        for seed in range(60)
    ]
    scores = torch.tensor([scores["0", "new"] for scores in found])
    assert abs(scores.mean() - wanted) < 4 * scores.std() / len(scores) ** 0.5
    assert scores.std() < 0.5 * wanted


def test_calls_of_one_layer_add_up_before_they_are_squared() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) - self.layer(x.clone())  # whatever the layer is, nothing changes

    model, x = Twice(), torch.randn(8, 3)
    values = [(model.layer.weight, torch.zeros(3, 3))]
    once = nn.Sequential(model.layer)
    noise = layer_scores(once, run_step, [x], {"0": once[0]}, lambda _: [("zero", values)], 0)["0", "zero"]

    class Shifted(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    model.__class__ = Shifted
    scores = layer_scores(model, run_step, [x], {"layer": model.layer}, lambda _: [("zero", values)], 0)
    assert scores["layer", "zero"] < 1e-9 < noise


def test_a_layer_whose_output_is_changed_in_place() -> None:
    torch.manual_seed(0)
    plain, in_place = (
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=inplace), nn.Linear(8, 5)) for inplace in (False, True)
    )
    in_place.load_state_dict(plain.state_dict())
    x = torch.randn(16, 6)
    found = [
        layer_scores(
            model, run_step, [x], {"0": model[0]}, lambda _, m=model: [("z", [(m[0].weight, torch.zeros(8, 6))])]
        )
        for model in (plain, in_place)
    ]
    assert found[0] == found[1]
    assert found[0]["0", "z"] > 0


def test_sums_by_sample() -> None:
    product = torch.arange(12.0).view(4, 3)
    assert sum_by_sample(product, 2).tolist() == [15.0, 51.0]  # two rows belong to each sample
    assert sum_by_sample(product, 4).tolist() == [3.0, 12.0, 21.0, 30.0]
    assert sum_by_sample(product, 5).tolist() == [66.0]


@pytest.mark.parametrize("kind", [WeightForms, Int8Forms])
def test_scores_tell_a_layer_that_matters_from_one_that_does_not(kind: type[WeightForms]) -> None:
    forms = kind(small(), batches(), way_without_trainer(small()))
    scores = forms.taylor(batches(), 0)
    assert set(scores) == {(layer, level) for layer, levels in forms.layers.items() for level in levels}
    worst = {layer: max(score for (name, _), score in scores.items() if name == layer) for layer in forms.layers}
    assert worst["quiet"] < 1e-3 * min(worst[layer] for layer in ("conv", "deep", "head"))
    assert forms.taylor(batches(), 0) == scores


def test_frozen_layers_and_steps_without_gradients_have_scores() -> None:
    class NoGrad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small()

        @torch.no_grad()
        def calibration_step(self, batch: Tensor) -> Tensor:
            return self.net(batch)

    model = NoGrad().eval().requires_grad_(False)
    forms = WeightForms(model, batches(), way_without_trainer(model))
    assert all(score > 0 for score in forms.taylor(batches(), 0).values())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_outputs_without_gradients_are_an_error() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).detach()

    model = Detached().eval()
    forms = WeightForms(model, batches(), way_without_trainer(model))
    with pytest.raises(CompressionError, match="`batches` must give outputs that have gradients"):
        forms.taylor(batches(), 0)

    def metric(model: nn.Module) -> float:
        return float(model(batches()[0]).std())

    with pytest.raises(CompressionError, match="Use method='measured'"):
        sensitivity(model, metric, batches(), "weights")
    measured = sensitivity(model, metric, batches(), "weights", method="measured")
    assert all(row.score is None and row.drop is not None for row in measured.rows)


def test_recurrent_layers_and_attention_have_scores_that_rank_as_errors_do() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 12, 2, batch_first=True)
            self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
            self.head = nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            x, _ = self.lstm(x)
            x = x + self.attention(x, x, x)[0]
            return self.head(x.mean(1))

    torch.manual_seed(0)
    model = Sequence().eval()
    x = [torch.randn(32, 7, 6) for _ in range(4)]
    run = way_without_trainer(model)
    forms = PruningForms(model, x, run, [0.1, 0.3, 0.5])
    assert set(forms.layers) == {"lstm", "attention", "head"}
    [*_, out] = forms.values({"attention": "0.5"})
    assert out[0] is forms.model.get_parameter("attention.out_proj.weight")
    expected, scores, errors = outputs_of(model, x, run), forms.taylor(x, 0), {}
    for layer, level in scores:
        with forms.compressed({layer: level}) as pruned:
            errors[layer, level] = relative_error(expected, outputs_of(pruned, x, run))
    assert rank_correlation(list(scores.values()), list(errors.values())) > 0.8


def test_what_fails_on_the_way_leaves_gradients_and_modes_as_they_were() -> None:
    model = small().train()
    kept = []

    def changes(path: str) -> list[tuple[str, list[tuple[Tensor, Tensor]]]]:
        raise KeyError(path)

    with pytest.raises(KeyError) as error, torch.no_grad():
        layer_scores(model, run_step, batches(), {"head": model.head}, changes)
    kept.append(error)  # what the traceback holds is alive
    assert torch.is_grad_enabled()
    assert model.training
    assert not model.head._forward_hooks
