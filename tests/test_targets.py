from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import weight_norm

from lightning_compress import CompressionError, Targets
from lightning_compress.modules.paths import clean_name
from lightning_compress.targets import matches
from tests.support.modules import Classifier
from tests.support.oracles import assert_same_state, hooks, snapshot
from tests.support.zoo import ZOO, Row, row

# What each row of the zoo has of weights, written down by hand.
EXPECTED = {
    "mlp": ["0.weight", "2.weight", "4.weight"],
    "conv_bn_relu": ["0.weight", "3.weight", "8.weight"],
    "inplace_relu": ["0.weight", "3.weight", "8.weight"],
    "residual": ["stem.weight", "conv1.weight", "conv2.weight", "head.weight"],
    "depthwise": ["0.weight", "1.weight", "4.weight", "7.weight"],
    "grouped": ["0.weight", "2.weight", "5.weight"],
    "concat": ["left.weight", "right.weight", "head.weight"],
    "attention": ["theirs.in_proj_weight", "theirs.out_proj.weight", "qkv.weight", "proj.weight", "head.weight"],
    "transformer": [
        "0.self_attn.in_proj_weight",
        "0.self_attn.out_proj.weight",
        "0.linear1.weight",
        "0.linear2.weight",
        "1.weight",
    ],
    "lstm": [*(f"rnn.weight_{part}_l{layer}" for layer in (0, 1) for part in ("ih", "hh")), "head.weight"],
    "gru": [*(f"rnn.weight_{part}_l{layer}" for layer in (0, 1) for part in ("ih", "hh")), "head.weight"],
    "tied": ["body.weight"],
    "shared": ["first.weight", "head.weight"],
    "keyword_only": ["left.weight", "right.weight", "head.weight"],
    "dict": ["body.weight", "head.weight"],
    "functional_dropout": ["body.weight", "head.weight"],
    "auxiliary_head": ["body.weight", "head.weight", "auxiliary.weight"],
    "weight_norm": ["0.parametrizations.weight.original1", "2.weight"],
    "int_weight": ["0.weight", "2.weight", "4.weight"],
}


def names(model: nn.Module, targets: Targets | None = None) -> list[str]:
    return [target.name for target in (targets or Targets()).select(model).targets]


@pytest.mark.parametrize("row", ZOO, ids=str)
def test_default_selection(row: Row) -> None:
    # P4, P5, N10: layers without a bias, with an int for a weight, recurrent and attention layers.
    model = row.build()
    before = snapshot(model)
    selection = Targets().select(model)
    assert [target.name for target in selection.targets] == EXPECTED[row.name]
    assert all(target.parameter is model.get_parameter(target.name) for target in selection.targets)
    assert len({id(target.parameter) for target in selection.targets}) == len(selection.targets)
    assert selection.numel == sum(model.get_parameter(name).numel() for name in EXPECTED[row.name])
    assert_same_state(before, model)
    assert hooks(model) == hooks(row.build())


def test_norms_embeddings_biases_and_frozen_layers_are_left_out() -> None:
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(5, 4),
            "bag": nn.EmbeddingBag(5, 4),
            "norm": nn.LayerNorm([4, 4]),
            "group": nn.GroupNorm(2, 4),
            "batch": nn.BatchNorm2d(4),
            "prelu": nn.PReLU(4),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
            "linear": nn.Linear(4, 4),
        }
    )
    selection = Targets().select(model)
    assert [target.name for target in selection.targets] == ["linear.weight"]
    assert selection.skipped["frozen.weight"] == "frozen"
    assert "embedding" in selection.skipped["embedding.weight"]
    assert {"norm.weight", "linear.bias"}.isdisjoint(selection.skipped)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (Targets(include=["embedding"]), ["embedding.weight"]),
        (Targets(types=[nn.Embedding]), ["embedding.weight"]),
        (Targets(include=["*"]), ["linear.weight"]),
    ],
    ids=["by name", "by type", "not by a wildcard"],
)
def test_an_embedding_is_targeted_when_it_is_named(targets: Targets, expected: list[str]) -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "linear": nn.Linear(4, 4)})
    assert names(model, targets) == expected


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (Targets(include=["0.self_attn"]), ["0.self_attn.in_proj_weight", "0.self_attn.out_proj.weight"]),
        (Targets(include=["0"], exclude=["0.self_attn"]), ["0.linear1.weight", "0.linear2.weight"]),
        (Targets(include=["*.linear?"]), ["0.linear1.weight", "0.linear2.weight"]),
        (Targets(exclude=["0"]), ["1.weight"]),
        (Targets(types=[nn.MultiheadAttention]), ["0.self_attn.in_proj_weight"]),
        (Targets(include=["*"], exclude=["*.linear1", "1"], types=[nn.Linear]), None),
    ],
    ids=["container", "container without a part", "wildcard", "exclude a container", "types", "all three"],
)
def test_include_exclude_and_types(targets: Targets, expected: list[str] | None) -> None:
    found = names(row("transformer").build(), targets)
    assert found == (expected or ["0.self_attn.out_proj.weight", "0.linear2.weight"])


