"""Pieces of a self-contained HTML page: escaped texts, tables in boxes that scroll, figures as data URIs."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence

from fedsim.base.tables import Table

#: Characters that HTML forbids, that show nothing, or that turn the direction of what follows.
UNSHOWN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a;
  background: #fff; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.25rem; margin-top: 2.2rem;
  border-bottom: 1px solid #ccc; }
h3 { font-size: 1.05rem; }
figure { margin: 1.2rem 0; } img { display: block; max-width: 100%; height: auto; }
figcaption, .note { color: #444; font-size: .92rem; }
.box { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .92rem; } th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd;
  text-align: left; vertical-align: top; overflow-wrap: normal; } th { background: #f4f4f4; }
td:first-child { min-width: 8rem; }
td.n, th.n { text-align: right; white-space: nowrap; } td.t { min-width: 11rem; white-space: pre-wrap; }
details { margin: .6rem 0; } summary { cursor: pointer; font-weight: 600; padding: .3rem 0; }
pre { white-space: pre-wrap; font-size: .85rem; background: #f6f6f6; padding: .6rem; }
@media print { @page { size: A4; margin: 14mm; } body { padding: 0; max-width: none; font-size: 10pt; }
  figure, tr { break-inside: avoid; page-break-inside: avoid; } figure img { max-height: 11cm; }
  h2, h3, summary { break-after: avoid; } .box { overflow: visible; } table { font-size: 8pt; }
  td.n, th.n { white-space: normal; } td.t { min-width: 0; }
  details::details-content { content-visibility: visible; display: block; block-size: auto; } }
"""


def text(value: object) -> str:
    """``value`` as HTML text, also within quotes; characters that cannot be shown become U+FFFD."""
    return html.escape(UNSHOWN.sub("\ufffd", str(value)), quote=True)


def paragraph(words: str, note: bool = False) -> str:
    """A paragraph of one text."""
    return f'<p class="note">{text(words)}</p>' if note else f"<p>{text(words)}</p>"


def bullets(lines: Sequence[str]) -> str:
    """A list; nothing without lines."""
    return f"<ul>{''.join(f'<li>{text(line)}</li>' for line in lines)}</ul>" if lines else ""


def table(content: Table, texts: bool = False) -> str:
    """A table in a box of its own that scrolls; with ``texts`` its cells are running text, not figures."""

    def cell(tag: str, column: int, value: str) -> str:
        kind = "t" if texts else "n" if column >= content.num_text else ""
        return f"<{tag}{f' class={kind}' if kind else ''}>{text(value)}</{tag}>"

    def line(tag: str, cells: Sequence[str]) -> str:
        return f"<tr>{''.join(cell(tag, i, value) for i, value in enumerate(cells))}</tr>"

    body = "".join(line("td", row) for row in content.rows)
    return f'<div class="box"><table><thead>{line("th", content.head)}</thead><tbody>{body}</tbody></table></div>'


def figure(png: bytes, alt: str, caption: str) -> str:
    """A picture inside the page."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
    return f'<figure><img src="{source}" alt="{text(alt)}"><figcaption>{text(caption)}</figcaption></figure>'


def details(summary: str, content: str) -> str:
    """``content``, HTML, folded under a line; a printed page unfolds it."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def section(heading: str, parts: Sequence[str]) -> str:
    """HTML parts under a heading; nothing if all are empty."""
    return f"<section><h2>{text(heading)}</h2>{''.join(parts)}</section>" if any(parts) else ""


def page(title: str, parts: Sequence[str]) -> str:
    """The whole document."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style>"
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body><main><h1>{text(title)}</h1>\n'
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )
