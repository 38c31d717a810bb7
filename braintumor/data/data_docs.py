"""Data Docs that need no internet: Great Expectations' pages without their addresses, behind an index of our own.

Great Expectations loads style sheets and scripts from public servers when a page is viewed, and draws its index with
them. Behind a hospital's firewall that leaves an empty index, elsewhere it tells strangers who validates what.
"""

import base64
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from braintumor.artifacts import write_text
from braintumor.data import contact_sheets
from braintumor.data.contact_sheets import Sheet, draw_copies, draw_odd_images
from braintumor.data.expectations import Finding
from braintumor.data.html_page import (
    POLICY,
    STYLE,
    Html,
    bar,
    element,
    figures,
    folded,
    joined,
    link,
    listed,
    markup,
    page,
    table,
)
from braintumor.data.manifest import Survey
from braintumor.data.privacy import shown_name, shown_names
from braintumor.labels import CLASS_NAMES, DECLARED_SPLITS
from braintumor.params import Params, PrivacyParams

INDEX, COPIES, ODD_IMAGES = "index.html", "copies.html", "odd_images.html"
# Fonts and animations for Great Expectations' own style sheets, which are not used.
UNUSED = "static"
NAMED = 20
# Upper ends of the steps in which groups of copies are counted.
SIZE_STEPS = (1, 2, 3, 5, 10, 20, 50)

# Elements that load something from elsewhere, or can't work without what was loaded.
_FOREIGN = re.compile(
    r"<script\b.*?</script>|<link\b[^>]*>|<img\b[^>]*https?://[^>]*>|<footer\b.*?</footer>", re.DOTALL
)
_ADDRESS = re.compile(r'href="https?://[^"]*"')

WHY_COPIES = (
    "Images are in one group where a chain of copies links them: the same file, the same pixels, or the same slice "
    "mirrored, turned by 180 degrees, recompressed, resized or with another contrast. A test image with a copy in "
    "training is solved by memory."
)
KIND_TITLES = {
    "mode": "of a mode other than L and RGB",
    "not_square": "not square",
    "nearly_empty": "nearly empty",
    "brightness": "nearly black or nearly white",
    "coloured": "coloured",
    "banner": "with a coloured banner at the edge",
    "white_frame": "with a white frame",
    "arrows": "with arrows or other drawn marks",
    "edge_filtered": "edge-filtered",
}
CHANGES = {
    "added": "added",
    "removed": "removed",
    "moved": "moved between train/ and test/",
    "relabelled": "relabelled",
    "renamed": "renamed",
    "rewritten": "rewritten: other bytes, the same pixels",
    "regrouped": "in a group of copies of another name",
}
COPIED_IMAGES = {
    "all": "Every image may be shown here (privacy.copy_images: all).",
    "phantoms": "Phantoms alone may be shown here, no images of patients (privacy.copy_images: phantoms).",
    "none": "No image may be shown here (privacy.copy_images: none).",
}


def write_data_docs(
    docs: Path,
    dataset: Path,
    survey: Survey,
    leakage: Mapping[str, Any],
    findings: Sequence[Finding],
    kinds: "pd.Series[Any]",
    difference: Mapping[str, Any] | None,
    params: Params,
) -> None:
    """`docs` holds whole Data Docs: Great Expectations' pages, an index, and pages on copies and odd images.

    Call it after `check_expectations` has left its pages in `docs`. `kinds` holds a tuple of kinds of oddity for each
    row of `survey.images` (`odd_kinds`); `difference` is the content of difference.json, None where no earlier version
    was accepted. Names and pictures are shown as `params.privacy` allows.
    """
    make_self_contained(docs)
    images, privacy = survey.images, params.privacy
    copies = draw_copies(dataset, images, privacy)
    odd = draw_odd_images(dataset, images, kinds, privacy)
    write_text(docs / COPIES, _copies_page(images, leakage, copies, privacy))
    write_text(docs / ODD_IMAGES, _odd_page(images, kinds, odd, privacy))
    parts = [
        element("h1", "Data validation"),
        element("p", joined(["Data version ", element("code", survey.data_md5)])),
        element("p", COPIED_IMAGES[privacy.copy_images]),
        _key_figures(images, leakage, kinds),
        element("h2", "Findings"),
        _findings(findings),
        element("h2", "Images"),
        _classes(images),
        element("h2", "Copies"),
        element("p", WHY_COPIES),
        _copies_by_place(leakage),
        element("p", link(COPIES, "Groups of copies: the largest, those across the splits, those of several labels")),
        element("h2", "Odd images"),
        _kinds(kinds),
        element("p", link(ODD_IMAGES, "Odd images by kind")),
        element("h2", "Since the last accepted data version"),
        *_difference(difference, images, params),
        element("h2", "Every expectation"),
        listed(_expectations(docs)),
    ]
    write_text(docs / INDEX, page("Data validation", parts))


