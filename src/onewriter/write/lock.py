"""WriteLock: how the writer takes SQLite's write lock, how long it has it, and the gap in which others get it."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any

from onewriter.base import garbage
from onewriter.base.state import State
from onewriter.base.tally import Times
from onewriter.sqlite.file import DatabaseFile
from onewriter.sqlite.lock_holders import describe_lock, describe_readers
from onewriter.sqlite.retry import FAILURES, Failure, LockPolicy, is_busy
from onewriter.write.checkpoint import Readers
from onewriter.write.session import WriteSession
from onewriter.write.ticket import Job

LONGEST_HOLD = 0.05  # seconds after which a batch takes no further job
SHARED_HOLD = 0.02  # the same while other processes want the lock too: shorter turns make equal shares sooner
LOOK = 0.05  # seconds after which a COMMIT that readers hold up looks for lost ones; less and less often
GAP = 0.001  # seconds for which the lock is left free after it was held that long


class WriteLock:
    """SQLite's write lock. The only BEGIN IMMEDIATE and COMMIT.

    Threads: the writer's. ``policy.stop`` ends a wait.
    """

    def __init__(
        self,
        policy: LockPolicy,
        path: str,
        state: State,
        file: DatabaseFile,
        readers: Readers,
        tell: Callable[[bool, str], object],
    ) -> None:
        self.policy = policy
        self.released_at = 0.0
        self.attempts, self.waited = 0, 0.0  # at BEGIN and COMMIT, and seconds, in all
        self._path = path
        self._state = state
        self._file = file
        self._readers = readers
        self._tell = tell
        self._begun_at = 0.0
        self.longest_hold = LONGEST_HOLD
        self._held = self._free = 0.0  # seconds with and without the lock since it was last left free for others
        self._is_committing = False  # the last attempt was COMMIT
        self.was_committing = False  # COMMIT was tried, and its outcome is not told yet

    def begin(self, session: WriteSession, job: Job[Any], times: Times, now: float) -> float:
        """Take it, or raise SQLite's error; returns the time at which it was there."""
        error = self.try_begin(session, now)
        if error is not None:
            self._keep_trying(session, "BEGIN IMMEDIATE", job, times, error)
            self.longest_hold = SHARED_HOLD
            times.lock_wait = self.policy.waited
            self._begun_at = monotonic()
        return self._begun_at

    def try_begin(self, session: WriteSession, now: float) -> Failure | None:
        """Try once; returns why it is not there."""
        if self._held >= self.longest_hold:
            self._leave_a_gap(now)
        self._free += now - self.released_at
        policy = self.policy
        policy.attempts, policy.waited, self._is_committing = 1, 0.0, False
        self.was_committing = False
        self.attempts += 1
        if len(session.guard.written) > 1:
            session.guard.forget_written(session.connection)
        try:
            # IMMEDIATE takes the write lock here, so BUSY comes before any job has had an effect.
            session.control["BEGIN IMMEDIATE"]()
        except FAILURES as error:
            self.released_at = now
            return error
        self._begun_at = monotonic()
        return None

    def commit(self, session: WriteSession, job: Job[Any], times: Times, now: float) -> None:
        """Commit, or raise SQLite's error."""
        error = self.try_commit(session)
        if error is not None:
            self._is_committing = True
            self.policy.attempts, self.policy.waited = 1, 0.0
            self._keep_trying(session, "COMMIT", job, times, error)
        times.commit = monotonic() - now

    def try_commit(self, session: WriteSession) -> Failure | None:
        """Try once; returns why it is not committed."""
        self.attempts += 1
        self.was_committing = True
        try:
            session.control["COMMIT"]()
        except FAILURES as error:
            return error
        return None

    def released(self) -> None:
        """The transaction has ended, in one way or the other."""
        self.released_at = now = monotonic()
        self._held += now - self._begun_at

    def call(self, function: Callable[[], Any], times: Times) -> Any:
        """For what takes the lock by itself: again while it meets BUSY."""
        try:
            return self.policy.call(function, self._tell)
        finally:
            self.attempts += self.policy.attempts
            self.waited += self.policy.waited
            if self.policy.attempts > 1:
                times.retried = True

    def in_the_way(self) -> str:
        """For messages: which process holds the lock that the last attempt met."""
        if self._is_committing:  # which readers hold up, in the rollback-journal modes
            return describe_readers(self._file.unlogged, self._readers.borrowers)
        return describe_lock(self._path, self._file.attached)

    def _keep_trying(self, session: WriteSession, sql: str, job: Job[Any], times: Times, first: Failure) -> None:
        search = garbage.Search(monotonic(), LOOK)

        def again() -> None:
            if self._is_undone(session):
                raise _UndoneError from first
            if self._is_committing and search.is_due(monotonic()):
                self._readers.free_lost()
            session.control[sql]()

        if not is_busy(first) or self._is_undone(session):
            raise first
        times.retried = True
        self._state.wait_for_lock(job, self.in_the_way)
        try:
            self.policy.keep_trying(again, self._tell, first)
        except _UndoneError:
            raise first from None
        finally:
            self._state.has_lock()
            self.attempts += self.policy.attempts - 1
            self.waited += self.policy.waited

    def _is_undone(self, session: WriteSession) -> bool:
        """Whether a COMMIT that met a lock has rolled back: then there is nothing to try again."""
        return self._is_committing and not session.connection.in_transaction

    def _leave_a_gap(self, now: float) -> None:
        """Leave the lock free for a moment after holding it for long: other processes live in that gap."""
        free = self._free + now - self.released_at
        if free < GAP:
            self.policy.stop.wait(GAP - free)
        self._held = self._free = 0.0
        self.longest_hold = LONGEST_HOLD
        self.released_at = now


class _UndoneError(Exception):
    """There is no transaction left that could be committed."""
