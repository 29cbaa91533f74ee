"""What can't be done is said, with its reason, and leaves the model as it was, bit for bit."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import CompressionError, Targets, plan_removal, remove_channels_
from tests.channels.cuts import cut, inexact, refusal, zeroed
from tests.channels.idioms import Net, conv, linear
from tests.support.oracles import assert_same_state, hooks, same_random_state, snapshot

X = torch.ones(2, 6)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, r"exactly one of them. Received: none"),
        ({"macs": 0.5, "params": 0.5}, r"exactly one of them. Received: params=0.5, macs=0.5"),
        *(({kind: 0.0}, rf"`{kind}` must lie in \(0, 1\]. Received: {kind}=0.0") for kind in ("channels", "params")),
        ({"latency": 1.5}, r"`latency` must lie in \(0, 1\]. Received: latency=1.5"),
        ({"macs": float("nan")}, r"Received: macs=nan"),
        ({"macs": True}, r"Received: macs=True"),
        ({"macs": "0.5"}, r"Received: macs='0.5'"),
        ({"macs": 0.5, "importance": "l3"}, r"`importance` must be .* Received: importance='l3'. Nearest: l2"),
        ({"macs": 0.5, "importance": "taylor"}, r"must have gradients. Received: none. Call loss.backward\(\) before"),
        ({"macs": 0.5, "scope": "all"}, r"`scope` must be 'global' or 'layer'. Received: scope='all'"),
        ({"macs": 0.5, "round_to": 0}, r"`round_to` must be a whole number, at least 1. Received: round_to=0"),
        ({"macs": 0.5, "round_to": 2.5}, r"Received: round_to=2.5"),
        ({"macs": 0.5, "min_layer_channels": 2}, r"`min_layer_channels` must lie in \[0, 1\]. Received"),
        ({"macs": 0.5, "overrides": {"0": 2}}, r"`overrides` must map patterns to fractions that remain"),
        ({"macs": 0.5, "overrides": {"nope": 0.5}}, r"`overrides` must match .*overrides='nope'. .*'0', '2'"),
        ({"macs": 0.5, "targets": Targets(include=["nope"])}, r"`targets` pattern 'nope' must match a module"),
        ({"macs": 0.5, "targets": Targets(exclude=["*"])}, r"`4`: an output; `\{0,2\}`: excluded"),
        ({"macs": 0.5, "targets": Targets(include=["4"])}, r"`4`: an output; `\{0,2\}`: not included"),
    ],
    ids=lambda value: "",
)  # fmt: skip
def test_arguments(options: dict[str, Any], text: str) -> None:
    model = mlp()
    before = snapshot(model)
    with same_random_state(), pytest.raises(CompressionError, match=text):
        plan_removal(model, X, **options)
    assert_same_state(before, model)
    assert hooks(model) == []


def test_no_example_inputs() -> None:
    with pytest.raises(CompressionError, match="`inputs` must be example inputs"):
        plan_removal(mlp(), macs=0.5)
    model = mlp()
    model.example_input_array = X
    assert plan_removal(model, macs=0.5).rows


def test_frozen_models() -> None:
    assert "`{0,2}`: frozen" in refusal(mlp().requires_grad_(False), X, macs=0.5)


@pytest.mark.parametrize("fault", ["twice", "another_width", "another_model", "fewer_layers", "more_layers"])
def test_a_plan_is_for_its_model_alone(fault: str) -> None:
    plan = plan_removal(mlp(), X, macs=0.5)
    model = {
        "another_width": lambda: nn.Sequential(nn.Linear(6, 13), nn.ReLU(), nn.Linear(13, 10), *mlp()[3:]),
        "another_model": lambda: nn.Linear(6, 3),
        "fewer_layers": lambda: mlp()[:3],
        "more_layers": lambda: nn.Sequential(*mlp(), nn.Linear(3, 3)),
        "twice": mlp,
    }[fault]()  # fmt: skip
    if fault == "twice":
        remove_channels_(model, plan)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    before = snapshot(model)
    with pytest.raises(CompressionError, match=r"`plan` must be of this model as it is now. Received: .* Plan again"):
        remove_channels_(model, plan, [optimizer])
    assert_same_state(before, model)


def test_plans_name_the_layers_that_stay() -> None:
    plan = plan_removal(mlp(), X, channels=0.5)
    assert str(plan).splitlines()[2:] == [
        "stays whole: `4`: an output",
        *("channels: 22 -> 11 (0.500)",),
        f"params: 247 -> {plan.after.params} ({plan.after.params / 247:.3f})",
        f"macs per sample: 222 -> {plan.after.macs} ({plan.after.macs / 222:.3f})",
    ]


class Cache:
    """Keys and values of the tokens so far."""

    def __init__(self) -> None:
        self.pair: tuple[Tensor, Tensor] | None = None

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.pair is not None:
            k, v = (torch.cat(both, 2) for both in zip(self.pair, (k, v), strict=True))
        self.pair = k, v
        return self.pair


class Decoder(nn.Module):
    """Gives back a cache, under the name of an argument or under another."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name, self.heads = name, 4
        self.embed, self.qkv = nn.Embedding(9, 32), nn.Linear(32, 96)
        self.o, self.head = nn.Linear(32, 32), nn.Linear(32, 9)

    def forward(self, ids: Tensor, cache: Cache | None = None) -> dict[str, Any]:
        cache, x = cache or Cache(), self.embed(ids)
        q, k, v = self.qkv(x).view(*ids.shape, 3, self.heads, 8).permute(2, 0, 3, 1, 4).unbind(0)
        k, v = cache.update(k, v)
        reach = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        y = nn.functional.scaled_dot_product_attention(q, k, v, reach)
        return {"logits": self.head(x + self.o(y.transpose(1, 2).flatten(2))), self.name: cache}


