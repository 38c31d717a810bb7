"""From `dvc repro` to a promotion in MLflow's UI: PostgreSQL, S3, accounts, the promoter and a browser, all real."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from registry_stack import Stack, registry_stack
from small_project import make_dataset, write_params

from braintumor.params import Profile
from braintumor.registry.server import connected
from braintumor.steps.gate import gate
from braintumor.steps.register import Registration, register

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).parents[2]
PROGRAM = str(Path(sys.executable).with_name("braintumor"))
NAME = "brain-tumor-phantoms"
POLL_S = 2
PATIENCE_S = 60

pytestmark = pytest.mark.timeout(900)


@dataclass(frozen=True)
class Project:
    """A working copy whose `dvc repro` has registered version 1 as the user 'pipeline'; a promoter watches."""

    folder: Path
    stack: Stack
    promoter_log: Path

    def run(self, user: str, *command: str) -> "subprocess.CompletedProcess[str]":
        """The command ended, run by a user of the registry."""
        return subprocess.run(
            command, cwd=self.folder, env=environment(self.stack, user), capture_output=True, text=True, timeout=600
        )

    def braintumor(self, user: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return self.run(user, PROGRAM, *arguments)

    def history(self) -> list[dict[str, Any]]:
        ended = self.braintumor("reader", "history", "--json")
        assert ended.returncode == 0, ended.stderr
        return list(json.loads(ended.stdout)["entries"])

    def wait_for_entries(self, count: int) -> list[dict[str, Any]]:
        deadline = time.monotonic() + PATIENCE_S
        while len(entries := self.history()) < count or entries[-1]["is_open"]:
            assert time.monotonic() < deadline, (entries, self.promoter_log.read_text()[-3000:])
            time.sleep(1)
        return entries


def environment(stack: Stack, user: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "AWS_"))}
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return kept | path | stack.environment_of(user) | {"DVC_NO_ANALYTICS": "1"}


@pytest.fixture(scope="module")
def project(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("project")
    copy_of_the_project(folder)
    make_dataset(folder / "data")
    write_params(folder / "params.yaml", promote={"poll_seconds": POLL_S})
    for command in (["git", "init", "-q"], ["dvc", "add", "-q", "data", "weights"]):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(command, cwd=folder, check=True, env=os.environ | {"PATH": path}, timeout=120)
    with registry_stack(tmp_path_factory.mktemp("registry")) as stack:
        log = folder / "promoter.log"
        made = Project(folder, stack, log)
        ended = made.run("pipeline", "dvc", "repro")
        assert ended.returncode == 0, ended.stdout + ended.stderr
        command = [PROGRAM, "promoter", "--listen", "127.0.0.1:0"]
        with log.open("w") as file:
            promoter = subprocess.Popen(
                command, cwd=folder, env=environment(stack, "promoter"), stdout=file, stderr=file
            )
        yield made
        promoter.terminate()
        assert promoter.wait(30) == 0 or promoter.returncode == 143


def copy_of_the_project(folder: Path) -> None:
    for name in ("braintumor", "components", "pipelines"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".dvcignore", ".gitignore", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    (folder / ".dvc").mkdir()
    (folder / ".dvc/config").write_text("")
    shutil.copytree(ROOT / "weights", folder / "weights")


def open_version(page: "Page", stack: Stack, version: str) -> None:
    page.goto("about:blank")
    page.goto(f"{stack.address}/#/models/{NAME}/versions/{version}")
    page.get_by_role("heading", name=f"Version {version}").wait_for()


def set_alias(page: "Page", alias: str) -> None:
    page.locator("[data-component-id*=modelversionviewaliaseditor]").last.click()
    page.locator("[role=dialog] input").last.fill(alias)
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Save aliases").click()


def add_tag(page: "Page", name: str, value: str) -> None:
    page.get_by_placeholder("Name").fill(name)
    page.get_by_placeholder("Value").fill(value)
    page.get_by_test_id("add-tag-button").click()
    page.get_by_role("cell", name=name).wait_for()


def keep_picture(page: "Page", name: str) -> None:
    """For a person to look at: a PNG in the folder that BRAINTUMOR_TEST_PICTURES names, if it names one."""
    if folder := os.environ.get("BRAINTUMOR_TEST_PICTURES"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def register_folders(folders: Any, params: Profile) -> Registration:
    return register(
        folders.model, folders.splits, folders.evaluation, folders.decision, folders.context, folders.validation,
        folders.registration, params,
    )  # fmt: skip


def champion(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in stack.environment_of("reader").items():
        monkeypatch.setenv(name, value)
    with connected() as client:
        return str(client.get_model_version_by_alias(NAME, "champion").version)


def test_a_reviewer_promotes_in_the_browser_what_dvc_repro_registered(
    project: Project, log_in: Callable[[str, str], "Page"], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stack = project.stack
    page = log_in("reviewer", stack.passwords["reviewer"])
    open_version(page, stack, "1")
    for told in ("Gate passed", "not a diagnostic device", "Quantitative analyses", "copy-free", "Nearest neighbour"):
        page.get_by_text(told).first.wait_for()
    assert not page.get_by_text("@ champion").count()
    with page.expect_popup() as opened:
        page.get_by_role("link", name="Report", exact=True).click()
    report = opened.value.frame_locator("iframe").first
    report.get_by_role("heading", name="Can the figure be believed?").wait_for()
    report.locator("img").first.wait_for()
    keep_picture(opened.value, "report")
    opened.value.close()

    add_tag(page, "promotion.reason", "first model")
    set_alias(page, "champion")
    page.get_by_text("@ champion").wait_for()
    (entry,) = project.wait_for_entries(1)
    assert (entry["action"], entry["before"], entry["after"]) == ("promoted", None, "1")
    assert (entry["who"], entry["who_is_known"], entry["reason"]) == ("reviewer", True, "first model")
    assert champion(stack, monkeypatch) == "1"

    open_version(page, stack, "1")
    page.get_by_text("champion since").wait_for()
    keep_picture(page, "promoted")
    ended = project.braintumor("reader", "predict", "data/test/glioma", "--json")
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == 6


def test_a_promotion_without_the_override_it_needs_is_put_back_and_its_page_says_why(
    project: Project,
    log_in: Callable[[str, str], "Page"],
    make_folders: Callable[..., Any],
    params: Profile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stack = project.stack
    with monkeypatch.context() as scope:
        for name, value in stack.environment_of("pipeline").items():
            scope.setenv(name, value)
        # Evaluated where nobody knew of the champion.
        folders = make_folders()
        gate(folders.evaluation, folders.context, folders.validation, folders.decision, params.gate)
        version = register_folders(folders, params).version
    before = len(project.history())

    page = log_in("reviewer", stack.passwords["reviewer"])
    open_version(page, stack, version)
    set_alias(page, "champion")
    entries = project.wait_for_entries(before + 1)
    assert (entries[-1]["action"], entries[-1]["version"], entries[-1]["after"]) == ("refused", version, "1")
    assert champion(stack, monkeypatch) == "1"
    open_version(page, stack, version)
    for told in ("and the champion now is version 1", "promotion.override"):
        page.get_by_text(told).first.scroll_into_view_if_needed()
    keep_picture(page, "refused")

    add_tag(page, "promotion.override", "looked at each of the images")
    set_alias(page, "champion")
    entries = project.wait_for_entries(before + 2)
    assert (entries[-1]["action"], entries[-1]["after"]) == ("promoted", version)
    assert entries[-1]["override"].startswith("looked at each of the images (despite: ")
    assert champion(stack, monkeypatch) == version

    ended = project.braintumor("reviewer", "rollback", "--reason", "the new one was only tried")
    assert ended.returncode == 0, ended.stderr
    assert project.wait_for_entries(before + 3)[-1]["after"] == "1"
    assert champion(stack, monkeypatch) == "1"
    ended = project.braintumor("reader", "history", "--verify")
    assert ended.returncode == 0, ended.stderr


def test_a_reader_who_tries_it_in_the_browser_changes_nothing(
    project: Project, log_in: Callable[[str, str], "Page"], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = project.history()
    page = log_in("reader", project.stack.passwords["reader"])
    open_version(page, project.stack, "2")
    with page.expect_response(lambda answer: answer.url.endswith("registered-models/alias")) as answer:
        set_alias(page, "champion")
    assert answer.value.status == 403
    # The dialog stays, and shows what the server answered.
    page.get_by_role("button", name="Save aliases").wait_for()
    assert champion(project.stack, monkeypatch) == "1"
    assert project.history() == before
