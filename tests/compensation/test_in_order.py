"""Layers are visited in the order of calls, with what they are given in two models."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_compress.compensation.in_order import Visits
from lightning_compress.compensation.layer_rows import matrix_of, output_rows_of, rows_of
from lightning_compress.compensation.runner import Runner, layers_of_
from tests.support.oracles import assert_same_state, hooks, same_random_state, snapshot


def visits(model: nn.Module, batches: Sequence[Any], fitted: nn.Module | None = None, **options: Any) -> Visits:
    """Visits of all layers of a model and of its copy."""
    fitted = copy.deepcopy(model) if fitted is None else fitted
    paths = set(layers_of_(copy.deepcopy(model)))
    return Visits(Runner(model), Runner(fitted), batches, paths, **options)


class Forward(nn.Module):
    """A few layers, and a forward of the test's."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._forward = forward
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self, *args, **kwargs)


def three(**more: nn.Module) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {name: nn.Linear(4, 4) for name in "abc"} | more


def test_the_order_is_that_of_calls_and_inputs_are_those_that_layers_get():
    model = Forward(lambda m, x: m.a(m.c(x).relu()), **three())
    batches = [torch.randn(3, 4), torch.randn(7, 4)]
    found = [(visit.path, [(call.batch, call.reference, call.fitted) for call in visit.calls])
             for visit in visits(model, batches)]  # fmt: skip
    assert [path for path, _ in found] == ["c", "a"]  # `b` isn't called
    for (path, calls), given in zip(found, (batches, [model.c(x).relu() for x in batches]), strict=True):
        assert [number for number, _, _ in calls] == [0, 1], path
        for (_, reference, fitted), x in zip(calls, given, strict=True):
            torch.testing.assert_close(reference, x)
            torch.testing.assert_close(fitted, x)


def test_what_a_visit_has_changed_is_seen_behind_it_in_the_fitted_model_alone():
    model = Forward(lambda m, x: m.b(m.a(x)), **three())
    fitted, x = copy.deepcopy(model), torch.randn(5, 4)
    expected = model.a(x)
    for visit in visits(model, [x], fitted):
        if visit.path == "a":
            visit.fitted.weight.data.mul_(2.0)
            visit.fitted.bias.data.zero_()
        else:
            (call,) = visit.calls
            torch.testing.assert_close(call.reference, expected)
            torch.testing.assert_close(call.fitted, x @ (2 * model.a.weight).mT)
    assert torch.equal(fitted.a.weight, 2 * model.a.weight) and not fitted.a.bias.any()


def test_a_layer_that_is_called_several_times_is_visited_once_with_all_calls():
    model = Forward(lambda m, x: m.b(m.a(m.a(m.c(x)))), **three())
    batches = [torch.randn(3, 4), torch.randn(2, 4)]
    fitted, calls = copy.deepcopy(model), dict[str, Any]()
    for visit in visits(model, batches, fitted):
        calls[visit.path] = [(call.batch, call.fitted) for call in visit.calls]
        if visit.path == "a":
            visit.fitted.weight.data.mul_(0.5)
    assert list(calls) == ["c", "a", "b"]
    for number, x in enumerate(batches):
        seen = [given for batch, given in calls["a"] if batch == number]
        for given, wanted in zip(seen, (model.c(x), model.a(model.c(x))), strict=True):
            torch.testing.assert_close(given, wanted)
        torch.testing.assert_close(calls["b"][number][1], fitted.a(fitted.a(model.c(x))))


def two_views(m: Any, x: Tensor) -> Tensor:
    """A residual network on two views of a sample, and a head on both."""

    def network(x: Tensor) -> Tensor:
        return m.norm((x := m.a(x)) + m.b(x).relu()).tanh()

    return m.c(network(x) + network(x.flip(0) * 2))


