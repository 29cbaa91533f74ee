"""Weights of few bits as they are stored: bytes, copies, files."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress import (
    GPTQ,
    NF4,
    CompressionError,
    WeightOnly,
    load_compressed,
    measure,
    quantize,
    save_compressed,
)
from lightning_compress.quantization.convert import form_name, record_of
from lightning_compress.quantization.layers.schemes import Packed
from tests.quantization.layers.packed_cases import CASES, FEW, build, fully, held, storages
from tests.support.few_bits import rounded
from tests.support.oracles import assert_same_state, snapshot

# What is stored.

THEORY: list[tuple[Packed, float]] = [
    (WeightOnly(8), 8 + 16 / 1024),
    (WeightOnly(4, 128), 4 + 16 / 128),
    (WeightOnly(4, 32), 4 + 16 / 32),
    (WeightOnly(4, 128, symmetric=False), 4 + 20 / 128),
    (WeightOnly(3, 128, symmetric=False), 3 + 19 / 128),
    (WeightOnly(2, 64), 2 + 16 / 64),
    (WeightOnly(2, None, symmetric=False), 2 + 18 / 1024),
    (NF4(64), 4 + 8 / 64),
    (NF4(128), 4 + 8 / 128),
]


@pytest.mark.parametrize(("scheme", "bits"), THEORY, ids=str)
def test_bytes_in_memory_and_on_disk_are_within_3_percent_of_the_theory(
    scheme: Packed, bits: float, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    quantized = quantize(model, scheme)
    theory = 1024 * 1024 * bits / 8
    in_memory = sum(tensor.nbytes for tensor in quantized.state_dict().values())
    assert in_memory == pytest.approx(theory, rel=0.03)
    assert [parameter.dtype for parameter in quantized.parameters()] == [torch.uint8]
    save_compressed(quantized, str(tmp_path / "small.ckpt"))
    assert (tmp_path / "small.ckpt").stat().st_size == pytest.approx(theory, rel=0.03)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "make", [lambda: nn.Conv2d(64, 32, 3), lambda: nn.Embedding(300, 256)], ids=["conv", "embedding"]
)
def test_bytes_of_other_layers(make: Callable[[], nn.Module], symmetric: bool) -> None:
    model = nn.Sequential(make())
    weight: Any = model[0].weight
    quantized = fully(model, WeightOnly(4, 64, symmetric))
    got = sum(value.nbytes for key, value in quantized.state_dict().items() if "bias" not in key)
    assert got == pytest.approx(weight.numel() * (4 + (16 if symmetric else 20) / 64) / 8, rel=0.03)


@pytest.mark.parametrize("scheme", [WeightOnly(8), NF4(8), WeightOnly(3, symmetric=False)], ids=str)
def test_measured_as_what_it_stores(scheme: Packed) -> None:
    model, batch = build("linear")
    with torch.no_grad():
        model[0].weight[:5] = 0.0
    quantized = fully(model, scheme)
    before, after = (measure(one, batch["input"], batch_sizes=[1], max_seconds=0.01) for one in (model, quantized))
    assert after.parameters == before.parameters == 24 * 20 + 20 + 20 * 7
    zeros = sum(int((parameter == 0).sum()) for parameter in rounded(model, quantized).parameters())
    assert after.parameters - after.nonzeros == zeros >= 5 * 24
    assert [layer.name for layer in after.layers] == [layer.name for layer in before.layers] == ["0", "2"]
    assert sum(layer.size_bytes for layer in after.layers) == sum(v.nbytes for v in quantized.state_dict().values())
    assert after.macs == before.macs == 24 * 20 + 20 * 7


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(64, 64, 3, groups=64), lambda: nn.Conv2d(3, 64, 3)])
@pytest.mark.parametrize("bits", [8, 4])
def test_short_rows_waste_little(make: Callable[[], nn.Module], bits: int) -> None:
    model = nn.Sequential(make())
    columns = model[0].weight.flatten(1).shape[1]
    quantized = fully(model, WeightOnly(bits))
    got = sum(value.nbytes for key, value in quantized.state_dict().items() if "bias" not in key)
    assert got <= 64 * (-(-columns * bits // 8) + 2)  # whole bytes in each row


def test_gptq_is_stored_as_rounding_to_the_nearest_is() -> None:
    model, batch = build("linear")
    for options in ({}, {"symmetric": False}):
        a = fully(model, GPTQ(3, 8, **options), batch).state_dict()
        b = fully(model, WeightOnly(3, 8, **options)).state_dict()
        assert {key: (v.shape, v.dtype) for key, v in a.items()} == {key: (v.shape, v.dtype) for key, v in b.items()}
        assert any(not torch.equal(a[key], b[key]) for key in a)


# Copies and files.


@pytest.mark.parametrize("scheme", FEW, ids=str)
def test_deep_copies_and_pickles(scheme: Packed) -> None:
    for case in ("encoder", "conv2d", "embedding"):
        model, batch = build(case)
        quantized = fully(model, scheme, batch)
        expected = quantized(**batch)
        twin = copy.deepcopy(quantized)
        again = pickle.loads(pickle.dumps(quantized))
        assert torch.equal(twin(**batch), expected) and torch.equal(again(**batch), expected)
        assert storages(twin).isdisjoint(storages(quantized))
        with torch.no_grad():
            for tensor in held(twin):
                tensor.zero_()
        assert not torch.equal(twin(**batch), expected)
        assert torch.equal(quantized(**batch), expected)


@pytest.mark.parametrize("scheme", FEW, ids=str)
def test_state_dicts_have_the_users_keys_for_all_that_is_float_and_load_strictly(scheme: Packed) -> None:
    (model, batch), (other, _) = build("encoder"), build("encoder", seed=1)
    quantized, target = fully(model, scheme, batch), fully(other, scheme, batch)
    state = quantized.state_dict()
    names, stored = set(model.state_dict()), {key for key, value in state.items() if value.dtype == torch.uint8}
    assert names <= set(state)
    assert stored & names == {name for name, value in model.named_parameters() if value.dim() > 1}
    assert all(any(key.startswith(f"{name}_") for name in stored) for key in set(state) - names)
    assert not torch.equal(quantized(**batch), target(**batch))
    target.load_state_dict(state, strict=True)
    assert torch.equal(quantized(**batch), target(**batch))
    assert f"out_features=5, bias=True, weight={scheme.bits} bits)" in repr(quantized)


@pytest.mark.parametrize("case", [case for case in CASES if case != "shared"])
@pytest.mark.parametrize("scheme", FEW, ids=str)
def test_files_load_bit_equal_into_a_fresh_model(scheme: Packed, case: str, tmp_path: Path) -> None:
    model, batch = build(case)
    quantized = fully(model, scheme, batch)
    save_compressed(quantized, str(tmp_path / "few.ckpt"))
    fresh, _ = build(case, seed=1)
    loaded = load_compressed(str(tmp_path / "few.ckpt"), fresh)
    assert loaded is fresh and form_name(loaded) == "converted"
    assert record_of(loaded) == record_of(quantized)
    assert_same_state(quantized, loaded)
    with torch.no_grad():
        got, expected = loaded.eval()(**batch), quantized(**batch)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    # And once more, from what was loaded.
    save_compressed(loaded, str(tmp_path / "again.ckpt"))
    assert_same_state(load_compressed(str(tmp_path / "again.ckpt"), build(case, seed=2)[0]), quantized)


FRESH = """
import sys, torch
torch.set_num_threads(1)
from tests.quantization.layers.packed_cases import FEW, build
from lightning_compress import load_compressed
for index in range(len(FEW)):
    for case in ("encoder", "tied", "conv2d"):
        model, batch = build(case, seed=3)
        batch, expected = torch.load(f"{index}_{case}_expected.pt", weights_only=True)
        got = load_compressed(f"{index}_{case}.ckpt", model).eval()(**batch)
        assert torch.equal(got, expected), (index, case)
