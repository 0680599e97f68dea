"""Batch: the jobs that share one transaction, what each of them does, and their outcomes."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from itertools import filterfalse, takewhile
from time import monotonic
from typing import Any, NamedTuple

from onewriter.base.state import State
from onewriter.base.tally import Times
from onewriter.errors import forked_error
from onewriter.sqlite.file import FileMovedError
from onewriter.sqlite.guard import Mode
from onewriter.sqlite.pragma_values import set_pragma
from onewriter.sqlite.retry import FAILURES, is_busy
from onewriter.write.alone import call_alone
from onewriter.write.block import Block
from onewriter.write.connection import WriteConnection
from onewriter.write.function_loan import FunctionLoan
from onewriter.write.jobs import BareStatementJob, ConnectionJob, StatementJob
from onewriter.write.loan import WriteLoan
from onewriter.write.lock import WriteLock
from onewriter.write.outcomes import (
    IN_PART,
    commit_outcome_unknown,
    copy_of,
    may_be_in_part,
    may_have_committed,
    unknown_outcome,
)
from onewriter.write.session import WriteSession
from onewriter.write.ticket import RUNNING, Job


class Again(enum.Enum):
    """What happens next to a job whose transaction was rolled back."""

    WITH_SAVEPOINT = "runs again, each with a savepoint: a failed statement may have kept part of its changes"
    ALONE = "runs again, in a transaction of its own"
    STANDS = "has rolled back the others: its error is final, and is set after their outcomes"


class Verdict(NamedTuple):
    """The result of a batch.

    Attributes:
        settled: jobs that have their outcome, in the order in which callers are to learn it.
        commits: how many transactions were committed.
        again: the other ones, in order.
        unknown: what COMMIT raised; those of ``settled`` without an error may or may not be in the file.
        moved: the file is not there any more; the transaction is rolled back.
    """

    settled: list[Job[Any]]
    commits: int = 0
    again: Sequence[tuple[Job[Any], Again]] = ()
    unknown: BaseException | None = None
    moved: FileMovedError | None = None


class Means(NamedTuple):
    """What every batch works with."""

    connection: WriteConnection
    lock: WriteLock
    state: State
    max_hold: float
    fail: Callable[..., None]


class Batch:
    """One transaction: from BEGIN IMMEDIATE until the outcome of each of its jobs is known.

    It only decides: the caller, which gets the verdict, makes the outcomes visible.

    States:  new → begun → over, with the verdict.
    Threads: the writer's.
    """

    __slots__ = (
        "_connection",
        "_fail",
        "_first",
        "_jobs",
        "_lock",
        "_max_hold",
        "_now",
        "_session",
        "_shares",
        "_state",
        "loans",
        "times",
    )

    def __init__(self, means: Means) -> None:
        self._connection, self._lock, self._state, self._max_hold, self._fail = means
        self._jobs: list[Job[Any]] = []  # that have started, in order
        self.loans: list[WriteLoan] = []  # of functions that have kept callbacks; and of a block, here
        self.times = Times()
        self._shares = False
        self._session: WriteSession
        self._now: float  # the last look at the clock
        self._first: Job[Any]

    def open(self) -> WriteSession:
        """See to a connection, or raise why there is none."""
        self._session = session = self._connection.session or self._connection.open()
        return session

    def begin(self, first: Job[Any], now: float, mark: bool) -> None:
        """Take SQLite's write lock, for ``first`` and those behind it, and ``mark`` that; raises SQLite's error."""
        self._first, session = first, self.open()
        if first.foreign_keys is not None:
            session.guard.settings_touched = True
            set_pragma(session.connection, "foreign_keys", int(first.foreign_keys))
        if self._connection.last_rowid.wanted is not None:
            self._connection.last_rowid.restore(session)
        self._now = self._lock.begin(session, first, self.times, now)
        if mark:
            session.set_mark()

    def run(self, todo: list[Job[Any]], again: dict[Job[Any], Again]) -> Verdict:
        """Run the jobs at the front of ``todo``, as many as may share the transaction, and commit them."""
        verdict, until = None, self._now + self._lock.longest_hold
        try:
            if len(todo) > 1:
                self._shares = self._may_share(todo[0], todo[1], again)
            if type(self._first) is StatementJob and not again and self._max_hold == math.inf:
                verdict = self._run_plain(todo, until)
            if todo and verdict is None:
                verdict = self._run_each(todo, again, until)
            return verdict or self._commit()
        finally:
            self._lock.released()

    def loan_for(self, block: Block, session: WriteSession) -> WriteLoan:
        """What a block will have, whose thread begins and ends it."""
        loan = WriteLoan(session, block)
        self._session, self._jobs, self.loans = session, [block], [loan]
        return loan

    def begin_block(self, block: Block) -> WriteLoan | None:
        """Start a block whose thread is the writer; None if it was withdrawn meanwhile."""
        if not block.start(monotonic()):
            self._connection.roll_back()
            self._lock.released()
            return None
        loan = self.loan_for(block, self._session)
        self._state.enter(block, loan)
        loan.limit(block.max_hold)
        return loan

    def end_block(self, error: BaseException | None) -> Verdict:
        """End it; ``error``: what has failed it."""
        try:
            self._leave(self.loans[0], None, error, savepoint=False)  # its mark ends with the transaction
            return self._commit() if self._connection.in_transaction else self._lost()
        finally:
            self._lock.released()

    def run_bare(self, job: BareStatementJob) -> Verdict:
        """Run a statement outside any transaction, again while it meets BUSY, which leaves it undone."""
        loan, unknown = WriteLoan(self._session, job), None
        self._state.scopes.begin_jobs()
        try:
            self._state.enter(job, loan)
            self._state.scopes.enter_job(loan)
            self._session.guard.settings_touched = True
            if self._max_hold != math.inf:
                loan.limit(self._max_hold)
            try:
                job.set_outcome(self._lock.call(lambda: job.perform(loan), self.times), None)
            finally:
                loan.end()
                self._state.leave()
                self._state.scopes.end_jobs()
        except BaseException as error:
            # It commits by itself, if it came so far.
            if may_have_committed(error):
                unknown = error
            else:
                self._fail(job, error, not is_busy(error))
                self._connection.roll_back()
        job.ended_at = monotonic()
        return Verdict([job], int(unknown is None and job.failed_with is None), unknown=unknown)

    def run_whole(self, job: ConnectionJob[Any]) -> Verdict:
        """Call a function with a connection of its own, while the session is idle."""
        unknown = None
        try:
            self._state.enter(job, None)
            try:
                job.set_outcome(call_alone(job, self._connection, self._state, self._max_hold), None)
            finally:
                self._state.leave()
        except FileMovedError as error:
            return Verdict([], moved=error)
        except BaseException as error:
            if self._state.forked:
                raise
            if may_have_committed(error):
                unknown = error
            else:
                self._fail(job, error)
        job.ended_at = monotonic()
        return Verdict([job], int(unknown is None and job.failed_with is None), unknown=unknown)

    def _may_share(self, first: Job[Any], second: Job[Any], again: dict[Job[Any], Again]) -> bool:
        """Whether these may share the transaction; called inside it, so that the schema stands."""
        if first.exclusive or second.exclusive or again.get(first) is Again.ALONE:
            return False
        try:
            undoes_all = self._session.schema_undoes_all()
            self._connection.last_rowid.note(self._session)
        except FAILURES:  # a damaged schema: the jobs will tell
            return False
        return not undoes_all

    def _run_plain(self, todo: list[Job[Any]], until: float) -> Verdict | None:
        """Run the SQL statements at the front, without a savepoint each. Functions come after: they are to run once."""
        session, state, jobs, shares = self._session, self._state, self._jobs, self._shares
        guard, lock, insert = session.guard, state.lock, session.executor.insert
        now = began = self._now
        known, taken = "", 0
        guard.mode = Mode.ALONE
        # Hot path: runs once for each queued statement; avoid calls.
        try:
            for job in todo:
                if type(job) is not StatementJob or now > until:
                    break
                sql = job.sql
                is_new = sql is not known
                if is_new:
                    if shares and job.exclusive:  # the first may be, and is
                        break
                    known = sql
                taken += 1
                with lock:
                    if job._stage > RUNNING:
                        continue
                    job.started_at, job._stage = now, RUNNING
                began = now
                state.job = job
                jobs.append(job)
                try:
                    job._result = insert(sql, job.work)
                except BaseException as error:
                    if shares and not self._is_harmless(sql, error):
                        return self._undo(jobs, Again.WITH_SAVEPOINT)
                    self._fail(job, error)
                    session.forget_error()
                job.ended_at = now = monotonic()
                # The guard is asked about new texts only; what follows may not rely on what the batch began with then.
                if not shares or (is_new and (guard.schema_changed or guard.settings_touched)):
                    break
        finally:
            guard.mode = Mode.GATEWAY
            if now - began > state.slow_after:
                state.warn_if_slow(now)  # the one that is slow is the last: the batch ends with it
            state.job, self._now = None, now
            del todo[:taken]
        return None

    def _run_each(self, todo: list[Job[Any]], again: dict[Job[Any], Again], until: float) -> Verdict | None:
        """Run the next jobs, whatever they are, each with a savepoint if they share the transaction."""
        session, state, shares, limited = self._session, self._state, self._shares, self._max_hold != math.inf
        guard, lock, jobs, taken, enter_job = session.guard, state.lock, self._jobs, 0, state.scopes.begin_jobs()
        # Hot path: runs once for each queued function; avoid calls.
        try:
            for job in todo:
                if job is not self._first and (
                    not shares or self._now >= until or guard.schema_changed or guard.settings_touched or job.exclusive
                ):
                    break
                taken += 1
                if again:
                    again.pop(job, None)
                with lock:
                    if job._stage > RUNNING:
                        continue
                    job.started_at, job._stage = self._now, RUNNING
                jobs.append(job)
                loan = WriteLoan(session, job) if job.lent else FunctionLoan(session, job)
                savepoint, result, failure = shares or job.needs_savepoint, None, None
                try:
                    state.job, state.transaction = job, loan
                    if savepoint:
                        session.set_mark()
                    if not job.lent:
                        enter_job(loan)
                        if limited:
                            loan.limit(self._max_hold)
                    guard.mode = loan.mode
                    result = job.perform(loan)
                except BaseException as error:
                    failure = error
                self._leave(loan, result, failure, savepoint)
                if job._error is not None and self._is_gone():
                    return self._lost()
        finally:
            state.scopes.end_jobs()
            del todo[:taken]
        return None

    def _is_harmless(self, sql: str, error: BaseException) -> bool:
        """Whether the statement that has failed so has certainly changed nothing."""
        had_no_effect = self._session.executor.surely_had_no_effect
        return not self._is_gone() and had_no_effect(sql, error, self._session.schema_fails)

    def _is_gone(self) -> bool:
        """Whether the transaction was undone as a whole, by SQLite or with its connection."""
        return self._connection.session is not self._session or not self._session.connection.in_transaction

    def _leave(self, loan: WriteLoan, result: Any, error: BaseException | None, savepoint: bool) -> None:
        """End a job; if it has failed, undo it alone where it shares the transaction."""
        job, session, state = loan.job, self._session, self._state
        if state.forked:
            raise forked_error() if error is None else error  # the job has forked, and this is the child
        session.guard.mode = Mode.GATEWAY
        job.ended_at = self._now = state.leave()
        if loan.parts is not None and not job.lent:
            self.loans.append(loan)
        try:
            loan.end()
            if error is None:
                if loan._time_limit is not None and loan.was_too_long and not job.lent:
                    raise loan.closed_error()  # which the job has swallowed
                if not session.connection.in_transaction:
                    raise loan.aborted_error()
                if loan.parts is not None:
                    loan.parts.undo_failed()
                if job.foreign_keys is False:
                    session.check_keys()
                if savepoint and self._shares:  # else it ends with the transaction
                    session.release_mark()
                job._result = result
        except Exception as failure:
            error = failure
        if error is not None:
            self._fail(job, error, True)
            if savepoint and self._connection.in_transaction:
                self._connection.undo_job()

    def _commit(self) -> Verdict:
        jobs, file = self._jobs, self._connection.file
        first = next(filterfalse(has_failed, jobs), None)
        if first is None:
            self._connection.roll_back()
            return Verdict(jobs)
        try:
            if self._now >= file.look_again_at:
                self._connection.check_file(self._now)
            self._lock.commit(self._session, first, self.times, self._now)
        except FileMovedError as error:
            self._connection.roll_back()
            return Verdict([], moved=error)
        except BaseException as error:
            return self.commit_failed(error)
        return Verdict(jobs, 1)

    def commit_failed(self, error: BaseException) -> Verdict:
        """COMMIT raised it."""
        is_open = self._session.connection.in_transaction
        if commit_outcome_unknown(error, is_open):
            return Verdict(self._jobs, unknown=error)
        self._connection.roll_back()
        if may_be_in_part(error, is_open, self._session):  # so nothing may run again
            for job in filterfalse(has_failed, self._jobs):
                self._fail(job, unknown_outcome(job, error, IN_PART))
            return Verdict(self._jobs)
        early = len(failed_early(self._jobs))
        if len(self._jobs) - early > 1 and not is_busy(error):
            return self._undo(self._jobs, Again.ALONE)
        # Those that failed too: perhaps by rows that are not there now; they have waited long enough.
        for job in self._jobs[early:]:
            self._fail(job, copy_of(error))
        return Verdict(self._jobs)

    def _lost(self) -> Verdict:
        """The transaction is gone, by what the last job did: it has its error, and the others run again."""
        if len(self._jobs) == 1:
            return Verdict(self._jobs)
        self._connection.last_rowid.keep(self._connection.session)
        verdict = self._undo(self._jobs[:-1], Again.ALONE)
        return verdict._replace(again=[*verdict.again, (self._jobs[-1], Again.STANDS)])

    def _undo(self, jobs: list[Job[Any]], how: Again) -> Verdict:
        """Undo all, so that ``jobs`` run again in order.

        Those that failed too: what they met may have been of another, which need not do the same again.
        """
        self._connection.roll_back()
        self._connection.last_rowid.undo()
        early = failed_early(jobs) if how is Again.ALONE else []
        rest = jobs[len(early) :]
        for job in rest:
            job.set_outcome(None, None)
        return Verdict(early, again=[(job, how) for job in rest])


def has_failed(job: Job[Any]) -> bool:
    return job._error is not None


def failed_early(jobs: list[Job[Any]]) -> list[Job[Any]]:
    """The first ones, as far as they failed before another had written: they met what is committed, so that stands."""
    return list(takewhile(has_failed, jobs))
