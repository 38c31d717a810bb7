"""The images' files: locked requirements, no root, and nothing in them that a step, or the server, doesn't need."""

import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("Dockerfile", "mlflow/Dockerfile")


def lines(file: str) -> list[str]:
    return re.sub(r"\\\n\s*", "", (ROOT / file).read_text()).splitlines()


def instructions(file: str) -> list[tuple[str, ...]]:
    return [tuple(line.split(maxsplit=1)) for line in lines(file) if line and not line.startswith("#")]


INSTRUCTIONS = instructions("Dockerfile")
SERVER = instructions("mlflow/Dockerfile")
TARGETS = ("cpu", "gpu")

targets = pytest.mark.parametrize("target", TARGETS)
files = pytest.mark.parametrize("file", FILES)


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Name of each stage, what it stands on, and its instructions."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for instruction, rest in INSTRUCTIONS:
        if instruction == "FROM":
            parent, _, name = rest.split()
            found[name] = (parent, [])
        elif found:
            list(found.values())[-1][1].append((instruction, rest))
    return found


def built(target: str) -> list[tuple[str, str]]:
    """All instructions behind a target, from the base image on."""
    parent, own = stages()[target]
    return [*(built(parent) if parent in stages() else []), *own]


def pins(name: str) -> set[str]:
    return set(re.findall(r"^[\w.-]+", (ROOT / "requirements" / name).read_text(), re.MULTILINE))


def copied_from_the_context(file: str = "Dockerfile") -> set[str]:
    copies = [rest.split()[:-1] for instruction, rest in instructions(file) if instruction == "COPY"]
    return {source for sources in copies if not sources[0].startswith("--from") for source in sources}


@files
def test_lint_finds_nothing(file: str) -> None:
    lint = subprocess.run([Path(sys.prefix) / "bin/hadolint", ROOT / file], capture_output=True, text=True, check=False)
    assert (lint.returncode, lint.stdout) == (0, "")


def test_every_stage_stands_on_the_pinned_base_or_on_a_stage_before_it() -> None:
    assert INSTRUCTIONS[0][0] == "ARG"
    # A registry's name would hold a slash, and a base without a tag could be any.
    assert re.fullmatch(r"BASE=python:3\.11-slim-\w+", INSTRUCTIONS[0][1])
    seen: set[str] = set()
    for name, (parent, _) in stages().items():
        assert parent == "${BASE}" or parent in seen
        seen.add(name)
    assert seen >= set(TARGETS)


def test_no_address_is_written_down() -> None:
    assert "://" not in "\n".join(lines("Dockerfile"))
    addresses = re.findall(r"\S*://[^\s')]*", "\n".join(lines("mlflow/Dockerfile")))
    # Of its own container, of a bucket's usual name, and a database that the environment names.
    assert addresses == [
        "MLFLOW_ARTIFACTS_DESTINATION=s3://mlflow/artifacts",
        "MLFLOW_BACKEND_STORE_URI=postgresql+psycopg2:///mlflow",
        "urlopen('http://127.0.0.1:5000/health",
    ]


@targets
def test_nothing_of_the_stages_with_an_installer_is_shipped_but_what_is_copied(target: str) -> None:
    assert not any(
        re.search(r"\b(pip|apt-get|venv)\b (?!\*)", rest) for instruction, rest in built(target) if instruction == "RUN"
    )
    copies = [rest.split() for instruction, rest in built(target) if instruction == "COPY" and "--from" in rest]
    assert copies
    assert {(source, place) for _, source, place in copies} <= {
        (f"/opt/{name}", "/opt/braintumor") for name in ("braintumor", "package", "cuda")
    }


def test_everything_that_is_installed_is_locked_by_hash_or_comes_from_the_repository() -> None:
    installs = [rest for instruction, rest in INSTRUCTIONS if instruction == "RUN" and "pip install" in rest]
    assert len(installs) == 3
    for install in installs:
        assert "--require-hashes" in install or "--no-index --no-deps --no-build-isolation" in install


def test_the_build_backend_is_all_that_is_removed_and_cuda_all_that_the_gpu_target_adds() -> None:
    (removal,) = [rest for _, rest in INSTRUCTIONS if "pip uninstall" in rest]
    removed = removal.split("--yes ")[1].split(" &&")[0].split()
    assert set(removed) == pins("run.txt") - pins("gpu.txt")
    added = pins("gpu.txt") - pins("run.txt")
    assert "nvidia-cudnn-cu12" in added
    assert all(name.startswith("nvidia-") for name in added)