def test_patterns_meet_whole_path_parts() -> None:
    assert matches("backbone.conv1", "backbone") and matches("backbone.conv1", "backbone.*")
    assert not matches("backbone2.conv1", "backbone")
    assert not matches("Backbone", "backbone")


def test_tied_weights_are_targeted_once_and_only_if_all_owners_are() -> None:
    # N9: the embedding and the head are one tensor.
    model = row("tied").build()
    assert names(model, Targets(include=["lm_head", "embedding"])) == ["embedding.weight"]
    assert names(model, Targets(include=["lm_head", "body"])) == ["body.weight"]
    assert "embedding.weight" in Targets().select(model).skipped
    with pytest.raises(CompressionError, match="at least one trainable weight"):
        Targets(include=["lm_head"]).select(model)


def test_a_tensor_tied_to_one_that_is_no_weight_is_left_out() -> None:
    # A Parameter on the root, or in a layer of the user's own, owns it as well.
    model = nn.Module()
    model.linear = nn.Linear(4, 4)
    model.other = nn.Linear(4, 2)
    model.norm = nn.LayerNorm([4, 4])
    model.norm.weight = model.linear.weight
    assert names(model) == ["other.weight"]


def test_a_weight_that_the_root_owns_too_is_left_out() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.other = nn.Linear(4, 2)
            self.prototype = self.linear.weight

    assert names(Root()) == ["other.weight"]


def test_a_shared_module_is_targeted_by_either_name_only_if_both_match() -> None:
    model = row("shared").build()
    assert names(model, Targets(include=["first", "again"])) == ["first.weight"]


@pytest.mark.parametrize("norm", [weight_norm, old_weight_norm], ids=["parametrization", "hook"])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_weight_norm_targets_the_direction_and_not_the_magnitude(norm: object) -> None:
    model = nn.Sequential(norm(nn.Linear(4, 3)))  # type: ignore[operator]
    [target] = Targets().select(model).targets
    assert target.layer == "0"
    assert target.parameter.shape == (3, 4)
    assert model.get_parameter(target.name) is target.parameter


def test_include_reaches_a_weight_normed_layer_by_its_path() -> None:
    assert names(row("weight_norm").build(), Targets(include=["0"])) == ["0.parametrizations.weight.original1"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own import
def test_names_leave_out_what_compile_inserts() -> None:
    # P16.
    model = nn.ModuleDict({"net": torch.compile(row("mlp").build()), "head": nn.Linear(4, 4)})
    assert names(model) == ["net.0.weight", "net.2.weight", "net.4.weight", "head.weight"]
    assert names(model, Targets(include=["net.4"])) == ["net.4.weight"]
    assert clean_name("a._orig_mod.b._orig_mod.weight") == "a.b.weight"


def test_names_start_at_the_lightning_module() -> None:
    assert names(Classifier()) == ["body.weight", "head.weight"]


def test_lazy_layers_are_refused_until_they_have_run() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises(CompressionError, match=r"`0\.weight` must have its shape.*lazy.*forward pass"):
        Targets().select(model)
    model(torch.zeros(1, 3))
    assert names(model) == ["0.weight", "1.weight"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (Targets(include=["bdy"]), r"pattern 'bdy' must match a module.*Nearest: body\."),
        (Targets(exclude=["heda"]), r"pattern 'heda' must match a module.*Nearest: head\."),
        (Targets(include=["student.head"]), r"pattern 'student.head'.*Nearest: .*head"),
        (Targets(exclude=["*"]), r"`targets` must select at least one.*Left out: body\.weight \(excluded\)"),
        (
            Targets(include=["norm"]),
            r"`targets` must select at least one.*`norm`: it has no parameter of two dimensions",
        ),
        (Targets(types=[nn.Conv2d]), r"`targets` must select at least one.*Conv2d: the model has no such.* Linear"),
        (Targets(include=[]), r"`targets` must select at least one"),
    ],
    ids=["include typo", "exclude typo", "wrong prefix", "all excluded", "no weights there", "no such type", "none"],
)
def test_errors_name_what_is_near_and_change_nothing(targets: Targets, message: str) -> None:
    model = Classifier()
    before = snapshot(model)
    with pytest.raises(CompressionError, match=message):
        targets.select(model)
    assert_same_state(before, model)
    assert hooks(model) == []


