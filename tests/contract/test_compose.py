"""The registry on one machine: as confined as in Kubernetes, and no secret but in a file."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "mlflow"
TEXT = (FOLDER / "compose.yaml").read_text()
COMPOSE = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
EXAMPLE = dict(
    line.split("=", 1)
    for line in (FOLDER / "example.env").read_text().splitlines()
    if line and not line.startswith("#")
)
# With a user of their own, who stands in the image.
OUR_IMAGES = {"mlflow", "promoter"}

every_service = pytest.mark.parametrize("name", SERVICES)


def secret_names(service: dict[str, Any]) -> set[str]:
    return {one if isinstance(one, str) else one["target"] for one in service.get("secrets", [])}


def test_services_are_those_of_the_cluster() -> None:
    assert set(SERVICES) == {"postgres", "mlflow", "promoter", "backup", "seaweedfs"}
    assert SERVICES["seaweedfs"]["profiles"] == ["s3"]


@every_service
def test_a_service_is_confined_watched_and_bounded(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert "cap_add" not in service
    assert service["mem_limit"]
    assert service["healthcheck"]["test"]
    assert name in OUR_IMAGES or re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])
    assert re.search(r":(\d[\w.-]*|\$\{TAG.*)$", service["image"])
    for volume in service.get("volumes", []):
        if isinstance(volume, str) and volume.startswith("./"):
            source, _, mode = volume.split(":")
            assert (FOLDER / source).is_file()
            assert mode == "ro"


def test_only_the_server_is_reached_and_only_from_this_machine() -> None:
    assert {name: one["ports"] for name, one in SERVICES.items() if "ports" in one} == {
        "mlflow": ["127.0.0.1:${PORT:-5000}:5000"]
    }
    assert COMPOSE["networks"]["database"] == {"internal": True}
    assert {name for name, one in SERVICES.items() if "database" in one["networks"]} == {"postgres", "mlflow", "backup"}
    assert SERVICES["postgres"]["networks"] == SERVICES["backup"]["networks"] == ["database"]


def test_a_secret_is_a_file_and_nothing_else_and_has_no_default() -> None:
    for name, secret in COMPOSE["secrets"].items():
        assert re.fullmatch(rf"\$\{{SECRETS_FOLDER(:\?[^}}]*)?\}}/{name}", secret["file"])
    assert {name for one in SERVICES.values() for name in secret_names(one)} == {
        *COMPOSE["secrets"], "MLFLOW_TRACKING_PASSWORD"
    } - {"PROMOTER_PASSWORD"}  # fmt: skip
    for service in SERVICES.values():
        for name in service.get("environment", {}):
            assert name not in COMPOSE["secrets"]
            assert not re.search(r"PASSWORD(?!_FILE)|SECRET|TOKEN|ACCESS_KEY", name)


def test_the_database_knows_no_secret_of_the_server_and_the_promoter_none_of_the_database() -> None:
    assert secret_names(SERVICES["postgres"]) == {"POSTGRES_PASSWORD", "PGPASSWORD"}
    assert secret_names(SERVICES["backup"]) == {"PGPASSWORD"}
    assert "PGPASSWORD" not in secret_names(SERVICES["promoter"])
    assert "POSTGRES_PASSWORD" not in secret_names(SERVICES["mlflow"])


@pytest.mark.parametrize("name", ["promoter", "backup"])
def test_a_secret_that_a_command_names_is_there(name: str) -> None:
    command = [*SERVICES[name].get("entrypoint", []), *SERVICES[name]["command"]]
    assert command[0] == "/with-secrets"
    named = {one.removesuffix("?") for one in command[1 : command.index("--")]}
    assert named == secret_names(SERVICES[name])


def test_the_example_answers_everything_that_must_be_said_and_holds_no_secret() -> None:
    used = dict(re.findall(r"\$\{(\w+)(:[?-])?", TEXT))
    demanded = set(re.findall(r"\$\{(\w+):\?", TEXT))
    assert demanded <= set(EXAMPLE) <= set(used)
    assert all(EXAMPLE.values())
    assert not set(EXAMPLE) & set(COMPOSE["secrets"])
    # What is named without a default is demanded where it is named first.
    assert {name for name in used if f"${{{name}}}" in TEXT} <= demanded


def test_there_is_memory_for_what_a_restore_lays_out_and_both_can_be_raised() -> None:
    backup = SERVICES["backup"]
    (space,) = re.findall(r"^/tmp:size=\$\{RESTORE_SPACE:-(\d+)g\}", "".join(backup["tmpfs"]))
    (memory,) = re.findall(r"^\$\{RESTORE_MEMORY:-(\d+)g\}$", backup["mem_limit"])
    assert int(memory) > int(space)
    document = (FOLDER.parent / "docs/operating.md").read_text()
    for name, default in (("RESTORE_SPACE", space), ("RESTORE_MEMORY", memory)):
        assert EXAMPLE[name] == f"{default}g"
        assert f"`{name}`" in document


def test_a_restore_that_does_not_fit_says_so_and_changes_nothing(tmp_path: Path) -> None:
    programs, backup = tmp_path / "bin", tmp_path / "backups/2026-01-31T01-17-00Z"
    programs.mkdir()
    backup.mkdir(parents=True)
    for name in ("mlflow", "accounts"):
        (backup / f"{name}.dump").write_text(name)
    sums = subprocess.run(["sha256sum", "mlflow.dump", "accounts.dump"], cwd=backup, capture_output=True, check=True)
    (backup / "SHA256SUMS").write_bytes(sums.stdout)
    # The second database is the one for which no room is left.
    (programs / "pg_restore").write_text(
        '#!/bin/bash\nfor last; do :; done\ncase $last in *accounts*) echo "SELECT 1" >/dev/full;; esac\n'
    )
    (programs / "psql").write_text('#!/bin/bash\necho "$@" >>"$CALLS"\necho 0\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    calls = tmp_path / "calls"
    done = subprocess.run(
        [FOLDER / "restore", "--replace", "latest"],
        env={"PATH": f"{programs}:/usr/bin:/bin", "BACKUPS": str(backup.parent), "CALLS": str(calls)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "accounts can't be laid out" in done.stderr
    assert "--single-transaction" not in calls.read_text()


def test_hosts_and_origin_are_those_of_the_example() -> None:
    environment = SERVICES["mlflow"]["environment"]
    assert environment["MLFLOW_SERVER_ALLOWED_HOSTS"].endswith("},mlflow:5000")
    assert "${REGISTRY_HOST:?" in environment["MLFLOW_SERVER_ALLOWED_HOSTS"]
    assert environment["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"] == "https://${REGISTRY_HOST}"
    assert SERVICES["promoter"]["environment"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert (FOLDER.parent / "params" / f"{EXAMPLE['PROFILE']}.yaml").is_file()


def test_the_images_are_those_of_the_cluster() -> None:
    overlay = yaml.safe_load((FOLDER.parent / "k8s/overlays/mlflow/kustomization.yaml").read_text())
    images = {one["name"]: one["newTag"] for one in overlay["images"]}
    assert SERVICES["postgres"]["image"] == SERVICES["backup"]["image"] == f"postgres:{images['postgres']}"
    assert {SERVICES[name]["image"].partition(":")[0] for name in OUR_IMAGES} == set(images) - {"postgres"}
    assert EXAMPLE["TAG"] == images["braintumor"] == images["braintumor-mlflow"]