def make_self_contained(docs: Path) -> None:
    """Every page that Great Expectations left in `docs` is whole by itself."""
    shutil.rmtree(docs / UNUSED, ignore_errors=True)
    for file in docs.rglob("*.html"):
        kept = _FOREIGN.sub("", file.read_text(encoding="utf-8"))
        write_text(file, _ADDRESS.sub('href="#"', kept).replace("</head>", f"{POLICY}<style>{STYLE}</style></head>", 1))


def _expectations(docs: Path) -> list[Html]:
    return [
        link(file.relative_to(docs).as_posix(), f"{title}: {_suite(file, docs)}")
        for folder, title in (("validations", "results"), ("expectations", "what is expected"))
        for file in sorted((docs / folder).rglob("*.html"))
    ]


def _suite(file: Path, docs: Path) -> str:
    parts = file.relative_to(docs).parts
    return parts[1] if parts[0] == "validations" else file.stem


def _findings(findings: Sequence[Finding]) -> Html:
    if not findings:
        return element("p", "none", 'class="passed"')
    rows = [
        (
            joined([element("span", finding.severity, f'class="{finding.severity}"'), Html("<br>"), finding.name]),
            joined([finding.message, _names(finding.shown_culprits, "culprit", "culprits")]),
        )
        for finding in findings
    ]
    counts = Counter(finding.severity for finding in findings)
    caption = f"{counts['critical']} critical, {counts['warning']} warnings: what the data set does not meet"
    return table(caption, ("finding", "what"), rows)


def _names(names: Sequence[str], one: str, many: str) -> Html:
    counted = f"{len(names)} {one if len(names) == 1 else many}"
    return folded(counted, listed(names)) if names else Html("")


def _key_figures(images: pd.DataFrame, leakage: Mapping[str, Any], kinds: "pd.Series[Any]") -> Html:
    splits = ", ".join(f"{(images['declared_split'] == split).sum():,} {split}" for split in DECLARED_SPLITS)
    n_odd, patients = int((kinds.map(len) > 0).sum()), leakage["patients"]
    return figures(
        [
            ("images", f"{leakage['n_images']:,}", splits),
            ("distinct slices", f"{leakage['n_groups']:,}", f"{leakage['n_copies']:,} images repeat another one"),
            (
                "leaked test images",
                _percent(leakage["leaked_share"]),
                f"{leakage['leaked_test_images']:,} of {leakage['n_test']:,} have a copy in training",
            ),
            ("label conflicts", len(leakage["label_conflicts"]), "groups of copies with several labels"),
            ("odd images", n_odd, "for a person to look at"),
            ("known patients", patients["known"], f"unknown for {patients['unknown']:,} images"),
        ]
    )


def _classes(images: pd.DataFrame) -> Html:
    counts = images.groupby(["label", "declared_split"]).size()
    rows = [(label, split, int(counts.get((label, split), 0))) for label in CLASS_NAMES for split in DECLARED_SPLITS]
    largest = max(count for _, _, count in rows)
    return table(
        "Images by class and declared split",
        ("class", "split", "images", ""),
        [(*row, bar(row[-1] / largest if largest else 0)) for row in rows],
    )


