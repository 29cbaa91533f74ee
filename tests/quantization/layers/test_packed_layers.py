"""Weights of few bits: which layers have them, and what is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import (
    GPTQ,
    NF4,
    CompressionError,
    Targets,
    WeightOnly,
    quantize,
)
from lightning_compress.quantization.convert import record_of
from lightning_compress.quantization.layers.schemes import Packed
from tests.quantization.layers.packed_cases import FEW, build, fully, held, storages, stored_in
from tests.quantization.test_quantize import agreement
from tests.support.few_bits import rounded
from tests.support.oracles import assert_same_state, hooks, snapshot


def sequential(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*map(copy.deepcopy, layers))


def float_in(quantized: nn.Module) -> dict[str, str]:
    return dict((record_of(quantized) or {})["floats"])


# What is left alone.


class Odd(nn.Module):
    """Recurrent and normalizing layers, tied and frozen parameters, lists of them, and a second hold on one."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 8, max_norm=1.0)
        self.rnn = nn.LSTM(8, 8, num_layers=2, batch_first=True)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(8)
        self.gains = nn.ParameterList([torch.ones(8), torch.full((8,), 2.0)])
        self.shift = nn.Parameter(torch.randn(8), requires_grad=False)
        self.held = {"shift": self.shift, "all": [self.gains[0]]}
        self.register_buffer("calls", torch.zeros(()))
        self.weighted = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        x = self.rnn(self.words(ids))[0][:, -1]
        x = self.norm(self.b(self.a(x).relu()) * self.held["all"][0] + self.held["shift"])
        return self.head(self.weighted(x * self.gains[1]))


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("scheme", FEW, ids=str)
def test_nothing_of_the_original_changes_and_nothing_is_shared_with_it(scheme: Packed, calibrated: bool) -> None:
    if isinstance(scheme, GPTQ) and not calibrated:
        return
    model, ids = Odd(), torch.randint(12, (6, 4))
    with torch.no_grad():
        model.words.weight *= 5  # longer than max_norm: a forward pass would shorten them
    model.rnn.eval()
    hooked = hooks(model)
    before, had = snapshot(model), [set(vars(module)) for module in model.modules()]
    modes, identities = [m.training for m in model.modules()], [id(p) for p in model.parameters()]
    quantized = quantize(model, scheme, calibration=[ids, ids + 0] if calibrated else None)
    assert_same_state(before, model)
    assert [set(vars(module)) for module in model.modules()] == had and hooks(model) == hooked
    assert [m.training for m in model.modules()] == modes and [id(p) for p in model.parameters()] == identities
    assert set(stored_in(quantized)) == {"a", "b"}
    assert storages(model).isdisjoint(storages(quantized))
    assert [p.requires_grad for p in quantized.parameters()] == [
        p.requires_grad and n != "a.weight" for n, p in model.named_parameters()
    ]
    quantized.eval()
    expected = quantized(ids).detach().clone()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(1)
    assert torch.equal(quantized(ids), expected)
    state = snapshot(model)
    with torch.no_grad():
        for tensor in held(quantized):
            tensor.fill_(2)
    assert_same_state(state, model)


SHARED = "weights of layers are shared while batches run, whoever else writes or holds them"


