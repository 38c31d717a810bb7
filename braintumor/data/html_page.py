"""Pages that load nothing: readable on a phone, in the dark and by a screen reader."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --bad: #c0392b; --good: #1e8449; --info: #2471a3;
  --warn: #9a6200; --bar: #2471a3; }
@media (prefers-color-scheme: dark) { :root { --bad: #ff8a7a; --good: #6fcf97; --info: #7cc0f0; --warn: #e6b35a;
  --bar: #3d7ea6; } }
body { font: 15px/1.5 system-ui, Helvetica, Arial, sans-serif; margin: 0 auto; max-width: 1200px; padding: 1rem; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; } .row > .col-md-10 { flex: 1 1 40rem; min-width: 0; }
.row > .col-lg-2 { flex: 0 1 14rem; } .row > .col-12 { flex: 1 0 100%; } .row > .col-6 { flex: 1 1 45%; }
.card, .alert { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .9rem; margin: .5rem 0; }
.alert { background: var(--soft); } .card:has(.btn-group-toggle) { display: none; }
h1 { font-size: 1.5rem; } h2, h4 { font-size: 1.15rem; } h3, h5, h6 { font-size: 1rem; margin: .4rem 0; }
h2 { border-top: 1px solid var(--line); margin-top: 2rem; padding-top: .8rem; }
table { border-collapse: collapse; width: 100%; } th { text-align: left; }
td, th { border-bottom: 1px solid var(--line); padding: .3rem .6rem .3rem 0; vertical-align: top; }
.table-responsive, .show-scrollbars, .wide { overflow-x: auto; }
li, figcaption, code, .wide td { overflow-wrap: anywhere; } .wide td:first-child { overflow-wrap: normal; }
.wide { margin: .6rem 0 1.2rem; } .wide > table { width: auto; } .wide td, .wide th { padding-right: 1.2rem; }
.figure { white-space: nowrap; }
th.number { text-align: right; } details > ul, details > ol { max-height: 24rem; overflow-y: auto; }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
ul.nav, ol.breadcrumb { list-style: none; padding: 0; } ol.breadcrumb { display: flex; gap: .8rem; }
a { color: var(--info); } .text-success, .passed { color: var(--good); } .text-info { color: var(--info); }
.text-danger, .critical { color: var(--bad); } .text-warning, .warning { color: var(--warn); }
.critical, .warning, .passed { font-weight: 600; }
.fa-check-circle::before { content: "\\2713"; } .fa-times::before { content: "\\2717"; }
.fa-exclamation-triangle::before { content: "!"; } .fa-comment::before { content: "\\2022"; }
dl.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem; }
dl.figures > div { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .8rem; }
dl.figures dt { font-size: .85rem; } dl.figures dd { margin: 0; font-size: 1.35rem; font-weight: 600; }
dl.figures dd small { display: block; font-size: .8rem; font-weight: 400; }
.bar { display: block; background: var(--bar); height: 1em; margin-top: .25em; border-radius: .2em; min-width: 1px; }
td:has(> .bar) { width: 24rem; min-width: 6rem; } caption { text-align: left; font-weight: 600; padding: .3rem 0; }
.sheets { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; } .sheets > figure { margin: 0; }
figure { max-width: 100%; } figure img { max-width: 100%; height: auto; display: block; } details { margin: .3rem 0; }
figcaption { font-size: .9rem; max-width: 45rem; } summary { cursor: pointer; }
.figure { font-variant-numeric: tabular-nums; } .lede { margin: .4rem 0; } .title h1 { margin: .2rem 0; }
.title { align-items: baseline; display: flex; flex-wrap: wrap; gap: 0 1.5rem; justify-content: space-between; }
h3 { margin-top: 1.4rem; } h2, h3 { scroll-margin-top: .8rem; } .finding { font-weight: 600; margin-top: .3rem; }
figure.plot { margin: 0; } figure.beside { align-items: center; display: flex; flex-wrap: wrap; gap: .3rem 1rem; }
figure.beside > figcaption { flex: 1 1 9rem; } ul.plain { list-style: none; padding-left: 0; }
nav ol { display: flex; flex-wrap: wrap; font-size: .88rem; gap: .3rem .9rem; list-style: none; margin: .5rem 0;
  padding: 0; }
.side { display: grid; gap: 0 2.2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }
.side > * { min-width: 0; } .side h2 { border: 0; margin: .6rem 0 0; padding-top: 0; } .side li { margin: .2rem 0; }
.side ul { font-size: .93rem; line-height: 1.4; margin: .5rem 0; padding-left: 1.2rem; }
.side dl.figures { grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); }
.pair { align-items: flex-start; display: flex; flex-wrap: wrap; gap: .4rem 1.8rem; }
.pair > div { flex: 1 1 20rem; min-width: 0; } .pair > .plots { flex: 0 1 auto; }
.pair > div > p { max-width: 42rem; margin-top: .3rem; }
.plots { align-items: flex-start; display: flex; flex-wrap: wrap; gap: .8rem 1.2rem; }
.small { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); }
.matrix td { background: color-mix(in srgb, var(--bar) var(--shade), transparent); min-width: 4.6rem;
  padding: .5rem .6rem; text-align: center; } .matrix td small { display: block; }
.matrix th { padding-right: 1rem; vertical-align: middle; } .matrix thead th { padding-right: 0; text-align: center; }
@media (max-width: 34rem) { .wide { font-size: .93rem; } .wide td, .wide th { padding-right: .8rem; }
  .matrix { font-size: .85rem; } .matrix td { min-width: 3rem; padding: .4rem .2rem; }
  .matrix th, .matrix thead th { font-size: .68rem; padding: .2rem; } }
/* Plots are dark ink on nothing: turned over, their hues stay. */
@media (prefers-color-scheme: dark) { figure.plot img { filter: invert(1) hue-rotate(180deg); } }
"""
# Whatever a page came to hold, the browser loads and runs nothing.
POLICY = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
)
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{policy}
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