@pytest.mark.parametrize("name", ["include", "exclude"])
def test_a_bare_string_is_refused_as_its_letters_would_be_patterns(name: str) -> None:
    with pytest.raises(CompressionError, match=rf"`{name}` must be a list of patterns.*{name}=\[\"...\"\]"):
        Targets(**{name: "body"})


class Experts(nn.Module):
    """One tensor for all experts, as in many mixtures of experts, with biases that no name tells."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(3, 8, 4)), nn.Parameter(torch.randn(3, 4, 8))
        self.w1_bias, self.shift = nn.Parameter(torch.zeros(3, 8)), nn.Parameter(torch.zeros(3, 4))
        self.scale, self.token = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(1, 1, 4))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(4, 4))
        self.many = nn.ParameterList([torch.randn(4, 4), torch.randn(4)])
        self.by_name = nn.ParameterDict({"a": torch.randn(2, 2)})


def mixture() -> nn.Module:
    return nn.ModuleDict(
        {
            "router": nn.Linear(4, 3),
            "experts": Experts(),
            "own": Own(),
            "block": nn.ModuleDict({"experts": Experts(), "out": nn.Linear(4, 4)}),
            "norm": nn.LayerNorm([4, 4]),
        }
    )


OWN = ["own.W", "own.many.0", "own.by_name.a"]
BLOCK = ["block.experts.w1", "block.experts.w2"]


@pytest.mark.parametrize(
    ("targets", "expected", "missed"),
    [
        (Targets(types=[Experts]), ["experts.w1", "experts.w2", *BLOCK], ["experts.shift", "block.experts.shift"]),
        (Targets(types=[Own, nn.Linear]), ["router.weight", *OWN, "block.out.weight"], []),
        (Targets(types=[nn.ParameterList]), ["own.many.0"], []),
        (Targets(types=[Own, nn.Conv2d, nn.LayerNorm], exclude=["norm"]), OWN, ["Conv2d", "LayerNorm"]),
        (Targets(include=["experts"]), ["experts.w1", "experts.w2"], ["experts.shift"]),
        (Targets(include=["*.experts"], exclude=["*.w2"]), ["block.experts.w1"], ["block.experts.shift"]),
        (Targets(include=["experts.w2", "router"]), ["router.weight", "experts.w2"], []),
        (Targets(include=["*.w1"]), ["experts.w1", "block.experts.w1"], []),
        (Targets(include=["own.many"]), ["own.many.0"], []),
        (Targets(include=["experts.scale"]), ["experts.scale"], []),
        (Targets(include=["experts.token", "experts.shift"]), ["experts.shift", "experts.token"], []),
        (Targets(include=["block"]), ["block.out.weight"], [*BLOCK, "block.experts.shift"]),
        (Targets(include=["router", "norm"]), ["router.weight"], ["norm"]),
        (Targets(include=["*"]), ["router.weight", "block.out.weight"], []),
        (Targets(), ["router.weight", "block.out.weight"], []),
    ],
    ids=str,
)
def test_parameters_of_any_name_in_layers_of_the_users_own(
    targets: Targets, expected: list[str], missed: list[str]
) -> None:
    selection = targets.select(mixture())
    assert [target.name for target in selection.targets] == expected
    assert [name.strip("`") for name in selection.missed] == missed
    assert all(name in selection.warning for name in missed)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (Targets(include=["experts.w3"]), r"pattern 'experts\.w3' must match.*Nearest: experts\.w\d"),
        (Targets(types=[nn.BatchNorm1d]), r"BatchNorm1d: the model has no such layer.*LayerNorm"),
        (Targets(types=[Own], exclude=["own"]), r"Own: own\.W \(excluded\)"),
    ],
    ids=str,
)
def test_what_reaches_nothing_in_layers_of_the_users_own_says_why(targets: Targets, message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        targets.select(mixture())


def test_a_model_that_is_itself_a_layer_is_targeted() -> None:
    # `prune_(nn.Linear(4, 4), 0.5)`: the root is the layer.
    [target] = Targets().select(nn.Linear(4, 4)).targets
    assert target.parameter.shape == (4, 4)
