"""A quantized layer is still the layer that it was: its names, class and attributes, its files, and who compiles it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import NF4, CompressionError, DynamicInt8, WeightOnly
from lightning_compress.modules.routing import forget_aside_, form_of, route_, unroute_
from lightning_compress.quantization.numerics.scheme import Scheme


class Net(nn.Module):
    """A layer of one kind between two linear ones, which are quantized with it."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(32, 64), make(), nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if isinstance(self.middle, nn.MultiheadAttention):
            x = self.middle(x, x, x)[0] + self.middle(x, x.flip(1), x, need_weights=False)[0]
        elif isinstance(self.middle, nn.Conv1d):
            x = self.middle(x.mT).mT
        elif isinstance(self.middle, nn.Embedding):
            x = x + self.middle(torch.arange(x.shape[1], device=x.device))
        else:
            x = self.middle(x)[0]
        return self.last(x)


def recurrent(kind: Any) -> Callable[[], nn.Module]:
    return lambda: kind(64, 32, 2, batch_first=True, bidirectional=True)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: nn.MultiheadAttention(64, 4, batch_first=True),
    "attention of other sizes": lambda: nn.MultiheadAttention(64, 4, batch_first=True, kdim=64, vdim=64, bias=False),
    "lstm": recurrent(nn.LSTM),
    "gru": recurrent(nn.GRU),
    "convolution": lambda: nn.Conv1d(64, 64, 3, padding=1, groups=2),
    "embedding": lambda: nn.Embedding(7, 64),
}
DYNAMIC: list[Scheme] = [DynamicInt8(per_token=False), DynamicInt8(per_token=True)]
FEW: list[Scheme] = [WeightOnly(8), WeightOnly(4, 32), WeightOnly(3, 5, symmetric=False), NF4(16)]
CASES = [
    pytest.param(kind, scheme, id=f"{kind}-{scheme}")
    for kind in KINDS
    for scheme in (
        DYNAMIC if kind in ("lstm", "gru") else FEW if kind in ("convolution", "embedding") else [*DYNAMIC, *FEW]
    )
]
TRACED = pytest.mark.parametrize(
    ("kind", "scheme"), [case for case in CASES if case.values[1] in (DYNAMIC[0], FEW[1], FEW[3])]
)
EVERY = pytest.mark.parametrize(("kind", "scheme"), CASES)


def made(kind: str, scheme: Scheme, seed: int = 0, forget: bool = True) -> tuple[Net, Net, Tensor]:
    """A float network, that with quantized layers, and inputs; the quantized one has run already."""
    torch.manual_seed(seed)
    net = Net(KINDS[kind]).eval()
    for name, parameter in net.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    x, quantized = torch.randn(3, 5, 32), copy.deepcopy(net)
    for layer in quantized.children():
        route_(layer, scheme.form(layer))
    for module in quantized.modules():
        if forget:
            forget_aside_(module)
    quantized(x)
    return net, quantized, x


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    """What code that reads the parameters by their attributes gets."""
    names = [name.rpartition(".") for name, _ in net.named_parameters()]
    return {f"{path}.{name}": getattr(net.get_submodule(path), name).detach() for path, _, name in names}


def dequantized(net: Net, quantized: Net) -> Net:
    """The float network with the weights that code reads."""
    twin = copy.deepcopy(net)
    twin.load_state_dict(weights_of(quantized), strict=False)
    return twin


def saved(net: nn.Module) -> dict[str, Tensor]:
    """The state dict of a file, read back."""
    stream = io.BytesIO()
    torch.save(net.state_dict(), stream)
    stream.seek(0)
    state: dict[str, Tensor] = torch.load(stream, weights_only=True)
    return state


@EVERY
def test_the_tree_is_the_users(kind: str, scheme: Scheme) -> None:
    net, quantized, _ = made(kind, scheme)
    for named in ("named_modules", "named_parameters", "named_buffers"):
        assert [name for name, _ in getattr(quantized, named)()] == [name for name, _ in getattr(net, named)()]
    for own, other in zip(quantized.modules(), net.modules(), strict=True):
        assert isinstance(own, type(other)) and type(own).__name__ == type(other).__name__
    assert quantized.first.in_features == 32 and quantized.last.bias is None
    assert isinstance(quantized.first.bias, nn.Parameter) and quantized.first.bias.requires_grad
    for name, value in weights_of(quantized).items():
        exact = net.get_parameter(name).detach()
        assert value.dtype == torch.float32 and value.shape == exact.shape
        assert (value - exact).abs().mean() <= 0.2 * exact.abs().mean()
    with pytest.raises(CompressionError, match="must be left as it is"):
        quantized.first.weight = nn.Parameter(torch.zeros(64, 32))