def _copies_by_place(leakage: Mapping[str, Any]) -> Html:
    places = {"train": "in train/ alone", "test": "in test/ alone", "across": "in both: these leak"}
    rows = [
        (what, leakage["copies"][place]["groups"], leakage["copies"][place]["images"]) for place, what in places.items()
    ]
    return table("Groups of several images", ("where", "groups", "images"), rows)


def _sizes(images: pd.DataFrame) -> Html:
    sizes = images["duplicate_group"].value_counts()
    rows = []
    for low, high in zip((0, *SIZE_STEPS), (*SIZE_STEPS, None), strict=True):
        within = sizes[(sizes > low) & (sizes <= (high or len(images)))]
        name = f"{low + 1} or more" if high is None else f"{low + 1} to {high}" if high > low + 1 else f"{high}"
        rows.append((name, len(within), int(within.sum())))
    largest = max(total for _, _, total in rows)
    return table(
        "Groups by size",
        ("images in the group", "groups", "images", ""),
        [(*row, bar(row[-1] / largest if largest else 0)) for row in rows],
    )


def _copies_page(
    images: pd.DataFrame, leakage: Mapping[str, Any], sheets: Mapping[str, Sequence[Sheet]], privacy: PrivacyParams
) -> str:
    per_group = f"of each group at most {contact_sheets.IMAGES_PER_GROUP} images are shown"
    topics = [
        ("largest", "The largest groups", f"The {contact_sheets.LARGEST_GROUPS} largest; {per_group}."),
        (
            "across",
            "Groups across the declared splits",
            f"Up to {contact_sheets.GROUPS_ACROSS} of {leakage['copies']['across']['groups']}, picked by chance; "
            f"{per_group}.",
        ),
        (
            "conflicts",
            "Groups with several labels",
            f"Up to {contact_sheets.CONFLICTING_GROUPS} of {len(leakage['label_conflicts'])}; {per_group}. "
            "One of the labels is wrong, or the slice shows nothing of the tumour.",
        ),
    ]
    parts = [*_opening("Copies", WHY_COPIES, privacy), _copies_by_place(leakage), _sizes(images)]
    for topic, title, remark in topics:
        parts += [element("h2", title), *_gallery(sheets[topic], remark)]
    return page("Copies", parts)


def _odd_page(
    images: pd.DataFrame, kinds: "pd.Series[Any]", sheets: Mapping[str, Sequence[Sheet]], privacy: PrivacyParams
) -> str:
    what = (
        "Images that a person should look at before a model learns from them. The file odd_images.csv beside the "
        "manifest lists them all, for annotators."
    )
    names = shown_names(images, privacy)
    parts = [*_opening("Odd images", what, privacy), _kinds(kinds)]
    for kind, its_sheets in sheets.items():
        every = sorted(names[[kind in its for its in kinds]])
        remark = f"{len(every):,} images; at most {contact_sheets.IMAGES_PER_KIND} are shown."
        parts += [element("h2", KIND_TITLES[kind].capitalize()), *_gallery(its_sheets, remark)]
        if len(every) > contact_sheets.IMAGES_PER_KIND:
            parts.append(_names(every, "name", "names"))
    return page("Odd images", parts)


def _opening(title: str, what: str, privacy: PrivacyParams) -> list[Html]:
    back = element("p", link(INDEX, "Data validation"))
    return [back, element("h1", title), element("p", what), element("p", COPIED_IMAGES[privacy.copy_images])]


def _kinds(kinds: "pd.Series[Any]") -> Html:
    counts = kinds.explode().value_counts()
    rows = [(what, int(counts.get(kind, 0))) for kind, what in KIND_TITLES.items()]
    return table("Odd images by kind; an image may be of several", ("kind", "images"), rows)


