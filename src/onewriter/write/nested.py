"""What is inside another job or block: a part of that, with a loan of its own."""

from __future__ import annotations

import contextlib
from typing import Any, TypeVar

from onewriter.write.loan import WriteLoan
from onewriter.write.part import Part
from onewriter.write.ticket import Job

T = TypeVar("T")


class NestedPart(Part):
    """For the ``with`` block the caller is inside ``job``, whose loan ends with it; what it lent, too."""

    def __init__(self, outer: WriteLoan, job: Job[Any]) -> None:
        super().__init__(outer)
        self._job = job

    def _begin(self) -> WriteLoan:
        self._inner = inner = self._loan.nested(self._job)
        self._scope = self._job._state.scopes.enter(inner, writes=True)
        return inner


def perform_inside(outer: WriteLoan, job: Job[T]) -> T:
    """Run ``job`` there; an error gets a note that names it, as that of any job."""
    try:
        with NestedPart(outer, job) as inner:
            return job.perform(inner)
    except BaseException as error:
        with contextlib.suppress(BaseException):  # as from a frozen dataclass, which refuses notes
            BaseException.add_note(error, f"onewriter: job {job.describe()}")
        raise