@EVERY
def test_a_state_dict_has_codes_under_the_users_names_and_the_rest_beside_them(kind: str, scheme: Scheme) -> None:
    net, quantized, _ = made(kind, scheme)
    state, names = saved(quantized), dict(net.named_parameters())
    assert set(names) <= set(state)
    for name, parameter in names.items():
        assert state[name].is_floating_point() == (parameter.dim() == 1)
        if parameter.dim() == 1:
            continue
        assert any(key.startswith(f"{name}_scale") for key in state)
        if isinstance(scheme, DynamicInt8):
            codes, scale = state[name], state[f"{name}_scale"]
            assert codes.dtype == torch.int8 and codes.shape == parameter.shape and scale.shape == (len(codes),)
            assert codes.float().abs().flatten(1).amax(1).eq(63 if scheme.reduced else 127).all()
            path, _, attribute = name.rpartition(".")
            value = getattr(quantized.get_submodule(path), attribute)
            assert torch.equal(value, codes * scale[:, None])
    assert all(key.startswith(tuple(names)) for key in state)


@EVERY
@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_load_brings_it_all_back(kind: str, scheme: Scheme, assign: bool) -> None:
    _, quantized, x = made(kind, scheme)
    _, other, _ = made(kind, scheme, seed=1)
    expected = quantized(x)
    assert not torch.equal(other(x), expected)
    state = saved(quantized)
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other(x), expected)
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    bad = {key: value.float() if "first.weight" in key else value for key, value in state.items()}
    with pytest.raises(RuntimeError, match="size mismatch for first.weight"):
        quantized.load_state_dict(bad)
    assert torch.equal(quantized(x), expected)


@EVERY
def test_copies(kind: str, scheme: Scheme) -> None:
    _, quantized, x = made(kind, scheme)
    expected = quantized(x)
    for twin in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert torch.equal(twin(x), expected)
        twin.first.bias.data.fill_(1e3)
        assert not torch.equal(twin(x), expected) and torch.equal(quantized(x), expected)
    layer, inputs = copy.copy(quantized.first), torch.randn(3, 32)
    assert layer is not quantized.first and torch.equal(layer(inputs), quantized.first(inputs))
    vars(layer)["_parameters"] = {**layer._parameters, "bias": nn.Parameter(torch.zeros(64))}
    assert not torch.equal(layer(inputs), quantized.first(inputs)) and torch.equal(quantized(x), expected)


@EVERY
def test_moves(kind: str, scheme: Scheme) -> None:
    _, quantized, x = made(kind, scheme)
    expected, state = quantized(x), saved(quantized)
    double = copy.deepcopy(quantized).double()
    got = double(x.double())
    assert got.dtype == double.first.weight.dtype == double.first.bias.dtype == torch.float64
    torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.05)
    nowhere = quantized.to("meta")
    assert all(value.is_meta for value in nowhere.state_dict().values()) and nowhere(x.to("meta")).is_meta
    back = nowhere.to_empty(device="cpu")
    back.load_state_dict(state)
    assert torch.equal(back(x), expected)


@EVERY
def test_it_goes_back_to_what_it_was(kind: str, scheme: Scheme) -> None:
    net, quantized, x = made(kind, scheme, forget=False)
    for layer in quantized.children():
        unroute_(layer)
    assert torch.equal(quantized(x), net(x))
    assert all(type(own) is type(other) for own, other in zip(quantized.modules(), net.modules(), strict=True))


@EVERY
def test_a_bias_that_changes_is_computed_with(kind: str, scheme: Scheme) -> None:
    _, quantized, x = made(kind, scheme)
    with torch.no_grad():
        for module in quantized.modules():
            for name in [name for name in module._parameters if "bias" in name and getattr(module, name) is not None]:
                before = quantized(x)
                getattr(module, name).data.mul_(-3.0)  # in place, where no version counts
                inside = quantized(x)
                setattr(module, name, nn.Parameter(getattr(module, name) * 3.0))
                assert not torch.equal(inside, before) and not torch.equal(quantized(x), inside), name
                assert torch.equal(quantized(x), copy.deepcopy(quantized)(x))