def test_a_network_on_two_views_is_walked_once_and_calls_are_those_of_the_network_as_it_is_by_then():
    model = Forward(two_views, **three(norm=nn.BatchNorm1d(4)))
    batches, runs = [torch.randn(3, 4), torch.randn(2, 4)], list[Tensor]()
    fitted = copy.deepcopy(model)

    def run(network: nn.Module, batch: Tensor) -> Tensor:
        runs.append(batch)
        return network(batch)

    paths = set(layers_of_(copy.deepcopy(model)))
    found = list[str]()
    for visit in Visits(Runner(model, run), Runner(fitted, run), batches, paths):
        found.append(visit.path)
        calls = [given for number in range(2) for given in calls_of(fitted, batches[number])[visit.path]]
        for call, given in zip(sorted(visit.calls, key=lambda call: call.batch), calls, strict=True):
            torch.testing.assert_close(call.fitted, given)
        if visit.path != "norm":
            visit.fitted.weight.data.mul_(0.5)
    assert found == ["a", "b", "norm", "c"]
    assert len(runs) == 1 + 2 + 2 * 2 * 2  # what is called; whether calls are apart, before and after; two walks a view


def calls_of(model: nn.Module, batch: Tensor) -> dict[str, list[Tensor]]:
    calls: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        twin = copy.deepcopy(model).eval()
        for path, layer in layers_of_(twin).items():
            layer.register_forward_pre_hook(lambda _, args, path=path: calls.setdefault(path, []).append(args[0]))
        twin(batch)
    return calls


def test_in_each_call_it_is_known_what_the_output_is_added_to():
    def network(m: Any, x: Tensor) -> Tensor:
        return (x := m.c(x)) + m.b(m.a(x).relu())

    model = Forward(lambda m, x: network(m, x) + network(m, x * 2), **three())
    x = torch.randn(3, 4)
    for visit in visits(model, [x], needs_sums=True):
        if visit.path == "b":
            for call, given in zip(visit.calls, (x, x * 2), strict=True):
                assert call.terms is not None
                torch.testing.assert_close(call.terms[0], model.c(given))


def test_code_that_other_values_are_nothing_for_is_walked_as_a_loop_is():
    def picky(m: Any, x: Tensor) -> Tensor:
        y = m.b(m.a(x)).relu()
        if not torch.equal(y, copy.deepcopy(expected).b(expected.a(x)).relu()):
            raise ValueError("no such values")
        return y + m.b(m.a(x * 2))

    model = Forward(picky, **three())
    expected = copy.deepcopy(model)
    assert [len(visit.calls) for visit in visits(model, [torch.randn(3, 4)])] == [2, 2]


def test_a_loop_s_layers_are_met_on_walks_of_their_own():
    model = Forward(lambda m, x: m.a(m.b(m.a(m.b(x).relu())).relu()), **three())
    x, fitted = torch.randn(3, 4), copy.deepcopy(model)
    for visit in visits(model, [x], fitted):
        for call, given in zip(visit.calls, calls_of(fitted, x)[visit.path], strict=True):
            torch.testing.assert_close(call.fitted, given)
        visit.fitted.weight.data.mul_(0.5)


@pytest.mark.parametrize(
    "batch",
    [
        {"x": torch.ones(3, 4), "scale": 2.0},
        [torch.ones(3, 4), torch.zeros(3, dtype=torch.int64)],
        (torch.ones(3, 4),),
    ],
    ids=["dict", "with targets", "tuple"],
)
def test_batches_are_called_as_everywhere(batch: Any):
    model = Forward(lambda m, x, scale=1.0: {"out": m.a(input=x * scale)}, **three())
    (visit,) = visits(model, [batch])
    scale = 2.0 if isinstance(batch, dict) else 1.0
    assert torch.equal(visit.calls[0].fitted, scale * torch.ones(3, 4))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = kind(4, 5, num_layers=2, **options)
        self.head = nn.Linear(self.rnn(torch.ones(3, 2, 4))[0].shape[-1], 2)
        self.eval()

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is None:
            return self.head(self.rnn(x)[0])
        packed = pack_padded_sequence(x, lengths, batch_first=self.rnn.batch_first, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.rnn(packed)[0], batch_first=self.rnn.batch_first)[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_recurrent_layer_is_visited_matrix_by_matrix(kind: type[nn.RNNBase], bidirectional: bool, packed: bool):
    model = Recurrent(kind, bidirectional=bidirectional, batch_first=True)
    x, lengths = torch.randn(3, 6, 4), torch.tensor([4, 6, 2])
    batch = {"x": x, "lengths": lengths} if packed else {"x": x}
    found = {visit.path: visit.calls[0] for visit in visits(model, [batch])}
    suffixes = ["l0", "l0_reverse", "l1", "l1_reverse"] if bidirectional else ["l0", "l1"]
    assert set(found) == {f"rnn.weight_{kind}_{suffix}" for kind in ("ih", "hh") for suffix in suffixes} | {"head"}
    steps = int(lengths.sum()) if packed else 18
    assert len(rows_of(model.head, found["rnn.weight_hh_l0"].fitted)[0]) == steps
    # The last layer: torch's own first layer tells what it was given, and what it had put out before each step.
    first = kind(4, 5, bidirectional=bidirectional, batch_first=True).eval()
    first.load_state_dict({name: value for name, value in model.rnn.state_dict().items() if "_l0" in name})
    seen = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False) if packed else x
    out = first(seen)[0]
    data = out.data if packed else out.transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(found["rnn.weight_ih_l1"].fitted, data)
    if not packed:
        states = out[..., :5].transpose(0, 1)
        before = torch.cat([torch.zeros_like(states[:1]), states[:-1]]).flatten(0, 1)
        torch.testing.assert_close(found["rnn.weight_hh_l0"].fitted, before)
        if bidirectional:
            states = out[..., 5:].transpose(0, 1)
            after = torch.cat([states[1:], torch.zeros_like(states[:1])]).flatten(0, 1)
            torch.testing.assert_close(found["rnn.weight_hh_l0_reverse"].fitted, after)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kdim", [None, 3])
