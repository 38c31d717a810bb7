"""The champion, fetched from a real store: the model that was registered, or a reason why there is none to compare."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from braintumor import artifacts
from braintumor.errors import RegistryUnreachable
from braintumor.model.inference import load_classifier, predict_probabilities
from braintumor.params import Params
from braintumor.progress import silent
from braintumor.registry.champion import Champion, ChampionUnusable, fetch_champion, groups_seen, score_champion
from braintumor.registry.server import connected
from braintumor.registry.versions import CHAMPION, champion
from braintumor.steps.gate import gate
from braintumor.steps.register import register

NAME = "brain-tumor-phantoms"


@pytest.fixture(name="facts")
def promoted_version(store: Path, make_folders: Callable[..., Any], params: Params) -> dict[str, Any]:
    """What context.json says of version 1, which is registered and promoted."""
    folders = make_folders()
    gate(folders.evaluation, folders.context, folders.validation, folders.decision, params.gate)
    steps = (folders.model, folders.splits, folders.evaluation, folders.decision, folders.context, folders.validation)
    register(*steps, folders.registration, params)
    with connected() as client:
        client.set_registered_model_alias(NAME, CHAMPION, "1")
    found = champion(NAME)
    assert found is not None
    return dict(found)


def stored(store: Path, name: str) -> Path:
    """The one file of this name below the store's artifacts."""
    (found,) = store.parent.rglob(f"mlartifacts/**/{name}")
    return found


def test_champion_comes_with_its_model_and_what_it_has_seen(
    facts: dict[str, Any], tiny_models: list[Path], tmp_path: Path
) -> None:
    found = fetch_champion(facts, NAME, tmp_path / "fetched")
    assert found.version == "1" and found.model.read_bytes() == tiny_models[0].read_bytes()
    assert len(found.seen_sha256) == 60 and all(re.fullmatch("[0-9a-f]{64}", digest) for digest in found.seen_sha256)
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 1), np.uint8)
    expected = predict_probabilities(load_classifier(tiny_models[0]), images)
    scored = score_champion(found, tmp_path, ["not read"] * 5, images, silent)
    np.testing.assert_allclose(scored, expected, atol=1e-6)


@pytest.mark.parametrize("harm", ["list gone", "list cut", "model cut", "version gone", "another model"])
def test_champion_that_is_not_what_was_registered_is_unusable_and_the_reason_names_no_place(
    harm: str, facts: dict[str, Any], store: Path, tmp_path: Path
) -> None:
    match harm:
        case "list gone":
            stored(store, "seen_images.sha256").unlink()
        case "list cut":
            file = stored(store, "seen_images.sha256")
            file.write_text("\n".join(file.read_text().splitlines()[:30]) + "\n")
        case "model cut":
            file = stored(store, artifacts.MODEL)
            file.write_bytes(file.read_bytes()[:1000])
        case "version gone":
            with connected() as client:
                client.delete_model_version(NAME, "1")
        case "another model":
            facts["model_digest"] = "0" * 64
    with pytest.raises(ChampionUnusable) as refused:
        fetch_champion(facts, NAME, tmp_path / "fetched")
    assert "version 1" in str(refused.value)
    assert str(store) not in str(refused.value) and "/" not in str(refused.value)


def test_server_that_does_not_answer_is_no_reason_to_compare_with_nothing(
    facts: dict[str, Any], tmp_path: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port}")
    with pytest.raises(RegistryUnreachable):
        fetch_champion(facts, NAME, tmp_path / "fetched")


def images_of(n: int, **columns: Any) -> pd.DataFrame:
    """A manifest of `n` images, two in each group."""
    rows = pd.DataFrame({"sha256": [f"sha-{index}" for index in range(n)], "patient": None})
    return rows.assign(duplicate_group=[f"g{index // 2}" for index in range(n)], **columns)


def test_groups_of_copies_and_patients_of_seen_images_are_known(tmp_path: Path) -> None:
    found = Champion("1", tmp_path / "model.keras", frozenset({"sha-2"}))
    assert groups_seen(found, images_of(8)) == {"g1"}
    patients = [None, None, "p1", None, None, None, "p1", None]
    assert groups_seen(found, images_of(8, patient=patients)) == {"g1", "g3"}


@pytest.mark.parametrize(("n_lost", "is_usable"), [(0, True), (1, True), (2, False), (150, False)])
def test_images_that_are_gone_make_a_comparison_worthless(n_lost: int, is_usable: bool, tmp_path: Path) -> None:
    seen = frozenset(f"sha-{index}" for index in range(150))
    found = Champion("1", tmp_path / "model.keras", seen)
    manifest = images_of(300).iloc[n_lost:]
    if is_usable:
        assert len(groups_seen(found, manifest)) == 75
    else:
        with pytest.raises(ChampionUnusable, match=f"{n_lost} of the 150 images"):
            groups_seen(found, manifest)


@pytest.mark.parametrize("harm", ["no model", "nan"])
def test_model_that_can_not_judge_is_unusable_and_does_not_stop_the_evaluation(
    harm: str, tiny_models: list[Path], tmp_path: Path
) -> None:
    file = tmp_path / "model.keras"
    if harm == "no model":
        file.write_bytes(b"not a model")
    else:
        model = load_classifier(tiny_models[0])
        model.get_layer("logits").kernel.assign(np.full((1, 4), np.nan))
        model.save(file)
    images = np.full((3, 32, 32, 1), 100, np.uint8)
    with pytest.raises(ChampionUnusable) as refused:
        score_champion(Champion("7", file, frozenset()), tmp_path, ["a", "b", "c"], images, silent)
    assert "version 7" in str(refused.value) and str(tmp_path) not in str(refused.value)
