import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from braintumor import artifacts
from braintumor.errors import RegistryUnreachable
from braintumor.params import Params
from braintumor.registry import tracking
from braintumor.registry.test_set_uses import earlier_decisions
from braintumor.steps.gate import gate

MakeFolders = Callable[..., Any]


def judge(folders: Any, params: Params) -> dict[str, Any]:
    tracking.publish(params, folders.model, folders.evaluation)
    gate(folders.evaluation, folders.context, folders.validation, folders.decision, params.gate)
    uses: dict[str, Any] = json.loads((folders.decision / artifacts.TEST_USES).read_text())
    return uses


def test_each_other_model_that_was_judged_on_the_same_test_set_counts_once(
    make_folders: MakeFolders, params: Params, store: Path
) -> None:
    first, second = make_folders("first", seed=1), make_folders("second", seed=2)
    test_md5 = json.loads((first.evaluation / artifacts.METRICS).read_text())["test_md5"]
    assert judge(first, params) == {"test_md5": test_md5, "earlier_decisions": 0}
    # Judged again, it is no other model.
    assert judge(first, params)["earlier_decisions"] == 0
    assert judge(second, params)["earlier_decisions"] == 1
    assert judge(first, params)["earlier_decisions"] == 1
    assert earlier_decisions("0" * 32, "another") == 0


def test_a_refused_model_has_used_the_test_set_too(make_folders: MakeFolders, params: Params, store: Path) -> None:
    weak, good = make_folders("weak", seed=1, n_wrong=20), make_folders("good", seed=2)
    judge(weak, params)
    assert judge(good, params)["earlier_decisions"] == 1


def test_a_model_that_was_scored_and_never_judged_does_not_count(
    make_folders: MakeFolders, params: Params, store: Path
) -> None:
    scored, judged = make_folders("scored", seed=1), make_folders("judged", seed=2)
    tracking.publish(params, scored.model, scored.evaluation)
    assert judge(judged, params)["earlier_decisions"] == 0


def test_where_the_server_is_away_the_count_is_unknown_not_zero(
    make_folders: MakeFolders, params: Params, no_server: str
) -> None:
    folders = make_folders()
    gate(folders.evaluation, folders.context, folders.validation, folders.decision, params.gate)
    assert json.loads((folders.decision / artifacts.TEST_USES).read_text())["earlier_decisions"] is None
    with pytest.raises(RegistryUnreachable):
        earlier_decisions("0" * 32, "model")


def test_a_decision_counts_though_mlflow_never_got_the_evaluation(
    make_folders: MakeFolders, params: Params, store: Path
) -> None:
    unseen, next_one = make_folders("unseen", seed=1, n_wrong=20), make_folders("next", seed=2)
    tracking.publish(params, unseen.model)
    gate(unseen.evaluation, unseen.context, unseen.validation, unseen.decision, params.gate)
    assert judge(next_one, params)["earlier_decisions"] == 1
