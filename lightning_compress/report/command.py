"""``lightning-compress report``: draws one report's JSON again, or the difference of two.

With a configuration and a checkpoint it is a subcommand of LightningCLI: see `cli`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_compress.errors import CompressionError, in_a_line, invalid
from lightning_compress.report.compare import Comparison
from lightning_compress.report.files import replace_file
from lightning_compress.report.runs import compare_runs

PROG = "lightning-compress report"
_ENDINGS = {".html": Comparison.to_html, ".md": Comparison.to_markdown, ".csv": Comparison.to_csv}


def main(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: what stands behind ``report``.

    Raises:
        SystemExit: with status 2 and a line on stderr, for input that can't be honoured.
    """
    parser = argparse.ArgumentParser(
        PROG,
        description="Draws a report that CompressionReport wrote, or what the second of two runs brought.",
        epilog=f"A checkpoint is measured by: {PROG} --config config.yaml --ckpt_path best.ckpt [--directory FOLDER]",
    )
    parser.add_argument("runs", nargs="+", help="one report.json, or two to compare")
    parser.add_argument("--output", default="report.html", help="the file to write: .html, .md or .csv")
    given = parser.parse_args(args)
    try:
        if len(given.runs) > 2:
            raise invalid("runs", "be one report.json or two", len(given.runs))
        path = draw([Path(run) for run in given.runs], Path(given.output))
    except (CompressionError, OSError) as error:
        sys.stderr.write(f"{PROG}: error: {error}\n")
        raise SystemExit(2) from error
    sys.stdout.write(f"Report: {path}\n")


def draw(runs: Sequence[Path], output: Path) -> Path:
    """Write the report of one run, or the difference of two, as the ending of ``output`` says."""
    if output.suffix not in _ENDINGS:
        raise invalid("output", f"end in {', '.join(_ENDINGS)}", str(output))
    found = [_read(run) for run in runs]
    try:
        shown = found[0] if len(found) == 1 else compare_runs(found[0], found[1], _names(runs[0], runs[1]))
        text = _ENDINGS[output.suffix](shown)
    except CompressionError:
        raise
    except Exception as error:  # what was edited by hand, or damaged, fails wherever it is used
        given = ", ".join(map(str, runs))
        raise invalid("runs", "be reports as CompressionReport wrote them", given, f"({in_a_line(error)})") from error
    replace_file(output, lambda: text)
    return output


def _read(path: Path) -> Comparison:
    try:
        return Comparison.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise invalid("runs", "be files that can be read", str(path), f"({error})") from error


def _names(first: Path, second: Path) -> tuple[str, str]:
    """Name runs by their files, else by their folders, else by their paths."""
    ways = ((path.stem, path.absolute().parent.name, str(path)) for path in (first, second))
    pairs = list(zip(*ways, strict=True))
    return next((pair for pair in pairs if pair[0] != pair[1]), ("first", "second"))
