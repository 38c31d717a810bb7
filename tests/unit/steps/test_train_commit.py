import pytest

from braintumor.steps.train import git_commit


def test_image_tells_the_commit_that_it_was_built_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINTUMOR_GIT_COMMIT", "c" * 40)
    assert git_commit() == "c" * 40
    monkeypatch.setenv("BRAINTUMOR_GIT_COMMIT", "")
    assert git_commit() != "c" * 40