def test_gpu_lock_has_the_versions_of_the_run_lock() -> None:
    def versions(name: str) -> dict[str, str]:
        return dict(re.findall(r"^([\w.-]+)\S*==(\S+)", (ROOT / "requirements" / name).read_text(), re.MULTILINE))

    run, gpu = versions("run.txt"), versions("gpu.txt")
    assert {name: gpu[name] for name in run if name in gpu} == {name: run[name] for name in run if name in gpu}


def test_both_targets_end_alike_with_the_code_last() -> None:
    (_, cpu), (_, gpu) = stages()["cpu"], stages()["gpu"]
    assert cpu == gpu
    assert cpu[0] == ("COPY", "--from=package /opt/package /opt/braintumor")
    # Of what changes with every commit, nothing stands before the requirements.
    code = {"braintumor", "components", "pipelines", "params", "pyproject.toml"}
    before = [rest for name in ("pip", "requirements", "runtime") for _, rest in built(name)]
    assert not any(set(rest.split()) & code for rest in before if "COPY" in rest)


@targets
def test_the_image_runs_as_a_numbered_user_who_is_not_root(target: str) -> None:
    users = [rest for instruction, rest in built(target) if instruction == "USER"]
    assert users == ["10001:10001"]
    assert not any(instruction == "ENTRYPOINT" for instruction, _ in built(target))


@targets
def test_the_image_knows_its_commit_and_refuses_to_be_built_without(target: str) -> None:
    instructions = built(target)
    assert ("LABEL", "org.opencontainers.image.revision=${GIT_COMMIT}") in instructions
    assert ("ENV", "BRAINTUMOR_GIT_COMMIT=${GIT_COMMIT}") in instructions
    # After all that is copied: another commit with the same code changes no layer.
    assert [instruction for instruction, _ in instructions[-4:]] == ["ARG", "RUN", "LABEL", "ENV"]
    assert any(
        instruction == "RUN" and rest.startswith('test -n "${GIT_COMMIT}"') for instruction, rest in instructions
    )


@targets
def test_imports_are_tried_at_the_build(target: str) -> None:
    (trial,) = [rest for instruction, rest in built(target) if "python3 -c" in rest]
    for name in ("braintumor", "components", "pipelines", "tensorflow", "kfp", "mlflow", "great_expectations", "boto3"):
        assert re.search(rf"\b{name}\b", trial.split("import", 1)[1])
    assert "&& braintumor --help" in trial


@pytest.mark.parametrize(
    ("file", "ignored"), [("Dockerfile", ".dockerignore"), ("mlflow/Dockerfile", "mlflow/Dockerfile.dockerignore")]
)
def test_the_build_sees_nothing_but_what_it_copies(file: str, ignored: str) -> None:
    first, *allowed = [line for line in (ROOT / ignored).read_text().splitlines() if line and not line.startswith("#")]
    assert first == "*"
    assert {line[1:] for line in allowed if line.startswith("!")} == copied_from_the_context(file)
    assert [line for line in allowed if not line.startswith("!")] == ["**/__pycache__"]
    for source in copied_from_the_context(file):
        assert (ROOT / source).exists(), source