@pytest.mark.parametrize("inside", [False, True])
def test_a_cache_that_is_taken_back_shrinks_with_its_heads(inside: bool) -> None:
    model, ids = Decoder("cache").eval(), torch.randint(9, (2, 6))
    whole = Net(lambda self, ids: self.inner(ids), inner=model).eval() if inside else model
    plan = plan_removal(whole, ids, macs=0.5, targets=Targets(include=["*qkv"]))
    assert any(len(dims.get(0, ())) in range(1, 96) for name, dims in plan.kept.items() if name.endswith("qkv.weight"))
    zeroes, small = zeroed(whole, plan), cut(whole, plan)
    if inside:
        zeroes, small = zeroes.inner, small.inner
    with torch.no_grad():
        expected, first = zeroes(ids)["logits"], small(ids[:, :4])
        second = small(ids[:, 4:], cache=first["cache"])
    got = torch.cat((first["logits"], second["logits"]), 1)
    assert (got - expected).abs().max() < 1e-5


def test_what_is_no_argument_keeps_its_size() -> None:
    assert "`qkv`, `head`: an output" in refusal(Decoder("keys"), torch.randint(9, (2, 6)), macs=0.5,
                                       targets=Targets(include=["qkv"]))  # fmt: skip


def _checked(self: Any, x: Tensor) -> Tensor:
    x = self.c(x).relu()
    if x.shape[1] != 8:
        raise ValueError("eight maps")
    return self.o(self.f(x.flatten(1)).relu())


def _through_channels(self: Any, x: Tensor) -> Tensor:
    x = self.c(x)
    squeezed = self.k(x.mean((2, 3)).unsqueeze(1)).transpose(1, 2)
    return self.o(self.f((x * squeezed.unsqueeze(-1)).relu()).relu())


def _normed_by_hand(self: Any, x: Tensor) -> Tensor:
    x = self.c(x).flatten(1)
    return self.o(self.f((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)).relu())


