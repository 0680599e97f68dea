"""Outcomes: what a job's error says of it, and how callers, callbacks and the log learn the outcomes."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Callable, Sequence
from operator import attrgetter
from time import monotonic
from typing import Any

from onewriter.base.call_site import without_own_frames
from onewriter.base.log import INTERRUPTS, call_all_safely, call_safely, report, text_of, traceback_of
from onewriter.base.state import State
from onewriter.base.tally import Times
from onewriter.base.waiting import is_there, wake
from onewriter.errors import CommitUnknownError, forked_error
from onewriter.events import BatchEnded, Hook, publish
from onewriter.sqlite.retry import FAILURES, error_code, is_busy, is_corrupt, note_descriptors
from onewriter.write.connection import WriteConnection
from onewriter.write.loan import WriteLoan
from onewriter.write.lock import WriteLock
from onewriter.write.session import WriteSession
from onewriter.write.ticket import DONE, RUNNING, Job, Ticket

work_of = attrgetter("work")
three_moments = attrgetter("created_at", "started_at", "ended_at")
UNKNOWN = "it may or may not be committed"
IN_PART = "some of the databases that were written may have it, and others not: in WAL mode they commit one by one"
UNWRITTEN = {  # I/O errors that come before anything is written
    getattr(sqlite3, f"SQLITE_IOERR_{name}")
    for name in (
        *("READ", "SHORT_READ", "LOCK", "RDLOCK", "CHECKRESERVEDLOCK", "NOMEM", "GETTEMPPATH", "CONVPATH", "ACCESS"),
        *("FSTAT", "SEEK", "SHMOPEN", "SHMLOCK", "MMAP"),  # not SHMSIZE, SHMMAP: the index grows behind the end mark
    )
}


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

    def fail(self, job: Job[Any], error: BaseException, is_known: bool = False) -> None:
        """Keep ``error`` as the outcome of ``job``, with a note that names it; it is visible after ``settle``.

        ``is_known``: the loan has seen it, if it comes from this database; it may also come from another.
        """
        try:
            self._connection.guard.explain(error)
        except BaseException as raised:  # while SQLite asked whether it may
            error = raised
        met = error.__cause__ or error if type(error) is CommitUnknownError else error
        try:
            if not is_known and is_corrupt(met):
                self._state.note_corruption(met)
            self._annotate(job, error, is_known)
        except BaseException as failure:  # as from a frozen dataclass, which refuses notes; or Ctrl-C in this moment
            if self._state.reporter is None and issubclass(type(failure), INTERRUPTS):
                self._state.interrupt = failure
        if error_code(met) & 0xFF == sqlite3.SQLITE_FULL:
            self._state.lacks_room = True
        job.set_outcome(None, error)

    def _annotate(self, job: Job[Any], error: BaseException, is_known: bool) -> None:
        BaseException.with_traceback(error, without_own_frames(traceback_of(error)))
        policy = self._lock.policy
        note, attempts = f"onewriter: job {job.describe()}", max(1, policy.attempts)
        # Also BUSY, but no lock is in the way: of what the job itself has not ended.
        met_lock = not is_known and is_busy(error) and "statements in progress" not in text_of(error)
        if attempts > 1 or met_lock:  # one, and it was had, is nothing to tell
            note += f", attempts to get SQLite's lock: {attempts}"
        if met_lock:
            note += f" in {policy.waited:.2f} s; {self._lock.in_the_way()}"
        note_descriptors(error)
        if note not in getattr(error, "__notes__", ()):
            BaseException.add_note(error, note)

    def refuse(self, jobs: list[Job[Any]], error: BaseException, times: Times) -> None:
        """Settle what there was no transaction for."""
        if times.retried:
            with self._state.lock:  # those that had started, and were undone, are counted with their times
                self._state.tally.retried += sum(not job.running() for job in jobs)
        for job in jobs:
            job.ended_at = monotonic()  # one that was undone in its midst has none
            self.fail(job, copy_of(error))
        self.settle(jobs, times)

    def settle(self, jobs: list[Job[Any]], times: Times, loans: Sequence[WriteLoan] = (), commits: int = 0) -> None:
        """Make the outcomes visible, wake who waits, call the callbacks; ``loans`` are those with callbacks."""
        state = self._state
        if state.forked:
            raise forked_error()  # by something further down the stack, and this is the child
        called: list[Job[Any]] = []
        unheard: list[Job[Any]] = []  # failures that no caller waits for: they have to be logged
        wakeups: list[Any] = []
        try:
            with state.lock:
                works, moments = list(map(work_of, jobs)), moments_of(jobs)
                committed = self._resolve(jobs, times, called, unheard, wakeups)
                self._lock.was_committing = False
                if jobs and jobs[0].in_stats:
                    state.tally.committed = committed
                    state.tally.add_batch(moments, times, commits)
            if unheard:
                self._log(unheard)
        finally:  # whatever failed (no memory, say): they have their outcome
            wake(wakeups)
        del works  # only now does what the jobs worked with go: it may have finalizers
        if state.live is not None:
            call_safely(state, state.live.settled, self._connection.session, jobs)
        if called or unheard or loans:
            self._tell(called, unheard, loans)
        if self._on_event is not None:
            self._publish(self._on_event, jobs, times, commits)

    def _resolve(
        self, jobs: list[Job[Any]], times: Times, called: list[Job[Any]], unheard: list[Job[Any]], wakeups: list[Any]
    ) -> int:
        """Under the lock; returns how many jobs are committed by now.

        Apart: what a signal handler raises as a loop jumps back goes past the ``with`` around that loop, in CPython
        3.12 and 3.13, and the lock would never be released.
        """
        # Hot path: runs once for each job; avoid calls.
        committed = self._state.tally.committed
        for job in jobs:
            if job._stage > RUNNING:
                continue
            job._stage = DONE
            job._times = times
            job.work = None
            if job._error is None:
                committed += 1
                job._sequence = committed
            elif self._is_unheard(job):
                unheard.append(job)
            if job._callbacks is not None:
                called.append(job)
            if job._waiters is not None:
                wakeups += job._waiters
                job._waiters = None
        return committed

    def _is_unheard(self, job: Job[Any]) -> bool:
        """Count the failure; whether no caller waits for it."""
        if job.in_stats:
            self._state.tally.count_failed(job.label)
        return job.logs_failure and not job._callbacks and not any(map(is_there, job._waiters or ()))

    def _log(self, unheard: list[Job[Any]]) -> None:
        """Before anybody hears of a later job of the batch, who is to find these in the log. Whatever the handlers do,
        it costs no wait; an inline gateway, which calls them itself, does so at the end.
        """
        for job in unheard if self._state.reporter is not None else ():
            self._report(job)

    def _report(self, job: Job[Any]) -> None:
        report(self._state, logging.ERROR, "job %s failed", job.describe(), error=job.failed_with)

    def _tell(self, called: list[Job[Any]], unheard: list[Job[Any]], loans: Sequence[WriteLoan]) -> None:
        for loan in loans:
            self.call_back(loan, committed=loan.job._error is None)
        for job in called:
            self._state.begin_callbacks(job)
            job.run_callbacks()
        for job in unheard:
            self._state.begin_callbacks(job)
            if self._state.reporter is None:
                self._report(job)
            if self._on_error is not None:
                call_safely(self._state, self._on_error, job)
        self._state.end_callbacks()

    def _publish(self, hook: Hook, jobs: list[Job[Any]], times: Times, commits: int) -> None:
        tickets = tuple(job for job in jobs if job.in_stats and not job.cancelled())
        if tickets:
            publish(self._state, hook, BatchEnded(tickets, commits, times.lock_wait, times.commit, times.retried))

    def call_back(self, loan: WriteLoan, committed: bool) -> None:
        """Call what ``on_commit`` or ``on_rollback`` has kept."""
        if loan.parts is not None and not loan.job.lent:  # or else its own thread does
            self._state.begin_callbacks(loan.job)
            call_all_safely(self._state, loan.parts.callbacks(committed))
            self._state.end_callbacks()


def moments_of(jobs: list[Job[Any]]) -> list[tuple[float, float, float]]:
    """When each of those that have started was made, had started and had ended."""
    try:
        return list(map(three_moments, jobs))
    except AttributeError:  # some have not
        ended = (job for job in jobs if job._stage == RUNNING and hasattr(job, "ended_at"))
        return [three_moments(job) for job in ended if job.in_stats]


def unknown_outcome(job: Job[Any], error: BaseException, fate: str = UNKNOWN) -> CommitUnknownError:
    """That of a job whose COMMIT was begun as ``error`` came."""
    text = f"COMMIT of job {job.describe()} failed with {text_of(error)}: {fate}"
    unknown = CommitUnknownError(text)
    unknown.__cause__ = copy_of(error)
    return unknown


def commit_outcome_unknown(error: BaseException, in_transaction: bool) -> bool:
    """Whether a COMMIT that raised ``error`` may yet be found in the file.

    A failed sync may: what was written before it can reach the disk (https://www.sqlite.org/wal.html). A full disk and
    a failed write may not: the end mark of the transaction was never written. Damage and locks are met before that;
    SQLITE_ERROR: SQLite had rolled back by then.
    """
    code = error_code(error)
    if (
        code in (sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_FULL, sqlite3.SQLITE_ERROR)
        or (is_corrupt(error) and code & 0xFF != sqlite3.SQLITE_IOERR)
        or code & 0xFF == sqlite3.SQLITE_BUSY
    ):
        return False
    return not in_transaction or code & 0xFF == sqlite3.SQLITE_IOERR


def may_be_in_part(error: BaseException, in_transaction: bool, session: WriteSession) -> bool:
    """Whether a COMMIT that raised ``error`` may be found in one database, and not in another.

    In WAL mode each commits for itself, one after the other (https://www.sqlite.org/lang_attach.html), TEMP behind the
    main one. Where the transaction is still open, the error came before the first: constraints, and all locks.
    """
    if in_transaction or error_code(error) == sqlite3.SQLITE_ERROR:
        return False
    files = {"temp", *(name.lower() for name, file in session.files.items() if file)}
    written = files.intersection(map(str.lower, session.guard.written))
    try:
        return len(written) > 1 and any(name.lower() in written for name in session.find_logs())
    except FAILURES:
        return True


def may_have_committed(error: BaseException) -> bool:
    """Whether what commits by itself may be found in the file, though it raised ``error``."""
    return commit_outcome_unknown(error, in_transaction=True) and error_code(error) not in UNWRITTEN


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
