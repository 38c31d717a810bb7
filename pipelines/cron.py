"""Cron expressions as Kubeflow Pipelines reads them: six fields, seconds first, in UTC.

Its controller reads them with robfig/cron 1.2 (https://pkg.go.dev/github.com/robfig/cron@v1.2.0): five fields are taken
for seconds to month, so that '0 2 * * *' would run every hour. What other readers of cron take differently is refused
here: 7 for Sunday, L, W, #, ranges that wrap, descriptors as @daily, and a step on one of two restricted day fields.
"""

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from itertools import product

from braintumor.errors import UserError

MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
YEARS = 5  # after so many years without a match, the controller gives up

ALL = frozenset({"*", "?"})


@dataclass(frozen=True)
class Field:
    """One of the six fields: its range, and the names that stand for numbers."""

    name: str
    low: int
    high: int
    names: tuple[str, ...] = ()

    def values(self, text: str) -> list[int]:
        """The numbers that `text` stands for, ascending; raises UserError."""
        if text == "?" and "day" not in self.name:
            raise self._error(text, "'?' is for the two day fields alone")
        parts = text.split(",")
        if len(parts) > 1 and any(part[:1] in ALL for part in parts):
            raise self._error(text, "'*' and '?' stand alone, not in a list")
        return sorted({value for part in parts for value in self._part(part, text)})

    def _part(self, part: str, text: str) -> range:
        match = re.fullmatch(r"(\*|\?|\w+)(?:-(\w+))?(?:/(\d+))?", part, re.ASCII)
        if match is None or (match[1] in ALL and match[2]) or (match[1] == "?" and match[3]):
            raise self._error(text, "write '*', N, N-M, a list N,M, or with a step */S, N-M/S")
        start, end = (self.low, self.high) if match[1] in ALL else (self._number(match[1], text),) * 2
        if match[2]:
            end = self._number(match[2], text)
        elif match[3]:
            end = self.high
        if start > end:
            raise self._error(text, f"{part} ends before it starts")
        step = int(match[3] or 1)
        if not 1 <= step <= self.high:
            raise self._error(text, f"a step is 1 to {self.high}")
        return range(start, end + 1, step)

    def _number(self, word: str, text: str) -> int:
        if word.lower() in self.names:
            return self.low + self.names.index(word.lower())
        if not word.isdecimal() or not self.low <= int(word) <= self.high:
            named = f" or {self.names[0]} to {self.names[-1]}" if self.names else ""
            raise self._error(text, f"{word} is not {self.low} to {self.high}{named}")
        return int(word)

    def _error(self, text: str, reason: str) -> UserError:
        return UserError(f"cron: the field {self.name} is '{text}': {reason}")


FIELDS = (
    Field("second", 0, 59),
    Field("minute", 0, 59),
    Field("hour", 0, 23),
    Field("day of month", 1, 31),
    Field("month", 1, 12, MONTHS),
    Field("day of week", 0, 6, WEEKDAYS),
)


@dataclass(frozen=True)
class Cron:
    """What a cron expression stands for."""

    text: str
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    either_day: bool  # both day fields are restricted: a day that matches one of them is enough
    times: tuple[time, ...]  # of a day, ascending

    def is_on(self, day: date) -> bool:
        """Whether it comes on this day."""
        matches = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return day.month in self.months and (any(matches) if self.either_day else all(matches))


def read_cron(cron: str) -> Cron:
    """What `cron` stands for; raises UserError if Kubeflow's controller refuses it, or others read it differently."""
    words = cron.split()
    if len(words) == 5:
        raise UserError(
            f"cron '{cron}' has five fields; Kubeflow Pipelines reads six, seconds first: write '0 {' '.join(words)}'"
        )
    if len(words) != len(FIELDS):
        raise UserError(
            f"cron '{cron}' has {len(words)} fields; it needs six ({', '.join(field.name for field in FIELDS)}), "
            "as '0 0 2 * * *' for every night at two in UTC"
        )
    seconds, minutes, hours, days, months, weekdays = (
        field.values(word) for field, word in zip(FIELDS, words, strict=True)
    )
    restricted = [word for word in (words[3], words[5]) if word not in ALL]
    if len(restricted) == 2 and any(word.startswith("*") for word in restricted):
        raise UserError(
            f"cron '{cron}' has a step '*/' on one of two restricted day fields, which is read as 'and' or as 'or'; "
            "write the days as a list, or leave one of the two fields '*'"
        )
    return Cron(
        " ".join(words),
        frozenset(days),
        frozenset(months),
        frozenset(weekdays),
        either_day=len(restricted) == 2,
        times=tuple(time(*parts) for parts in product(hours, minutes, seconds)),
    )


def next_times(cron: str, n: int = 5, now: datetime | None = None) -> list[datetime]:
    """The next `n` times in UTC, ascending; fewer if it does not come within five years; raises UserError."""
    read = read_cron(cron)
    found: list[datetime] = []
    after = (now or datetime.now(UTC)).astimezone(UTC)
    while len(found) < n and (following := _next(read, after)):
        found.append(following)
        after = following
    return found


def check_cron(cron: str, now: datetime | None = None) -> str:
    """`cron` with single spaces; raises UserError if it is malformed, ambiguous, or never comes."""
    if not next_times(cron, 1, now):
        raise UserError(f"cron '{cron}' never comes: no such day within {YEARS} years; check day and month")
    return read_cron(cron).text


def _next(cron: Cron, after: datetime) -> datetime | None:
    day = after.date()
    while day <= date(after.year + YEARS, 12, 31):
        if cron.is_on(day):
            for moment in cron.times:
                candidate = datetime.combine(day, moment, UTC)
                if candidate > after:
                    return candidate
        day += timedelta(days=1)
    return None
