"""The marks of tasks that do a step side by side, each a part of it."""

from collections.abc import Iterator
from contextlib import contextmanager

from braintumor.errors import UserError
from braintumor.interruption import deferred_interruptions
from braintumor.progress import warn
from braintumor.registry.attempts import (
    FAILED,
    RUNNING,
    STEP,
    in_words,
    mark,
    run_of_this_pipeline,
    sigterm_as_exit,
    without_traceback,
)
from braintumor.registry.server import connected


@contextmanager
def part_of_the_step(step: str, part: str) -> Iterator[None]:
    """The attempt's run says that `step` is under way, or why this `part` of it failed; never that the step is done.

    What another part said of its failure stays; a part that failed and is tried again takes its own word back.
    """
    with without_traceback(), sigterm_as_exit():
        run_id = run_of_this_pipeline()
        try:
            if not _has_another_failed(run_id, step, part):
                mark(run_id, step, RUNNING)
            yield
        except BaseException as error:
            # A signal that comes now waits until this is told.
            with deferred_interruptions():
                mark(run_id, step, f"{FAILED}: {part}: {in_words(error)}")
            raise


def _has_another_failed(run_id: str | None, step: str, part: str) -> bool:
    if run_id is None:
        return False
    try:
        with connected(is_patient=False) as client:
            mark = str(client.get_run(run_id).data.tags.get(f"{STEP}.{step}", ""))
    except UserError as error:
        warn(f"{error}. It is not known whether another part of {step} has failed")
        return False
    return mark.startswith(FAILED) and not mark.startswith(f"{FAILED}: {part}: ")
