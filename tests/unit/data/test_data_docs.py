from pathlib import Path

from braintumor.data.data_docs import make_self_contained
from braintumor.data.expectations import Finding

PAGE = """<html><head><link rel="stylesheet" href="https://cdn.example/a.css">
<link rel="icon" href="static/favicon.ico"><script src="https://cdn.example/b.js"></script></head>
<body><img
  src="https://assets.example/logo.png"><a href="https://example.org">GX</a> <a href="other.html">kept</a>
<script>$("x").hide()</script><footer><p>news <a href="https://example.org/letter">Subscribe</a></p></footer></body></html>
"""
FINDING = Finding("unreadable", "critical", "2 images can't be decoded", ("train/glioma/<b>.jpg", "b.jpg"))


def test_pages_load_nothing_and_the_index_leads_to_them(tmp_path: Path) -> None:
    for page in ("index.html", "expectations/images.html", "validations/images/run/time/images.html"):
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text(PAGE)
    make_self_contained(tmp_path, "a" * 32, 881, [FINDING])
    pages = [path.read_text() for path in tmp_path.rglob("*.html")]
    assert len(pages) == 3
    assert not any("://" in page or "<script" in page for page in pages)
    kept = (tmp_path / "expectations/images.html").read_text()
    assert '<a href="other.html">kept</a>' in kept
    assert "static/favicon.ico" in kept
    index = (tmp_path / "index.html").read_text()
    for expected in (
        'href="expectations/images.html"',
        'href="validations/images/run/time/images.html"',
        "2 images can&#x27;t be decoded",
        "train/glioma/&lt;b&gt;.jpg",
        "a" * 32,
    ):
        assert expected in index


def test_index_without_findings_says_so(tmp_path: Path) -> None:
    make_self_contained(tmp_path, "a" * 32, 881, [])
    assert '<p class="passed">none</p>' in (tmp_path / "index.html").read_text()