print("equal")
"""


@pytest.mark.slow
def test_a_fresh_process_computes_the_same(tmp_path: Path) -> None:
    for index, scheme in enumerate(FEW):
        for case in ("encoder", "tied", "conv2d"):
            model, batch = build(case)
            quantized = fully(model, scheme, batch)
            save_compressed(quantized, str(tmp_path / f"{index}_{case}.ckpt"))
            torch.save([batch, quantized(**batch).detach()], tmp_path / f"{index}_{case}_expected.pt")
    command = [sys.executable, "-W", "ignore", "-c", FRESH]
    environment = {"PYTHONPATH": str(Path(__file__).parents[3]), "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.parametrize(
    ("saved", "fresh"),
    [
        (nn.Linear(24, 8), nn.Linear(24, 9)),
        (nn.Linear(24, 8), nn.Linear(40, 8)),
        # As many bytes and as many scales, but other columns.
        (nn.Linear(24, 8), nn.Linear(20, 8)),
        (nn.Conv2d(2, 4, (2, 3)), nn.Conv2d(2, 4, (3, 2))),
        (nn.Linear(24, 8), nn.Conv1d(24, 8, 1)),
        (nn.Linear(24, 8), nn.Linear(24, 8, bias=False)),
        (nn.Linear(24, 8), nn.Sequential(nn.Tanh(), nn.Linear(24, 8))),
    ],
    ids=str,
)
@pytest.mark.parametrize("scheme", [WeightOnly(4), NF4(32)], ids=str)
def test_a_file_of_another_model_is_an_error_that_changes_nothing(
    scheme: Packed, saved: nn.Module, fresh: nn.Module, tmp_path: Path
) -> None:
    save_compressed(fully(nn.Sequential(saved), scheme), str(tmp_path / "few.ckpt"))
    model = nn.Sequential(copy.deepcopy(fresh))
    before, had = snapshot(model), [set(vars(module)) for module in model.modules()]
    with pytest.raises(CompressionError, match="`path` must hold a checkpoint of this model"):
        load_compressed(str(tmp_path / "few.ckpt"), model)
    assert_same_state(before, model)
    assert [set(vars(module)) for module in model.modules()] == had
