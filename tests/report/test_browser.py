"""The page in a real browser, where the system has one: nothing complains, nothing scrolls sideways, all has a name."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_compress.report import compare
from tests.report.pages import HOSTILE, everything
from tests.report.test_compare import LARGE, SMALL

NAMES = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"There is no browser here: {', '.join(NAMES)}.")

# The page itself allows no scripts, so a frame around it looks at it.
FRAME = """<!DOCTYPE html><iframe id="page" style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe>
<pre id="seen"></pre><script>
const frame = document.getElementById("page");
frame.addEventListener("load", () => {{
  const page = frame.contentDocument;
  const boxes = (element) => element.getBoundingClientRect();
  document.getElementById("seen").textContent = JSON.stringify({{
    scrolls: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    beyond: [...page.querySelectorAll("h1, h2, p, li, dd, svg, .scroll, pre")]
      .filter((element) => boxes(element).right > {width} + 1).map((element) => element.outerHTML.slice(0, 80)),
    pictures: [...page.querySelectorAll("svg")]
      .map((svg) => [svg.querySelector("title").textContent, boxes(svg).width]),
    cut: [...page.querySelectorAll("svg")].flatMap((svg) => [...svg.querySelectorAll("text")]
      .filter((text) => boxes(text).left < boxes(svg).left - 1 || boxes(text).right > boxes(svg).right + 1)
      .map((text) => text.textContent)),
    text: Math.min(...[...page.querySelectorAll("svg text")].map((text) => boxes(text).height)),
    focusable: [...page.querySelectorAll("a, summary, [tabindex]")].filter((element) => element.tabIndex < 0).length,
    ran: page.defaultView.ran ?? false,
  }});
}});
</script>"""


def look(folder: Path, page: str, width: int) -> tuple[dict[str, Any], list[str]]:
    """What a frame of so many pixels shows, and what the console says."""
    path = folder / "frame.html"
    path.write_text(FRAME.format(width=width, page=html.escape(page)), encoding="utf-8")
    switches = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--enable-logging=stderr"]
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [str(BROWSER), *switches, profile, "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    seen = re.search(r'<pre id="seen">(.+?)</pre>', done.stdout, flags=re.DOTALL)
    assert seen is not None, done.stderr[-2000:]
    return json.loads(html.unescape(seen[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("width", [360, 800, 1280])
def test_a_page_fits_and_the_console_is_silent(tmp_path: Path, width: int) -> None:
    seen, console = look(tmp_path, everything(tmp_path).to_html(), width)
    assert console == []
    assert (seen["scrolls"], seen["beyond"]) == (0, [])
    assert [title for title, _ in seen["pictures"]] == [
        "test_acc against latency of batch 1, ms",
        "test_acc against size on disk, KB",
        "Bytes of each layer, before above after",
    ]
    assert all(drawn >= 280 for _, drawn in seen["pictures"])
    assert seen["text"] > 9.5, "text of pictures can be read"
    assert (seen["cut"], seen["focusable"]) == ([], 0)


def test_hostile_names_run_nothing_and_fit(tmp_path: Path) -> None:
    name = f"</code></svg><script>parent.ran = window.ran = true</script><img src=x onerror='window.ran = 1'>{HOSTILE}"
    rows = {name: replace(LARGE, latency=()), f"{name}2": SMALL}
    metrics = {row: {name: 0.5} for row in rows}
    seen, console = look(tmp_path, compare(rows, metrics=metrics, notes=[name], settings=name).to_html(), 360)
    assert (seen["ran"], console) == (False, [])
    assert (seen["scrolls"], seen["beyond"]) == (0, [])


def test_a_console_that_complains_is_heard(tmp_path: Path) -> None:
    _, console = look(tmp_path, "<svg><title>a</title></svg><script>console.error('seen')</script>", 360)
    assert len(console) == 1 and "seen" in console[0]
    seen, _ = look(tmp_path, "<svg><title>a</title></svg><p style='width:700px'>wide</p>", 360)
    assert seen["scrolls"] > 300 and len(seen["beyond"]) == 1
