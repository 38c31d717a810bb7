import json
import shutil
from pathlib import Path

import pytest
import yaml

from braintumor.errors import UserError
from braintumor.params import list_profiles, load_params, parse_params, use_profile

ROOT = Path(__file__).parents[2]


def changed(tmp_path: Path, section: str, **changes: object) -> Path:
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    for key, value in changes.items():
        if value is None:
            del content[section][key]
        else:
            content[section][key] = value
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    "path", [ROOT / "params.yaml", *sorted((ROOT / "params").glob("*.yaml"))], ids=lambda p: p.stem
)
def test_every_committed_file_is_complete(path: Path) -> None:
    params = load_params(path)
    assert params.gate.min_accuracy.required
    assert params.gate.min_accuracy.value >= 0.92
    assert params.gate.not_worse_than_champion is not None and params.promote.max_age_days > 0


def test_what_changes_no_result_is_shown_to_no_step(tmp_path: Path) -> None:
    profile = load_params(ROOT / "params.yaml")
    other = load_params(changed(tmp_path, "promote", max_age_days=7))
    assert other.as_json() == profile.as_json()
    assert parse_params(profile.as_json()).as_json() == profile.as_json()
    assert not {"cluster", "promote"} & set(json.loads(profile.as_json()))


@pytest.mark.parametrize(
    ("section", "change", "told"),
    [
        ("train", {"epoch": 3}, "train.epoch is unknown"),
        ("train", {"epochs": None}, "train.epochs is missing"),
        ("split", {"protocol": "random"}, "split.protocol is 'random'"),
        ("train", {"learning_rate": float("nan")}, "train.learning_rate is nan"),
        ("train", {"batch_size": 0}, "train.batch_size is 0"),
        ("gate", {"min_accuracy": {"value": 1.2, "required": True}}, "gate.min_accuracy.value is 1.2"),
        ("gate", {"min_accuracy": {"value": 0.9}}, "gate.min_accuracy.required is missing"),
        ("gate", {"not_worse_than_champion": {}}, "gate.not_worse_than_champion.required is missing"),
        ("gate", {"not_worse_than_champion": {"value": 0.9, "required": True}}, "not_worse_than_champion.value is"),
        ("promote", {"max_age_days": 0}, "promote.max_age_days is 0"),
        ("promote", {"poll_seconds": None}, "promote.poll_seconds is missing"),
        ("register", {"alias": "Challenger"}, "register.alias is 'Challenger'"),
        ("register", {"alias": "champion"}, "a reviewer sets 'champion'"),
        ("register", {"alias": "latest"}, "MLflow keeps this alias"),
        ("register", {"alias": "v2"}, "MLflow keeps this alias"),
        ("train", {"seed": -1}, "train.seed is -1"),
        ("train", {"schedule": "constant"}, "set warmup_fraction to 0"),
        ("train", {"optimizer": "adam"}, "set weight_decay to 0"),
        ("train", {"weights": "none", "epochs": 0}, "there is no head phase"),
        ("train", {"head_epochs": 0, "epochs": 0}, "nothing would be trained"),
        ("train", {"weights": "none", "batch_norm": "inference"}, "needs pretrained weights"),
        ("train", {"ema_momentum": 1.0}, "train.ema_momentum is 1.0"),
    ],
)
def test_wrong_key_or_value_is_named_with_its_section(
    tmp_path: Path, section: str, change: dict[str, object], told: str
) -> None:
    with pytest.raises(UserError) as error:
        load_params(changed(tmp_path, section, **change))
    assert told in str(error.value)
    assert "params.yaml" in str(error.value)


def test_unknown_and_missing_sections_are_both_named(tmp_path: Path) -> None:
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    content["trian"] = content.pop("train")
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError) as error:
        load_params(path)
    assert "train is missing" in str(error.value)
    assert "trian is unknown" in str(error.value)


@pytest.mark.parametrize(("text", "told"), [("", "no sections"), ("a: [", "not valid YAML"), ("- a", "no sections")])
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=told):
        load_params(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing"):
        load_params(tmp_path / "params.yaml")


def test_profile_replaces_the_file_in_use(tmp_path: Path) -> None:
    target = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", target)
    use_profile("reference", ROOT / "params", target)
    assert target.read_bytes() == (ROOT / "params" / "reference.yaml").read_bytes()


def test_unknown_profile_is_refused_and_the_file_in_use_kept(tmp_path: Path) -> None:
    target = tmp_path / "params.yaml"
    target.write_text("mine")
    with pytest.raises(UserError, match=r"choose one of .*reference"):
        use_profile("referense", ROOT / "params", target)
    assert target.read_text() == "mine"


def test_profiles_are_listed_with_what_they_are_for() -> None:
    profiles = list_profiles(ROOT / "params")
    assert {"production", "real-cpu", "reference", "sample"} <= set(profiles)
    assert all(len(purpose) > 10 for purpose in profiles.values())


def test_sample_profile_is_the_file_that_was_committed_in_use() -> None:
    assert (ROOT / "params" / "sample.yaml").read_bytes() == (ROOT / "params.yaml").read_bytes()


def test_reference_profile_is_the_published_recipe() -> None:
    train = load_params(ROOT / "params" / "reference.yaml").train
    assert (train.image_size_px, train.weights, train.epochs) == (224, "imagenet", 25)
    assert (train.learning_rate, train.schedule) == (1e-5, "constant")
