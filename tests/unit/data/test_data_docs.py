import base64
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from braintumor.data import data_docs, oddities
from braintumor.data.contents import Contents
from braintumor.data.data_docs import write_data_docs
from braintumor.data.difference import as_json, compare
from braintumor.data.duplicates import measure_leakage
from braintumor.data.expectations import Finding
from braintumor.data.html_page import Html, bar, table
from braintumor.data.manifest import Survey, survey
from braintumor.data.oddities import odd_kinds
from braintumor.data.profile import Accepted, make_profile
from braintumor.params import Params

PAGE = """<html><head><link rel="stylesheet" href="https://cdn.example/a.css">
<link rel="icon" href="../static/favicon.ico"><script src="https://cdn.example/b.js"></script></head>
<body><img
  src="https://assets.example/logo.png"><a href="https://example.org">GX</a> <a href="other.html">kept</a>
<script>$("x").hide()</script><footer><p>news <a href="https://example.org/letter">Subscribe</a></p></footer></body></html>
"""
FINDING = Finding(
    "unreadable",
    "critical",
    "2 images can't be decoded",
    ("train/glioma/real.jpg", "b.jpg"),
    ("train/<b>.jpg", "x.jpg"),
)
Write = Callable[..., Path]


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 48), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Four classes of three images; a slice stands mirrored in test/, and under two labels in train/."""
    data = tmp_path / "data"
    for index, label in enumerate(("glioma", "meningioma", "notumor", "pituitary")):
        for number in range(3):
            draw(data / f"train/{label}/{number}.png", 10 * index + number)
    first = Image.open(data / "train/glioma/0.png")
    (data / "test/glioma").mkdir(parents=True)
    first.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(data / "test/glioma/mirrored.png")
    Image.open(data / "train/notumor/1.png").save(data / "train/pituitary/twin & brother.png")
    return data


@pytest.fixture
def write(tmp_path: Path, dataset: Path, params: Params) -> Write:
    """Write the Data Docs of `dataset`, with Great Expectations' pages in them."""

    def write(
        findings: tuple[Finding, ...] = (),
        accepted: pd.DataFrame | None = None,
        kinds: "pd.Series[Any] | None" = None,
        **privacy: Any,
    ) -> Path:
        docs = tmp_path / "docs"
        for page in ("index.html", "expectations/images.html", "validations/images/run/time/images.html"):
            (docs / page).parent.mkdir(parents=True, exist_ok=True)
            (docs / page).write_text(PAGE)
        (docs / "static").mkdir(exist_ok=True)
        (docs / "static/huge.gif").write_bytes(b"GIF89a")
        rules = params.privacy.model_copy(update={"copy_images": "all", "hash_names": False} | privacy)
        settings = params.model_copy(update={"privacy": rules})
        surveyed = survey(dataset, 1, params.validation.copy_correlation)
        images = surveyed.images
        difference = None
        if accepted is not None:
            known = Accepted("3", "b" * 32, make_profile(accepted, rules))
            difference = as_json(compare(images, known.images), known, surveyed.data_md5)
        kinds = odd_kinds(images, params.validation) if kinds is None else kinds
        write_data_docs(docs, dataset, surveyed, measure_leakage(images), findings, kinds, difference, settings)
        return docs

    return write


