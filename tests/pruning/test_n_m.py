"""N:M: groups along the input dimension, against a slow oracle of one group at a time, and in real fits."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_compress import CompressionError, ScheduledPruning, Targets, Window, prune_
from lightning_compress.pruning import n_m
from lightning_compress.pruning.n_m import Pattern
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state, snapshot


def groups_of(tensor: Tensor, m: int, dim: int) -> list[list[Any]]:
    """Every M consecutive entries along `dim`, found by index."""
    dim %= tensor.dim()
    found = []
    for rest in product(*(range(size) for i, size in enumerate(tensor.shape) if i != dim)):
        for start in range(0, tensor.shape[dim], m):
            places = [(*rest[:dim], k, *rest[dim:]) for k in range(start, start + m)]
            found.append([tensor[place].item() for place in places])
    return found


def obvious(scores: list[float], alive: list[bool], drop: int, signed: bool = False) -> list[bool]:
    """One group: the pruned first, then the smallest; of equal ones the first. NaN is above all."""

    def key(k: int) -> tuple[Any, ...]:
        if not alive[k]:
            return (False, False, 0.0, k)
        value = scores[k] if signed else abs(scores[k])
        return (True, math.isnan(value), 0.0 if math.isnan(value) else value, k)

    goes = set(sorted(range(len(scores)), key=key)[:drop])
    return [k in goes for k in range(len(scores))]


def check(pattern: Pattern, scores: Tensor, mask: Tensor, dim: int, signed: bool = False) -> None:
    before = snapshot([scores, mask])
    goes = pattern.smallest(scores, mask, dim, signed)
    assert_same_state(before, snapshot([scores, mask]))
    assert goes.shape == scores.shape and goes.dtype == torch.bool
    found, values, alive = (groups_of(tensor, pattern.m, dim) for tensor in (goes, scores, mask))
    for got, group, stays in zip(found, values, alive, strict=True):
        assert got == obvious(group, stays, pattern.m - pattern.n, signed), (group, stays)


def random_case(shape: tuple[int, ...], seed: int, ties: bool, share: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = (
        torch.randint(-3, 4, shape, generator=generator).float() if ties else torch.randn(shape, generator=generator)
    )
    return scores, torch.rand(shape, generator=generator) < share


PATTERNS = [(n, m) for m in range(2, 9) for n in range(1, m)]


@pytest.mark.parametrize(("n", "m"), PATTERNS, ids=lambda value: str(value))
def test_every_group_loses_its_smallest(n: int, m: int) -> None:
    for seed, (dim, ties, share, signed) in enumerate(product([0, 1], [False, True], [0.6, 1.1], [False, True])):
        shape = (2 * m, 3) if dim == 0 else (3, 2 * m)
        check(Pattern(n, m), *random_case(shape, seed, ties, share), dim, signed)


@given(
    nm=st.sampled_from(PATTERNS),
    rest=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    dim=st.integers(0, 1),
    seed=st.integers(0, 999),
    ties=st.booleans(),
    share=st.sampled_from([0.2, 0.7, 1.1]),
    signed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
@settings(max_examples=100)
def test_convolution_shapes(
    nm: tuple[int, int], rest: list[int], dim: int, seed: int, ties: bool, share: float, signed: bool, dtype: Any
) -> None:
    shape = (*rest[:dim], 2 * nm[1], *rest[dim:])
    scores, mask = random_case(shape, seed, ties, share)
    check(Pattern(*nm), scores.to(dtype), mask, dim, signed)


@pytest.mark.parametrize(("m", "share"), [(256, 1.1), (257, 1.1), pytest.param(300, 0.8, marks=pytest.mark.slow)])
def test_groups_of_more_entries_than_a_byte_can_count(m: int, share: float) -> None:
    check(Pattern(1, m), *random_case((1, 2 * m), 0, True, share), 1)


def test_groups_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(n_m, "_CHUNK", 5)
    check(Pattern(2, 4), *random_case((7, 12), 0, True, 0.8), 1)


def test_an_entry_at_infinity_goes_last() -> None:
    scores = torch.tensor([[math.inf, -math.inf, 1.0, 0.0]])
    check(Pattern(2, 4), scores, torch.tensor([[True, True, False, False]]), 1)
    check(Pattern(1, 4), scores, torch.tensor([[True, True, True, True]]), 1)
    check(Pattern(1, 4), scores, torch.tensor([[True, True, True, True]]), 1, signed=True)


def test_what_is_pruned_already_goes_before_an_entry_at_minus_infinity() -> None:
    scores = torch.tensor([[math.inf, -math.inf, 1.0, 0.0]])
    check(Pattern(2, 4), scores, torch.tensor([[True, True, False, False]]), 1, signed=True)


@pytest.mark.parametrize("nm", [(1, 3), (2, 3), (2, 4)], ids=str)
def test_nan_ranks_above_all_and_the_count_of_a_group_stays_exact(nm: tuple[int, int]) -> None:
    for at in product([1.0, -2.0, math.nan], repeat=nm[1]):
        scores = torch.tensor([at])
        goes = Pattern(*nm).smallest(scores, torch.ones_like(scores, dtype=torch.bool), 1)
        assert int(goes.sum()) == nm[1] - nm[0], at
        check(Pattern(*nm), scores, torch.ones_like(scores, dtype=torch.bool), 1)


@pytest.mark.parametrize(
    "text", ["", "2", "2:", ":4", "4:4", "5:4", "0:4", "-1:4", "2:4:8", "a:b", "1.5:4", "2 of 4", "2/4", "²:4", "0:0"]
)
def test_patterns_that_are_none(text: str) -> None:
    with pytest.raises(CompressionError, match=r"`n_m` must be 'N:M' with 0 < N < M\. Received: n_m="):
        Pattern.parse(text)
    with pytest.raises(CompressionError, match="`n_m` must be"):
        ScheduledPruning(n_m=text)


def test_patterns_that_are() -> None:
    assert Pattern.parse("1:16") == Pattern(1, 16)
    assert Pattern.parse("7:8") == Pattern(7, 8)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sparsity": ({"sparsity": 0.5}, "`sparsity` must be left out: n_m='2:4' fixes it"),
    "overrides": ({"overrides": {"body": 0.5}}, "`overrides` must be left out"),
    "cap": ({"max_layer_sparsity": 0.9}, "`max_layer_sparsity` must be left out"),
    "random": ({"method": "random_unstructured"}, "`n_m` must be left out with method='random_unstructured'"),
    "structured": ({"method": "ln_structured"}, "`n_m` must be left out with method='ln_structured'"),
    "user's": ({"method": "tests.pruning.rules.LargestFirst"}, "`n_m` must be left out with method="),
    "masks": ({"method": "custom_from_mask", "mask_file": "x"}, "`n_m` must be left out with method='custom_from"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_with_groups(name: str) -> None:
    arguments, message = REFUSED[name]
    with pytest.raises(CompressionError, match=message):
        ScheduledPruning(n_m="2:4", **arguments)
    arguments.pop("mask_file", None)
    model = nn.Sequential(nn.Linear(8, 8))
    before = snapshot(model)
    with pytest.raises(CompressionError, match=message):
        prune_(model, n_m="2:4", **arguments)
    assert_same_state(before, model)


class WatchGroups(Callback):
    """At every batch end: did masks only grow, and has no group lost more than it may?"""

    def __init__(self, pruning: ScheduledPruning, n: int, m: int) -> None:
        self.pruning, self.n, self.m = pruning, n, m
        self.before: dict[str, Tensor] = {}
        self.pruned: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        for name, mask in self.pruning.masks.items():
            assert not (mask & ~self.before.get(name, mask)).any(), f"{name}: a weight came back"
            assert all(sum(group) >= self.n for group in groups_of(mask, self.m, 1)), name
            assert not pl_module.get_parameter(name)[~mask].any()
        self.before = {name: mask.clone() for name, mask in self.pruning.masks.items()}
        self.pruned.append(sum(int((~mask).sum()) for mask in self.pruning.masks.values()))


@pytest.mark.parametrize(
    ("n", "m", "method", "scope"),
    [
        (2, 4, "l1_unstructured", "global"),
        (1, 4, "l1_unstructured", "layer"),
        (3, 8, "lamp", "global"),
        (2, 4, "taylor", "layer"),
        (5, 16, "taylor", "global"),
        (2, 4, "movement", "global"),
    ],
)
def test_gradual_to_exactly_n_of_m(n: int, m: int, method: str, scope: Any) -> None:
    module = Classifier()
    pruning = ScheduledPruning(method, n_m=f"{n}:{m}", scope=scope, window=Window(0.2, 0.9))
    watch = WatchGroups(pruning, n, m)
    quiet_trainer(max_epochs=3, limit_val_batches=0, callbacks=[pruning, watch]).fit(module, TinyData())
    for weight in (module.body.weight, module.head.weight):
        assert {sum(value == 0 for value in group) for group in groups_of(weight, m, 1)} == {m - n}
    assert len(set(watch.pruned)) > 5 and watch.pruned[0] == 0
    assert watch.pruned[-1] == 640 * (m - n) // m


def test_regrowing_within_groups_ends_exactly_too() -> None:
    module, pruning = Classifier(), ScheduledPruning(n_m="2:4", regrow=True, window=Window(0.1, 0.9))
    quiet_trainer(max_epochs=3, limit_val_batches=0, callbacks=[pruning]).fit(module, TinyData())
    assert all(sum(group) == 2 for mask in pruning.masks.values() for group in groups_of(mask, 4, 1))


def test_what_is_left_of_a_group_is_larger_than_what_went() -> None:
    module = Classifier()
    before = module.body.weight.detach().clone()
    masks = prune_(module, n_m="2:4")
    for values, alive in zip(groups_of(before, 4, 1), groups_of(masks["body.weight"], 4, 1), strict=True):
        stays = [abs(value) for value, stay in zip(values, alive, strict=True) if stay]
        goes = [abs(value) for value, stay in zip(values, alive, strict=True) if not stay]
        assert len(goes) == 2 and max(goes) <= min(stays)


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_groups_run_along_the_inputs_of_a_transposed_convolution(kind: Any) -> None:
    layer = kind(8, 3, 2)
    model = nn.Sequential(layer)
    prune_(model, n_m="1:4")
    assert layer.weight.shape[0] == 8
    assert {sum(value != 0 for value in group) for group in groups_of(layer.weight, 4, 0)} == {1}


@pytest.mark.parametrize(("make", "dim"), [(lambda: nn.Conv2d(8, 3, 3), 1), (lambda: nn.Conv1d(16, 4, 2, groups=2), 1)])
def test_groups_run_along_the_inputs_of_a_convolution(make: Any, dim: int) -> None:
    layer = make()
    prune_(nn.Sequential(layer), n_m="2:4")
    assert {sum(value != 0 for value in group) for group in groups_of(layer.weight, 4, dim)} == {2}


class Odd(Classifier):
    """16 inputs divide by four, the head's 33 don't."""

    def __init__(self) -> None:
        super().__init__(hidden=33)


def test_layers_whose_inputs_do_not_divide_stay_dense_and_are_listed() -> None:
    module, pruning = Odd(), ScheduledPruning(n_m="2:4", window=Window(0.2))
    quiet_trainer(limit_val_batches=0, callbacks=[pruning]).fit(module, TinyData())
    assert list(pruning.masks) == ["body.weight"]
    assert (module.body.weight == 0).sum() == 33 * 8
    assert not (module.head.weight == 0).any()
    assert "`head.weight` is not pruned: 33 inputs are no multiple of 4" in pruning.report_notes()


def test_no_layer_that_divides_is_an_error_before_anything_changes() -> None:
    module = Odd()
    before = snapshot(module)
    pruning = ScheduledPruning(n_m="2:4", targets=Targets(include=["head"]))
    with pytest.raises(CompressionError, match="`n_m` must have layers.*head.weight: 33 inputs are no multiple of 4"):
        quiet_trainer(callbacks=[pruning]).fit(module, TinyData())
    assert_same_state(before, module)
    with pytest.raises(CompressionError, match="`n_m` must have layers"):
        prune_(module, n_m="2:7")
    assert_same_state(before, module)
