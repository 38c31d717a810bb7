import pytest

from braintumor.progress import shown


def test_log_gets_a_line_for_every_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with shown() as progress:
        advance = progress("train: fine-tuning", 40)
        for _ in range(40):
            advance()
    told = capsys.readouterr()
    assert told.out == ""
    assert [line.split(" (")[0] for line in told.err.splitlines()] == [
        f"train: fine-tuning: {done} of 40" for done in range(4, 41, 4)
    ]


def test_log_of_a_short_work_has_a_line_for_each_unit(capsys: pytest.CaptureFixture[str]) -> None:
    with shown() as progress:
        advance = progress("evaluate", 3)
        for _ in range(3):
            advance()
    assert len(capsys.readouterr().err.splitlines()) == 3
