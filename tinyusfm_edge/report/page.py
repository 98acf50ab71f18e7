"""A report as one HTML file: banner, tables, charts, images, facts.

Everything is inside; nothing is fetched.

Text is escaped here and nowhere else; charts are the SVG of charts.py. The page runs no script. It
does not know what is reported; commands put the blocks together.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

GOOD = frozenset({"passed", "yes", "holds", "verified"})
BAD = frozenset({"missed", "no", "unverified", "failed", "worse"})
"""Cells of a table that are shown in green and red, in any case of letters."""


LONG_CELL = 28
"""Letters from which a cell may break into lines."""
MANY_COLUMNS = 8
"""Columns from which the rows of a table become cards on a narrow screen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table with a heading.

    Attributes:
        title: heading.
        note: a sentence below it, or nothing.
        header: names of the columns.
        rows: cells; numbers as text.
    """

    title: str
    note: str = ""
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A chart with a heading.

    Attributes:
        title: heading.
        note: a sentence below it, or nothing.
        svg: an ``<svg>`` element of charts.py.
    """

    title: str
    note: str = ""
    svg: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """Images side by side.

    Attributes:
        title: heading.
        note: a sentence below it, or nothing.
        images: (caption, PNG bytes).
    """

    title: str
    note: str = ""
    images: Sequence[tuple[str, bytes]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Names and values, such as hashes.

    Attributes:
        title: heading.
        note: a sentence below it, or nothing.
        facts: (name, value).
    """

    title: str
    note: str = ""
    facts: Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """Files beside the page.

    Attributes:
        title: heading.
        note: a sentence below it, or nothing.
        links: (file name, words).
    """

    title: str
    note: str = ""
    links: Sequence[tuple[str, str]]


Block = Table | Chart | Images | Facts | Links


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """A whole report.

    Attributes:
        title: of the page.
        passed: colours the banner; None is no verdict.
        headline: the verdict, one sentence.
        lead: lines below it.
        blocks: in order.
    """

    title: str
    passed: bool | None
    headline: str
    lead: Sequence[str] = ()
    blocks: Sequence[Block]


def render(page: Page) -> str:
    """The page as HTML text."""
    lead = "".join(f"<p>{escape(line)}</p>" for line in page.lead)
    colour = "plain" if page.passed is None else "good" if page.passed else "bad"
    banner = f'<div class="banner {colour}">{escape(page.headline)}</div>'
    body = "\n".join(_block(block) for block in page.blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(page.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(page.title)}</h1>\n{banner}\n{lead}\n{body}\n</main>\n</body>\n</html>\n"
    )


def _block(block: Block) -> str:
    note = f'<p class="note">{escape(block.note)}</p>' if block.note else ""
    return f"<section><h2>{escape(block.title)}</h2>{note}{_content(block)}</section>"


def _content(block: Block) -> str:
    if isinstance(block, Table):
        if not block.rows:
            return ""
        numeric = [all(_is_number(row[i].strip().lower()) for row in block.rows) for i in range(len(block.header))]
        head = "".join(
            f'<th class="number">{escape(name)}</th>' if right else f"<th>{escape(name)}</th>"
            for name, right in zip(block.header, numeric, strict=True)
        )
        many = len(block.header) >= MANY_COLUMNS
        names = [f' data-of="{escape(name, quote=True)}"' if many else "" for name in block.header]
        rows = "".join(
            "<tr>" + "".join(_cell(*each) for each in zip(row, names, numeric, strict=True)) + "</tr>"
            for row in block.rows
        )
        table = '<table class="many">' if many else "<table>"
        return f'<div class="wide">{table}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    if isinstance(block, Chart):
        return f'<div class="wide">{block.svg}</div>'
    if isinstance(block, Images):
        one = " one" if len(block.images) == 1 else ""
        return f'<div class="images{one}">' + "".join(_image(*image) for image in block.images) + "</div>"
    if isinstance(block, Links):
        items = (f'<li><a href="{escape(name, quote=True)}">{escape(text)}</a></li>' for name, text in block.links)
        return "<ul>" + "".join(items) + "</ul>"
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in block.facts) + "</dl>"


def _cell(text: str, name: str, numeric: bool) -> str:
    lowered = text.strip().lower()
    kind = "good" if lowered in GOOD else "bad" if lowered in BAD else "number" if numeric else ""
    kind = kind or ("long" if len(text) > LONG_CELL else "")
    return f'<td class="{kind}"{name}>{escape(text)}</td>' if kind else f"<td{name}>{escape(text)}</td>"


def _is_number(text: str) -> bool:
    try:
        float(text.split(" ")[0])
    except ValueError:
        return text == "-"
    return True


def _image(caption: str, png: bytes) -> str:
    source = base64.b64encode(png).decode("ascii")
    words = escape(caption, quote=True)
    below = f"<figcaption>{words}</figcaption>" if words else ""
    return f'<figure><img alt="{words}" src="data:image/png;base64,{source}">{below}</figure>'


_STYLE = """
:root{color-scheme:light}
body{margin:0;background:#f4f6f8;color:#1b2630;font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1160px;margin:0 auto;padding:20px 16px 60px}
h1{font-size:1.5rem;margin:.4em 0}h2{font-size:1.1rem;margin:0 0 .4em}
.banner{border-radius:10px;padding:16px 20px;font-size:1.15rem;font-weight:600;color:#fff;margin:.6em 0 1em}
.banner.plain{background:#3e4c59}.banner.good{background:#1f7a3a}.banner.bad{background:#b02a2a}
section{background:#fff;border:1px solid #dde3e8;border-radius:10px;padding:16px 18px;margin:16px 0}
.note{margin:.1em 0 .8em;color:#52606d;font-size:.95rem}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{text-align:left;padding:7px 6px;border-bottom:1px solid #e6ebef;white-space:nowrap}
th{color:#52606d;font-weight:600}.number{text-align:right;font-variant-numeric:tabular-nums}
td.long{white-space:normal;min-width:8em}td.good{color:#1f7a3a;font-weight:600}td.bad{color:#b02a2a;font-weight:600}
svg{width:100%;max-width:960px;height:auto;display:block}svg text{font:12px system-ui,sans-serif;fill:#3e4c59}
.grid{stroke:#e6ebef}.axis{stroke:#9aa5b1}.limit{stroke:#b02a2a;stroke-dasharray:5 4}
svg .limit-label{fill:#b02a2a}
.images{display:grid;grid-template-columns:repeat(auto-fill,minmax(280px,1fr));gap:14px}figure{margin:0}
.images.one{grid-template-columns:1fr}.images.one img{width:auto;max-width:100%}
img{width:100%;border-radius:6px;display:block;background:#000}figcaption{font-size:.9rem;color:#52606d;padding-top:4px}
dl{display:grid;grid-template-columns:minmax(120px,max-content) 1fr;gap:4px 18px;margin:0;font-size:.92rem}
dt{color:#52606d}dd{margin:0;overflow-wrap:anywhere;font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.86rem}
@media print{body{background:#fff;font-size:11pt}main{max-width:none;padding:0}
section{border:0;padding:0;break-inside:auto}
.banner{color:#000!important;background:none!important;border:2px solid #000}
.wide{overflow:visible}th,td{white-space:normal}
tr,figure,dl{break-inside:avoid}h2{break-after:avoid}a{color:#000;text-decoration:none}}
@media screen and (max-width:1000px){.many thead{display:none}.many,.many tbody{display:block}
.many tr{display:grid;grid-template-columns:repeat(auto-fill,minmax(140px,1fr));gap:1px 18px;padding:9px 0}
.many tr{border-bottom:1px solid #dde3e8}
.many td{display:flex;justify-content:space-between;gap:8px;border:0;padding:1px 0}
.many td{white-space:normal;text-align:right}.many td::before{white-space:nowrap}
.many td::before{content:attr(data-of);color:#52606d;font-weight:400}
.many td:first-child{grid-column:1/-1;font-weight:600;text-align:left}.many td:first-child::before{content:none}}
@media screen and (max-width:600px){table:not(.many) td:not(.number){white-space:normal;overflow-wrap:break-word}
.wide svg{width:480px;max-width:none}svg text{font-size:14px}}
@media (max-width:520px){dl{grid-template-columns:1fr}dd{margin-bottom:8px}}
"""


__all__ = [
    "BAD",
    "GOOD",
    "LONG_CELL",
    "MANY_COLUMNS",
    "Block",
    "Chart",
    "Facts",
    "Images",
    "Links",
    "Page",
    "Table",
    "render",
]