def test_what_the_image_installs_is_what_the_wheel_holds() -> None:
    packages = re.search(
        r"^\[tool\.hatch.*?\]\npackages = (\[.*\])", (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert packages
    folders = {name for name in copied_from_the_context() if (ROOT / name / "__init__.py").is_file()}
    assert set(re.findall(r'"(\w+)"', packages[1])) == folders


def test_the_check_of_the_image_is_a_script_that_bash_reads() -> None:
    assert subprocess.run(["bash", "-n", ROOT / "tests/image/check"], check=False).returncode == 0


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("image", ["--target cpu", "--tag braintumor:some"]),
        ("image-server", ["--file mlflow/Dockerfile", "--tag braintumor-mlflow:some"]),
    ],
)
def test_make_builds_each_image_with_a_commit_that_says_what_is_not_committed(target: str, expected: list[str]) -> None:
    told = subprocess.run(
        ["make", "--dry-run", "--silent", target, "TAG=some", "BUILD=docker", "TARGET=cpu"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    build = told.stdout.splitlines()[-1]
    assert build.startswith('docker build --build-arg GIT_COMMIT="$(git describe --always --dirty --abbrev=40 ')
    for option in expected:
        assert option in build


def server_stage(name: str) -> list[tuple[str, ...]]:
    starts = [index for index, (instruction, *_) in enumerate(SERVER) if instruction == "FROM"]
    stages = [SERVER[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]
    (found,) = [stage for stage in stages if stage[0][1] == f"${{BASE}} AS {name}"]
    return found


def test_the_server_stands_on_the_base_of_the_steps_and_ships_no_installer() -> None:
    assert SERVER[0] == INSTRUCTIONS[0]
    shipped = server_stage("server")
    runs = [rest for instruction, rest in shipped if instruction == "RUN"]
    assert not any(re.search(r"\b(pip|apt-get|venv|curl|wget)\b (?!\*)", run) for run in runs)
    assert "rm -rf /usr/local/bin/pip*" in runs[0]
    assert ("USER", "10001:10001") in shipped


def test_all_that_the_server_installs_is_locked_by_hash_and_the_build_backend_goes_again() -> None:
    installs = [rest for instruction, rest in SERVER if instruction == "RUN" and "pip install" in rest]
    assert ["--require-hashes -r server.txt" in one for one in installs] == [True, False]
    assert "--no-index --no-deps --no-build-isolation" in installs[1]
    removed = set(installs[1].split("uninstall --yes ")[1].split(" &&")[0].split())
    assert "hatchling" in removed < pins("server.txt")
    assert {"mlflow", "psycopg2-binary", "boto3", "flask-wtf"} <= pins("server.txt") - removed
    # What serves models, and would be a gigabyte, is not for the server.
    assert not pins("server.txt") & {"tensorflow", "keras", "kfp", "dvc"}


def test_the_server_has_the_mlflow_of_the_pipeline() -> None:
    def version(name: str) -> str:
        (found,) = re.findall(r"^mlflow==(\S+)", (ROOT / "requirements" / name).read_text(), re.MULTILINE)
        return str(found)

    assert version("server.txt") == version("run.txt")


def test_the_server_starts_with_the_plugin_and_not_without_its_secrets() -> None:
    (command,) = [json.loads(rest) for instruction, rest in server_stage("server") if instruction == "CMD"]
    end = command.index("--")
    assert command[0] == "with-secrets"
    assert command[1:end] == [
        "PGPASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_FLASK_SERVER_SECRET_KEY",
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY", "MLFLOW_AUTH_ADMIN_PASSWORD?",
    ]  # fmt: skip
    assert command[end + 1 : end + 5] == ["mlflow", "server", "--app-name", "braintumor-auth"]
    plugins = re.search(r"^\[project.entry-points.\"mlflow.app\"\]\n(.*)$", (ROOT / "pyproject.toml").read_text(), re.M)
    assert plugins
    assert plugins[1] == 'braintumor-auth = "braintumor.registry.rights:create_app"'
    trial = [rest for instruction, rest in server_stage("server") if instruction == "RUN"][-1]
    for name in ("boto3", "braintumor.registry.rights", "mlflow.server.auth", "psycopg2"):
        assert name in trial
    assert any(instruction == "HEALTHCHECK" for instruction, _ in SERVER)


def test_nobody_has_rights_on_the_server_by_default_and_no_password_stands_in_its_settings() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "mlflow/accounts.ini")
    assert dict(settings["mlflow"]) == {
        "default_permission": "NO_PERMISSIONS",
        "database_uri": "postgresql+psycopg2:///accounts",
        "admin_username": "admin",
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
        "auth_cache_ttl_seconds": "60",
    }


@pytest.mark.parametrize("name", ["with-secrets", "backup", "restore"])
def test_the_scripts_of_the_server_can_be_started_and_read_by_their_shell(name: str) -> None:
    script = ROOT / "mlflow" / name
    assert script.stat().st_mode & 0o555 == 0o555
    shell = script.read_text().splitlines()[0].removeprefix("#!")
    assert shell in ("/bin/sh", "/bin/bash")
    assert subprocess.run([shell, "-n", script], check=False).returncode == 0


def test_there_is_no_python_beside_the_server() -> None:
    # With an __init__.py the folder would be imported in place of MLflow.
    assert not list((ROOT / "mlflow").rglob("*.py"))
