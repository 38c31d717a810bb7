import pytest

from braintumor.data.patients import HASHED_PATIENT
from braintumor.data.pseudonyms import PATIENT_KEY_VARIABLE, patient_key, pseudonym, refuse_other_key
from braintumor.errors import UserError

KEY = b"0123456789abcdef"


def test_a_pseudonym_is_stable_and_tells_nothing() -> None:
    name = pseudonym("H-4711", KEY)
    # Pinned: data sets that were imported years ago have to be joined.
    assert name == "patient-109f50-58f02f7a157e2c9a"
    assert HASHED_PATIENT.fullmatch(name)
    assert name == pseudonym(" h-4711", KEY)
    assert "4711" not in name
    assert len({pseudonym(number, key) for number in ("1", "2") for key in (KEY, KEY * 2)}) == 4


def test_no_key_is_none_and_a_short_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PATIENT_KEY_VARIABLE, raising=False)
    assert patient_key() is None
    monkeypatch.setenv(PATIENT_KEY_VARIABLE, f" {KEY.decode()}\n")
    assert patient_key() == KEY
    monkeypatch.setenv(PATIENT_KEY_VARIABLE, "secret")
    with pytest.raises(UserError, match="shorter than 16 characters") as caught:
        patient_key()
    assert "secret" not in str(caught.value)


def test_patients_of_another_key_are_refused_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATIENT_KEY_VARIABLE, KEY.decode())
    refuse_other_key(["", "P1", "volume-0123456789abcdef", pseudonym("H-4711", KEY)])
    with pytest.raises(UserError, match="another key"):
        refuse_other_key([pseudonym("H-4711", KEY), pseudonym("H-4711", KEY[::-1])])
    monkeypatch.delenv(PATIENT_KEY_VARIABLE)
    with pytest.raises(UserError, match="another key"):
        refuse_other_key([pseudonym("H-4711", KEY)])
