"""Outcomes: what a job's error tells of it, and how everybody hears what became of the jobs."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Callable, Iterable
from typing import Any

from onewriter.base.call_site import without_own_frames
from onewriter.base.log import INTERRUPTS, call_all_safely, call_safely, report, text_of, traceback_of
from onewriter.base.state import State
from onewriter.base.tally import Times
from onewriter.errors import forked_error
from onewriter.events import BatchEnded, Hook, publish
from onewriter.sqlite.retry import is_busy, is_corrupt, note_descriptors
from onewriter.write.connection import WriteConnection
from onewriter.write.loan import WriteLoan
from onewriter.write.lock import WriteLock
from onewriter.write.ticket import Job, Ticket, settle


class Outcomes:
    """Threads: the writer's. Callbacks are called here, with no lock held and outside any transaction."""

    def __init__(
        self,
        state: State,
        connection: WriteConnection,
        lock: WriteLock,
        on_error: Callable[[Ticket[Any]], object] | None,
        on_event: Hook | None,
    ) -> None:
        self._state = state
        self._connection = connection
        self._lock = lock
        self._on_error = on_error
        self._on_event = on_event

    def fail(self, job: Job[Any], error: BaseException) -> None:
        """Keep ``error`` as the outcome of ``job``, with a note that names it; nobody sees it before ``settle``."""
        try:
            self._connection.guard.explain(error)
        except BaseException as raised:  # while SQLite asked whether it may
            error = raised
        try:
            self._annotate(job, error)
        except BaseException as failure:  # as from a frozen dataclass, which refuses notes; or Ctrl-C in this moment
            if self._state.reporter is None and issubclass(type(failure), INTERRUPTS):
                self._state.interrupt = failure
        job.set_outcome(None, error)

    def _annotate(self, job: Job[Any], error: BaseException) -> None:
        BaseException.with_traceback(error, without_own_frames(traceback_of(error)))
        if is_corrupt(error):
            self._state.note_corruption(error)
        policy = self._lock.policy
        note, attempts = f"onewriter: job {job.describe()}", max(1, policy.attempts)
        if attempts > 1 or is_busy(error):  # one, and it was had, is nothing to tell
            note += f", attempts to get SQLite's lock: {attempts}"
        if is_busy(error):
            note += f" in {policy.waited:.2f} s; {self._lock.in_the_way()}"
        note_descriptors(error)
        if note not in getattr(error, "__notes__", ()):
            BaseException.add_note(error, note)

    def settle(self, jobs: list[Job[Any]], times: Times, loans: Iterable[WriteLoan] = (), commits: int = 0) -> None:
        """Make the outcomes visible, and then call what waits for them; ``loans`` are those of ``jobs``."""
        if self._state.forked:
            raise forked_error()  # by something further down the stack, and this is the child
        called, unheard = settle(jobs, self._state, times, commits)
        if self._state.live is not None:
            call_safely(self._state, self._state.live.settled, self._connection.session, jobs)
        for loan in loans:
            if loan.parts is not None:  # most have none
                self.call_back(loan, committed=loan.job._error is None)
        for job in called:
            self._state.begin_callbacks(job)
            job.run_callbacks()
        for job in unheard:
            self._state.begin_callbacks(job)
            report(self._state, logging.ERROR, "job %s failed", job.describe(), error=job.failed_with)
            if self._on_error is not None:
                call_safely(self._state, self._on_error, job)
        self._state.end_callbacks()
        if self._on_event is not None and (
            tickets := tuple(job for job in jobs if job.in_stats and not job.cancelled())
        ):
            event = BatchEnded(tickets, commits, times.lock_wait, times.commit, times.retried)
            publish(self._state, self._on_event, event)

    def call_back(self, loan: WriteLoan, committed: bool) -> None:
        """Call what ``on_commit`` or ``on_rollback`` has kept."""
        if loan.job.lent:
            return  # its own thread does
        callbacks = loan.callbacks(committed)
        if callbacks:
            self._state.begin_callbacks(loan.job)
            call_all_safely(self._state, [(callback,) for callback in callbacks])


def copy_of(error: BaseException) -> BaseException:
    """An exception object of its own for each job, since each gets notes and a traceback."""
    copy: BaseException
    try:
        copy = type(error)(*error.args)
        BaseException.with_traceback(copy, None)  # or it is no exception
    except BaseException:
        copy = sqlite3.OperationalError(text_of(error))
    for name in ("sqlite_errorcode", "sqlite_errorname"):
        with contextlib.suppress(BaseException):
            setattr(copy, name, getattr(error, name))
    return copy
