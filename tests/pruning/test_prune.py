"""`prune_`, one event on any module, and `sparsity`, which counts."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from lightning_compress import CompressionError, Targets, prune_, sparsity
from lightning_compress.errors import NoEffectWarning
from tests.support.architectures import TiedLanguageModel
from tests.support.data import TinyData
from tests.support.modules import Classifier, float_leaves, quiet_trainer
from tests.support.oracles import assert_same_state, count_zeros, hooks, same_random_state, snapshot
from tests.support.zoo import ZOO, Row, row

UNSTRUCTURED = ["l1_unstructured", "random_unstructured"]

STRUCTURED = ["ln_structured", "random_structured"]

RULES = "tests.pruning.rules."


def stack(*shapes: tuple[int, ...], seed: int = 0) -> nn.Sequential:
    """Layers with weights of these shapes and no zero in them."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for shape in shapes:
        layer: nn.Module = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d}[len(shape)](
            1, 1, **({"kernel_size": 1} if len(shape) > 2 else {})
        )
        layer.weight = nn.Parameter(torch.randn(shape, generator=generator))
        layers.append(layer)
    return nn.Sequential(*layers)


def masked(masks: dict[str, Tensor]) -> list[int]:
    return [sum(not stays for stays in mask.flatten().tolist()) for mask in masks.values()]