@TRACED
def test_compiles_in_one_graph_of_plain_operators(kind: str, scheme: Scheme) -> None:
    if kind in ("lstm", "gru"):
        pytest.skip("dynamo takes no recurrent layers of torch, float ones neither")
    net, quantized, x = made(kind, scheme)
    torch._dynamo.reset()
    compiled = torch.compile(quantized, fullgraph=True, backend="eager")
    reference = dequantized(net, quantized)
    torch.testing.assert_close(compiled(x), reference(x), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        quantized.first.bias += 1.0
        reference.first.bias += 1.0
    torch.testing.assert_close(compiled(x), reference(x), rtol=1e-4, atol=1e-4)


@TRACED
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_holds_no_float_weight_and_stays_as_it_is(kind: str, scheme: Scheme, strict: bool) -> None:
    if strict and kind in ("lstm", "gru"):
        pytest.skip("dynamo takes no recurrent layers of torch, float ones neither")
    net, quantized, x = made(kind, scheme)
    expected, reference = quantized(x), dequantized(net, quantized)
    program = torch.export.export(quantized, (x,), strict=strict)
    held = {**program.state_dict, **program.constants}
    shapes = {parameter.shape for parameter in net.parameters() if parameter.dim() > 1}
    assert [key for key, value in held.items() if value.is_floating_point() and value.shape in shapes] == []
    # Of what was traced; one way alone, as either brings back what it was before.
    twin = pickle.loads(pickle.dumps(quantized)) if "attention" in kind else copy.deepcopy(quantized)
    for _ in range(2):
        torch.testing.assert_close(program.module()(x), reference(x), rtol=1e-4, atol=1e-4)
        for model in (twin, quantized):
            assert torch.equal(model(x), expected)
        quantized.state_dict()


# In the kernel's order of 4 bits.


def tiles(layer: Any) -> int:
    size: int = form_of(layer).weights["weight"].tile  # type: ignore[union-attr]
    return size


def test_codes_of_two_networks_are_in_one_order_whatever_has_run() -> None:
    scheme = WeightOnly(4, 32)
    (_, used, x), (_, fresh, _) = made("attention", scheme), made("attention", scheme, seed=1)
    with torch.no_grad():
        for own, other in zip(fresh.parameters(), used.parameters(), strict=True):
            own.copy_(other)
    for own, other in zip(fresh.modules(), used.modules(), strict=True):
        if (form := form_of(own)) is not None:
            for name, weight in form.weights.items():
                weight.scale.copy_(form_of(other).weights[name].scale)  # type: ignore[operator, union-attr]
    assert torch.equal(fresh(x), used(x))


def test_layers_of_one_weight_are_saved_once() -> None:
    scheme, first, second = WeightOnly(4, 32), nn.Linear(64, 64), nn.Linear(64, 64)
    second.weight = first.weight
    form = scheme.form(first)
    route_(first, form)
    route_(second, scheme.form(second, {"": form.weights["weight"]}))
    both = nn.Sequential(first, second)
    state = both.state_dict()
    assert state["0.weight"].data_ptr() == state["1.weight"].data_ptr()
    assert both[0]._parameters["weight"] is both[1]._parameters["weight"]
    expected, kept = both(torch.ones(1, 64)), state["0.weight"].clone()
    with torch.no_grad():
        both[0]._parameters["weight"].zero_()  # type: ignore[union-attr]
    assert not torch.equal(both.state_dict()["1.weight"], kept)
    both.load_state_dict({**state, "0.weight": kept, "1.weight": kept})
    assert torch.equal(both(torch.ones(1, 64)), expected)


def test_a_weight_that_was_elsewhere_takes_the_kernels_order_when_it_comes_back() -> None:
    layer, x = nn.Linear(64, 64), torch.randn(2, 64)
    route_(layer, WeightOnly(4, 32).form(layer))
    if not tiles(layer):
        pytest.skip("this CPU has no such kernel")
    state, expected = saved(layer), layer(x).detach()
    other = nn.Linear(64, 64, device="meta")
    route_(other, WeightOnly(4, 32).form(other))
    assert not tiles(other)
    other.to_empty(device="cpu").load_state_dict(state)
    assert tiles(other) and torch.equal(other(x), expected)
