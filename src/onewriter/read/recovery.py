"""Recovery: a reader cannot write, so it has the writer roll back what a killed process has left of a transaction."""

from __future__ import annotations

import contextlib
import sys
from time import monotonic
from typing import Any

from onewriter.base.state import State
from onewriter.errors import OneWriterError
from onewriter.events import Submit
from onewriter.sqlite.retry import is_busy
from onewriter.write.jobs import StatementJob
from onewriter.write.outcomes import copy_of

PAUSE = 0.1  # seconds from one to the next, as long as it is in vain


class Recovery:
    """In the rollback-journal modes: SQLite does it as a transaction begins.

    Threads: any.
    """

    def __init__(self, state: State, submit: Submit) -> None:
        self._state = state
        self._submit = submit
        self._last: StatementJob | None = None

    def ask(self, asked: Any) -> StatementJob | None:
        """Have it done, without waiting for it. Called again and again, with what it has returned to the same read
        before: raises what that has failed with, if it was no lock.
        """
        failure = asked.failed_with if asked is not None and asked.done() else None
        if failure is not None and not (is_busy(failure) or asked.cancelled()):
            raise copy_of(failure)
        last = self._last
        if last is not None and not last.done():
            return last
        if last is not None and monotonic() < last.created_at + PAUSE:
            return None
        self._last = job = StatementJob(self._state, "SELECT 1", (), "recovery", sys._getframe(), False)
        with contextlib.suppress(OneWriterError):  # the gateway is closed, or out of service
            self._submit(job, 0.0)
        return job
