from datetime import UTC, datetime

import pytest

from braintumor.errors import UserError
from pipelines.cron import check_cron, next_times, read_cron

NOW = datetime(2026, 6, 11, 23, 59, 59, tzinfo=UTC)


@pytest.mark.parametrize(
    ("cron", "epochs"),
    [
        ("0 0 2 * * *", [1781229600, 1781316000, 1781402400, 1781488800, 1781575200]),
        ("0 30 1 * * 1-5", [1781227800, 1781487000, 1781573400, 1781659800, 1781746200]),
        ("0 0 0 29 2 *", [1835395200, 1961625600, 2087856000, 2214086400, 2340316800]),
        ("15 */20 22-23 * * ?", [1781301615, 1781302815, 1781304015, 1781305215, 1781306415]),
        ("0 0 6 1,15 * *", [1781503200, 1782885600, 1784095200, 1785564000, 1786773600]),
        ("0 0 6 13 * FRI", [1781244000, 1781330400, 1781848800, 1782453600, 1783058400]),
        ("0 0 4 31 * *", [1785470400, 1788148800, 1793419200, 1798689600, 1801368000]),
        ("0 45/5 23 * dec SUN", [1796600700, 1796601000, 1796601300, 1797205500, 1797205800]),
        ("0 0 3 */10 jan-mar *", [1798772400, 1799636400, 1800500400, 1801364400, 1801450800]),
        ("59 59 23 31 12 ?", [1798761599, 1830297599, 1861919999, 1893455999, 1924991999]),
    ],
)
def test_the_times_are_those_of_the_controllers_own_library(cron: str, epochs: list[int]) -> None:
    # Computed once by robfig/cron in Go.
    assert [int(moment.timestamp()) for moment in next_times(cron, 5, NOW)] == epochs


def test_times_are_in_utc_and_after_now_even_within_a_second() -> None:
    late = datetime(2026, 6, 12, 2, 0, 0, 500_000, tzinfo=UTC)
    assert next_times("0 0 2 * * *", 2, late) == [
        datetime(2026, 6, 13, 2, tzinfo=UTC),
        datetime(2026, 6, 14, 2, tzinfo=UTC),
    ]
    assert next_times("* * * * * *", 1, late) == [datetime(2026, 6, 12, 2, 0, 1, tzinfo=UTC)]


def test_now_may_be_told_in_another_time_zone() -> None:
    here = datetime.fromisoformat("2026-06-12T03:30:00+02:00")  # 01:30 in UTC
    assert next_times("0 0 2 * * *", 1, here) == [datetime(2026, 6, 12, 2, tzinfo=UTC)]


def test_five_fields_are_refused_with_the_six_that_were_meant() -> None:
    # The controller would take them for seconds to month, and start a run every hour.
    with pytest.raises(UserError, match=r"write '0 0 2 \* \* \*'"):
        check_cron("0 2 * * *")


@pytest.mark.parametrize("cron", ["0 0 0 30 2 *", "0 0 0 31 2,4,6,9,11 *"])
def test_a_day_that_never_comes_is_refused(cron: str) -> None:
    assert next_times(cron, 5, NOW) == []
    with pytest.raises(UserError, match="never comes"):
        check_cron(cron, NOW)


@pytest.mark.parametrize(
    ("cron", "told"),
    [
        ("", "0 fields"),
        ("@daily", "1 fields"),
        ("@every 1h", "2 fields"),
        ("0 0 2 * * * 2027", "7 fields"),
        ("TZ=Europe/Berlin 0 0 2 * * *", "7 fields"),
        ("60 0 2 * * *", "the field second is '60': 60 is not 0 to 59"),
        ("0 0 24 * * *", "the field hour"),
        ("0 0 2 0 * *", "the field day of month"),
        ("0 0 2 * 13 *", "13 is not 1 to 12 or jan to dec"),
        ("0 0 2 * * 7", "7 is not 0 to 6 or sun to sat"),
        ("0 0 2 * * MON-SUN", "ends before it starts"),
        ("0 0 22-2 * * *", "ends before it starts"),
        ("0 */0 * * * *", "a step is 1 to 59"),
        ("0 */90 * * * *", "a step is 1 to 59"),
        ("0 0 2 L * *", "the field day of month"),
        ("0 0 2 15W * *", "the field day of month"),
        ("0 0 2 * * FRI#2", "the field day of week"),
        ("0 0 2 * * 5L", "the field day of week"),
        ("0 0 ? * * *", "the two day fields alone"),
        ("0 0 2 ?/2 * *", "the field day of month"),
        ("0 0 2 *,5 * *", "not in a list"),
        ("0 0 2 5,*/2 * *", "not in a list"),
        ("0 0 2 *-5 * *", "the field day of month"),
        ("0 0 1,,2 * * *", "the field hour"),
        ("0 0 +2 * * *", "the field hour"),
        ("0 0 -2 * * *", "the field hour"),
        ("0 0 ² * * *", "the field hour"),
        ("0 0 2 */2 * MON", "a step"),
        ("0 0 2 1 * */2", "a step"),
        ("0 0 2 * feb-2x *", "the field month"),
    ],
)
def test_what_readers_of_cron_take_differently_is_refused_by_field(cron: str, told: str) -> None:
    with pytest.raises(UserError, match="cron") as error:
        check_cron(cron, NOW)
    assert told in str(error.value)


def test_two_restricted_day_fields_mean_either_and_a_star_means_both() -> None:
    either, fridays = read_cron("0 0 6 13 * FRI"), read_cron("0 0 6 * * FRI")
    assert [either.is_on(datetime(2026, 6, day)) for day in (12, 13, 14)] == [True, True, False]
    assert [fridays.is_on(datetime(2026, 6, day)) for day in (12, 13, 14)] == [True, False, False]


def test_the_text_that_is_kept_has_single_spaces() -> None:
    assert check_cron("  0 0   2 * *\t* ", NOW) == "0 0 2 * * *"
