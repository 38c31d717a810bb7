"""Promotions on a real store, of versions that the steps gate and register registered."""

import errno
import json
import os
import shutil
import sqlite3
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from braintumor import artifacts
from braintumor.artifacts import sha256_of_file
from braintumor.errors import GateNotPassed, RegistryUnreachable, UserError
from braintumor.evidence.comparison import no_champion
from braintumor.model.saved import MAX_MODEL_BYTES
from braintumor.params import Profile
from braintumor.registry import ledger, promotions, server
from braintumor.registry.rights import ServerRights
from braintumor.registry.server import connected
from braintumor.registry.version_facts import MAX_JSON_BYTES
from braintumor.registry.versions import download_model
from braintumor.steps.gate import gate
from braintumor.steps.register import register

NAME = "brain-tumor-phantoms"
# What each version's evaluation says of the comparison with the champion.
COMPARISONS = {"1": None, "2": ("better", "1"), "3": ("worse", "1")}


@dataclass(frozen=True)
class Registry:
    """A store with three versions, and what a reviewer does to it in the UI."""

    folder: Path
    params: Profile
    client: Any

    @property
    def entries(self) -> list[ledger.Recorded]:
        return ledger.read(self.client, NAME)

    @property
    def actions(self) -> list[tuple[str, str | None, str | None]]:
        return [(one.entry.action, one.entry.version, one.entry.after) for one in self.entries]

    @property
    def alias(self) -> str | None:
        found = self.client.get_registered_model(NAME).aliases.get("champion")
        return None if found is None else str(found)

    def tags(self, version: str) -> dict[str, str]:
        found = self.client.get_model_version(NAME, version).tags
        return {name: value for name, value in found.items() if name.startswith("promotion.")}

    def set_alias(self, version: str, **tags: str) -> None:
        for name, value in tags.items():
            self.client.set_model_version_tag(NAME, version, f"promotion.{name}", value)
        self.client.set_registered_model_alias(NAME, "champion", version)

    def reconcile(self, **options: Any) -> list[str]:
        return [str(outcome) for outcome in promotions.reconcile(self.params, **options)]

    def promote(self, version: str, reason: str = "it is better", override: str = "") -> str:
        return str(promotions.promote(NAME, version, reason, override, self.params))

    def artifact(self, version: str, path: str) -> Path:
        run = self.client.get_run(self.client.get_model_version(NAME, version).run_id)
        return Path(run.info.artifact_uri.removeprefix("file://")) / path

    def model_file(self, version: str) -> Path:
        uri = self.client.get_model_version_download_uri(NAME, version)
        return Path(uri.removeprefix("file://")) / "data" / artifacts.MODEL