def test_attention_is_visited_projection_by_projection(batch_first: bool, kdim: int | None):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(6, 2, batch_first=batch_first, kdim=kdim)
    model = Forward(lambda m, x, y: m.attend(x, y, x)[0], attend=layer)
    x, y = torch.randn(4, 4, 6), torch.randn(4, 4, kdim or 6)
    found = {visit.path: visit for visit in visits(model, [{"x": x, "y": y}])}
    names = ["in_proj_weight.0", "in_proj_weight.1", "in_proj_weight.2"]
    names = names if kdim is None else ["q_proj_weight.0", "k_proj_weight.1", "v_proj_weight.2"]
    assert list(found) == [*(f"attend.{name}" for name in names), "attend.out_proj"]
    for name, given in zip(names, (x, y, x), strict=True):
        visit = found[f"attend.{name}"]
        torch.testing.assert_close(visit.calls[0].fitted.reshape(given.shape).sum((0, 1)), given.sum((0, 1)))
        visit.fitted.weight.data.fill_(0.5)  # its memory is the layer's
    out = found["attend.out_proj"]
    wanted = output_rows_of(out.fitted, model(x, y))
    got = rows_of(out.fitted, out.calls[0].fitted) @ matrix_of(out.fitted).mT + out.fitted.bias
    assert sorted(map(tuple, got[0].detach().round(decimals=3).tolist())) == sorted(
        map(tuple, wanted.detach().round(decimals=3).tolist())
    )


def test_a_transformer_layer_is_visited_without_its_fast_path():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    found = {visit.path: visit.calls[0] for visit in visits(model, [x])}
    assert list(found)[-3:] == ["self_attn.out_proj", "linear1", "linear2"] and len(found) == 6
    torch.testing.assert_close(found["linear1"].fitted, model.norm1(x + model.self_attn(x, x, x)[0]))


class Keeps(nn.Module):
    """Keeps a list, a count and a buffer from call to call, as decoders with caches do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("cache", torch.zeros(4))
        self.list: list[Tensor] = []
        self.count = 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            self.list.append(self.a(x))
            self.count += 1
        self.cache += self.list[-1].mean(0)
        return self.b(torch.stack(self.list).sum(0) + self.cache)


class Noisy(nn.Linear):
    """Draws in evaluation too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand_like(x)


def test_both_models_get_the_same_draws_and_each_batch_its_own():
    model = nn.Sequential(Noisy(4, 4), nn.Linear(4, 4)).eval()
    batches = [torch.zeros(2, 4)] * 3
    with same_random_state():
        (visit,) = Visits(Runner(model), Runner(copy.deepcopy(model)), batches, ["1"])
    given = [call.fitted for call in visit.calls]
    assert all(call.reference is not None and call.reference.equal(call.fitted) for call in visit.calls)
    assert len(given) == 3 and not any(given[0].equal(other) for other in given[1:])


