"""What is inside another job or block: a savepoint of that, with a loan of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

from onewriter.write.loan import WriteLoan
from onewriter.write.ticket import Job

T = TypeVar("T")


@contextlib.contextmanager
def part_of(outer: WriteLoan, job: Job[Any]) -> Iterator[WriteLoan]:
    """For the ``with`` block the caller is inside ``job``, whose loan ends with it; what it lent, too."""
    with outer.part():
        inner = outer.nested(job)
        try:
            with job._state.scopes.inside(inner, writes=True):
                yield inner
        finally:
            inner.end()


def perform_inside(outer: WriteLoan, job: Job[T]) -> T:
    """Run ``job`` there; an error gets a note that names it, as that of any job."""
    try:
        with part_of(outer, job) as inner:
            return job.perform(inner)
    except BaseException as error:
        with contextlib.suppress(BaseException):  # as from a frozen dataclass, which refuses notes
            BaseException.add_note(error, f"onewriter: job {job.describe()}")
        raise
