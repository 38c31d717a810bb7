"""The step `gate`."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from braintumor import artifacts
from braintumor.artifacts import read_json, replacing_directory, sha256_of_file, write_json
from braintumor.errors import UserError
from braintumor.params import GateParams
from braintumor.registry import tracking
from braintumor.registry.policy import Check, Decision, decide
from braintumor.registry.test_set_uses import earlier_decisions_if_reachable


def gate(evaluation: Path, context: Path, validation: Path, output: Path, params: GateParams) -> Decision:
    """The verdict on the evaluation stands in decision.json, with the digests of all that was judged.

    The run in MLflow gets the verdict and the validation's Data Docs, which a reviewer of a refused model wants too.
    Raises UserError, and writes nothing, if there is no evaluation to judge.
    """
    decision = judge(evaluation, context, params)
    uses = _uses_of_the_test_set(evaluation, decision)
    with replacing_directory(output) as folder:
        write_json(folder / artifacts.DECISION, decision.as_json())
        # Beside the decision: it depends on the server, and the same files must give the same decision.
        write_json(folder / artifacts.TEST_USES, uses)
    tracking.publish_decision_if_reachable(output, validation, evaluation)
    return decision


def _uses_of_the_test_set(evaluation: Path, decision: Decision) -> dict[str, Any]:
    test_md5 = read_json(evaluation / artifacts.METRICS, "braintumor evaluate").get("test_md5")
    digest = decision.digests["model_digest"]
    if not isinstance(test_md5, str) or digest is None:
        return {"test_md5": None, "earlier_decisions": None}
    return {"test_md5": test_md5, "earlier_decisions": earlier_decisions_if_reachable(test_md5, digest)}


def judge(evaluation: Path, context: Path, params: GateParams) -> Decision:
    """The rules applied to the files, and the digests of these very files."""
    metrics = read_json(evaluation / artifacts.METRICS, "braintumor evaluate")
    current_data_md5, champion_version = _current(context)
    decision = decide(metrics, _comparison(evaluation), params, current_data_md5, champion_version)
    untouched = _untouched(evaluation, metrics)
    return replace(
        decision,
        passed=decision.passed and untouched.passed,
        checks=(*decision.checks, untouched),
        digests=decision.digests | {"metrics_sha256": sha256_of_file(evaluation / artifacts.METRICS)},
    )


def _current(context: Path) -> tuple[str, str | None]:
    """The data version and the champion's version that count now; None for no champion."""
    file = context / artifacts.CONTEXT
    facts = read_json(file, "braintumor resolve")
    data_md5, champion = facts.get("data_md5"), facts.get("champion", "")
    if not isinstance(data_md5, str) or not data_md5:
        raise UserError(f"{file} has no data_md5; run 'braintumor resolve' again")
    if champion is None:
        return data_md5, None
    version = champion.get("version") if isinstance(champion, Mapping) else None
    if not isinstance(version, str) or not version:
        raise UserError(f"{file} does not say which version is the champion; run 'braintumor resolve' again")
    return data_md5, version


def _comparison(evaluation: Path) -> object:
    """The evidence's comparison with the champion; None where there is no evidence, which closes the gate anyway."""
    file = evaluation / artifacts.EVIDENCE
    return read_json(file, "braintumor evaluate").get("comparison") if file.is_file() else None


def _untouched(evaluation: Path, metrics: Mapping[str, Any]) -> Check:
    """Whether the files are those that the metrics name."""
    paths = [evaluation / name for name in artifacts.JUDGED_FILES]
    missing = [path for path in paths if not path.is_file()]
    changed = [
        path
        for path in paths
        if path not in missing and sha256_of_file(path) != metrics.get(artifacts.sha256_key(path.name))
    ]
    problems = [
        *(f"{path} is missing" for path in missing),
        *(f"{path} is not the file that the metrics name" for path in changed),
    ]
    return Check(
        name="files_untouched",
        value=f"{len(problems)} problems",
        threshold="0 problems",
        required=True,
        passed=not problems,
        reason=f"{'; '.join(problems)}; run 'braintumor evaluate' again"
        if problems
        else f"{len(paths)} files are those that the metrics name",
    )
