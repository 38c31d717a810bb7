import copy
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from braintumor.errors import UserError
from braintumor.evidence import plots, report
from braintumor.evidence.doubts import NOT_MEASURED, find_doubts, missed_tumours, percent
from braintumor.evidence.gallery import Gallery
from braintumor.evidence.report import SECTIONS, write_report
from braintumor.evidence.triage import measure_triage
from braintumor.params import load_params

MakeEvaluation = Callable[..., Any]


class Page(HTMLParser):
    """What a reader, a browser and a screen reader find on a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.alternatives: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.cells: list[str] = []
        self.source = text
        self.feed(text)
        self.cells = [cell.strip() for cell in self.cells]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        has = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if "id" in has:
            self.ids.append(has["id"])
        if tag == "a":
            self.links.append(has["href"])
        if tag == "img":
            self.alternatives.append(has["alt"])
        if tag == "td":
            self.cells.append("")
        self.loaded += [has[name] for name in ("src", "srcset", "data", "action") if name in has]
        self.loaded += [has["href"]] if tag == "link" else []
        assert not any(name.startswith("on") for name in has)

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.cells:
            self.cells[-1] += data


def read(folder: Path, evaluation: Any, galleries: Any = (), **changes: Any) -> Page:
    evidence = evaluation.evidence | changes
    write_report(evaluation.metrics, evidence, galleries, evaluation.training, folder / "report.html")
    return Page((folder / "report.html").read_text())


def gallery(side_px: int = 64, title: str = "Wrong") -> Gallery:
    pixels = np.random.default_rng(0).integers(0, 255, (side_px, side_px, 3)).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=95)
    return Gallery(title, "The most confident mistakes.", ("a.png, glioma",), content.getvalue(), (side_px, side_px))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, evaluation: Any) -> Page:
    """The report with a gallery."""
    return read(tmp_path_factory.mktemp("report"), evaluation, [gallery()])


def leads(evaluation: Any, **changes: Any) -> list[str]:
    return [doubt.lead for doubt in find_doubts(evaluation.metrics, evaluation.evidence | changes)]


def test_first_screen_tells_what_was_judged_how_good_it_is_and_what_to_doubt(page: Page, evaluation: Any) -> None:
    metrics = evaluation.metrics
    first = page.text.split("Can the figure be believed? Intervals")[0]
    for said in (
        "A research tool, not a diagnostic device.",
        f"{metrics['n_test']:,} test images in {metrics['n_groups']:,} groups",
        "official: copy-free, patients unknown",
        metrics["data_md5"][:12],
        metrics["model_digest"][:12],
        *(percent(metrics[name]) for name in ("accuracy", "nearest_neighbour_accuracy", "statistics_accuracy")),
        *(percent(end) for end in metrics["accuracy_interval"]),
        percent(metrics["tumour_sensitivity"]),
        percent(metrics["copy_free_accuracy"]),
        percent(evaluation.evidence["calibration"]["after"]["ece"]),
        f"{evaluation.evidence['ood']['auroc']:.2f}",
        "What to doubt",
        *(doubt.told for doubt in find_doubts(metrics, evaluation.evidence)),
    ):
        assert said in first, said


def test_page_loads_nothing_and_runs_nothing(page: Page) -> None:
    assert page.loaded and all(address.startswith("data:image/") for address in page.loaded)
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "form", "base"}
    assert "default-src 'none'" in page.source
    assert "url(" not in page.source and "@import" not in page.source
    assert len(page.source) < report.MAX_BYTES


def test_links_lead_to_headings_whose_levels_skip_none(page: Page, tmp_path: Path, make_evaluation: Any) -> None:
    for one in (page, read(tmp_path, make_evaluation(leaky=True))):
        assert one.headings[0] == 1 and one.headings.count(1) == 1
        assert all(below - above <= 1 for above, below in zip(one.headings, one.headings[1:], strict=False))
        assert len(one.ids) == len(set(one.ids))
        assert set(one.links) <= {f"#{name}" for name in one.ids}
        assert [link for link in one.links if link[1:] in SECTIONS][: len(SECTIONS)] == [
            f"#{name}" for name in SECTIONS
        ]


def test_every_plot_tells_its_figures_and_these_stand_in_tables(page: Page, evaluation: Any) -> None:
    assert len(page.alternatives) > 15
    assert all(re.search(r"\d", told) and len(told) > 40 for told in page.alternatives)
    evidence = evaluation.evidence
    shares = [
        *(entry["accuracy"] for entry in evidence["slices"]),
        *(entry["coverage"] for entry in evidence["conformal"]["per_class"].values()),
        *(entry["flagged_share"] for entry in evidence["ood"]["kinds"].values()),
        *(accuracy for kind in evidence["robustness"]["kinds"].values() for accuracy in kind["accuracy"]),
        *(entry["accuracy"] for entry in evidence["calibration"]["bins"] if entry["n"]),
        *(entry["champion"] for entry in evidence["comparison"]["figures"].values()),
        *(part["neighbour_accuracy"] for part in evidence["leakage"]["declared"] if part["n"]),
    ]
    for share in shares:
        assert percent(share) in page.cells, share


def test_same_figures_give_the_same_bytes_in_whatever_order_they_come(
    page: Page, tmp_path: Path, evaluation: Any
) -> None:
    other = json.loads(json.dumps(evaluation.evidence, sort_keys=True))
    assert read(tmp_path, evaluation, [gallery()], **other).source == page.source


def test_names_are_escaped(tmp_path: Path, evaluation: Any) -> None:
    evil = '"><script>alert(1)</script>'
    mistakes = copy.deepcopy(evaluation.evidence["mistakes"])
    mistakes["confident"][0]["path"] = evil
    page = read(tmp_path, evaluation, [gallery(title=evil)], mistakes=mistakes)
    assert "script" not in page.tags
    assert page.text.count(evil) == 2


def test_pictures_are_made_smaller_until_the_page_is_small_enough(
    tmp_path: Path, evaluation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(tmp_path, evaluation)
    bare = (tmp_path / "report.html").stat().st_size
    monkeypatch.setattr(report, "MAX_BYTES", bare + 100_000)
    page = read(tmp_path, evaluation, [gallery(600)])
    assert (tmp_path / "report.html").stat().st_size <= report.MAX_BYTES
    assert any(address.startswith("data:image/jpeg") for address in page.loaded)
    monkeypatch.setattr(report, "MAX_BYTES", bare)
    with pytest.raises(UserError, match="gallery_images"):
        read(tmp_path, evaluation, [gallery(600)])


def test_pictures_that_privacy_keeps_back_are_named_only(tmp_path: Path, evaluation: Any) -> None:
    hidden = Gallery("Wrong", "The most confident mistakes.", ("a.png, glioma",))
    page = read(tmp_path, evaluation, [hidden])
    assert "privacy keeps these images back" in page.text and "a.png, glioma" in page.text
    assert not any(address.startswith("data:image/jpeg") for address in page.loaded)


def test_what_was_not_measured_is_said_in_its_section_and_among_the_doubts(tmp_path: Path, evaluation: Any) -> None:
    page = read(tmp_path, evaluation, **dict.fromkeys(NOT_MEASURED))
    assert page.text.count("Not measured in this evaluation.") == len(NOT_MEASURED)
    assert all(told in page.text for told in NOT_MEASURED.values())
    assert "robustness_images is 0" in page.text
    assert [name for name in SECTIONS if name in page.ids] == list(SECTIONS)


def test_a_comparison_that_was_not_made_says_why(tmp_path: Path, evaluation: Any) -> None:
    from braintumor.evidence.comparison import no_champion, not_comparable

    page = read(tmp_path, evaluation, comparison=not_comparable("the classes differ", "3"))
    assert page.text.count("the classes differ") + page.text.count("The classes differ") == 2
    assert "no version has the alias champion yet" in read(tmp_path, evaluation, comparison=no_champion()).text


def test_a_good_model_leaves_few_doubts(make_evaluation: MakeEvaluation) -> None:
    found = leads(make_evaluation(0.99))
    assert "Patients unknown." in found
    weaknesses = {"A shortcut.", "Over-confident.", "Inflated by copies.", "Not above the floor.", "Missed tumours."}
    assert not weaknesses & set(found), found


def test_a_leaky_model_is_exposed(tmp_path: Path, make_evaluation: MakeEvaluation) -> None:
    leaky = make_evaluation(leaky=True)
    (doubt,) = [doubt for doubt in find_doubts(leaky.metrics, leaky.evidence) if doubt.lead == "Inflated by copies."]
    parts = {part["part"]: percent(part["accuracy"]) for part in leaky.evidence["leakage"]["split"]}
    assert percent(leaky.metrics["leaked_share"]) in doubt.told and "protocol declared" in doubt.told
    assert parts["with copies"] in doubt.told and parts["copy-free"] in doubt.told
    page = read(tmp_path, leaky)
    assert page.text.count("Warning:") >= 1 and "model, copy-free" in " ".join(page.alternatives)


def test_an_over_confident_model_is_exposed(make_evaluation: MakeEvaluation) -> None:
    sharpened = make_evaluation(0.8, sharpened=4)
    (doubt,) = [doubt for doubt in find_doubts(sharpened.metrics, sharpened.evidence) if doubt.section == "calibration"]
    assert doubt.lead == "Over-confident."
    assert percent(sharpened.evidence["calibration"]["after"]["ece"]) in doubt.told
    assert "Under-confident." in leads(make_evaluation(0.97, sharpened=0.3))


def test_a_model_that_takes_a_shortcut_is_exposed(make_evaluation: MakeEvaluation) -> None:
    assert "A shortcut." in leads(make_evaluation(shortcut=True))


def test_a_weak_slice_class_and_perturbation_are_named_with_their_figures(evaluation: Any) -> None:
    evidence = copy.deepcopy(evaluation.evidence)
    evidence["robustness"]["kinds"]["noise"]["accuracy"] = [0.8, 0.2]
    told = {doubt.section: f"{doubt.lead} {doubt.told}" for doubt in find_doubts(evaluation.metrics, evidence)}
    rgb = next(entry for entry in evidence["slices"] if entry["value"] == "RGB" and entry["label"] is None)
    plain = next(entry for entry in evidence["slices"] if entry["value"] == "L" and entry["label"] is None)
    assert rgb["stands_out"]
    of_slice = f"{percent(rgb['accuracy'])} of mode RGB ({rgb['n']:,} images; the rest {percent(plain['accuracy'])})"
    assert of_slice in told["slices"]
    worst = min(evaluation.metrics["per_class"], key=lambda name: evaluation.metrics["per_class"][name]["recall"])
    assert f"Weakest on {worst}" in told["classes"]
    assert "Not robust to noise" in told["robust"] and "20.0% under noise" in told["robust"]
    rotated = evidence["ood"]["kinds"]["rotated"]
    assert rotated["auroc"] < 0.9 and f"rotated (AUROC {rotated['auroc']:.2f}" in told["ood"]


def test_doubts_of_explanation_coverage_and_referral_rest_on_their_figures(evaluation: Any) -> None:
    evidence = copy.deepcopy(evaluation.evidence)
    evidence["explanation"]["randomisation"]["passed"] = False
    evidence["explanation"]["localisation"]["pointing_game"] = 0.07
    evidence["conformal"]["per_class"]["glioma"] |= {"coverage": 0.7, "coverage_interval": [0.6, 0.8]}
    evidence["triage"] |= {"threshold": None, "test": None, "calibration": None, "remark": "refer every image"}
    found = {doubt.section: doubt.told for doubt in find_doubts(evaluation.metrics, evidence)}
    assert {"sanity", "localisation", "conformal", "triage"} <= set(found)
    assert "70.0% of glioma" in found["conformal"] and found["triage"] == "Refer every image."
    assert not {"sanity", "localisation"} & {
        doubt.section for doubt in find_doubts(evaluation.metrics, evaluation.evidence)
    }


def triage_of(error: float) -> dict[str, Any]:
    """Referral by a model that calibration shows to be right in 99 % where it is sure, on test images with an error."""
    committed = load_params(Path(__file__).parents[3] / "params.yaml").evaluate
    params = committed.model_copy(update={"triage_max_error": 0.05, "bootstrap_samples": 500})
    truth, wrong = (np.arange(400) % round(1 / share) == 0 for share in (0.01, error))
    sure = np.tile([0.97, 0.01, 0.01, 0.01], (400, 1))
    return measure_triage(truth.astype(int), sure, np.arange(400), wrong.astype(int), sure, np.arange(400), params)


@pytest.mark.parametrize(("error", "is_broken"), [(0.02, False), (1 / 17, False), (0.1, True)])
def test_referral_is_doubted_where_its_own_remark_says_that_it_breaks_its_promise(
    evaluation: Any, error: float, is_broken: bool
) -> None:
    found = triage_of(error)
    doubted = [doubt.told for doubt in find_doubts(evaluation.metrics, evaluation.evidence | {"triage": found})]
    told = [text for text in doubted if "Of the test images that it keeps" in text]
    assert ("The test images break this" in found["remark"]) == bool(told) == is_broken
    assert (1 - found["test"]["accuracy"] > found["max_error"]) == (error > 0.05)
    if is_broken:
        assert "10.0% (7." in told[0]


def test_no_error_is_promised_where_no_threshold_was_found(tmp_path: Path, evaluation: Any) -> None:
    promise = "so that at most 5.0% of the answers kept are wrong"
    assert promise in read(tmp_path, evaluation, triage=triage_of(0.02)).text
    none = triage_of(0.02) | {"threshold": None, "test": None, "calibration": None, "remark": "Refer every image."}
    assert promise not in read(tmp_path, evaluation, triage=none).text


def test_strange_images_that_are_flagged_are_not_called_unnoticed(evaluation: Any) -> None:
    ood = copy.deepcopy(evaluation.evidence["ood"])
    ood["kinds"]["noise"] |= {"auroc": 0.6, "flagged_share": 0.1}
    ood["kinds"]["rotated"] |= {"auroc": 0.85, "flagged_share": 0.7}
    doubts = find_doubts(evaluation.metrics, evaluation.evidence | {"ood": ood})
    assert [(doubt.lead, doubt.told) for doubt in doubts if doubt.section == "ood"][:2] == [
        ("Strange images pass.", "The model hardly notices noise (AUROC 0.60, 10% flagged)."),
        (
            "Strange images score like test images.",
            "The model tells rotated (AUROC 0.85, 70% flagged) less well from test images.",
        ),
    ]


def test_sets_that_hold_the_truth_too_seldom_are_doubted(evaluation: Any) -> None:
    conformal = evaluation.evidence["conformal"] | {"coverage": 0.8, "coverage_interval": [0.75, 0.85]}
    assert "Sets that promise too much." in leads(evaluation, conformal=conformal)
    assert "Sets that promise too much." not in leads(evaluation)


def test_a_model_that_guesses_takes_no_shortcut(evaluation: Any) -> None:
    shortcut = evaluation.evidence["shortcut"] | {"share_of_gain": None, "warning": "no better than guessing"}
    found = leads(evaluation, shortcut=shortcut)
    assert "No better than guessing." in found and "A shortcut." not in found


def test_copies_that_stand_in_easier_classes_are_not_said_to_inflate(make_evaluation: MakeEvaluation) -> None:
    leaky = make_evaluation(leaky=True)
    leakage = copy.deepcopy(leaky.evidence["leakage"])
    leakage["advantage"]["split"]["same_mix"] = {"difference": 0.0, "interval": [-0.1, 0.1]}
    assert "Inflated by copies." in leads(leaky)
    found = leads(leaky, leakage=leakage)
    assert "Tested on copies." in found and "Inflated by copies." not in found


def test_missed_tumours_are_those_called_notumor() -> None:
    matrix = [[5, 1, 2, 0], [0, 9, 3, 0], [1, 1, 7, 1], [0, 0, 4, 6]]
    assert missed_tumours({"confusion_matrix": matrix}) == (9, 30)


def test_nearly_all_is_not_all() -> None:
    assert [percent(share) for share in (0, 0.0004, 0.5, 0.9996, 1)] == ["0.0%", "<0.1%", "50.0%", ">99.9%", "100.0%"]


def test_curves_hold_what_the_report_draws(evaluation: Any) -> None:
    tables = plots.curves(evaluation.evidence)
    evidence = evaluation.evidence
    assert tables["reliability.csv"]["n"].sum() == evaluation.metrics["n_test"]
    curve = evidence["triage"]["curve"]
    assert tables["risk_coverage.csv"]["wrong"].to_list() == [1 - point["accuracy"] for point in curve]
    noise = evidence["robustness"]["kinds"]["noise"]["accuracy"]
    assert tables["robustness.csv"]["noise"].dropna().to_list() == [evidence["robustness"]["clean_accuracy"], *noise]
    assert tables["ood.csv"]["kind"].to_list() == ["noise", "rotated"]
    assert len(tables["slices.csv"]) == len(evidence["slices"])
    empty = plots.curves(dict.fromkeys(NOT_MEASURED))
    assert empty.keys() == tables.keys() and all(table.empty for table in empty.values())
    assert all(list(empty[name]) == list(tables[name]) for name in tables if name != "robustness.csv")


def test_drawings_are_the_same_every_time_and_hold_no_date(evaluation: Any) -> None:
    bins = evaluation.evidence["calibration"]["bins"]
    first, second = (plots.draw_reliability(bins, "as the model answers").svg for _ in range(2))
    assert first == second and first.startswith(b"<?xml")
    assert not re.search(rb"<dc:date|20\d\d-\d\d-\d\d", first)
