"""Turns the results of `peers.py` into Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from defaults_rows import TASKS
from peers_code import lines_of_code
from peers_rows import TABLES, Row, Table
from scipy.stats import t as student_t

Result = dict[str, Any]
UNITS = {"cnn-bn": "Digits read (%)", "transformer": "Digits read (%)", "pitch": "Within 50 cents (%)"}
NAMES = {
    "cnn-bn": "CNN with BatchNorm, from scratch",
    "transformer": "Transformer, from scratch",
    "pitch": "CREPE's small form, pretrained",
    "sentences": "all-MiniLM-L6-v2, pretrained",
}
ABOUT = """# Against the peers

Generated: `python benchmarks/peers.py --table > benchmarks/RESULTS.md` from what `python benchmarks/peers.py` measured.

All rows of a table and a seed begin with the same weights and see the same samples in the same order, for as many
epochs, on the same machine. Differences to ours are paired by seed, with the 95 % t-interval of their mean, and bold
where it excludes 0. The files run at a batch of 16 on one thread by turns, in CPU time; time to ours is the median of
ratios within a round (above 1 ours is faster), with the least and the largest of the seeds; between networks of one
shape, as for sparsity and distillation, it shows the noise. Lines are those that a user writes (in `peers_code.py`,
without imports). CPU and wall time are those of all they do (fits, calibration, export and what proves it), medians of
the seeds; wall time has what other work on the machine takes, too."""


def interval(differences: list[float]) -> str:
    """Their mean, with the 95 % t-interval of it; bold where that excludes 0."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return f"{mean:+.2f}"
    half = float(student_t.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences) / len(differences) ** 0.5
    text = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
    return f"**{text}**" if abs(mean) > half + 1e-9 else text


def mean(results: list[Result], key: str, unit: float = 1.0) -> float:
    return statistics.fmean(result[key] for result in results) / unit


def cells(row: Row, found: dict[str, dict[int, Result]], sparse: bool) -> list[str]:
    """What was measured of a row, seed by seed, beside that of its base."""
    results, bases = found[row.name], found.get(row.base, {})
    measured = list(results.values())
    pairs = [(results[seed]["score"], bases[seed]["score"]) for seed in results if seed in bases]
    ratios = [result["ratio"] for result in measured if "ratio" in result]
    to_ours = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""
    zeros = [f"{mean(measured, 'gzip', 1e3):,.1f}", f"{100 * mean(measured, 'zeros'):.1f}"] if sparse else []
    return [
        row.name,
        f"{mean(measured, 'score'):.2f}",
        interval([own - base for own, base in pairs]) if row.base and pairs else "",
        f"{mean(measured, 'bytes', 1e3):,.1f}",
        *zeros,
        f"{mean(measured, 'macs', 1e6):,.3f}",
        f"{statistics.median(result['ms'] for result in measured):.2f}",
        to_ours if row.base else "",
        str(lines_of_code(row.code)),
        f"{statistics.median(result['cpu'] for result in measured):.1f}",
        f"{statistics.median(result['wall'] for result in measured):.1f}",
    ]


def network_table(table: Table, name: str, results: list[Result]) -> Iterator[str]:
    sparse = any("zeros" in result for result in results)
    found: dict[str, dict[int, Result]] = {}
    for result in results:
        if "error" not in result:
            found.setdefault(result["row"], {})[result["seed"]] = result
    seeds = len({result["seed"] for result in results})
    heads = [f"{NAMES[name]}, {seeds} seed{'s' * (seeds > 1)}", UNITS.get(name, "Cosine to float (%)")]
    heads += ["To ours (points)", "File (KB)", *["Gzipped (KB)", "Zeros (%)"] * sparse]
    heads += ["MACs (M)", "Latency (ms)", "Time to ours", "Lines", "CPU (s)", "Wall (s)"]
    yield f"| {' | '.join(heads)} |"
    yield "|:--|" + "--:|" * (len(heads) - 1)
    yield from ("| " + " | ".join(cells(row, found, sparse)) + " |" for row in table.rows if row.name in found)
    for row in table.rows:
        errors = sorted({result["error"] for result in results if result["row"] == row.name and "error" in result})
        if errors:
            yield f"\n{row.name} failed: {'; '.join(errors)}"
        elif row.name not in found:
            yield f"\n{unmeasured(row.name, row.packages)}"


def unmeasured(name: str, packages: tuple[str, ...]) -> str:
    return f"{name} wasn't measured{': it needs ' * bool(packages)}{', '.join(packages)}."


def page(lines: list[dict[str, Any]]) -> str:
    """The whole page, of the lines of the results' file."""
    settings = [line for line in lines if "machine" in line]
    results = [line for line in lines if "row" in line]
    parts = [ABOUT]
    for setting in settings:
        versions = ", ".join(f"{name} {version}" for name, version in setting["versions"].items())
        parts.append(f"{setting['machine']}; Python {setting['python']}; {versions}.")
    for key, table in TABLES.items():
        parts.append(f"## {table.title}: `python benchmarks/peers.py {key}`\n\n{table.about}")
        for name in table.networks:
            own = [result for result in results if (result["table"], result["network"]) == (key, name)]
            if own:
                parts.append("\n".join(network_table(table, name, own)))
            else:
                parts.append(unmeasured(NAMES[name], tuple(filter(None, [TASKS[name].package]))))
        if table.said:
            parts.append("\n".join(f"- {text}" for text in table.said))
    return "\n\n".join(parts)
