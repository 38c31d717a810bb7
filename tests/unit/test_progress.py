import time

import pytest

from braintumor.progress import shown


def test_log_of_a_long_work_gets_a_line_every_ten_seconds_and_one_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    with shown() as progress:
        advance = progress("train: fine-tuning", 10)
        for _ in range(10):
            advance()
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == [
        "train: fine-tuning: 4 of 10 (12 s)",
        "train: fine-tuning: 8 of 10 (24 s)",
        "train: fine-tuning: 10 of 10 (30 s)",
    ]


def test_log_of_a_short_work_gets_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with shown() as progress:
        advance = progress("evaluate", 3)
        for _ in range(3):
            advance()
    assert len(capsys.readouterr().err.splitlines()) == 1