class Html(str):
    """Markup: all other text is escaped."""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page; `parts` are markup."""
    return _PAGE.format(title=escape(title), policy=POLICY, style=STYLE, body="\n".join(parts))


def markup(value: object) -> str:
    """`value` as it stands in a page."""
    return str(value) if isinstance(value, Html) else escape(str(value))


def element(name: str, content: object, attributes: str = "") -> Html:
    """One element around `content`; `attributes` are markup."""
    return Html(f"<{name}{attributes and ' ' + attributes}>{markup(content)}</{name}>")


def joined(parts: Iterable[object]) -> Html:
    """The parts, one after the other."""
    return Html("\n".join(markup(part) for part in parts))


def link(address: str, text: object) -> Html:
    """A link to another page of the same folder."""
    return element("a", text, f'href="{escape(address)}"')


def listed(items: Iterable[object]) -> Html:
    """An unordered list."""
    return element("ul", joined(element("li", item) for item in items))


def picture(content: bytes, alt: str, size: tuple[int, int]) -> Html:
    """An image that stands within the page (SVG, PNG or JPEG); `alt` says what whoever doesn't see it should know."""
    kinds = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"<?xml": "svg+xml", b"<svg": "svg+xml"}
    kind = next(kind for start, kind in kinds.items() if content.startswith(start))
    address = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return Html(f'<img src="{address}" width="{size[0]}" height="{size[1]}" alt="{escape(alt)}">')


def heading(level: int, title: object, anchor: str) -> Html:
    """A heading that `#anchor` leads to."""
    return element(f"h{level}", title, f'id="{escape(anchor)}"')


def contents(entries: Iterable[tuple[str, str]]) -> Html:
    """Links to the headings of this page: (anchor, title) each."""
    items = [element("li", link(f"#{anchor}", title)) for anchor, title in entries]
    return element("nav", element("ol", joined(items)), 'aria-label="Contents"')


def folded(summary: str, content: object) -> Html:
    """Content that a click opens."""
    return element("details", joined([element("summary", summary), content]))


def figures(entries: Iterable[tuple[str, object, str]]) -> Html:
    """Key figures: (what, value, remark) each."""
    cards = [
        element("div", joined([element("dt", what), element("dd", joined([value, element("small", remark)]))]))
        for what, value, remark in entries
    ]
    return element("dl", joined(cards), 'class="figures"')


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    """A table; whole numbers stand right, and are read in thousands."""
    cells = [list(row) for row in rows]
    body = [element("tr", joined(map(_cell, row))) for row in cells]
    is_number = [isinstance(cell, int) for cell in cells[0]] if cells else [False] * len(head)
    # A column of bars has no name: a screen reader has the numbers.
    names = [
        element("th", name, 'scope="col" class="number"' if number else 'scope="col"') if name else Html("<td></td>")
        for name, number in zip(head, is_number, strict=True)
    ]
    inner = [
        element("caption", caption),
        element("thead", element("tr", joined(names))),
        element("tbody", joined(body)),
    ]
    return element("div", element("table", joined(inner)), 'class="wide"')


def bar(share: float) -> Html:
    """A bar in a table's cell, beside the number that it shows; 1 fills the cell."""
    return Html(f'<span class="bar" aria-hidden="true" style="width: {max(0.0, min(1.0, share)):.1%}"></span>')


def _cell(content: object) -> Html:
    if isinstance(content, int):
        return element("td", f"{content:,}", 'class="number"')
    return element("td", content)