def test_what_a_module_keeps_from_call_to_call_stays_within_a_batch():
    model = Keeps()
    batches = [torch.randn(3, 4), torch.randn(5, 4)]
    fitted = copy.deepcopy(model)
    found = {visit.path: visit.calls for visit in visits(model, batches, fitted)}
    assert [len(calls) for calls in found.values()] == [4, 2]
    for call, x in zip(found["b"], batches, strict=True):
        torch.testing.assert_close(call.reference, 2 * model.a(x) + model.a(x).mean(0))
    for module in (model, fitted):
        assert module.list == [] and module.count == 0 and not module.cache.any()


def test_batches_that_take_another_way_tell_what_they_can():
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(m.a(x)) if x.sum() > 0 else m.c(m.b(x))

    model = Forward(forward, **three())
    batches = [torch.ones(2, 4), -torch.ones(3, 4), torch.ones(4, 4)]
    found = {visit.path: [(call.batch, call.fitted) for call in visit.calls] for visit in visits(model, batches)}
    assert list(found) == ["a", "b"]  # the order of the first batch
    assert [number for number, _ in found["a"]] == [0, 2]
    assert sorted(number for number, _ in found["b"]) == [0, 1, 2]


def test_a_batch_whose_way_depends_on_what_was_changed_is_left_alone_from_there_on():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(m.c(y)) if y.abs().sum() > 0 else m.c(m.b(y))

    model = Forward(forward, **three())
    paths = []
    for visit in visits(model, [torch.ones(2, 4)]):
        paths.append(visit.path)
        visit.fitted.weight.data.zero_()
        visit.fitted.bias.data.zero_()
    assert paths == ["a"]


def test_lengths_may_differ_from_batch_to_batch():
    torch.manual_seed(0)
    model = Forward(lambda m, x: m.norm(m.conv(x)).mean(2), conv=nn.Conv1d(2, 3, 3), norm=nn.BatchNorm1d(3))
    found = {visit.path: visit.calls for visit in visits(model, [torch.randn(2, 2, 9), torch.randn(1, 2, 30)])}
    assert [call.fitted.shape[2] for call in found["norm"]] == [7, 28]


def test_nothing_is_left_behind():
    model = Forward(lambda m, x: m.b(m.drop(m.norm(m.a(x) + torch.rand(()) + np.random.rand()))),
                    **three(norm=nn.BatchNorm1d(4), drop=nn.Dropout()))  # fmt: skip
    model.train()
    fitted = copy.deepcopy(model)
    before = [(snapshot(m), hooks(m), [inner.training for inner in m.modules()]) for m in (model, fitted)]
    threads, batches = threading.active_count(), [torch.randn(3, 4), torch.randn(2, 4)]
    with same_random_state():
        for visit in visits(model, batches, fitted, needs_sums=True):
            assert not visit.fitted.training
            break  # given up on the way
        for visit in visits(model, batches, fitted, needs_sums=True):
            assert visit.calls
    for module, (state, hooked, modes) in zip((model, fitted), before, strict=True):
        assert_same_state(snapshot(module), state)
        assert hooks(module) == hooked and [inner.training for inner in module.modules()] == modes
    assert threading.active_count() == threads


def test_it_works_in_inference_mode_and_what_is_changed_there_stays():
    model = Forward(lambda m, x: m.b(m.a(x)), **three())
    fitted = copy.deepcopy(model)
    with torch.inference_mode():
        for visit in visits(model, [torch.randn(3, 4)], fitted):
            visit.fitted.weight.data.mul_(0.0)
    assert not fitted.a.weight.any() and not fitted.b.weight.any()
    assert fitted(torch.ones(1, 4)).requires_grad


def test_an_error_of_the_model_comes_out_and_leaves_no_thread():
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        if len(x) == 3:
            raise LookupError("of the user's")
        return m.b(y)

    model, threads = Forward(forward, **three()), threading.active_count()
    with pytest.raises(LookupError, match="of the user's"):
        for _ in visits(model, [torch.ones(2, 4), torch.ones(3, 4)]):
            pass
    assert threading.active_count() == threads