class Writes(nn.Module):
    """Its forward changes weights, as clipping, normalized prototypes and `max_norm` do; or holds one twice."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.words, self.body = nn.Embedding(12, 8, max_norm=0.1 if way == "tied" else None), nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        if way == "tied":
            self.head.weight = self.words.weight
        self.held = [self.body.weight] if way == "held" else []

    def forward(self, ids: Tensor) -> Tensor:
        if self.way == "clipped":
            with torch.no_grad():
                self.head.weight.clamp_(-0.01, 0.01)
        return self.head(self.body(self.words(ids))) + sum(one.sum() for one in self.held)


@pytest.mark.parametrize(
    "way", ["tied", *(pytest.param(way, marks=pytest.mark.xfail(reason=SHARED)) for way in ("clipped", "held"))]
)
def test_a_forward_that_writes_into_its_weights_changes_its_copy_only(way: str) -> None:
    model, ids = Writes(way), torch.arange(12).view(3, 4)
    before = snapshot(model)
    quantized = quantize(model, "nf4", calibration=[ids], overrides={"body": "nf4"}).eval()
    assert_same_state(before, model)
    expected = quantized(ids).detach().clone()
    with torch.no_grad():
        model.body.weight.fill_(1)
    assert torch.equal(quantized(ids), expected)


def test_a_recurrent_layer_that_stays_float_keeps_one_set_of_weights_of_its_own() -> None:
    model = Odd()
    quantized = quantize(model, "nf4")
    assert all(a is b for a, b in zip(quantized.rnn._flat_weights, quantized.rnn.parameters(), strict=True))
    ids = torch.randint(12, (6, 4))
    first = quantized.eval()(ids)
    with torch.no_grad():
        quantized.rnn.weight_hh_l0.mul_(3)
    assert not torch.equal(quantized(ids), first)
    assert quantized.held["shift"] is quantized.shift and quantized.held["all"][0] is quantized.gains[0]


def test_forward_hooks_of_the_user_still_fire() -> None:
    model, batch = build("linear")
    seen: list[str] = []
    model[0].register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    model[2].register_forward_hook(lambda m, args, output: seen.append("hook"))
    quantized = fully(model, WeightOnly(4, 4))
    seen.clear()
    torch.testing.assert_close(quantized(**batch), rounded(model, quantized)(**batch), rtol=1e-4, atol=1e-5)
    assert seen == ["hook"] * 2


def test_a_forward_that_was_replaced_on_a_layer_is_kept_or_the_layer_stays_float() -> None:
    model, batch = build("linear")
    inner = model[0].forward
    model[0].forward = lambda x: inner(x) + 100.0  # as wrappers that move layers between devices do
    quantized = fully(model, WeightOnly(8))
    assert agreement(model(**batch), quantized(**batch)) > 0.99
    assert (quantized[0](batch["input"]) > 50).all()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_layers_that_cannot_be_stored_stay_float_with_a_reason() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(
        Own(8, 8), nn.Linear(8, 8), nn.Bilinear(4, 4, 2), nn.EmbeddingBag(4, 4), nn.Linear(8, 8), nn.Linear(0, 8)
    )
    model.append(nn.Linear(8, 8, dtype=torch.complex64)).append(nn.Linear(8, 8, dtype=torch.float64))
    model.append(nn.Embedding(9, 8, max_norm=1.0)).append(nn.MultiheadAttention(8, 2, add_bias_kv=True))
    with torch.no_grad():
        model[4].weight[3, 3] = torch.nan
        model[7].weight *= 1e300
    before = snapshot(model)
    quantized = fully(model, NF4(8))
    assert stored_in(quantized) == {"1": "nf4"}
    reasons = float_in(quantized)
    assert set(reasons) == {"0", "2", "3", "4", "5", "6", "7", "8", "9"} and all(reasons.values())
    for path, words in {"0": "Own", "4": "finite", "5": "empty", "8": "max_norm", "9": "add_bias_kv"}.items():
        assert words in reasons[path], path
    assert_same_state(before, model)


# Which layers.


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 9)  # defined first, called last
        self.words = nn.Embedding(9, 16)
        self.body = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.norm = nn.LayerNorm(16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.body(self.words(ids)))).log_softmax(-1)


BODY, IDS = {"body.0", "body.2"}, torch.randint(9, (4, 5))


EMBEDDING = "embedding, which is left out unless it is named"


LAST = "last layer, which is left out unless it is named"


@pytest.mark.parametrize(
    ("scheme", "options", "chosen", "floats"),
    [
        ("nf4", {}, BODY, {"words": EMBEDDING, "head": LAST}),
        ("gptq", {}, BODY, {"words": EMBEDDING, "head": LAST}),
        ("int4_weight_only", {}, BODY, {"words": EMBEDDING, "head": LAST}),
        ("int8_weight_only", {}, {*BODY, "head"}, {"words": EMBEDDING}),
        ("nf4", {"overrides": {"head": "int8_weight_only"}}, {*BODY, "head"}, {"words": EMBEDDING}),
        ("nf4", {"overrides": {"words": "nf4"}}, {*BODY, "words"}, {"head": LAST}),
        ("nf4", {"overrides": {"hea?": "nf4", "w*s": "int8_weight_only"}}, {*BODY, "head", "words"}, {}),
        ("nf4", {"overrides": {"*": "gptq"}}, BODY, {"words": EMBEDDING, "head": LAST}),
        ("nf4", {"targets": Targets(include=["*"])}, BODY, {"words": EMBEDDING, "head": LAST}),
        ("nf4", {"targets": Targets(include=["body", "head"])}, {*BODY, "head"}, {}),
        ("nf4", {"targets": Targets(include=["words"])}, {"words"}, {}),
        ("nf4", {"targets": Targets(types=[nn.Embedding])}, {"words"}, {}),
        ("nf4", {"targets": Targets(include=["head"])}, {"head"}, {}),
        (
            "nf4",
            {"targets": Targets(exclude=["head", "body.0"]), "overrides": {"head": "gptq"}},
            {"body.2"},
            {"head": "excluded", "words": EMBEDDING},
        ),
    ],
)
def test_embeddings_and_the_last_layer_are_spared_unless_they_are_named(
    scheme: str, options: Any, chosen: set[str], floats: dict[str, str]
) -> None:
    quantized = quantize(Words(), scheme, calibration=[IDS], **options)
    assert set(stored_in(quantized)) == chosen
    reasons = float_in(quantized)
    assert {path: reasons.get(path) for path in floats} == floats
    assert not chosen & reasons.keys()


def test_without_a_batch_the_last_layer_is_the_one_that_was_defined_last() -> None:
    quantized = quantize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4), nn.Softmax(-1)), "nf4")
    assert stored_in(quantized) == {"0": "nf4"} and float_in(quantized) == {"2": LAST}


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 4), sequential(nn.Conv1d(2, 3, 1)), sequential(nn.Linear(8, 4))])
def test_a_model_of_one_layer_is_quantized(make: Callable[[], nn.Module]) -> None:
    assert len(stored_in(quantize(make(), "nf4"))) == 1


def test_an_embedding_alone_is_quantized_where_it_is_named_only() -> None:
    model = nn.Sequential(nn.Embedding(9, 8))
    assert stored_in(quantize(model, "nf4", overrides={"0": "nf4"})) == {"0": "nf4"}
    with pytest.raises(CompressionError, match="must have a layer that the scheme can quantize.*0: embedding"):
        quantize(model, "nf4")


def test_tied_layers_are_stored_once_or_not_at_all() -> None:
    model, batch = build("tied")
    assert stored_in(quantize(model, "nf4")) == {"body": "nf4"}
    both = quantize(model, "nf4", overrides={"embedding": NF4(8), "lm_head": NF4(8)})
    codes = [both.get_submodule(name)._parameters["weight"] for name in ("embedding", "lm_head")]
    assert codes[0] is codes[1]
    size = {value.untyped_storage().data_ptr(): value.nbytes for value in both.state_dict().values()}
    assert sum(size.values()) < 20 * 16 // 2 + 20 * 2 + 16 * 16 // 2 + 16 * 1 + 16 * 4 + 64
    twin = copy.deepcopy(both)
    again = [twin.get_submodule(name)._parameters["weight"] for name in ("embedding", "lm_head")]
    assert again[0] is again[1] and again[0] is not codes[0]
    # One of them in another scheme: neither is stored, and both say so.
    apart = quantize(model, "nf4", overrides={"embedding": "int8_weight_only", "lm_head": NF4(8)})
    assert stored_in(apart) == {"body": "nf4"}
    assert "tied to `lm_head`" in float_in(apart)["embedding"] and "tied to `embedding`" in float_in(apart)["lm_head"]
    assert apart.embedding.weight is apart.lm_head.weight
    torch.testing.assert_close(apart.eval()(**batch), rounded(model, apart)(**batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gptq", [GPTQ(4, 8), GPTQ(3, None, activation_order=True)], ids=str)
def test_beside_static_int8_in_one_model(gptq: GPTQ) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(16, 16), nn.Tanh()),
        nn.Sequential(nn.Conv1d(4, 8, 1), nn.BatchNorm1d(8), nn.ReLU()),
        nn.Flatten(),
        nn.Sequential(nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 4)),
    ).eval()
    batches = [torch.randn(8, 4, 16) for _ in range(4)]
    before = snapshot(model)
    mixed = quantize(model, "int8_static", batches, overrides={"0.0": NF4(8), "3.0": gptq, "3.2": WeightOnly(6)}).eval()
    assert stored_in(mixed) == {"0.0": "nf4", "3.0": "gptq", "3.2": "int6_weight_only"}
    assert [unit["path"] for unit in (record_of(mixed) or {})["units"]]
    assert agreement(model(batches[0]), mixed(batches[0])) > 0.97
    assert_same_state(before, model)
