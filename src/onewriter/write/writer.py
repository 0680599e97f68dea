"""Writer: take jobs → one transaction → settle. The only BEGIN, COMMIT and ROLLBACK."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import itertools
import logging
import math
import os
import sqlite3
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

from onewriter.base.call_site import without_own_frames
from onewriter.base.log import INTERRUPTS, call_all_safely, call_safely, report, text_of, traceback_of
from onewriter.base.state import State, broken_error
from onewriter.base.tally import Batch
from onewriter.errors import CommitUnknownError, TransactionClosedError, WriterClosedError, forked_error
from onewriter.events import BatchEnded, Hook, WriterBroken, tell
from onewriter.sqlite.connection import configure, open_writer
from onewriter.sqlite.file import DatabaseFile, FileMovedError, exposure
from onewriter.sqlite.guard import Guard, Mode
from onewriter.sqlite.locks import describe_lock, describe_readers
from onewriter.sqlite.options import Settings
from onewriter.sqlite.pragmas import set_pragma
from onewriter.sqlite.retry import CORRUPT, LockPolicy, error_code, is_busy, note_descriptors
from onewriter.write.block import BlockFailedError, BlockJob
from onewriter.write.checkpoint import Checkpoint, Checkpointer, Readers
from onewriter.write.jobs import BareStatementJob, ControlJob, StatementJob
from onewriter.write.queue import JobQueue
from onewriter.write.session import WriteSession
from onewriter.write.ticket import RUNNING, Job, Ticket, settle
from onewriter.write.transaction import Transaction

MOST_TAKEN = 2048  # jobs
IDLE = 0.5  # seconds without jobs after which the log is emptied
GAP = 0.0015  # seconds
LONGEST_HOLD = 0.05  # seconds after which a batch takes no further job
UNWRITTEN = {  # I/O errors that come before anything is written
    getattr(sqlite3, f"SQLITE_IOERR_{name}")
    for name in (
        *("READ", "SHORT_READ", "LOCK", "RDLOCK", "CHECKRESERVEDLOCK", "NOMEM", "GETTEMPPATH", "CONVPATH", "ACCESS"),
        *("FSTAT", "SEEK", "SHMOPEN", "SHMSIZE", "SHMLOCK", "SHMMAP", "MMAP"),
    )
}
UNDOES_ALL = ("ROLLBACK", "DEFERRED")  # in a schema: RAISE, ON CONFLICT, and keys that COMMIT checks for all


class Writer:
    """What the writer does, whichever thread is the writer: a driver calls it.

    States:  open → drained → ended; ``state.broken`` says if it ended because it is out of service.
    Locks:   none of its own. ``_pending`` (jobs taken from the queue, in order; those before ``_next`` have their
             outcome) is changed by the writer only, and copied, in one step, by ``abandon``.
    Threads: abandon, is_on and unfinished may be called from any thread; the rest belongs to the writer.
    Assumes: nothing here holds the DbWriter, so that one that was dropped can be collected.
    """

    def __init__(
        self,
        settings: Settings,
        label: str,
        state: State,
        queue: JobQueue,
        file: DatabaseFile,
        readers: Readers,
        max_hold: float,
        on_error: Callable[[Ticket[Any]], object] | None,
        on_event: Hook | None,
        on_end: Callable[[Writer], object],
    ) -> None:
        self.label = label
        self.lock_timeout = settings.lock_timeout
        self.state = state
        self.queue = queue
        self.file = file
        self.readers = readers
        self.drained = threading.Event()  # every accepted job has its outcome, and no other comes
        self.leaving = False  # set at exit: a lock that is not to be had ends the drain
        self.withdrawn: list[str] = []  # labels of what the writer itself withdrew
        self._settings = settings
        self._max_hold = max_hold
        self._on_error = on_error
        self.on_event = on_event
        self._on_end = on_end
        self._stop = threading.Event()  # ends the wait for SQLite's lock; what has not started does not start
        self._policy = LockPolicy(settings.lock_timeout, self._stop)
        self._guard = Guard(settings.journal_mode, settings.puts_back)
        self._checkpointer = Checkpointer(settings, self.file, self.readers, self.state, on_event)
        self._held = self._free = 0.0  # seconds with and without SQLite's lock since it was last left free for others
        self._begun_at = self._released_at = 0.0
        self._session: WriteSession | None = None
        self._pending: list[Job[Any]] = []
        self._next = 0
        # It has undone all, and is told in its turn; with the history that it leaves.
        self._culprit: tuple[Job[Any], list[Transaction], tuple[int, int] | None] | None = None
        self._savepoints_until = 0  # pending jobs before that place run again, each with a savepoint
        self._one_by_one_until = 0  # pending jobs before that place run again, each alone
        self._risky_schema = self._failing_schema = True
        self._schema_versions: list[Any] = []
        self._checkpoint_failed = False  # the last one, and that was told
        self._is_committing = False  # the last attempt to get SQLite's lock was COMMIT
        self._before: tuple[int, int] | None = None  # the history with which the shared transaction began
        self._history: tuple[int, int] | None = None  # that the next job is to find
        self._batch = Batch()

    def abandon(self) -> None:
        """Withdraw what has not started, and end a wait for SQLite's lock. The queue must refuse already."""
        self._stop.set()
        # What moves from the queue to _pending meanwhile is withdrawn by the writer thread, which looks at _stop.
        dropped = [job for job in [*self.queue.empty_out(), *self._pending.copy()] if self._withdraw(job)]
        if dropped:
            report(self.state, logging.WARNING, "%s: close withdrew %d queued jobs", self.label, len(dropped))
        call_all_safely(self.state, [(job.run_callbacks,) for job in dropped])

    def end_block_at_exit(self) -> None:
        job = self.state.job
        if job is not None:
            job.end_at_exit()

    def after_fork_in_child(self) -> list[object]:
        """In a forked child: refuse everything; returns what must never be closed there."""
        error = forked_error()
        self.state.after_fork_in_child(error)
        self.queue.after_fork_in_child(error)
        kept: list[object] = self.readers.after_fork_in_child()
        return kept if self._session is None else [*self._session.after_fork_in_child(), *kept]

    @property
    def health(self) -> str:
        """``"ok"``, ``"degraded: why"``, ``"broken: why"`` or ``"closed"``."""
        state, now = self.state, monotonic()
        if state.broken is None and self.queue.refusing:
            return "closed"
        if state.health != "ok":
            return state.health
        why = [self.file.exposed, self._checkpointer.starved]
        if self.queue.is_nearly_full:
            why.append(f"the queue is nearly full: {self.queue.fill}")
        if state.is_slow(now):
            why.append(state.describe())
        text = "; ".join(filter(None, why))
        return f"degraded: {text}" if text else "ok"

    def oldest_age(self, now: float) -> float:
        """For how many seconds the oldest job without an outcome has been here."""
        for job in itertools.islice(self._pending.copy(), self._next, None):
            if not job.done():
                return max(0.0, now - job.created_at)
        first = self.queue.oldest()
        return 0.0 if first is None else max(0.0, now - first.created_at)

    def is_on(self, file: os.stat_result) -> bool:
        """Whether ``file`` is this writer's database."""
        return self.file.identity == (file.st_dev, file.st_ino)

    def unfinished(self) -> list[str]:
        """The labels of the jobs that have no outcome yet."""
        return [job.label for job in (*self._pending.copy(), *self.queue.jobs()) if not job.done()]

    # From here on, only the thread that is the writer calls ----------------------------------------------------------

    def write(self, jobs: list[Job[Any]]) -> None:
        """Bring ``jobs`` to their outcome."""
        self._pending, self.queue.taken = jobs, []
        while self._next < len(self._pending):
            self._write_group()
        self._pending, self._culprit = [], None  # an idle writer keeps nothing of its last jobs alive
        self._next = self._savepoints_until = self._one_by_one_until = 0

    def begin_block(self, job: BlockJob) -> None:
        """Begin a block that runs in the thread that is the writer; it is lent, or has its outcome."""
        self._pending = [job]
        if self._is_moved():
            return
        try:
            session = self._begin(job)
        except BaseException as error:
            self._refused(error)
            return
        if not job.start(monotonic()):  # withdrawn meanwhile
            self._roll_back()
            return
        transaction = Transaction(session, job)
        self.state.enter(job, transaction)
        session.set_mark()
        transaction.limit(job.max_hold)
        job.lend(transaction)

    def end_block(self, job: BlockJob) -> None:
        assert self._session is not None
        assert job.transaction is not None
        error: BaseException | None = None
        try:
            job.wait_for_call(job.transaction)
            error = job.transaction.overdue()
        except (BlockFailedError, TransactionClosedError) as failure:
            error = job.transaction.overdue() or failure
        self._leave(self._session, job.transaction, None, error, savepoint=True)
        if self._session.connection.in_transaction:
            self._commit(self._session, [job], [job.transaction])
        else:
            self._lost([job], [job.transaction])
        self.write([])
        self._restore_settings()

    def broke(self, error: BaseException) -> None:
        """The writer met an error of its own making: answer everything that waits."""
        if self.state.forked:
            return
        self._go_out_of_service(error)  # before anything else that could fail, too
        report(self.state, logging.CRITICAL, "%s: the writer thread died", self.label, error=error)
        self._break(error)

    @property
    def idle_after(self) -> float | None:
        """Seconds without jobs after which ``idle`` is to be called; None: it need not be."""
        return IDLE if self._checkpointer.has_work else None

    def idle(self) -> None:
        """Do what waits for a quiet moment."""
        if self._checkpointer.has_work and monotonic() - self._released_at >= IDLE:
            self._checkpoint(self._checkpointer.empty)

    def end(self, patience: float | None = None) -> None:
        """Close all connections, after the last job; those lent for longer than ``patience`` seconds when they end."""
        if self.state.forked:
            return
        self.drained.set()
        # The readers before the writer: the last to close tidies up, if it may write.
        call_safely(self.state, self.readers.close, patience)
        call_safely(self.state, self._end_session)
        if self.state.reporter is not None:
            self.state.reporter.close()
        call_safely(self.state, self.readers.when_all_back, functools.partial(self._on_end, self))

    def _end_session(self) -> None:
        try:
            self._roll_back()
            if self.state.broken is None:
                self._is_moved()
            if self._settings.auto_checkpoint and self.file.logged and self.state.broken is None:
                self._checkpoint(self._checkpointer.empty)
        finally:
            self._drop_session()

    @property
    def last_checkpoint(self) -> tuple[Checkpoint, float] | None:
        """And when it ended, by ``monotonic``."""
        return self._checkpointer.last

    def _checkpoint(self, checkpoint: Callable[[WriteSession], object]) -> None:
        if self._session is not None:
            try:
                checkpoint(self._session)
                self._checkpoint_failed = False
            except sqlite3.Error as error:
                if not self._checkpoint_failed:  # a full disk fails each of them
                    report(self.state, logging.WARNING, "%s: a checkpoint failed: %s", self.label, error)
                self._checkpoint_failed = True

    def checkpoint(self, mode: str) -> Checkpoint:
        """For ``ControlJob``."""
        return self._checkpointer.ask_for(self._session or self.open(), mode)

    def open(self) -> WriteSession:
        """Open the write connection."""
        self.file.check()  # SQLite would create it anew
        session = open_writer(self._settings, self._guard, self._policy, self._tell_waiting, WriteSession)
        self._session = session
        try:
            self.file.remember(session.files.values(), session.logs.values())
        except BaseException:
            self._drop_session()
            raise
        self._checkpointer.remember_size(session)
        self._tell_exposed()
        self._guard.schema_changed = True
        return session

    def _tell_exposed(self) -> None:
        before = self.file.exposed
        self.file.exposed = exposure(self.file.files)
        if self.file.exposed and self.file.exposed != before:
            report(self.state, logging.CRITICAL, "%s: %s", self.label, self.file.exposed)

    def _write_group(self) -> None:
        """Bring the first pending jobs to their outcome: as many as may share one transaction."""
        pending, place = self._pending, self._next
        while place < len(pending) and pending[place]._stage > RUNNING:
            place += 1
        self._next = place
        if place == len(pending):
            return
        first = pending[place]
        if self._culprit is not None and self._culprit[0] is first:
            (_, runs, self._history), self._culprit = self._culprit, None
            self._settle([first], runs)
        elif self.state.broken is None and self._is_moved():
            return
        elif self._stop.is_set() and not first.running():
            if self._withdraw(first):
                self.withdrawn.append(first.label)
                first.run_callbacks()
        elif isinstance(first, ControlJob):
            self._control(first)
        elif isinstance(first, BareStatementJob):
            self._write_bare(first)
        else:
            self._write_together(first)
        if self._guard.settings_touched:
            self._restore_settings()

    def _write_together(self, first: Job[Any]) -> None:
        try:
            session = self._begin(first)
        except BaseException as error:  # without a thread of its own, Ctrl-C too
            self._refused(error)
            return
        if not first.start(monotonic()):  # withdrawn meanwhile; what the transaction began with was for it alone
            self._roll_back()
            return
        share = self._may_share(session)
        until = monotonic() + LONGEST_HOLD
        jobs: list[Job[Any]] = []
        done = self._perform_plain(session, jobs, until, share)
        if done is None:
            return
        runs: list[Transaction] = []
        connection, now = session.connection, monotonic()
        for job in itertools.islice(self._pending, done, None):
            if jobs and not (share and now < until and not job.must_be_alone() and self._is_unchanged()):
                break
            if not job.start(now):
                continue
            jobs.append(job)
            runs.append(self._perform(session, job, undo_alone=share))
            now = job.ended_at
            if not connection.in_transaction:
                self._lost(jobs, runs)
                return
        self._commit(session, jobs, runs)

    def _is_unchanged(self) -> bool:
        """Whether the next job may rely on what the batch began with."""
        return not (self._guard.schema_changed or self._guard.settings_touched)

    def _perform_plain(self, session: WriteSession, jobs: list[Job[Any]], until: float, share: bool) -> int | None:
        """Run the SQL statements at the front, without a savepoint each, and add them to ``jobs``.

        Returns the place of the first job that it did not look at; None if a statement failed that may have left
        something behind: then all is rolled back, to run again with savepoints. Functions come after statements, since
        they are to run once.
        """
        place = self._next
        if place < max(self._savepoints_until, self._one_by_one_until) or self._max_hold != math.inf:
            return place
        now, guard, state, known = monotonic(), self._guard, self.state, ""
        lock, insert = state.lock, session.executor.insert
        guard.mode, guard.refusal = Mode.ALONE, None
        # What happens here happens for every queued statement: no calls that can be spared.
        try:
            for job in self._pending[place:]:
                if type(job) is not StatementJob or now > until:
                    break
                sql = job.sql
                is_new = sql is not known
                if is_new:
                    if job.must_be_alone():
                        break
                    known = sql
                place += 1
                with lock:
                    if job._stage > RUNNING:
                        continue
                    job._stage = RUNNING
                job.started_at = now
                state.job = job
                jobs.append(job)
                try:
                    job._result = insert(sql, job.work)
                except BaseException as error:
                    if share and not session.executor.surely_had_no_effect(job.sql, error, self._failing_schema):
                        self._run_with_savepoints(jobs)
                        return None
                    self._fail(job, error)
                    session.forget_error()
                job.ended_at = now = monotonic()
                if not share or (is_new and not self._is_unchanged()):  # the guard is asked about new texts only
                    break
        finally:
            guard.mode = Mode.GATEWAY
            state.leave()  # the one that is slow is the last: the batch ends with it
        if jobs and not session.connection.in_transaction:  # what was done last lost it
            self._lost(jobs, [])
            return None
        return place

    def _run_with_savepoints(self, jobs: list[Job[Any]]) -> None:
        self._roll_back()
        for job in jobs:
            job.set_outcome(None, None)
        self._history = self._before
        self._count_runs(len(jobs))
        self._savepoints_until = self._place_after(jobs[-1])

    def _place_after(self, job: Job[Any]) -> int:
        return self._pending.index(job, self._next) + 1

    def _begin(self, first: Job[Any]) -> WriteSession:
        """Take SQLite's write lock; raises SQLite's error if it is not to be had."""
        session = self._session or self.open()
        if first.foreign_keys is not None:
            self._guard.settings_touched = True
            set_pragma(session.connection, "foreign_keys", int(first.foreign_keys))
        if self._history is not None:
            self._restore_history(session, self._history)
        self._batch = Batch()
        self._leave_a_gap()
        # IMMEDIATE takes the write lock here, so BUSY comes before any job has had an effect.
        self._keep_trying(session, "BEGIN IMMEDIATE", first)
        self._batch.lock_wait = self._policy.waited
        self._begun_at = monotonic()
        return session

    def _restore_history(self, session: WriteSession, history: tuple[int, int]) -> None:
        """What was undone has left its mark on the connection, but is to run as if it had not."""
        self._history = None
        try:
            if session.history() != history:
                session.set_history(*history)
        except sqlite3.Error as error:  # no room for a temporary file
            report(self.state, logging.WARNING, "%s: last_insert_rowid() is of an undone run: %s", self.label, error)

    def _keep_trying(self, session: WriteSession, sql: str, job: Job[Any]) -> None:
        policy = self._policy
        policy.attempts, policy.waited = 1, 0.0
        self._is_committing = sql == "COMMIT"
        try:
            session.internal(sql)
        except sqlite3.OperationalError as error:
            if not is_busy(error) or self._is_undone(session):
                raise
            self._batch.retried = True
            self.state.wait_for_lock(job, self._in_the_way if self._is_committing else None)
            first = error

            def again() -> None:
                if self._is_undone(session):
                    raise _UndoneError from first
                session.internal(sql)

            try:
                policy.keep_trying(again, self._tell_waiting, error)
            except _UndoneError:
                raise first from None
            finally:
                self.state.has_lock()
        finally:
            self._count_attempts()

    def _is_undone(self, session: WriteSession) -> bool:
        """Whether a COMMIT that met a lock has rolled back: then there is nothing to try again."""
        return self._is_committing and not session.connection.in_transaction

    def _in_the_way(self) -> str:
        """For messages: who has the lock that the last attempt met."""
        if self._is_committing:  # which readers hold up, in the rollback-journal modes
            return describe_readers(self.file.unlogged, self.readers.borrowers)
        return describe_lock(self._settings.path)

    def _count_attempts(self) -> None:
        with self.state.lock:
            self.state.tally.lock_attempts += self._policy.attempts
            self.state.tally.lock_wait += self._policy.waited

    def _refused(self, error: BaseException) -> None:
        """No transaction: all that waits for one fails together, since each has waited long enough by now."""
        self._roll_back()
        if self.leaving and is_busy(error):
            self._stop.set()
        ended = self._stop.is_set() and is_busy(error)  # by close: what has not started is withdrawn, not failed
        waiting = [
            job
            for job in self._pending
            if not (job.done() or self._is_culprit(job) or isinstance(job, BareStatementJob | ControlJob))
            and not (ended and not job.running())
        ]
        for job in waiting:
            self._fail(job, copy_of(error))
        self._settle(waiting, [])

    def _may_share(self, session: WriteSession) -> bool:
        """Whether the first two pending jobs may share a transaction; called inside it, so that the schema stands."""
        pair = self._pending[self._next : self._next + 2]
        if self._next < self._one_by_one_until or len(pair) < 2 or any(job.must_be_alone() for job in pair):
            return False
        try:
            versions = [session.internal(f'PRAGMA "{name}".schema_version') for name in session.databases]
            if self._guard.schema_changed or versions != self._schema_versions:
                found = session.words_in_schema(*UNDOES_ALL, "FAIL")
                self._risky_schema, self._failing_schema = not found.isdisjoint(UNDOES_ALL), "FAIL" in found
                self._schema_versions = versions
                self._guard.schema_changed = False
            self._before = session.history()
        except sqlite3.Error:  # a damaged schema: the jobs will tell
            return False
        return not self._risky_schema

    def _perform(self, session: WriteSession, job: Job[Any], undo_alone: bool) -> Transaction:
        """Run one job; if it fails, undo it alone where it shares the transaction."""
        transaction, result, failure = Transaction(session, job), None, None
        savepoint = undo_alone or job.needs_savepoint
        try:
            self.state.enter(job, transaction)
            if savepoint:
                session.set_mark()
            if self._max_hold != math.inf and not job.lent:
                transaction.limit(self._max_hold)
            result = job.perform(transaction)
        except BaseException as error:
            failure = error
        self._leave(session, transaction, result, failure, savepoint)
        return transaction

    def _leave(
        self, session: WriteSession, transaction: Transaction, result: Any, error: BaseException | None, savepoint: bool
    ) -> None:
        job = transaction.job
        if self.state.forked:
            raise error or forked_error()  # the job has forked, and this is the child
        job.ended_at = self.state.leave()
        try:
            transaction.end()
            if error is None:
                self._check_end(session, job, transaction)
                if savepoint:
                    session.release_mark()
                job.set_outcome(result, None)
        except Exception as failure:
            error = failure
        if error is not None:
            self._fail(job, error)
            if savepoint and session.connection.in_transaction:
                self._undo_job(session)

    def _check_end(self, session: WriteSession, job: Job[Any], transaction: Transaction) -> None:
        if transaction.was_too_long and not job.lent:  # and the job has swallowed the error
            raise transaction.closed_error()
        if not session.connection.in_transaction:
            raise transaction.aborted_error()
        if job.foreign_keys is False and (violations := session.internal("PRAGMA foreign_key_check")):
            table, rowid, parent, _ = violations[0]
            raise sqlite3.IntegrityError(
                f"FOREIGN KEY constraint failed: {len(violations)} rows; the first: {table} (rowid {rowid}) → {parent}"
            )

    def _undo_job(self, session: WriteSession) -> None:
        try:
            session.undo_to_mark()
            session.release_mark()
        except sqlite3.Error:
            self._roll_back()  # everything: the others run again

    def _commit(self, session: WriteSession, jobs: list[Job[Any]], runs: list[Transaction]) -> None:
        kept = [job for job in jobs if job._error is None]
        if kept and self._is_moved():  # which has told the jobs
            self._roll_back()
            return
        if not kept:
            self._roll_back()
        else:
            began = monotonic()
            try:
                self._keep_trying(session, "COMMIT", kept[0])
            except BaseException as error:
                self._commit_failed(session, jobs, runs, kept, error)
                return
            self._batch.commit = monotonic() - began
        self._count_hold(monotonic())
        self._settle(jobs, runs, commits=int(bool(kept)))
        if kept:
            self._checkpoint(self._checkpointer.after_batch)
        if self.readers.in_use:
            self.readers.warn_if_slow()

    def _count_hold(self, now: float) -> None:
        self._held += now - self._begun_at
        self._released_at = now

    def _leave_a_gap(self) -> None:
        """Leave the lock free for a moment after holding it for long: other processes live in that gap."""
        self._free += monotonic() - self._released_at
        if self._held >= LONGEST_HOLD:
            if self._free < GAP:
                self._stop.wait(GAP - self._free)
            self._held = self._free = 0.0

    def _commit_failed(
        self,
        session: WriteSession,
        jobs: list[Job[Any]],
        runs: list[Transaction],
        kept: list[Job[Any]],
        error: BaseException,
    ) -> None:
        if commit_outcome_unknown(error, session.connection.in_transaction):
            self._commit_unknown(jobs, runs, kept, error)
            return
        self._roll_back()
        told = self._tell_early(jobs, runs)
        rest = jobs[told:]
        if len(rest) > 1 and not is_busy(error):
            self._run_again(rest, runs)
            return
        for job in rest:  # those that failed too: perhaps by rows that are not there now; they have waited long enough
            self._fail(job, copy_of(error))
        told_now = set(rest)
        self._settle(rest, [run for run in runs if run.job in told_now])

    def _commit_unknown(
        self, jobs: list[Job[Any]], runs: list[Transaction], kept: list[Job[Any]], error: BaseException
    ) -> None:
        for job in kept:
            unknown = CommitUnknownError(
                f"COMMIT of job {job.describe()} met {text_of(error)}: it may or may not be done"
            )
            unknown.__cause__ = copy_of(error)
            self._fail(job, unknown)
        report(self.state, logging.CRITICAL, "%s: out of service, since COMMIT met %s", self.label, text_of(error))
        self._go_out_of_service(error)  # before anybody hears, and asks
        self._settle(jobs, runs)
        self._break(error)

    def _lost(self, jobs: list[Job[Any]], runs: list[Transaction]) -> None:
        """The transaction is gone, by what the last job did: it has its error, and the others run again."""
        if len(jobs) == 1:
            self._settle(jobs, runs)
            return
        told, last = self._tell_early(jobs[:-1], runs), jobs[-1]
        history = None if self._session is None else self._session.history()
        self._run_again(jobs[told:-1], runs)
        self._one_by_one_until = self._place_after(last)
        self._culprit = last, [run for run in runs if run.job is last], history

    def _tell_early(self, jobs: list[Job[Any]], runs: list[Transaction]) -> int:
        """Tell the first jobs, as far as they failed before another had written: they met what is committed."""
        early = list(itertools.takewhile(lambda job: job.failed_with is not None, jobs))
        told = set(early)
        self._settle(early, [run for run in runs if run.job in told])
        return len(early)

    def _is_culprit(self, job: Job[Any]) -> bool:
        return self._culprit is not None and self._culprit[0] is job

    def _run_again(self, jobs: list[Job[Any]], runs: list[Transaction]) -> None:
        """The shared transaction is undone: its jobs, still at the front, run again in order, each alone.

        Those that failed too: what they met may have been of another, which need not do the same again. Of ``runs``,
        which may be of others too, theirs are undone.
        """
        again = set(jobs)
        for job in jobs:
            self._one_by_one_until = self._place_after(job)
            job.set_outcome(None, None)
        for run in runs:
            if run.job in again:
                self._call_back(run, committed=False)
        self.state.end_telling()
        self._history = self._before
        self._count_runs(len(jobs))

    def _count_runs(self, again: int) -> None:
        with self.state.lock:
            self.state.tally.run_twice += again

    def _roll_back(self) -> None:
        # SQLite has rolled back by itself after some errors (disk full, RAISE(ROLLBACK)): a second ROLLBACK would fail.
        if self._session is not None and self._session.connection.in_transaction:
            try:
                self._session.internal("ROLLBACK")
            except sqlite3.Error:
                self._drop_session()

    def _control(self, job: ControlJob[Any]) -> None:
        if not job.start(monotonic()):
            return
        self.state.enter(job, None)
        try:
            job.set_outcome(job.call(), None)
        except BaseException as error:
            self._fail(job, error)
        job.ended_at = self.state.leave()
        self._settle([job], [])

    def _write_bare(self, job: BareStatementJob) -> None:
        """Run a statement outside any transaction, again while it meets BUSY, which leaves it undone."""
        if not job.start(monotonic()):
            return
        self._batch = Batch()
        runs: list[Transaction] = []
        try:
            session = self._session or self.open()
            transaction = Transaction(session, job)
            runs = [transaction]
            self.state.enter(job, transaction)
            self._guard.settings_touched = True
            if self._max_hold != math.inf:
                transaction.limit(self._max_hold)
            try:
                job.set_outcome(self._policy.call(lambda: job.perform(transaction), self._tell_waiting), None)
            finally:
                transaction.end()
                self.state.leave()
                self._batch.retried = self._policy.attempts > 1
                self._count_attempts()
        except BaseException as error:
            # It commits by itself, if it came so far.
            if runs and commit_outcome_unknown(error, in_transaction=True) and error_code(error) not in UNWRITTEN:
                job.ended_at = monotonic()
                self._commit_unknown([job], runs, [job], error)
                return
            self._fail(job, error)
            self._roll_back()
        job.ended_at = monotonic()
        self._settle([job], runs, commits=int(job.failed_with is None))

    def _fail(self, job: Job[Any], error: BaseException) -> None:
        try:
            self._guard.explain(error)
        except BaseException as raised:  # while SQLite asked whether it may
            error = raised
        try:
            self._annotate(job, error)
        except BaseException as failure:  # as from a frozen dataclass, which refuses notes; or Ctrl-C in this moment
            if self.state.reporter is None and issubclass(type(failure), INTERRUPTS):
                self.state.interrupt = failure
        job.set_outcome(None, error)

    def _annotate(self, job: Job[Any], error: BaseException) -> None:
        BaseException.with_traceback(error, without_own_frames(traceback_of(error)))
        self.state.note_corruption(error)
        note, attempts = f"onewriter: job {job.describe()}", max(1, self._policy.attempts)
        if attempts > 1 or is_busy(error):  # one, and it was had, is nothing to tell
            note += f", attempts to get SQLite's lock: {attempts}"
        if is_busy(error):
            note += f" in {self._policy.waited:.2f} s; {self._in_the_way()}"
        note_descriptors(error)
        if note not in getattr(error, "__notes__", ()):
            BaseException.add_note(error, note)

    def _settle(self, jobs: list[Job[Any]], runs: list[Transaction], commits: int = 0) -> None:
        """Make the outcomes visible, and then, with the lock free, call what waits for them."""
        if self.state.forked:
            raise forked_error()  # by something further down the stack, and this is the child
        called, unheard = settle(jobs, self.state, self._batch, commits)
        for run in runs:
            if run.has_callbacks:
                self._call_back(run, committed=run.job._error is None)
        for job in called:
            self.state.begin_telling(job)
            job.run_callbacks()
        for job in unheard:
            self.state.begin_telling(job)
            report(self.state, logging.ERROR, "job %s failed", job.describe(), error=job.failed_with)
            if self._on_error is not None:
                call_safely(self.state, self._on_error, job)
        self.state.end_telling()
        if self.on_event is not None and (
            tickets := tuple(job for job in jobs if job.in_stats and not job.cancelled())
        ):
            batch = self._batch
            event = BatchEnded(tickets, commits, batch.lock_wait, batch.commit, batch.retried)
            tell(self.state, self.on_event, event)

    def _call_back(self, run: Transaction, committed: bool) -> None:
        if run.job.lent:
            return  # its own thread does
        self.state.begin_telling(run.job)
        call_all_safely(self.state, [(callback,) for callback in run.callbacks(committed)])

    def _withdraw(self, job: Job[Any]) -> bool:
        return job.withdraw_quietly(WithdrawnError(f"closed before job {job.describe()} started"))

    def _is_moved(self) -> bool:
        """Look, at times, whether the file is still there; if not, the gateway is out of service."""
        try:
            self.file.check_at_times(math.inf if self.drained.is_set() else monotonic())
            if self.file.is_smaller and self._session is not None:
                self._checkpointer.judge_size(self._session)
        except FileMovedError as error:
            report(self.state, logging.CRITICAL, "%s: %s", self.label, error)
            self._break(error)
            return True
        return False

    def _break(self, cause: BaseException) -> None:
        """Out of service: everything that waits, and everything later, fails at once."""
        self._go_out_of_service(cause)
        waiting = (*self._pending, *self.queue.taken, *self.queue.empty_out())
        stranded = [job for job in waiting if not job.done()]
        for job in stranded:
            job.set_outcome(None, broken_error(cause))
            job.ended_at = monotonic()
        self._settle(stranded, [])
        if self.on_event is not None:
            tell(self.state, self.on_event, WriterBroken(cause))

    def _go_out_of_service(self, cause: BaseException) -> None:
        self.state.health = f"broken: {text_of(cause)}"
        self.state.broken = cause
        self.queue.refuse(broken_error(cause))

    def _restore_settings(self) -> None:
        """Put back what a job's PRAGMA may have changed."""
        self._guard.settings_touched = False
        if self._guard.in_vain:
            text = (
                "%s: PRAGMA %s of run_without_transaction is put back at once, since the gateway has set it: use the "
                "argument of DbWriter, or foreign_keys=False on a job that rebuilds a table"
            )
            report(self.state, logging.WARNING, text, self.label, self._guard.in_vain)
            self._guard.in_vain = ""
        self.file.forget_size()  # VACUUM makes it smaller
        has_temp, self._guard.temp_touched = self._guard.temp_touched, False
        if self._session is not None:
            try:
                if has_temp:
                    set_pragma(self._session.connection, "foreign_keys", 0)  # or else DROP looks at them
                    self._session.drop_temp_objects()
                try:
                    configure(self._session.connection, self._settings, self._session.databases)
                except ValueError as error:  # as a limit on a size that is surpassed
                    report(self.state, logging.WARNING, "%s: %s", self.label, error)
                self._session.restore_factories()
                # Texts that were allowed for this job are asked again, for the next.
                self._guard.install(self._session.connection)
            except sqlite3.Error:
                self._drop_session()

    def _drop_session(self) -> None:
        """Close the connection, which rolls back; the next job opens another."""
        session, self._session = self._session, None
        if session is not None:
            self.file.close(session.connection)

    def _tell_waiting(self, has_it: bool, text: str) -> None:
        where = f"opening {self._settings.path}" if self._session is None else self.state.describe(has_it)
        report(self.state, logging.WARNING, "%s: %s (%s)", self.label, text, where)


class _UndoneError(Exception):
    """There is no transaction left that could be committed."""


class WithdrawnError(WriterClosedError, concurrent.futures.CancelledError):
    """What the result of a job is that close withdrew: its ticket says ``cancelled()``. Not committed."""


def commit_outcome_unknown(error: BaseException, in_transaction: bool) -> bool:
    """Whether a COMMIT that raised ``error`` may yet be found in the file.

    A failed sync may: what was written before it can reach the disk (https://www.sqlite.org/wal.html). A full disk and
    a failed write may not: the end mark of the transaction was never written. Damage and locks are met before that.
    """
    code = error_code(error)
    if code in (sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_FULL) or code & 0xFF in (*CORRUPT, sqlite3.SQLITE_BUSY):
        return False
    return not in_transaction or code & 0xFF == sqlite3.SQLITE_IOERR


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
