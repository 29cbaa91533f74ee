from __future__ import annotations

from dataclasses import replace

from lightning_compress.report import compare
from lightning_compress.report.layers import LayerPair, became, largest, paired, short_name, size_of
from lightning_compress.report.plots import plot_report
from lightning_compress.report.storage import LayerMeasurement
from tests.report.test_compare import INT8, LARGE
from tests.report.test_plots import PNG


def layers(count: int, size_bytes: int = 400) -> tuple[LayerMeasurement, ...]:
    names = [f"backbone.stage.with.a.very.long.name.block{index}.convolution" for index in range(count)]
    return tuple(
        LayerMeasurement(name, "Conv2d", 100, 50, size_bytes + index, "float32") for index, name in enumerate(names)
    )


def test_many_layers_are_summed_up_as_others() -> None:
    before, after = layers(30), layers(30, 100)
    pairs = largest(paired(before, after))
    assert len(pairs) == 18
    assert pairs[-1].name == "13 others"
    assert sum(size_of(pair.before) for pair in pairs) == sum(layer.size_bytes for layer in before)
    assert sum(size_of(pair.after) for pair in pairs) == sum(layer.size_bytes for layer in after)
    assert [short_name(pair.name)[-12:] for pair in pairs[:2]] == [".convolution"] * 2
    assert all(len(short_name(pair.name)) <= 30 for pair in pairs)


def test_small_layers_that_vanish_are_one_pair_that_is_gone(tmp_path) -> None:
    # As an int8 network of convolutions and BatchNorms that were folded into them.
    norms = tuple(replace(one, name=f"norm{index}", size_bytes=80) for index, one in enumerate(layers(10)))
    before, after = (*layers(10), *norms), layers(10, 100)
    last = largest(paired(before, after))[-1]
    assert (last.name, became(last)) == ("3 others", "gone")
    rows = {"float": replace(LARGE, layers=before), "int8": replace(INT8, layers=after)}
    assert plot_report(compare(rows), tmp_path / "report.png").read_bytes()[:4] == PNG


def test_removed_and_new_layers_are_kept() -> None:
    pairs = paired(layers(2), layers(3)[1:])
    assert [(size_of(pair.before), size_of(pair.after)) for pair in pairs] == [(400, 0), (401, 401), (0, 402)]
    assert [became(pair).split(",")[0] for pair in pairs] == ["gone", "same", "new"]


def test_only_a_layer_of_zeros_is_all_zeros() -> None:
    some, none = (LayerMeasurement("x", "Linear", 1000, nonzeros, 4, "float32") for nonzeros in (1, 0))
    assert became(LayerPair("x", some, some)) == "same, 99% zeros"
    assert became(LayerPair("x", some, none)) == "same, 100% zeros"