@pytest.fixture(scope="module")
def tiny_models(tiny_models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One more model: the first network under another name, which is another digest."""
    third = tmp_path_factory.mktemp("third") / "model-3.keras"
    with zipfile.ZipFile(tiny_models[0]) as source, zipfile.ZipFile(third, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(b'"tiny"', b'"tiny3"'))
    return [*tiny_models, third]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test leaves the store with the registered versions for the others."""
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture
def registry(
    prepared: Path, make_folders: Callable[..., Any], migrated_database: Path, no_store: Path, params: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Registry]:  # fmt: skip
    # One place for all tests: to open another database costs MLflow a second.
    folder = prepared / "store"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    if not folder.exists():
        folder.mkdir()
        shutil.copyfile(migrated_database, folder / "mlflow.db")
        for version, comparison in COMPARISONS.items():
            register_version(make_folders, params, version, comparison)
        shutil.copytree(folder, prepared / "pristine")
    else:
        restore(prepared / "pristine", folder)
    with connected() as client:
        yield Registry(folder, params, client)


def restore(pristine: Path, folder: Path) -> None:
    """The store is as it was after the registrations, for those too who have it open."""
    databases = (sqlite3.connect(place / "mlflow.db") for place in (pristine, folder))
    with closing(next(databases)) as source, closing(next(databases)) as target:
        source.backup(target)
    shutil.rmtree(folder / "mlartifacts")
    shutil.copytree(pristine / "mlartifacts", folder / "mlartifacts")


def register_version(
    make_folders: Callable[..., Any], params: Any, version: str, comparison: tuple[str, str] | None
) -> None:
    folders = make_folders(f"build-{version}", seed=int(version))
    if comparison is not None:
        verdict, champion = comparison
        compared = {**no_champion(), "verdict": verdict, "champion": champion, "reason": "so the intervals say"}
        folders.edit(folders.evaluation / artifacts.EVIDENCE, comparison=compared)
        sha256 = sha256_of_file(folders.evaluation / artifacts.EVIDENCE)
        folders.edit(folders.evaluation / artifacts.METRICS, evidence_sha256=sha256)
        facts = {"version": champion, "model_digest": "0" * 64, "data_md5": "0" * 32}
        folders.edit(folders.context / artifacts.CONTEXT, champion=facts)
    gate(folders.evaluation, folders.context, folders.validation, folders.decision, params.gate)
    registered = register(
        folders.model, folders.splits, folders.evaluation, folders.decision, folders.context, folders.validation,
        folders.registration, params,
    )  # fmt: skip
    assert registered.version == version


def test_a_version_is_promoted_and_its_successor_after_it(registry: Registry) -> None:
    told = registry.promote("1", "the first that passed")
    assert told.startswith("entry 1: version 1 was promoted by ")
    assert registry.alias == "1"
    assert registry.actions == [("promoted", "1", "1")]
    entry = registry.entries[0].entry
    assert (entry.reason, entry.before, entry.override, entry.comparison) == (
        "the first that passed",
        None,
        "",
        "no champion",
    )
    assert entry.who.endswith("(command line)") and not entry.who_is_known
    assert entry.digests == {
        "model_digest": registry.client.get_model_version(NAME, "1").tags["model_digest"],
        "model_sha256": sha256_of_file(registry.model_file("1")),
        "data_md5": "0123456789abcdef0123456789abcdef",
        "decision_sha256": sha256_of_file(registry.artifact("1", "gate/decision.json")),
        "metrics_sha256": sha256_of_file(registry.artifact("1", "evaluation/metrics.json")),
        "evidence_sha256": sha256_of_file(registry.artifact("1", "evaluation/evidence.json")),
    }

    registry.promote("2")
    assert registry.alias == "2"
    assert registry.actions[1:] == [("promoted", "2", "2")]
    first, second = registry.entries
    assert second.entry.before == "1" and second.entry.comparison == "better"
    assert not first.is_open and not second.is_open
    # The request is gone, what became of it stands there.
    assert registry.tags("1") == {
        "promotion.outcome": f"champion until {second.entry.time}, since {first.entry.time} (entries 1 and 2)",
        "promotion.entry": f"1 {first.sha256}",
    }
    assert registry.tags("2") == {
        "promotion.outcome": f"champion since {second.entry.time} (entry 2)",
        "promotion.entry": f"2 {second.sha256}",
    }
    assert ledger.verify(registry.client, NAME).problems == []


def test_the_champion_promoted_again_stays_it_and_nothing_is_recorded(registry: Registry) -> None:
    registry.promote("1")
    assert "already" in registry.promote("1")
    assert len(registry.entries) == 1
    assert set(registry.tags("1")) == {"promotion.outcome", "promotion.entry"}


def test_a_worse_model_needs_an_override_and_the_ledger_keeps_it(registry: Registry) -> None:
    registry.promote("1")
    with pytest.raises(GateNotPassed, match=r"version 3 .* says worse: so the intervals say; .* --override"):
        registry.promote("3")
    assert registry.alias == "1" and len(registry.entries) == 1 and registry.tags("3") == {}

    registry.promote("3", override="the other one can't be served any more")
    entry = registry.entries[1].entry
    assert registry.alias == "3" and (entry.action, entry.comparison) == ("promoted", "worse")
    assert entry.override.startswith("the other one can't be served any more (despite: the comparison with ")


def test_an_override_that_overrides_nothing_is_not_in_the_ledger(registry: Registry) -> None:
    registry.promote("1", override="to be on the safe side")
    assert registry.entries[0].entry.override == ""


def test_a_comparison_with_another_champion_than_the_present_one_needs_an_override(registry: Registry) -> None:
    registry.promote("1")
    registry.promote("3", override="to see it fail")
    with pytest.raises(GateNotPassed, match=r"compared with version 1 \(better: .*, and the champion now is version 3"):
        registry.promote("2")
    promotions.rollback(NAME, "it fails", registry.params)
    registry.promote("2")
    assert registry.actions[-1] == ("promoted", "2", "2")


def test_a_version_that_was_registered_long_ago_needs_an_override(registry: Registry) -> None:
    with closing(sqlite3.connect(registry.folder / "mlflow.db")) as database:
        database.execute("UPDATE model_versions SET creation_time = creation_time - 91 * 86400000 WHERE version = 1")
        database.commit()
    with pytest.raises(GateNotPassed, match="registered 91 days ago, and 90 are allowed"):
        registry.promote("1")
    registry.promote("1", override="nothing newer passes")
    assert "91 days ago" in registry.entries[0].entry.override


def test_a_rollback_goes_to_the_champion_before_and_back_again(registry: Registry) -> None:
    with pytest.raises(UserError, match="no champion before"):
        promotions.rollback(NAME, "why not", registry.params)
    registry.promote("1")
    registry.promote("2")
    for number in ("1", "2"):
        promotions.rollback(NAME, "the other one", registry.params)
        assert registry.alias == number
        assert registry.actions[-1] == ("rolled back", number, number)
    assert registry.tags("1")["promotion.entry"].startswith("3 ")


def test_a_rollback_counts_what_was_set_in_the_ui_and_not_recorded_yet(registry: Registry) -> None:
    registry.promote("1")
    registry.promote("2")
    registry.set_alias("3", override="a try")
    promotions.rollback(NAME, "3 is wrong", registry.params)
    assert registry.actions[2:] == [("promoted", "3", "3"), ("rolled back", "2", "2")]


def test_an_alias_set_in_the_ui_is_judged_and_recorded_once(registry: Registry) -> None:
    registry.set_alias("1")
    assert registry.reconcile() == [
        "entry 1: version 1 was promoted by in the UI, user unknown (not checked): none given; "
        "champion none -> version 1"
    ]
    assert registry.reconcile() == [] and len(registry.entries) == 1
    registry.set_alias("2", reason="  better on the slices that matter  ")
    registry.reconcile()
    assert registry.entries[1].entry.reason == "better on the slices that matter"
    assert set(registry.tags("2")) == {"promotion.outcome", "promotion.entry"}


def test_a_worse_model_set_in_the_ui_is_put_back_and_its_page_says_why(registry: Registry) -> None:
    registry.promote("1")
    registry.set_alias("3", reason="I like it")
    registry.reconcile()
    assert registry.alias == "1"
    assert registry.actions[1:] == [("refused", "3", "1")]
    outcome = registry.tags("3")["promotion.outcome"]
    assert outcome.startswith("refused ") and "says worse: so the intervals say" in outcome
    assert "promotion.override" in outcome and "promotion.reason" not in registry.tags("3")

    # As that page says.
    registry.set_alias("3", override="the only one that can be served")
    registry.reconcile()
    assert registry.alias == "3" and registry.actions[-1] == ("promoted", "3", "3")
    assert registry.tags("3")["promotion.outcome"].startswith("champion since ")


def test_a_first_version_that_may_not_be_promoted_leaves_no_champion(registry: Registry) -> None:
    registry.client.set_model_version_tag(NAME, "1", "gate", "not passed")
    registry.set_alias("1")
    registry.reconcile()
    assert registry.alias is None and registry.actions == [("refused", "1", None)]


def test_an_alias_that_is_deleted_is_recorded_and_its_version_may_come_back(registry: Registry) -> None:
    registry.promote("1")
    registry.promote("2")
    registry.client.delete_registered_model_alias(NAME, "champion")
    registry.reconcile()
    assert registry.actions[-1] == ("removed", "2", None)
    assert registry.tags("2")["promotion.outcome"].startswith("champion until ")
    registry.set_alias("2")
    registry.reconcile()
    assert registry.actions[-1] == ("rolled back", "2", "2")


def test_a_champion_that_is_deleted_is_recorded_before_its_successor(registry: Registry) -> None:
    registry.promote("1")
    registry.client.delete_model_version(NAME, "1")
    registry.set_alias("2")
    registry.reconcile()
    assert registry.actions[1:] == [("removed", "1", None), ("promoted", "2", "2")]
    assert registry.entries[1].entry.reason == "the version was deleted"
    with pytest.raises(UserError, match="no version 1 of"):
        registry.promote("1")


def tampered(registry: Registry) -> dict[str, Callable[[], None]]:
    """Ways to make version 2 look like what was never judged."""

    def edit(path: str, **changes: Any) -> Callable[[], None]:
        file = registry.artifact("2", path)

        def change() -> None:
            file.write_text(json.dumps(json.loads(file.read_text()) | changes))

        return change

    def tag(name: str, value: str) -> Callable[[], None]:
        return lambda: registry.client.set_model_version_tag(NAME, "2", name, value)

    return {
        "the decision names metrics_sha256": edit("evaluation/metrics.json", accuracy=0.999),
        "names evidence_sha256": edit("evaluation/evidence.json", comparison={"verdict": "better", "champion": None}),
        "the decision names model_digest": edit("gate/decision.json", digests={"model_digest": "1" * 64}),
        "that it did not pass": edit("gate/decision.json", passed=False),
        "has no gate/decision.json": lambda: registry.artifact("2", "gate/decision.json").unlink(),
        "is no JSON object": lambda: registry.artifact("2", "gate/decision.json").write_text("{"),
        "has no evaluation/evidence.json": lambda: registry.artifact("2", "evaluation/evidence.json").unlink(),
        "that of the model file": lambda: shutil.copyfile(registry.model_file("1"), registry.model_file("2")),
        "model file is damaged": lambda: registry.model_file("2").write_bytes(b"PK"),
        "model file is gone": lambda: registry.model_file("2").unlink(),
        "a tag names data_md5": tag("data_md5", "f" * 32),
        "tag 'gate' is": tag("gate", "waived"),
        "tag accuracy shows '0.9999'": tag("accuracy", "0.9999"),
        "has no run any more": lambda: registry.client.delete_run(
            registry.client.get_model_version(NAME, "2").run_id
        ),
    }  # fmt: skip


def test_a_version_without_its_evidence_is_refused_and_no_override_helps(registry: Registry, prepared: Path) -> None:
    for fact, tamper in tampered(registry).items():
        tamper()
        with pytest.raises(GateNotPassed, match=fact):
            registry.promote("2", override="never mind")
        assert registry.alias is None and registry.entries == [] and registry.tags("2") == {}
        restore(prepared / "pristine", registry.folder)
    registry.promote("2")
    assert registry.alias == "2"


def test_a_version_without_its_evidence_that_was_set_in_the_ui_is_put_back(registry: Registry) -> None:
    registry.promote("1")
    for fact in ("has no gate/decision.json", "that of the model file"):
        tampered(registry)[fact]()
        registry.set_alias("2", override="never mind")
        registry.reconcile()
        assert registry.alias == "1" and registry.actions[-1] == ("refused", "2", "1")
        assert fact in registry.tags("2")["promotion.outcome"]
        shutil.copytree(
            registry.folder.with_name("pristine") / "mlartifacts", registry.folder / "mlartifacts", dirs_exist_ok=True
        )
    registry.promote("2")


def test_rules_that_are_stricter_here_than_where_the_model_was_judged_refuse_it(registry: Registry) -> None:
    bound = registry.params.gate.min_accuracy.model_copy(update={"value": 0.999})
    strict = registry.params.model_copy(
        update={"gate": registry.params.gate.model_copy(update={"min_accuracy": bound})}
    )
    with pytest.raises(GateNotPassed, match=r"accuracy 0.98\d\d is below 0.999"):
        promotions.promote(NAME, "1", "why not", "all the same", strict)
    assert registry.alias is None and registry.entries == []


def test_input_that_can_not_be_right_changes_nothing(registry: Registry, tmp_path: Path) -> None:
    for version in ("99", "0", "x", "1.0", "99999999999999999999"):
        with pytest.raises(UserError, match="version") as error:
            registry.promote(version)
        assert error.value.exit_code == 2
    for reason, override in (("", ""), (" \n", ""), ("a" * 1001, ""), ("so", " ")):
        with pytest.raises(UserError, match="ledger later"):
            registry.promote("1", reason, override)
    assert registry.alias is None and registry.entries == [] and registry.tags("1") == {}


def test_where_no_store_is_a_promotion_makes_none(no_store: Path, params: Any) -> None:
    with pytest.raises(UserError, match="run the pipeline"):
        promotions.promote(NAME, "1", "so", "", params)
    assert promotions.reconcile(params) == []
    assert not no_store.exists()


def test_a_champion_that_is_not_in_the_ledger_is_not_handed_out(registry: Registry, tmp_path: Path) -> None:
    registry.set_alias("3")
    # Before the first promotion there is no ledger, and the alias is all there is.
    assert download_model(NAME, "champion", tmp_path / "a").is_file()
    registry.promote("1")
    assert download_model(NAME, "champion", tmp_path / "a").is_file()
    registry.set_alias("2")
    with pytest.raises(UserError, match=r"version 2, whose promotion is not recorded .*champion: 1.*promoter --once"):
        download_model(NAME, "champion", tmp_path / "b")
    assert download_model(NAME, "2", tmp_path / "b").is_file()
    registry.reconcile()
    assert download_model(NAME, "champion", tmp_path / "c").is_file()
    with pytest.raises(UserError, match="spell it so"):
        download_model(NAME, "Champion", tmp_path / "d")

    # Another model under the champion's number, with a tag that fits.
    shutil.copyfile(registry.model_file("1"), registry.model_file("2"))
    digest = registry.client.get_model_version(NAME, "1").tags["model_digest"]
    registry.client.set_model_version_tag(NAME, "2", "model_digest", digest)
    with pytest.raises(UserError, match="another model than the one that was promoted"):
        download_model(NAME, "champion", tmp_path / "d")


def test_the_commands_end_as_their_errors_say(
    registry: Registry, braintumor: Any, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("--params", Path(__file__).parents[2] / "params.yaml", "--reason", "so")
    assert braintumor("rollback", *given).code == 2
    assert braintumor("promote", "1", *given[:2]).code == 2
    assert braintumor("promote", "7", *given).code == 2
    done = braintumor("promote", "1", *given)
    assert (done.code, done.out.startswith("promote: entry 1: version 1 was promoted by ")) == (0, True)
    worse = braintumor("promote", "3", *given)
    assert worse.code == 4 and "--override" in worse.err and registry.alias == "1"
    assert braintumor("promote", "3", *given, "--override", "all the same").code == 0
    assert braintumor("rollback", *given).code == 0 and registry.alias == "1"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert braintumor("promote", "1", *given).code == 5


class Hook:
    """A deployment hook; fails as long as `reason` says why."""

    def __init__(self) -> None:
        self.reason = ""
        self.never: set[int] = set()
        self.told: list[tuple[int, str | None]] = []

    def __call__(self, recorded: ledger.Recorded) -> None:
        if self.reason or recorded.entry.index in self.never:
            raise UserError(self.reason or "the hook does not like it")
        self.told.append((recorded.entry.index, recorded.entry.after))


def test_the_deployment_is_told_of_the_newest_change_however_often_it_fails(registry: Registry) -> None:
    hook = Hook()
    hook.reason = "the hook does not answer"
    for version in ("1", "2"):
        registry.set_alias(version)
        with pytest.raises(promotions.NotDeployed, match="the hook does not answer"):
            registry.reconcile(deploy=hook)
    registry.set_alias("3")  # refused: nobody need be told
    with pytest.raises(promotions.NotDeployed):
        registry.reconcile(deploy=hook)
    assert registry.actions == [("promoted", "1", "1"), ("promoted", "2", "2"), ("refused", "3", "2")]
    reason = "the hook does not answer"
    assert [one.hook for one in registry.entries] == [f"superseded by entry 2: {reason}", f"failing: {reason}", ""]
    assert [one.is_open for one in registry.entries] == [False, True, False]
    # Somebody without a hook leaves that to the promoter.
    registry.reconcile()
    assert [one.is_open for one in registry.entries] == [False, True, False]

    hook.reason = ""
    assert len(registry.reconcile(deploy=hook)) == 1
    assert registry.reconcile(deploy=hook) == []
    assert hook.told == [(2, "2")]
    assert registry.entries[1].hook.startswith("delivered 2")
    assert not any(one.is_open for one in registry.entries)


def test_an_entry_that_can_not_be_deployed_does_not_hold_up_the_next_nor_come_after_it(registry: Registry) -> None:
    hook = Hook()
    hook.never = {1}
    registry.set_alias("1")
    with pytest.raises(promotions.NotDeployed):
        registry.reconcile(deploy=hook)
    registry.set_alias("2")
    registry.reconcile(deploy=hook)
    hook.never = set()
    registry.reconcile(deploy=hook)
    assert hook.told == [(2, "2")]
    assert registry.entries[0].hook == "superseded by entry 2: the hook does not like it"
    assert not any(one.is_open for one in registry.entries)


class Receiver:
    """Who serves the model, by the contract: ignores a key that it knows, and what is older than what it applied."""

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.index, self.serves = 0, "nothing"
        self.fails: set[int] = set()
        self.calls: list[int] = []

    def __call__(self, recorded: ledger.Recorded) -> None:
        self.calls.append(recorded.entry.index)
        if recorded.entry.index in self.fails:
            raise UserError("down")
        if recorded.sha256 not in self.keys and recorded.entry.index >= self.index:
            self.keys.add(recorded.sha256)
            self.index, self.serves = recorded.entry.index, str(recorded.entry.after)


def test_killed_while_it_deploys_after_a_failure_it_never_goes_back_to_the_older_change(
    registry: Registry, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin() -> None:
        restore(prepared / "pristine", registry.folder)
        hooks.append(Receiver())
        hooks[-1].fails = {1}
        registry.set_alias("1")
        with pytest.raises(promotions.NotDeployed):
            registry.reconcile(deploy=hooks[-1])
        registry.set_alias("2")

    def check() -> None:
        hook = hooks[-1]
        hook.fails = set()
        registry.reconcile(deploy=hook)
        assert hook.serves == "2" == registry.alias
        # Not by the receiver's care alone.
        assert hook.calls == sorted(hook.calls)
        assert registry.entries[1].hook.startswith("delivered")

    hooks: list[Receiver] = []
    interrupted_at_every_call(registry, monkeypatch, begin, lambda: registry.reconcile(deploy=hooks[-1]), check)


def test_what_another_promoter_has_overtaken_is_not_deployed_any_more(registry: Registry) -> None:
    hook = Receiver()
    hook.fails = {1}
    registry.set_alias("1")
    with pytest.raises(promotions.NotDeployed):
        registry.reconcile(deploy=hook)
    registry.promote("2")
    second = registry.entries[1]
    ledger.close(registry.client, second, "delivered by another one")
    hook.fails = set()
    registry.reconcile(deploy=hook)
    assert hook.calls == [1] and registry.entries[0].hook == "superseded by entry 2"
    assert not any(one.is_open for one in registry.entries)


def junk(registry: Registry) -> dict[str, Callable[[], object]]:
    """What a pipeline may upload in place of what was judged."""
    metrics = registry.artifact("2", "evaluation/metrics.json")

    def in_metrics(value: str) -> Callable[[], object]:
        def change() -> None:
            content = json.dumps(json.loads(metrics.read_text()) | {"accuracy": "@"})
            metrics.write_text(content.replace('"@"', value))

        return change

    def folder(path: Path) -> None:
        path.unlink()
        path.mkdir()
        (path / "x").write_text("x")

    def archive() -> None:
        with zipfile.ZipFile(registry.model_file("2"), "w") as file:
            file.writestr("config.json", b"\xff")
            file.writestr("model.weights.h5", b"x")

    def long(path: Path, n_bytes: int) -> None:
        with path.open("r+b") as file:
            file.truncate(n_bytes)

    return {
        "a huge number": in_metrics("1" + "0" * 400),
        "no number": in_metrics("NaN"),
        "infinite": in_metrics("1e999"),
        "deep": in_metrics("[" * 600 + "]" * 600),
        "deeper": in_metrics("[" * 60 + "]" * 60),
        "half a character": in_metrics('"\\ud800"'),
        "another type": in_metrics('{"a": [1]}'),
        "no text": lambda: metrics.write_bytes(b"\xff"),
        "long metrics": lambda: long(metrics, MAX_JSON_BYTES + 1),
        "a folder of metrics": lambda: folder(metrics),
        "a folder of a model": lambda: folder(registry.model_file("2")),
        "a model of junk": archive,
        "a long model": lambda: long(registry.model_file("2"), MAX_MODEL_BYTES + 1),
    }


def test_whatever_a_pipeline_uploads_is_put_back_and_the_deployment_goes_on(registry: Registry, prepared: Path) -> None:
    registry.promote("1")
    hook = Receiver()
    for number, (what, spoil) in enumerate(junk(registry).items()):
        spoil()
        registry.set_alias("2", override="never mind")
        registry.reconcile(deploy=hook)
        assert (registry.alias, registry.actions[-1]) == ("1", ("refused", "2", "1")), what
        assert len(registry.entries) == number + 2 and not any(one.is_open for one in registry.entries)
        shutil.rmtree(registry.folder / "mlartifacts")
        shutil.copytree(prepared / "pristine" / "mlartifacts", registry.folder / "mlartifacts")
    assert hook.serves == "1"
    registry.promote("2")


def test_facts_on_which_the_rules_themselves_fail_are_refused(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.promote("1")
    for error in (OverflowError, ZeroDivisionError, RecursionError, TypeError, ValueError, AttributeError, KeyError):

        def fail(*_: object, error: type[Exception] = error) -> None:
            raise error("nobody foresaw it")

        registry.set_alias("2")
        with monkeypatch.context() as patch:
            patch.setattr(promotions, "rule", fail)
            registry.reconcile()
        assert registry.alias == "1" and "can't be judged" in registry.entries[-1].entry.reason


def test_a_full_disk_of_the_promoter_refuses_nothing_and_is_told(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.set_alias("1")

    def fail(*_: object) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/scratch/model.keras")

    with monkeypatch.context() as patch:
        patch.setattr("braintumor.registry.version_facts._Folder.download", fail)
        with pytest.raises(RegistryUnreachable, match=r"this machine can't write .*/scratch/model\.keras"):
            registry.reconcile()
    assert registry.alias == "1" and registry.entries == []
    registry.reconcile()
    assert registry.actions == [("promoted", "1", "1")]


def test_the_champions_file_has_to_be_the_very_file_that_was_promoted(registry: Registry, tmp_path: Path) -> None:
    registry.promote("1")
    with zipfile.ZipFile(registry.model_file("1"), "a") as archive:
        archive.writestr("assets/more", "what no digest of the model tells")
    with pytest.raises(UserError, match="does not hold the file that was promoted"):
        download_model(NAME, "champion", tmp_path)
    assert download_model(NAME, "1", tmp_path).is_file()
    registry.promote("2")
    with pytest.raises(GateNotPassed, match="its model_sha256 is "):
        registry.promote("1", override="all the same")


def test_what_a_command_that_was_killed_asked_for_counts_for_no_later_request(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.promote("1")

    def kill(*_: object) -> None:
        raise Killed

    for minutes in (0, 6):
        with monkeypatch.context() as patch, suppress(Killed):
            patch.setattr(type(registry.client), "set_registered_model_alias", kill)
            registry.promote("3", "I try", "I say so")
        assert registry.tags("3")["promotion.override"].startswith("I say so [entry ")
        if not minutes:
            registry.promote("2")
        later = promotions.server_time(registry.client) + timedelta(minutes=minutes)
        registry.set_alias("3")
        with monkeypatch.context() as patch:
            patch.setattr(promotions, "server_time", lambda client, later=later: later)
            registry.reconcile()
        assert registry.alias == "2" and registry.actions[-1] == ("refused", "3", "2")
        assert set(registry.tags("3")) == {"promotion.outcome", "promotion.entry"}


@pytest.mark.parametrize("failing", ["set_model_version_tag", "set_registered_model_alias"])
def test_a_command_that_fails_leaves_no_request_behind(
    failing: str, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.promote("1")
    done = getattr(type(registry.client), failing)

    def fail(client: Any, *given: Any) -> Any:
        if failing.startswith("set_registered") or given[2] == "promotion.claimed_by":
            raise MlflowException("the server is away")
        return done(client, *given)

    with monkeypatch.context() as patch:
        patch.setattr(type(registry.client), failing, fail)
        with pytest.raises(RegistryUnreachable):
            registry.promote("3", "I try", "I say so")
    assert registry.tags("3") == {} and registry.alias == "1"


def test_of_what_was_promoted_without_a_hook_the_deployment_is_told_the_newest(registry: Registry) -> None:
    registry.promote("1")
    registry.promote("2")
    hook = Hook()
    registry.reconcile(deploy=hook)
    registry.reconcile(deploy=hook)
    assert hook.told == [(2, "2")]


# A process that is killed between two of these might as well have been killed before the first.
READS = ("get_", "search_", "list_", "download_")


class Killed(BaseException):
    """The process is no more."""


class Interrupted:
    """A client to whose process something `happens` before the call number `n_calls` of those that count."""

    def __init__(
        self, client: Any, n_calls: int, happens: Callable[[], None], not_counted: tuple[str, ...] = READS
    ) -> None:
        self._client, self._n_calls, self._happens, self._not_counted = client, n_calls, happens, not_counted
        self.n_made = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        if not callable(found) or name.startswith(self._not_counted):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            self.n_made += 1
            if self.n_made == self._n_calls + 1:
                self._happens()
            return found(*arguments, **options)

        return call


def interrupted_at_every_call(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, begin: Callable[[], None], act: Callable[[], object],
    check: Callable[[], None], happens: Callable[[], None] | None = None, not_counted: tuple[str, ...] = READS,
) -> int:  # fmt: skip
    """Begin, act until before the k-th call, when the process is killed or `happens`, reconcile and check, for all k.

    How many calls there are.
    """

    def kill() -> None:
        raise Killed

    for n_calls in range(100):
        begin()
        client = Interrupted(registry.client, n_calls, happens or kill, not_counted)
        with monkeypatch.context() as patch, suppress(Killed):
            patch.setattr(server, "_client", lambda address, client=client: client)
            act()
        registry.reconcile()
        check()
        assert not any(one.is_open for one in registry.entries)
        if client.n_made <= n_calls:
            assert ledger.verify(registry.client, NAME).problems == []
            return client.n_made
    raise AssertionError("it never ends")


def test_a_promotion_is_recorded_once_wherever_the_promoter_is_killed(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.promote("1")
    hook = Hook()

    def begin() -> None:
        registry.set_alias("1" if registry.alias == "2" else "2", reason="because")
        hook.told.clear()

    def check() -> None:
        alias, entry = registry.alias, registry.entries[-1].entry
        n_entries.append(len(registry.entries))
        assert n_entries[-1] == n_entries[-2] + 1
        assert (entry.after, entry.reason) == (alias, "because") and entry.action in ("promoted", "rolled back")
        assert set(registry.tags(str(alias))) == {"promotion.outcome", "promotion.entry"}
        registry.reconcile(deploy=hook)
        assert (entry.index, alias) in hook.told and {told[0] for told in hook.told} == {entry.index}

    n_entries = [1]
    n = interrupted_at_every_call(registry, monkeypatch, begin, lambda: registry.reconcile(deploy=hook), check)
    # Four of the entry, three tags of versions, the request's, the hook's, the end.
    assert n >= 10


def test_a_refusal_is_recorded_once_wherever_the_promoter_is_killed(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.promote("1")

    def check() -> None:
        n_entries.append(len(registry.entries))
        assert n_entries[-1] == n_entries[-2] + 1
        assert registry.actions[-1] == ("refused", "3", "1") and registry.alias == "1"
        assert set(registry.tags("3")) == {"promotion.outcome", "promotion.entry"}

    n_entries = [1]
    interrupted_at_every_call(
        registry, monkeypatch, lambda: registry.set_alias("3", reason="so", claimed_by="me"), registry.reconcile, check
    )


def test_a_removal_is_recorded_once_wherever_the_promoter_is_killed(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin() -> None:
        registry.promote("1")
        registry.client.delete_registered_model_alias(NAME, "champion")

    def check() -> None:
        n_entries.append(len(registry.entries))
        assert n_entries[-1] == n_entries[-2] + 2
        assert registry.actions[-1] == ("removed", "1", None) and registry.alias is None

    n_entries = [0]
    interrupted_at_every_call(registry, monkeypatch, begin, registry.reconcile, check)


def test_the_command_is_killed_anywhere_and_the_change_is_made_and_recorded_or_not_made(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.promote("1")
    champions = ["1"]

    def act() -> None:
        registry.promote("1" if champions[-1] == "2" else "2", "because")

    def check() -> None:
        alias = str(registry.alias)
        assert len(registry.entries) == len(champions) + (alias != champions[-1])
        if alias != champions[-1]:
            champions.append(alias)
        assert ledger.champion_of(registry.entries) == alias

    interrupted_at_every_call(registry, monkeypatch, lambda: None, act, check)
    assert len(champions) > 5


def test_the_first_promotion_is_recorded_once_wherever_it_is_killed(
    registry: Registry, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin() -> None:
        restore(prepared / "pristine", registry.folder)
        registry.set_alias("1")

    def check() -> None:
        assert registry.actions == [("promoted", "1", "1")]
        assert [one.name for one in registry.client.search_experiments()].count(ledger.experiment_name(NAME)) == 1

    interrupted_at_every_call(registry, monkeypatch, begin, registry.reconcile, check)


def test_a_request_made_anew_while_its_refusal_is_carried_out_is_judged_anew(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.promote("1")
    registry.set_alias("3", reason="so")

    def kill() -> None:
        raise Killed

    with monkeypatch.context() as patch, suppress(Killed):
        client = Interrupted(registry.client, 4, kill)
        patch.setattr(server, "_client", lambda address: client)
        registry.reconcile()
    assert registry.actions[-1] == ("refused", "3", "1") and registry.entries[-1].is_open
    registry.set_alias("3", override="it must be")
    registry.reconcile()
    assert registry.alias == "3" and registry.actions[1:] == [("refused", "3", "1"), ("promoted", "3", "3")]
    assert set(registry.tags("3")) == {"promotion.outcome", "promotion.entry"}


def test_whom_the_server_vouches_for_is_known_and_a_used_signature_is_nobodys(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed = "ann at home at 2026-06-01T12:00:00+00:00 #1"
    registry.set_alias("1", by=signed, claimed_by="somebody else")
    monkeypatch.setattr(promotions, "server_rights", lambda: ServerRights("promoter", ("promoter",)))
    registry.reconcile()
    registry.set_alias("2", claimed_by="somebody else")
    registry.reconcile()
    registry.set_alias("1", by=signed)
    registry.reconcile()
    known = [(one.entry.who, one.entry.who_is_known) for one in registry.entries]
    assert known == [("ann at home", True), *[("in the UI, user unknown", False)] * 2]


def test_two_promoters_at_once_record_a_change_once(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.promote("1")
    make = server._client
    n_entries = [1]

    def begin() -> None:
        registry.set_alias("3", reason="so")

    def other_promoter() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(server, "_client", make)
            registry.reconcile()

    def check() -> None:
        n_entries.append(len(registry.entries))
        assert n_entries[-1] == n_entries[-2] + 1
        assert registry.actions[-1] == ("refused", "3", "1") and registry.alias == "1"

    # What is read of runs and files does not change.
    constant = ("get_run", "search_", "list_", "download_")
    interrupted_at_every_call(registry, monkeypatch, begin, registry.reconcile, check, other_promoter, constant)
