"""Self-contained HTML pages."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping
from pathlib import Path

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: #1b1f24;
       max-width: 74rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid #d0d7de; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 1rem 0; }
dt { color: #57606a; } dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1rem 0; break-inside: avoid; } img { max-width: 100%; height: auto; }
figcaption, .note { color: #57606a; font-size: .9rem; max-width: 48rem; }
.wide { overflow-x: auto; } .side { display: flex; flex-wrap: wrap; gap: 0 2.5rem; }
.side > div { break-inside: avoid; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; vertical-align: top; white-space: nowrap; }
th { vertical-align: bottom; border-bottom: 2px solid #d0d7de; font-weight: 600; white-space: pre; }
td { border-bottom: 1px solid #eaeef2; } .text { text-align: left; white-space: normal; min-width: 6rem; }
.text:last-child { min-width: 16rem; }
tr.front td:first-child { box-shadow: inset 4px 0 #d55e00; font-weight: 600; } tr.faint { color: #6e7781; }
@media print { body { margin: 0; max-width: none; font-size: 10pt; }
  .wide { overflow: visible; } h2 { break-after: avoid; }
  table { font-size: 7.5pt; } th, td { padding: .1rem .3rem; }
  .text:last-child { min-width: 6rem; } thead { display: table-header-group; }
  tr { break-inside: avoid; } section { page: wide; } @page { margin: 14mm; }
  @page wide { size: A4 landscape; margin: 10mm; } }
"""


def html_page(title: str, parts: Iterable[str]) -> str:
    """A page of these parts, which are HTML; empty ones are left out."""
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def html_picture(path: Path, caption: str) -> str:
    """A picture inside the page. Its width follows from its pixels, so that all plots have the same font size."""
    data = path.read_bytes()
    width = int.from_bytes(data[16:20]) * 3 // 4
    image = f'<img src="data:image/png;base64,{base64.b64encode(data).decode()}" width="{width}" alt="{path.stem}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def html_settings(settings: Mapping[str, object]) -> str:
    """A list of names and values."""
    pairs = (f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>" for key, value in settings.items())
    return f"<dl>{''.join(pairs)}</dl>"
