"""The part of `report.html` on files for other runtimes: proof, what runs in int8, and how long it takes there."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_compress.messages import by_reason, named
from lightning_compress.report.facts import FileFacts
from lightning_compress.report.markup import Markup, element, escaped, joined, prose, table, terms
from lightning_compress.report.ratios import Row
from lightning_compress.report.render import factor, on_one_line


def files_section(rows: Sequence[Row]) -> Markup:
    """Return what is known of each file; nothing where none was written."""
    files = [(row, row.measurement.file) for row in rows if row.measurement.file is not None]
    return joined(_file(number, row, facts) for number, (row, facts) in enumerate(files) if facts is not None)


def _file(number: int, row: Row, facts: FileFacts) -> Markup:
    said = [
        ("For", f"{facts.target}, run in {facts.runtime}" if facts.target != facts.runtime else facts.runtime),
        ("Size", f"{row.measurement.size_bytes:,} bytes"),
        ("Agrees with the model", _parity(facts)),
        ("Runs in int8", _int8(facts)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in facts.versions.items())),
    ]
    if facts.dequantized:
        said.insert(
            4,
            (
                "Smaller, but no faster",
                f"{named(facts.dequantized)}: their weights become floats when the file is loaded",
            ),
        )
    parts = [element("h3", on_one_line(row.name)), element("div", terms(said), class_="facts")]
    if facts.latency:
        parts.append(_latency(number, row, facts))
    if facts.floats:
        reasons = [[prose(named(layers)), reason] for reason, layers in by_reason(facts.floats).items()]
        caption = f"Quantized layers that {facts.runtime} computes in float"
        parts.append(table(f"file-{number}-floats", caption, ["Layers", "Reason"], reasons, "words"))
    return joined(parts)


def _parity(facts: FileFacts) -> str:
    parity = facts.parity
    if parity is None:
        return "Not compared (verify=False)"
    same = "" if parity["same_class"] is None else f", the same class for {parity['same_class']:.1%}"
    sizes = ", ".join(map(str, parity["batch_sizes"]))
    return f"Cosine {parity['cosine']:.6f}{same}, on {parity['samples']} samples at batch sizes {sizes}"


def _int8(facts: FileFacts) -> Markup:
    whole = len(facts.int8) + len(facts.floats)
    if not whole:
        return escaped("Nothing: the file is in float")
    return prose(f"{len(facts.int8)} of {whole} quantized layers" + (f": {named(facts.int8)}" if facts.int8 else ""))


def _latency(number: int, row: Row, facts: FileFacts) -> Markup:
    lines = []
    for timed in facts.latency:
        ratio = timed.ratio
        words = f"{factor(1 / ratio)}x faster" if ratio <= 1 else f"{factor(ratio)}x slower"
        low, high = timed.quartiles
        certain = (low > 1) == (high > 1)
        spread = f"{factor(1 / high)} to {factor(1 / low)}" if ratio <= 1 else f"{factor(low)} to {factor(high)}"
        shown = (
            element("span", words, class_="good" if ratio <= 1 else "bad") if certain else "no measurable difference"
        )
        lines.append(
            [
                f"{timed.batch_size}",
                f"{timed.file_ms:.3g}",
                f"{timed.model_ms:.3g}",
                joined([shown, element("small", spread)] if certain else [shown]),
            ]
        )
    name, baselines = on_one_line(row.name), sorted({timed.baseline for timed in facts.latency})
    head = ["Batch", f"{facts.runtime}, ms", f"{' or '.join(baselines)} model in torch, ms", "The file is"]
    threads = " or ".join(map(str, sorted({timed.threads for timed in facts.latency})))
    return table(f"file-{number}-latency", f"Latency of {name}, in turns, threads: {threads}", head, lines)
