"""The part of `report.html` on single layers: bytes, bits, zeros, rounding errors, and what each costs alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning_compress.report.facts import LayerSensitivity, Sensitivity
from lightning_compress.report.layers import LayerPair, bits_of, largest, paired, saved, size_of, zeros
from lightning_compress.report.markup import Markup, element, escaped, folded, joined, table
from lightning_compress.report.ratios import Row
from lightning_compress.report.render import on_one_line
from lightning_compress.report.storage import LayerMeasurement
from lightning_compress.report.svg import bars

_MOST_LAYERS, _OPEN_LAYERS = 400, 40
_TOGETHER = "\N{NO-BREAK SPACE}"


def layers_section(base: Row, row: Row | None, sensitivity: Sensitivity | None) -> Markup:
    """Return what became of each layer, as a picture of the largest and as a table."""
    if row is None or not (base.measurement.layers or row.measurement.layers):
        return Markup("")
    pairs = paired(base.measurement.layers, row.measurement.layers)
    names = on_one_line(base.name), on_one_line(row.name)
    keys = [(element("span", class_=f"key {kind}"), name) for kind, name in zip(("base", "judged"), names, strict=True)]
    caption = element("figcaption", "Bytes of the largest layers: ", *(part for key in keys for part in key))
    title, description = f"Bytes of each layer, {names[0]} above {names[1]}", "The table has the same numbers."
    picture = bars("layers-picture", title, description, largest(pairs))
    by_size = sorted(pairs, key=lambda pair: -max(size_of(pair.before), size_of(pair.after)))
    kept = {pair.name for pair in by_size[:_MOST_LAYERS]}
    listed = [pair for pair in pairs if pair.name in kept]
    drawn = _layer_table(listed, names, row, sensitivity)
    if len(listed) > _OPEN_LAYERS:
        which = f"All {len(pairs)}" if len(listed) == len(pairs) else f"The largest {len(listed)} of {len(pairs)}"
        drawn = folded(f"{which} layers", drawn)
    return joined([*_agreement(row), element("div", element("figure", caption, picture), drawn, class_="beside")])


def _agreement(row: Row) -> Iterable[Markup]:
    quantized = row.measurement.quantized
    if quantized is None or quantized.cosine is None:
        return
    said = f"Against the same weights in float the outputs agree by a cosine of {quantized.cosine:.4f}"
    if quantized.same_class is not None:
        said += f", and the largest output is the same for {quantized.same_class:.1%} of samples"
    batches = f"{quantized.batches} batch{'' if quantized.batches == 1 else 'es'}"
    yield element("p", f"{said} ({batches}).")


def _layer_table(
    pairs: Sequence[LayerPair], names: tuple[str, str], row: Row, sensitivity: Sensitivity | None
) -> Markup:
    errors = row.measurement.quantized.errors if row.measurement.quantized else {}
    costs = sensitivity.worst() if sensitivity else {}
    levels = {cost.level for cost in costs.values()}
    columns: dict[str, list[str]] = {
        "Layer": [_layer(pair) for pair in pairs],
        "Bits": [_arrow(*(_bits(layer) for layer in pair[1:])).replace(" ", _TOGETHER) for pair in pairs],
        f"Bytes, {names[0]} → {names[1]}": [_arrow(*(f"{size_of(layer):,}" for layer in pair[1:])) for pair in pairs],
        "Saved": [saved(pair) for pair in pairs],
        "Zeros": [f"{zeros(pair.after)}%" for pair in pairs],
        "Rounding error": [f"{errors[pair.name]:.2%}" if errors.get(pair.name) is not None else "–" for pair in pairs],
        "Sensitivity": [_cost(costs.get(pair.name), len(levels) > 1) for pair in pairs],
    }
    optional = {"Rounding error": errors, "Sensitivity": costs}
    kept = {name: cells for name, cells in columns.items() if optional.get(name, True)}
    drawn = table("layers-table", "What became of each layer", list(kept), zip(*kept.values(), strict=True))
    said = "Rounding error: what rounding to int8 changes of what the layer gives, as a share of it. " if errors else ""
    if sensitivity:
        level = f" at {levels.pop()}" if len(levels) == 1 else ""
        said += f"Sensitivity: how far the metric falls from {sensitivity.metric:.4g} with this layer alone{level}."
    return element("div", drawn, *([element("p", said, class_="quiet")] if said else []))


def _arrow(before: str, after: str) -> str:
    return before if before == after else f"{before}{_TOGETHER}→ {after}"


def _bits(layer: LayerMeasurement | None) -> str:
    return "–" if layer is None else str(bits_of(layer.dtype) or layer.dtype)


def _layer(pair: LayerPair) -> Markup:
    kinds = dict.fromkeys(layer.type for layer in pair[1:] if layer)
    return joined([element("code", pair.name or "(model)"), element("small", " → ".join(kinds))], " ")


def _cost(row: LayerSensitivity | None, several: bool) -> Markup:
    if row is None or (row.drop is None and row.score is None):
        return escaped("–")
    error = f" ± {row.drop_error:.2g}" if row.drop_error is not None else ""
    value = f"score {row.score:.2g}" if row.drop is None else f"{row.drop:.4g}{error}"
    return joined([value, *([element("small", f"at {row.level}")] if several else [])])
