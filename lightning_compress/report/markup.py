"""Elements of HTML and SVG: whatever isn't markup already is escaped, so that no name of a user's becomes any."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

# Neither HTML nor XML can hold them, not even escaped.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


_LONGEST_WORD = 30


class Markup(str):
    """Text that is markup already; any other text is escaped where it becomes a part of an element."""


def escaped(text: str) -> Markup:
    """Return text as markup that shows it.

    Example:
        >>> escaped("<b>"), escaped(Markup("<b>"))
        ('&lt;b&gt;', '<b>')
    """
    return text if isinstance(text, Markup) else Markup(html.escape(_UNPRINTABLE.sub("\ufffd", text)))


def element(tag: str, *children: str, **attributes: str | float | None) -> Markup:
    """Return an element; an attribute of None is left out, and underscores in names become hyphens.

    Example:
        >>> element("p", "1 < 2", class_="note", aria_label='"')
        '<p class="note" aria-label="&quot;">1 &lt; 2</p>'
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    opened = " ".join([tag, *(f'{key}="{escaped(str(value))}"' for key, value in given.items())])
    return Markup(f"<{opened}>{joined(children)}</{tag}>")


def joined(parts: Iterable[str], between: str = "") -> Markup:
    """Join parts, those that aren't markup escaped."""
    return Markup(between.join(map(escaped, parts)))


def prose(text: str) -> Markup:
    """Return a sentence; what stands between backticks is code.

    Example:
        >>> prose("`a` & b")
        '<code>a</code> &amp; b'
    """
    parts = text.split("`")
    if len(parts) % 2 == 0:  # a backtick that opens no code
        return escaped(text)
    return joined(element("code", part) if index % 2 else part for index, part in enumerate(parts))


def table(id_: str, caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "figures") -> Markup:
    """Return a table in a region that scrolls by itself, and takes the keyboard's focus for that.

    Args:
        id_: of the caption, unique on the page.
        caption: what the table shows.
        head: of each column; the first column names the rows.
        rows: of cells.
        kind: ``figures``, aligned to the right, or ``words``.
    """
    header = element("thead", element("tr", *(_header(text, "col") for text in head)))
    body = [element("tr", _header(first, "row"), *(element("td", cell) for cell in rest)) for first, *rest in rows]
    drawn = element("table", element("caption", caption, id=id_), header, element("tbody", *body), class_=kind)
    return element("div", drawn, class_="scroll", role="region", aria_labelledby=id_, tabindex=0)


def _header(text: str, scope: str) -> Markup:
    # Only where a word is too long for a column may it break anywhere: others would, too, in a narrow table.
    words = re.sub("<[^>]*>", " ", escaped(text)).split()
    return element(
        "th",
        text if words else "(no name)",
        scope=scope,
        class_="long" if max(map(len, words), default=0) > _LONGEST_WORD else None,
    )


def terms(pairs: Iterable[tuple[str, str]]) -> Markup:
    """Return a list of terms, each with what it is."""
    return element("dl", *(element("div", element("dt", term), element("dd", said)) for term, said in pairs))


def folded(summary: str, *children: str) -> Markup:
    """Return what is shown when its summary is opened, and in print."""
    return element("details", element("summary", summary), *children)
