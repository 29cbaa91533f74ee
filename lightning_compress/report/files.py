"""Where does a comparison go? Into files, then pictures, each of which may fail alone; and to the terminal."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning_compress.errors import in_a_line
from lightning_compress.report.compare import Comparison
from lightning_compress.report.plots import plot_report
from lightning_compress.report.render import legend, on_one_line, origins_of
from lightning_compress.report.sparsity_plot import plot_sparsity
from lightning_compress.whole_file import whole_file

_MOST_NOTES = 10


def write(
    comparison: Comparison, folder: Path, picture: bool, histories: Sequence[Any], failed: Callable[[str], None]
) -> tuple[Comparison, list[str]]:
    """Write ``report.html``, ``report.json``, ``report.md`` and ``report.csv``, then the pictures.

    Args:
        comparison: what to write.
        folder: where; it is made if need be.
        picture: whether to draw.
        histories: of sparsity, each of which becomes a picture.
        failed: is told of each file that couldn't be written, in one line; the others are written all the same.

    Returns:
        The comparison with a note for each picture that is missing, and the names of the files that were written.
    """
    failures: list[str] = []

    def attempt(name: str, action: Callable[[Path], Any]) -> bool:
        try:
            action(folder / name)
        except Exception as error:
            failures.append(f"{name} couldn't be written ({in_a_line(error)}).")
            failed(failures[-1])
            return False
        return True

    texts = [name for name, text in _texts(comparison).items() if attempt(name, partial(replace_file, text=text))]
    drawn: list[str] = []
    if picture and importlib.util.find_spec("matplotlib") is None:
        failures.append('No picture: matplotlib isn\'t installed. Install it: pip install "lightning-compress[plots]"')
    elif picture:
        drawn = [name for name, draw in _pictures(comparison, histories).items() if attempt(name, partial(_draw, draw))]
    if failures:
        comparison = replace(comparison, notes=(*comparison.notes, *failures))
        for name in texts:
            with suppress(Exception):  # it stands there already, without these notes
                replace_file(folder / name, _texts(comparison)[name])
    return comparison, [*texts, *drawn]


def _texts(comparison: Comparison) -> dict[str, Callable[[], str]]:
    return {
        "report.html": comparison.to_html,
        "report.json": comparison.to_json,
        "report.md": comparison.to_markdown,
        "report.csv": comparison.to_csv,
    }


def replace_file(path: Path, text: Callable[[], str]) -> None:
    """Write a file as a whole or not at all: a full disk leaves no half of it, and the one before stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as begun:
        begun.write_text(text(), encoding="utf-8")


def _draw(draw: Callable[[Path], Any], path: Path) -> None:
    with whole_file(path) as begun:
        draw(begun)


def _pictures(comparison: Comparison, histories: Sequence[Any]) -> dict[str, Callable[[Path], Any]]:
    names = ["sparsity.png" if len(histories) == 1 else f"sparsity_{index}.png" for index in range(len(histories))]
    drawn: dict[str, Callable[[Path], Any]] = {"report.png": partial(plot_report, comparison)}
    return drawn | {name: partial(plot_sparsity, history) for name, history in zip(names, histories, strict=True)}


def show(comparison: Comparison, folder: Path, written: Sequence[str]) -> None:
    """Print the comparison to the terminal: the table, the first notes, and where the rest is."""
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    if not console.is_terminal:
        # A file or a pipe has no width; rich would take 80 and cut columns off.
        console = Console(width=140)
    console.print(comparison.to_table())
    # All of them where no file has the rest.
    most = _MOST_NOTES if "report.md" in written else len(comparison.notes)
    for note in comparison.notes[:most]:
        console.print(f"- {escape(on_one_line(note))}", highlight=False)
    if len(comparison.notes) > most:
        console.print(f"- and {len(comparison.notes) - most} more notes in report.md", highlight=False)
    for line in (origins_of(comparison.rows), legend(comparison.rows, comparison.machine)):
        if line:
            console.print(f"[dim]{escape(line)}[/dim]", highlight=False)
    if written:
        console.print(f"Report: {escape(str(folder))} ({', '.join(written)})", soft_wrap=True, highlight=False)
