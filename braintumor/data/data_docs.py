"""Data Docs that need no internet: Great Expectations' pages without their addresses, behind an index of our own.

Great Expectations loads style sheets and scripts from public servers when a page is viewed, and draws its index with
them. Behind a hospital's firewall that leaves an empty index, elsewhere it tells strangers who validates what.
"""

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from braintumor.artifacts import write_text
from braintumor.data.expectations import Finding

# Elements that load something from elsewhere, or can't work without what was loaded.
_FOREIGN = re.compile(
    r"<script\b.*?</script>|<link\b[^>]*https?://[^>]*>|<img\b[^>]*https?://[^>]*>|<footer\b.*?</footer>", re.DOTALL
)
_ADDRESS = re.compile(r'href="https?://[^"]*"')

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --bad: #c0392b; --good: #1e8449; --info: #2471a3; }
body { font: 15px/1.5 system-ui, Helvetica, Arial, sans-serif; margin: 0 auto; max-width: 1200px; padding: 1rem; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; } .row > .col-md-10 { flex: 1 1 40rem; min-width: 0; }
.row > .col-lg-2 { flex: 0 1 14rem; } .row > .col-12 { flex: 1 0 100%; } .row > .col-6 { flex: 1 1 45%; }
.card, .alert { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .9rem; margin: .5rem 0; }
.alert { background: var(--soft); } .card:has(.btn-group-toggle) { display: none; }
h1 { font-size: 1.5rem; } h2, h4 { font-size: 1.15rem; } h5, h6 { font-size: 1rem; margin: .4rem 0; }
table { border-collapse: collapse; width: 100%; } th { text-align: left; }
td, th { border-bottom: 1px solid var(--line); padding: .3rem .6rem .3rem 0; vertical-align: top; }
.table-responsive, .show-scrollbars { overflow-x: auto; }
ul.nav, ol.breadcrumb { list-style: none; padding: 0; } ol.breadcrumb { display: flex; gap: .8rem; }
a { color: var(--info); } .text-success, .passed { color: var(--good); } .text-info { color: var(--info); }
.text-danger, .critical { color: var(--bad); } .text-warning, .warning { color: #b9770e; }
.critical, .warning, .passed { font-weight: 600; }
.fa-check-circle::before { content: "\\2713"; } .fa-times::before { content: "\\2717"; }
.fa-exclamation-triangle::before { content: "!"; } .fa-comment::before { content: "\\2022"; }
"""
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Data validation</title>
<style>{style}</style>
</head>
<body>
<h1>Data validation</h1>
<p>{n_images} images, data version <code>{data_md5}</code></p>
<h2>Findings</h2>
{findings}
<h2>Every expectation</h2>
<ul>
{links}
</ul>
</body>
</html>
"""


def make_self_contained(docs: Path, data_md5: str, n_images: int, findings: Sequence[Finding]) -> None:
    """Every page in `docs` is whole by itself, and index.html lists the findings and leads to the others."""
    for page in docs.rglob("*.html"):
        kept = _FOREIGN.sub("", page.read_text(encoding="utf-8"))
        write_text(page, _ADDRESS.sub('href="#"', kept).replace("</head>", f"<style>{_STYLE}</style></head>", 1))
    links = [
        f'<li><a href="{escape(page.relative_to(docs).as_posix())}">{title}: {escape(_suite(page, docs))}</a></li>'
        for folder, title in (("validations", "results"), ("expectations", "what is expected"))
        for page in sorted((docs / folder).rglob("*.html"))
    ]
    content = {
        "style": _STYLE,
        "data_md5": escape(data_md5),
        "n_images": n_images,
        "findings": _table(findings) if findings else '<p class="passed">none</p>',
        "links": "\n".join(links),
    }
    write_text(docs / "index.html", _PAGE.format(**content))


def _suite(page: Path, docs: Path) -> str:
    parts = page.relative_to(docs).parts
    return parts[1] if parts[0] == "validations" else page.stem


def _table(findings: Sequence[Finding]) -> str:
    rows = [
        f'<tr><td class="{finding.severity}">{finding.severity}</td><td>{escape(finding.name)}</td>'
        f"<td>{escape(finding.message)}{_culprits(finding)}</td></tr>"
        for finding in findings
    ]
    head = "<tr><th>severity</th><th>finding</th><th>what</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _culprits(finding: Finding) -> str:
    if not finding.culprits:
        return ""
    items = "".join(f"<li>{escape(culprit)}</li>" for culprit in finding.culprits)
    return f"<details><summary>{len(finding.culprits)} culprits</summary><ul>{items}</ul></details>"