class Addresses(HTMLParser):
    """What a page links to and shows, and its pictures without a text."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.silent: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.found += [address for name in ("href", "src") if (address := given.get(name)) and address != "#"]
        if tag == "img" and not given.get("alt"):
            self.silent.append(str(given.get("src")))


def addresses(page: Path) -> Addresses:
    parser = Addresses()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser


def test_pages_load_nothing_and_every_address_leads_somewhere(write: Write) -> None:
    docs = write((FINDING,))
    pages = list(docs.rglob("*.html"))
    assert {page.name for page in pages} == {"index.html", "copies.html", "odd_images.html", "images.html"}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "://" not in text
        assert "<script" not in text
        assert "default-src 'none'" in text
        found = addresses(page)
        assert found.silent == []
        elsewhere = [each for each in found.found if not each.startswith(("data:", "other.html"))]
        assert [each for each in elsewhere if not (page.parent / unquote(each)).is_file()] == []
    assert '<a href="other.html">kept</a>' in (docs / "expectations/images.html").read_text()
    assert not (docs / "static").exists()
    index = addresses(docs / "index.html").found
    assert index == [
        "copies.html", "odd_images.html", "validations/images/run/time/images.html", "expectations/images.html",
    ]  # fmt: skip


def test_index_tells_key_figures_and_findings(write: Write) -> None:
    index = (write((FINDING,)) / "index.html").read_text()
    for expected in (
        "1 critical, 0 warnings",
        "2 images can&#x27;t be decoded",
        "train/&lt;b&gt;.jpg",
        "100.0 %",
        "1 of 1 have a copy in training",
        "13 train, 1 test",
    ):
        assert expected in index
    assert "real.jpg" not in index
    assert re.search(r"<td>in both: these leak</td>\s*<td class=\"number\">1</td>\s*<td class=\"number\">2</td>", index)


def test_index_without_findings_and_without_an_earlier_version_says_so(write: Write) -> None:
    index = (write() / "index.html").read_text()
    assert '<p class="passed">none</p>' in index
    assert "no earlier data version to compare with" in index


def test_copies_are_shown_by_size_across_the_splits_and_by_conflict(write: Write) -> None:
    docs = write()
    page = (docs / "copies.html").read_text()
    # Two of the largest groups, one across the splits and one of two labels, each whole within the page.
    pictures = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(pictures) == 4
    assert all(Image.open(io.BytesIO(base64.b64decode(picture))).width > 200 for picture in pictures)
    assert "test/glioma/mirrored.png, glioma, test" in page
    assert "train/pituitary/twin &amp; brother.png, pituitary, train" in page


def test_odd_images_are_shown_by_kind(write: Write, dataset: Path) -> None:
    kinds = pd.Series([("arrows",), ("arrows", "banner"), *[()] * 12], dtype=object)
    docs = write(kinds=kinds)
    page = (docs / "odd_images.html").read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == 2
    assert "<h2>With arrows or other drawn marks</h2>" in page
    assert "<h2>Edge-filtered</h2>" not in page
    assert re.search(r"with arrows or other drawn marks</td>\s*<td class=\"number\">2</td>", page)


def test_every_kind_of_oddity_has_words() -> None:
    assert list(data_docs.KIND_TITLES) == list(oddities.KINDS)


def test_names_and_pictures_are_shown_as_privacy_allows(write: Write, dataset: Path) -> None:
    accepted = survey(dataset, 1, 0.88).images
    (dataset / "train/glioma/2.png").unlink()
    draw(dataset / "train/glioma/jane doe.png", 77)
    docs = write(accepted=accepted, hash_names=True, copy_images="phantoms")
    for page in docs.glob("*.html"):
        text = page.read_text()
        assert not re.search(r"jane|mirrored\.png|twin|/[0-9]\.png", text)
        assert "<img" not in text
    index = (docs / "index.html").read_text()
    assert "Phantoms alone may be shown here" in index
    assert re.search(r"train/glioma/[0-9a-f]{12}\.png", index)


def test_index_tells_what_changed_since_the_accepted_version(write: Write, dataset: Path) -> None:
    earlier = survey(dataset, 1, 0.88).images
    changed = earlier["path"] == "train/meningioma/0.png"
    earlier.loc[changed, "label"] = "glioma"
    earlier.loc[changed, "path"] = "train/glioma/old.png"
    (dataset / "train/notumor/2.png").unlink()
    draw(dataset / "train/pituitary/new <i>.png", 78)
    index = (write(accepted=earlier) / "index.html").read_text()
    assert "compared with data " + "b" * 32 in index
    for change, count in (("added", 1), ("removed", 1), ("relabelled", 1), ("moved between train/ and test/", 0)):
        assert re.search(rf"<td>{change}</td>\s*<td class=\"number\">{count}</td>", index), change
    assert "train/pituitary/new &lt;i&gt;.png" in index
    assert "train/notumor/2.png, notumor" in index
    assert "train/meningioma/0.png: glioma to meningioma" in index
    assert '<th scope="col">statistic</th>' in index


def test_index_names_groups_that_a_new_image_joined(write: Write, dataset: Path) -> None:
    earlier = survey(dataset, 1, 0.88).images
    of_test = earlier["path"] == "test/glioma/mirrored.png"
    earlier.loc[of_test, "duplicate_group"] = "gmirrored"
    Image.open(dataset / "train/glioma/0.png").rotate(180).save(dataset / "train/glioma/bridge.png")
    index = (write(accepted=earlier) / "index.html").read_text()
    assert "1 group that used to be several" in index
    assert re.search(r"g[0-9a-f]{12}: g[0-9a-f]{12}, gmirrored, joined by train/glioma/bridge\.png", index)


def test_the_same_images_give_the_same_pages(write: Write) -> None:
    docs = write()
    first = {path: path.read_bytes() for path in docs.rglob("*") if path.is_file()}
    assert {path: path.read_bytes() for path in write().rglob("*") if path.is_file()} == first


def test_a_data_set_without_images_has_its_pages(tmp_path: Path, dataset: Path, params: Params) -> None:
    images = survey(dataset, 1, 0.88).images.head(0)
    nothing = Survey(images, Contents([], [], [], [], []), "a" * 32)
    kinds = odd_kinds(images, params.validation)
    (tmp_path / "docs").mkdir()
    write_data_docs(tmp_path / "docs", dataset, nothing, measure_leakage(images), [], kinds, None, params)
    assert "unknown" in (tmp_path / "docs/index.html").read_text()
    assert "none" in (tmp_path / "docs/copies.html").read_text()


def test_a_table_escapes_all_but_markup_and_keeps_bars_from_screen_readers() -> None:
    made = table("a & b", ("what", "images", ""), [("<b>", 12345, bar(0.5)), (Html("<i>x</i>"), 1, bar(2))])
    assert "a &amp; b" in made
    assert "&lt;b&gt;" in made
    assert "<i>x</i>" in made
    assert '<td class="number">12,345</td>' in made
    assert re.findall(r'aria-hidden="true" style="width: ([0-9.]+)%"', made) == ["50.0", "100.0"]