shapes = st.lists(st.lists(st.integers(1, 8), min_size=2, max_size=4).map(tuple), min_size=1, max_size=4)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("method", [*UNSTRUCTURED, RULES + "LargestFirst"])
@given(shapes=shapes, sparsity=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_sparsity_is_exact_to_one_weight(
    method: str, scope: Any, shapes: list[tuple[int, ...]], sparsity: float, seed: int
) -> None:
    model = stack(*shapes, seed=seed)
    sizes = [layer.weight.numel() for layer in model]
    masks = prune_(model, sparsity, method, scope)
    if scope == "layer":
        assert masked(masks) == [round(sparsity * size) for size in sizes]
    else:
        assert sum(masked(masks)) == round(sparsity * sum(sizes))
    assert count_zeros(layer.weight for layer in model) == (sum(masked(masks)), sum(sizes))
    for layer, mask in zip(model, masks.values(), strict=True):
        assert torch.equal(layer.weight != 0, mask)


@pytest.mark.parametrize("method", STRUCTURED)
@given(shapes=shapes, sparsity=st.floats(0, 1, exclude_max=True), dim=st.sampled_from([0, 1, -1]))
@settings(max_examples=40)
def test_structured_takes_whole_units_the_nearest_number_and_never_a_whole_tensor(
    method: str, shapes: list[tuple[int, ...]], sparsity: float, dim: int
) -> None:
    model = stack(*shapes)
    for mask in prune_(model, sparsity, method, "layer", dim=dim).values():
        units = mask.movedim(dim, 0).flatten(1)
        alive = units.any(1)
        assert torch.equal(units, alive[:, None].expand_as(units))
        gone = len(alive) - int(alive.sum())
        assert gone == min(round(sparsity * len(alive)), len(alive) - 1)


@pytest.mark.parametrize("method", STRUCTURED)
@given(shapes=shapes, sparsity=st.floats(0, 1, exclude_max=True), norm=st.sampled_from([1.0, 2.0, float("inf")]))
@settings(max_examples=40)
def test_structured_global_comes_within_one_unit_and_leaves_each_tensor_one(
    method: str, shapes: list[tuple[int, ...]], sparsity: float, norm: float
) -> None:
    model = stack(*shapes)
    masks = prune_(model, sparsity, method, "global", norm=norm)
    unit_sizes = []
    for mask in masks.values():
        units = mask.flatten(1)
        assert torch.equal(units, units.any(1, keepdim=True).expand_as(units))
        assert units.any()
        unit_sizes.append(units.shape[1])
    total = sum(mask.numel() for mask in masks.values())
    most = total - sum(unit_sizes)  # one unit of each tensor stays
    goal = min(round(sparsity * total), most)
    assert abs(sum(masked(masks)) - goal) <= max(unit_sizes)


def test_structured_global_is_the_nearest_number_where_units_are_of_one_size() -> None:
    for tenths in range(10):
        model = stack((6, 10), (9, 10))
        masks = prune_(model, tenths / 10, "ln_structured", "global")
        assert sum(masked(masks)) in {10 * round(15 * tenths / 10 - 1e-9), 10 * round(15 * tenths / 10 + 1e-9)}


# torch.nn.utils.prune as an oracle, where one event of both is the same thing.


@given(shapes=shapes, sparsity=st.floats(0, 1, exclude_max=True))
@settings(max_examples=40)
def test_l1_global_equals_torch(shapes: list[tuple[int, ...]], sparsity: float) -> None:
    model, oracle = stack(*shapes), stack(*shapes)
    masks = prune_(model, sparsity, "l1_unstructured")
    amount = round(sparsity * sum(layer.weight.numel() for layer in oracle))
    if amount:
        prune.global_unstructured([(layer, "weight") for layer in oracle], prune.L1Unstructured, amount=amount)
    for name, layer, reference in zip(masks, model, oracle, strict=True):
        assert torch.equal(layer.weight, reference.weight)
        assert torch.equal(masks[name], getattr(reference, "weight_mask", torch.ones_like(layer.weight)).bool())


@given(shapes=shapes, sparsity=st.floats(0, 0.95))
@settings(max_examples=40)
def test_l1_layer_equals_torch(shapes: list[tuple[int, ...]], sparsity: float) -> None:
    model, oracle = stack(*shapes), stack(*shapes)
    prune_(model, sparsity, scope="layer")
    for layer, reference in zip(model, oracle, strict=True):
        prune.l1_unstructured(reference, "weight", amount=round(sparsity * reference.weight.numel()))
        assert torch.equal(layer.weight, reference.weight)


@pytest.mark.parametrize("norm", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_ln_structured_layer_equals_torch(norm: float, dim: int) -> None:
    model, oracle = stack((8, 6), (6, 4, 3), (4, 5, 3, 3)), stack((8, 6), (6, 4, 3), (4, 5, 3, 3))
    prune_(model, 0.4, "ln_structured", "layer", dim=dim, norm=norm)
    for layer, reference in zip(model, oracle, strict=True):
        prune.ln_structured(reference, "weight", amount=round(0.4 * reference.weight.shape[dim]), n=norm, dim=dim)
        assert torch.equal(layer.weight, reference.weight)


@pytest.mark.parametrize("method", ["random_unstructured", "random_structured"])
def test_random_equals_torch_under_the_same_seed(method: str) -> None:
    model, oracle = stack((12, 9)), stack((12, 9))
    masks = prune_(model, 0.5, method, "layer", seed=7)
    torch.manual_seed(7)
    if method == "random_unstructured":
        prune.random_unstructured(oracle[0], "weight", amount=54)
    else:
        prune.random_structured(oracle[0], "weight", amount=6, dim=0)
    assert torch.equal(masks["0.weight"], oracle[0].weight_mask.bool())


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("method", ["random_unstructured", "random_structured"])
def test_random_depends_on_its_seed_alone(method: str, scope: Any) -> None:
    def draw(seed: int) -> dict[str, Tensor]:
        torch.rand(3)  # the global state is another each time
        return prune_(stack((16, 8), (16, 8)), 0.5, method, scope, seed=seed)

    with_three = draw(3)
    assert_same_state(with_three, draw(3))
    assert any(not torch.equal(mask, draw(4)[name]) for name, mask in with_three.items())
    first, second = with_three.values()
    assert not torch.equal(first, second)


def test_custom_from_mask_applies_the_masks() -> None:
    model, oracle = stack((3, 4), (4, 3)), stack((3, 4), (4, 3))
    mask = torch.arange(12).view(3, 4) % 3 != 0
    masks = prune_(model, method="custom_from_mask", masks={"0.weight": mask})
    prune.custom_from_mask(oracle[0], "weight", mask)
    assert torch.equal(model[0].weight, oracle[0].weight)
    assert torch.equal(model[1].weight, oracle[1].weight)
    assert torch.equal(masks["0.weight"], mask) and masks["1.weight"].all()


def test_a_rule_of_the_users_that_fixes_its_sparsity() -> None:
    model = stack((4, 4))
    masks = prune_(model, method=RULES + "EveryOther")
    assert masks["0.weight"].flatten().tolist() == [False, True] * 8


def test_a_structured_rule_of_the_users() -> None:
    masks = prune_(stack((4, 6)), 0.5, RULES + "LastRows", "layer", dim=1)
    assert masks["0.weight"].tolist() == [[True, True, True, False, False, False]] * 4


def test_a_rule_of_torch_by_its_import_path() -> None:
    a, b = stack((8, 8)), stack((8, 8))
    assert_same_state(prune_(a, 0.5, "torch.nn.utils.prune.L1Unstructured"), prune_(b, 0.5, "l1_unstructured"))
    assert torch.equal(a[0].weight, b[0].weight)


@pytest.mark.parametrize("method", [*UNSTRUCTURED, *STRUCTURED, RULES + "Noisy"])
def test_the_global_generators_stay(method: str) -> None:
    model = stack((8, 8), (8, 8))
    with same_random_state():
        prune_(model, 0.5, method, "layer")
        if RULES not in method:
            prune_(model, 0.7, method, "global")


def test_what_was_pruned_stays_so_and_is_no_candidate_again() -> None:
    # T15: a second event takes new units.
    model = stack((10, 4))
    first = prune_(model, 0.3, "ln_structured", "layer")
    second = prune_(model, 0.6, "ln_structured", "layer", masks=first)
    assert masked(first) == [12] and masked(second) == [24]
    assert not (second["0.weight"] & ~first["0.weight"]).any()


def test_sparsity_is_of_the_original_weights_and_does_not_compound() -> None:
    # W1.
    model, masks = stack((10, 10)), None
    for _ in range(3):
        masks = prune_(model, 0.5, masks=masks)
    assert masked(masks or {}) == [50]


@pytest.mark.parametrize("row", ZOO, ids=str)
def test_over_the_zoo_weights_are_zero_and_keys_order_and_all_else_stay(row: Row) -> None:
    # P3, N6, N9.
    model = row.build()
    before, order = snapshot(model), list(model.state_dict())
    identities = [id(parameter) for parameter in model.parameters()]
    masks = prune_(model, 0.75, "magnitude")  # by which no row goes whole: a weight norm would lose its magnitude
    assert list(model.state_dict()) == order
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert hooks(model) == hooks(row.build())
    targeted = [model.get_parameter(name) for name in masks]
    zeros, total = count_zeros(targeted)
    assert zeros == sum(masked(masks)) == round(0.75 * total)
    after = snapshot(model)
    expected = dict(before)
    for name, mask in masks.items():
        for key in before:
            if before[key].shape == mask.shape and torch.equal(before[key], before[name]):
                expected[key] = torch.where(mask, before[key], 0.0)
    assert_same_state(expected, after)
    args, kwargs = row.inputs()
    assert all(leaf.isfinite().all() for leaf in float_leaves(model.eval()(*args, **kwargs)))
    sum(leaf.sum() for leaf in float_leaves(model.train()(*args, **kwargs))).backward()
    copy.deepcopy(model)  # T1


@pytest.mark.filterwarnings(
    "ignore:prune_. pruned units may still put out a constant. those of `head.weight`:UserWarning"
)
@pytest.mark.parametrize("row", ZOO, ids=str)
def test_over_the_zoo_structured(row: Row) -> None:
    model = row.build()
    args, kwargs = row.inputs()
    prune_(model, 0.5, "ln_structured", "layer", inputs={"a": args[0], **kwargs} if kwargs else args)
    outputs = list(float_leaves(model.eval()(*args, **kwargs)))
    assert all(leaf.isfinite().all() for leaf in outputs)
    sum(leaf.sum() for leaf in float_leaves(model.train()(*args, **kwargs))).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_weight_norm_zeroes_the_effective_weight() -> None:
    model = row("weight_norm").build()
    [mask, _] = prune_(model, 0.5, scope="layer").values()
    assert torch.equal(model[0].weight != 0, mask)


def test_half_precision_is_exact_too() -> None:
    model = stack((40, 40)).to(torch.bfloat16)
    assert masked(prune_(model, 0.9)) == [1440]
    assert count_zeros([model[0].weight])[0] == 1440


def test_ties_are_broken_and_the_count_stays_exact() -> None:
    model = stack((10, 10))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    assert masked(prune_(model, 0.37)) == [37]


def test_masks_hold_no_graph_and_are_not_in_the_model() -> None:
    model = stack((4, 4))
    masks = prune_(model, 0.5)
    assert not any(mask.requires_grad for mask in masks.values())
    assert not any(tensor.dtype == torch.bool for tensor in itertools.chain(model.parameters(), model.buffers()))


def test_p19_a_lightning_module_attached_or_not() -> None:
    module = Classifier()
    first = prune_(module, 0.5)
    quiet_trainer(max_epochs=1).fit(module, TinyData())
    second = prune_(module, 0.5, "ln_structured", targets=Targets(exclude=["head"]), inputs=torch.zeros(2, 16))
    assert sum(masked(first)) == 320
    rows = second["body.weight"].any(1)
    assert torch.equal(module.norm.weight != 0, rows) and torch.equal(module.body.bias != 0, rows)


def test_pruning_under_a_targets_object() -> None:
    model = row("mlp").build()
    before = snapshot(model)
    assert set(prune_(model, 0.5, targets=Targets(exclude=["4"]))) == {"0.weight", "2.weight"}
    assert torch.equal(model[4].weight, before["4.weight"])


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "above 1": ({"sparsity": 1.5}, r"`sparsity` must lie in \[0, 1\)\. Received: sparsity=1\.5"),
    "1": ({"sparsity": 1.0}, "`sparsity` must lie"),
    "below 0": ({"sparsity": -0.2}, "`sparsity` must lie"),
    "nan": ({"sparsity": float("nan")}, "`sparsity` must lie"),
    "none": ({}, "`sparsity` must be given for method='lamp'"),
    "method": ({"sparsity": 0.5, "method": "l2"}, "`method` must be a pruning rule"),
    "scope": ({"sparsity": 0.5, "scope": "local"}, "`scope` must be 'global' or 'layer'"),
    "dim": ({"sparsity": 0.5, "method": "ln_structured", "dim": 2}, "`dim` must be a dimension of every target"),
    "negative dim": ({"sparsity": 0.5, "method": "ln_structured", "dim": -3}, "`dim` must be a dimension"),
    "pattern": ({"sparsity": 0.5, "targets": Targets(include=["nope"])}, "'nope' must match a module"),
    "no masks": ({"method": "custom_from_mask"}, "`masks` must be given for method='custom_from_mask'"),
    "both": (
        {"method": "custom_from_mask", "sparsity": 0.5, "masks": {}},
        "`sparsity` must be left out: method='custom_from_mask' fixes it itself",
    ),
    "wrong mask": (
        {"method": "custom_from_mask", "masks": {"0.weight": torch.ones(2, 2)}},
        r"weight's shape \(32, 16\)",
    ),
    "fixed by the rule": ({"sparsity": 0.5, "method": RULES + "EveryOther"}, "`sparsity` must be left out"),
    "no type": ({"sparsity": 0.5, "method": RULES + "Nameless"}, "must set PRUNING_TYPE"),
    "units of the user's, globally": ({"sparsity": 0.5, "method": RULES + "LastRows"}, "`scope` must be 'layer'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_change_nothing(name: str) -> None:
    arguments, message = ERRORS[name]
    model = row("mlp").build()
    before = snapshot(model)
    with same_random_state(), pytest.raises(CompressionError, match=message):
        prune_(model, **arguments)
    assert_same_state(before, model)
    assert hooks(model) == []


def test_a_rule_that_fails_in_the_middle_changes_nothing() -> None:
    model = row("mlp").build()
    before = snapshot(model)
    with same_random_state(), pytest.raises(RuntimeError, match="a rule of the user's fails"):
        prune_(model, 0.5, RULES + "Fails", "layer")
    assert_same_state(before, model)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.shift = nn.Parameter(torch.randn(3, 8, 4)), nn.Parameter(torch.randn(3, 8))


def test_stacks_of_experts_share_the_budget_and_have_overrides_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(4, 24), Experts())
    with pytest.warns(NoEffectWarning, match=r"^prune_: `targets` names.*`1\.shift`: it may be a bias"):
        masks = prune_(model, 0.5, targets=Targets(types=[nn.Linear, Experts]), overrides={"1.up": 0.75})
    assert {name: int((~mask).sum()) for name, mask in masks.items()} == {"0.weight": 24, "1.up": 72}
    assert sparsity(model, Targets(include=["1.up"])) == 0.75


def test_n_m_leaves_stacks_out_whose_inputs_are_not_known() -> None:
    with pytest.raises(CompressionError, match=r"`n_m` must have layers.*1\.up: which dimension.*are its inputs"):
        prune_(nn.Sequential(nn.ReLU(), Experts()), targets=Targets(include=["1.up"]), n_m="2:4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.5, "method": "ln_structured"}, r"must select weights of two dimensions.*Received: 0\.bias"),
        ({"n_m": "2:4"}, r"`n_m` must have layers.*0\.bias: it has no inputs"),
    ],
)
def test_a_bias_that_is_named_has_neither_units_nor_groups(arguments: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    before = snapshot(model)
    with pytest.raises(CompressionError, match=message):
        prune_(model, targets=Targets(include=["0.bias"]), **arguments)
    assert_same_state(before, model)


@pytest.mark.parametrize("seed", range(5))
def test_sparsity_is_what_counting_finds(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5), nn.LSTM(5, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand(parameter.shape, generator=generator) < 0.6)
    weights = [model[0].weight, model[3].weight, model[4].weight_ih_l0, model[4].weight_hh_l0]
    zeros, total = count_zeros(weights)
    assert zeros and sparsity(model) == zeros / total
    assert sparsity(model, Targets(include=["3"])) == count_zeros([model[3].weight])[0] / 80


def test_p3_biases_and_zeros_elsewhere_do_not_count() -> None:
    # P3, PL#13595.
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False))
    assert sparsity(model) == 0.0  # BatchNorm's shifts are all zero.
    with torch.no_grad():
        model[0].bias.zero_()
        model[2].weight[0].zero_()
    assert sparsity(model) == 4 / 32


def test_p3_n9_tied_weights_count_once() -> None:
    model = TiedLanguageModel()
    targets = Targets(types=[nn.Linear, nn.Embedding])
    tied = [p for p in model.parameters() if p.dim() == 2]
    assert len(tied) < len([m for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))])
    with torch.no_grad():
        for parameter in tied:
            parameter[0].zero_()
    zeros, total = count_zeros(tied)
    assert sparsity(model, targets) == zeros / total


@pytest.mark.parametrize("dim", [0, 1, None])
def test_with_weight_norm_zeros_of_the_weight_itself_count(dim: Any) -> None:
    layer = weight_norm(nn.Linear(6, 4), dim=dim)
    with torch.no_grad():
        layer.parametrizations.weight.original1[0, :3].zero_()
        if dim == 0:
            layer.parametrizations.weight.original0[2].zero_()
    weight = layer.weight.detach()
    expected = sum(value == 0 for value in weight.flatten().tolist()) / 24
    assert sparsity(nn.Sequential(layer)) == expected == (9 if dim == 0 else 3) / 24