def _gallery(sheets: Iterable[Sheet], remark: str) -> list[Html]:
    drawn = [_figure(sheet) for sheet in sheets]
    if not drawn:
        return [element("p", "none", 'class="passed"')]
    return [element("p", remark), element("div", joined(drawn), 'class="sheets"')]


def _figure(sheet: Sheet) -> Html:
    title = f"{sheet.title}: {sheet.n_images} images" + (
        f", {len(sheet.names)} of them here" if len(sheet.names) < sheet.n_images else ""
    )
    named = folded("names, labels, splits", element("ol", joined(element("li", name) for name in sheet.names)))
    caption = element("figcaption", joined([title, named]))
    if sheet.picture is None:
        return element("figure", caption)
    # Within the page: MLflow shows a page of a run without the files beside it.
    address = f"data:image/jpeg;base64,{base64.b64encode(sheet.picture).decode()}"
    width, height = sheet.size
    picture = Html(f'<img src="{address}" width="{width}" height="{height}" alt="Contact sheet, {markup(title)}">')
    return element("figure", joined([picture, caption]))


def _difference(difference: Mapping[str, Any] | None, images: pd.DataFrame, params: Params) -> list[Html]:
    if difference is None or difference["counts"] is None:
        statement = "no earlier data version to compare with" if difference is None else difference["statement"]
        return [element("p", statement)]
    shown_of = dict(zip(images["path"], shown_names(images, params.privacy), strict=True))
    counts = difference["counts"]
    rows = [
        (
            what,
            _unknown(counts[change]),
            _names(_changed(difference, change, shown_of, params.privacy), "name", "names"),
        )
        for change, what in CHANGES.items()
    ]
    joins = [_join(found, shown_of) for found in difference["joined_groups"]]
    mix = [
        (label, _percent(share["before"]), _percent(share["now"])) for label, share in difference["label_mix"].items()
    ]
    return [
        element("p", difference["statement"]),
        element("p", f"{counts['before']:,} images then, {counts['now']:,} now."),
        table("What changed", ("change", "images", "names"), rows),
        _names(joins, "group that used to be several", "groups that used to be several"),
        table("Share of each class", ("class", "then", "now"), mix),
        *_drift(difference["drift"], params.validation.max_statistic_drift),
    ]


def _changed(
    difference: Mapping[str, Any], change: str, shown_of: Mapping[str, str], privacy: PrivacyParams
) -> list[str]:
    rows = difference["images"].get(change, [])[:NAMED]
    if change == "removed":
        # Only the names that were shown then are known, and privacy may be stricter by now.
        return [f"{shown_name(row['path'], row['sha256'], privacy)}, {row['label']}" for row in rows]
    return [shown_of[row["path"]] + (f": {row['before']} to {row['now']}" if "now" in row else "") for row in rows]


def _join(found: Mapping[str, Any], shown_of: Mapping[str, str]) -> str:
    by = ", ".join(shown_of[path] for path in found["bridges"])
    return f"{found['group']}: {', '.join(found['earlier'])}" + (f", joined by {by}" if by else "")


def _drift(drift: Mapping[str, Any], limit: float) -> list[Html]:
    rows = [
        (statistic, *(_distance(found["classes"].get(label), limit) for label in CLASS_NAMES))
        for statistic, found in drift.items()
    ]
    what = (
        "How far the distribution of a statistic has moved within a class: 0 not at all, 1 as far as can be. Above "
        f"{limit:g}, and above what chance explains, it is a finding."
    )
    return [
        element("p", what),
        table("Drift (Kolmogorov-Smirnov distance)", ("statistic", *CLASS_NAMES), rows),
    ]


def _distance(found: Mapping[str, float] | None, limit: float) -> Html:
    if found is None:
        return Html("unknown")
    is_drift = found["distance"] > max(limit, found["chance"])
    return element("span", f"{found['distance']:.2f}", 'class="warning"' if is_drift else "")


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.1f} %"


def _unknown(count: int | None) -> int | str:
    return "unknown" if count is None else count