CAN_STAY: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], str, str]] = [
    ("size_that_is_checked", lambda: Net(_checked, c=conv(3, 8), f=linear(288, 12), o=linear(12, 3)), (2, 3, 6, 6),
     "c", "its code needs all of them"),
    ("index_of_channels", lambda: Net(lambda s, x: s.o(s.f(s.c(x)[:, s.order]).relu()), c=conv(3, 8), f=conv(8, 12),
     o=conv(12, 2), order=torch.randperm(8)), (2, 3, 6, 6), "c", "its places are numbered in the model's forward"),
    ("softmax_of_channels", lambda: Net(lambda s, x: s.o(s.f(s.c(x).softmax(1)).relu()), c=conv(3, 8), f=conv(8, 12),
     o=conv(12, 2)), (2, 3, 6, 6), "c", "`softmax` runs over it, in the model's forward; name"),
    ("convolution_over_channels", lambda: Net(_through_channels, c=conv(3, 8), k=nn.Conv1d(1, 1, 3, padding=1),
     f=conv(8, 12), o=conv(12, 2)), (2, 3, 6, 6), "c", "fixed size"),
    ("statistics_of_channels", lambda: Net(_normed_by_hand, c=conv(3, 8), f=linear(288, 12), o=linear(12, 3)),
     (2, 3, 6, 6), "c", "runs over"),
    ("layer_norm_over_maps", lambda: nn.Sequential(conv(3, 8), nn.LayerNorm((8, 6, 6)), conv(8, 12), nn.ReLU(),
     conv(12, 2)), (2, 3, 6, 6), "0", "`1`"),
    ("group_norm", lambda: nn.Sequential(conv(3, 8), nn.GroupNorm(2, 8), conv(8, 12), nn.ReLU(), conv(12, 2)),
     (2, 3, 6, 6), "0", "a norm spans it, in `1`; name a layer of it exactly in targets.include"),
    ("groups_as_many_as_channels", lambda: nn.Sequential(conv(3, 8), nn.GroupNorm(8, 8), conv(8, 12), nn.ReLU(),
     conv(12, 2)), (2, 3, 6, 6), "0", "as many groups as channels, in `1`"),
    ("fourier", lambda: Net(lambda s, x: s.o(s.f(torch.fft.fft(s.c(x), dim=1).real).relu()), c=conv(3, 8),
     f=conv(8, 12), o=conv(12, 2)), (2, 3, 6, 6), "c", "`_fft_r2c` in the model's forward isn't understood"),
    ("local_response_norm", lambda: nn.Sequential(conv(3, 8), nn.LocalResponseNorm(3), conv(8, 12), nn.ReLU(),
     conv(12, 2)), (2, 3, 6, 6), "0", "`1`"),
    ("residual_to_the_input", lambda: Net(lambda s, x: s.o(s.f(x + s.c(x)).relu()), c=conv(3, 3), f=conv(3, 12),
     o=conv(12, 2)), (2, 3, 6, 6), "c", "it meets a tensor of fixed size in the model's forward"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("net", "shape", "layer", "reason"), [row[1:] for row in CAN_STAY], ids=[row[0] for row in CAN_STAY]
)
def test_what_cannot_be_cut_stays_alone(net: Any, shape: tuple[int, ...], layer: str, reason: str) -> None:
    model, x = net(), torch.randn(shape)
    plan = plan_removal(model, x, channels=0.5, importance="random")
    assert reason in plan.fixed[layer]
    assert [row.layers for row in plan.rows] in ([("f",)], [("2",)])
    assert len(plan.fixed[layer].splitlines()) == 1
    assert inexact(model, plan, (x,)) < 1e-5


def test_widths_that_steer_control_flow_stay() -> None:
    model = Net(
        lambda s, x: s.o(s.f(s.c(x)) * (2 if s.c(x).mean() > 0 else 1)), c=conv(3, 8), f=conv(8, 9), o=conv(9, 2)
    )
    plan = plan_removal(model, torch.randn(2, 3, 6, 6), channels=0.5)
    assert [row.layers for row in plan.rows] == [("f",)]


class Slots:
    __slots__ = ("logits",)

    def __init__(self, logits: Any) -> None:
        self.logits = logits


@dataclasses.dataclass
class Output:
    logits: Any


class Mapping(dict):  # type: ignore[type-arg]
    pass


Pair = collections.namedtuple("Pair", "one other")

WRAPS: dict[str, Callable[[Tensor], Any]] = {
    "dict": lambda y: {"a": [y]},
    "dict_of_its_own": lambda y: Mapping(a=y),
    "user_dict": lambda y: collections.UserDict(a=y),
    "named_tuple": lambda y: Pair(y, None),
    "dataclass": Output,
    "dataclass_in_dataclass": lambda y: Output(Output(y)),
    "dataclass_in_list": lambda y: [None, Output(y)],
    "slots": Slots,
    "object_in_object": lambda y: Output(Slots([y])),
    "set": lambda y: {y},
    "distribution": lambda y: torch.distributions.Normal(y, 1.0 + y.square(), validate_args=False),
    "nothing_else": lambda y: (y, 3, "text", None),
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_outputs_of_any_kind_keep_their_shape(wrap: str) -> None:
    model = Net(lambda s, x: WRAPS[wrap](s.o(s.a(x).relu())), a=linear(6, 12), o=linear(12, 10))
    plan = plan_removal(model, X, channels=0.5)
    assert [(row.layers, row.after) for row in plan.rows] == [(("a",), 6)]
    assert plan.fixed == {"o": "an output"}


@pytest.mark.parametrize(
    "error", [AssertionError, AttributeError, KeyError, IndexError, ValueError, NotImplementedError]
)
def test_models_that_do_not_train_without_targets(error: type[Exception]) -> None:
    def forward(self: Any, x: Tensor, targets: Any = None) -> Tensor:
        if self.training:
            raise error("targets")
        return self.o(self.a(x).relu())

    assert plan_removal(Net(forward, a=linear(6, 12), o=linear(12, 3)), X, channels=0.5).rows


def test_train_may_return_nothing() -> None:
    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> None:  # type: ignore[override]
            super().train(mode)

    assert plan_removal(Frozen(*mlp()), X, channels=0.5).rows


def test_under_inference_mode() -> None:
    model = mlp()
    expected = plan_removal(model, X, channels=0.5, scope="layer")
    with torch.inference_mode():
        plan = plan_removal(model, X, channels=0.5, scope="layer")
        remove_channels_(model, plan)
    assert_same_state(plan.kept, expected.kept)
    model(X).sum().backward()
    assert model[0].weight.grad.shape == model[0].weight.shape == (6, 6)


def test_models_that_run_differently_by_width_are_not_cut_to_where_they_do() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.o(x * 2 if x.shape[1] < 6 else x)

    model = Net(forward, a=linear(6, 16), o=linear(16, 3))
    assert "computes something else" in refusal(model, X, channels=0.25)
    assert plan_removal(model, X, channels=0.5).rows[0].after == 8


def test_halves_that_are_counted_in_forward() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.c(x)
        half = x.shape[1] // 2
        return self.o(torch.cat([self.a(x[:, :half]), self.b(x[:, half:])], 1))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net(forward, c=conv(3, 16), a=conv(8, 6), b=conv(8, 6), o=conv(12, 2))
        x = torch.randn(2, 3, 6, 6)
    for seed in range(4):
        plan = plan_removal(model, x, macs=0.4, importance="random", seed=seed)
        assert inexact(model, plan, (x,)) < 1e-5


def test_one_infinite_output_hides_nothing() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        y = self.o(y * 2 if y.shape[1] < 12 else y)
        return torch.cat([y, y.new_full((len(y), 1), -torch.inf)], 1)

    assert "computes something else" in refusal(Net(forward, a=linear(6, 12), o=linear(12, 3)), X, channels=0.5)


def test_an_error_of_the_model_itself_is_told_as_such() -> None:
    with pytest.raises(Exception, match="mat1 and mat2"):
        plan_removal(mlp(), torch.ones(2, 7), macs=0.5)


def test_attention_with_keys_of_its_own_stays_exact() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.i, self.o = nn.Linear(6, 16), nn.Linear(16, 3)
            self.a = nn.MultiheadAttention(16, 4, batch_first=True, add_bias_kv=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.i(x)
            return self.o(self.a(x, x, x, need_weights=False)[0])

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Block(), torch.randn(2, 5, 6)
    plan = plan_removal(model, x, channels=0.5, importance="random")
    assert inexact(model, plan, (x,)) < 1e-5


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_projected_recurrent_states_stay() -> None:
    model = Net(lambda s, x: s.o(s.f(s.r(x, None)[0]).relu()), r=nn.LSTM(6, 12, proj_size=5, batch_first=True),
                f=linear(5, 8), o=linear(8, 3))  # fmt: skip
    plan = plan_removal(model, torch.randn(2, 4, 6), channels=0.5)
    assert "projected" in plan.fixed["r"] and [row.layers for row in plan.rows] == [("f",)]
