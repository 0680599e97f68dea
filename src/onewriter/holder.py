"""Holder: who is on the write connection now."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

from onewriter.errors import ReentrantWriteError, WriterBrokenError
from onewriter.fork import forked_error
from onewriter.locks import describe_lock
from onewriter.log import report
from onewriter.retry import error_code
from onewriter.stats import Tally

if TYPE_CHECKING:
    from onewriter.job import Job
    from onewriter.taskblock import TaskBlock
    from onewriter.transaction import Transaction

IN_STATEMENT = "a function that SQLite calls while it runs a statement cannot use the connection of that statement"
INHERITED = "belongs to the parent of this process"
FRESH = 0.05  # seconds for which a look at who holds SQLite's lock is good
CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class Holder:
    """The one place that says which job holds the writer, in which thread, and since when.

    Locks:   ``lock`` guards the state of every ticket of this gateway. Nothing blocks and no callback runs while it is
             held; it is re-entrant because finalizers and signal handlers may cancel or enqueue at any moment.
    Threads: the rest is written by the writer thread and read by any; each attribute is read in one step.
    """

    def __init__(self, slow_after: float, path: str) -> None:
        self.slow_after = slow_after
        self._path = path
        self._lock_told = -FRESH, ""  # who holds SQLite's lock, and when that was looked up
        self._warned_of = 0.0  # the job that a warning has named: when it started
        self.lock = threading.RLock()
        self.tally = Tally()  # guarded by lock
        self.forget: Callable[[Job[Any]], object] = id  # the queue's: what is withdrawn makes room there
        self.health = "ok"
        self.broken: BaseException | None = None  # why the gateway is out of service
        self.forked = False  # this is a child of the process that it belongs to
        self.writer_thread = 0
        self.reporting: set[int] = set()  # threads inside our log calls: failures of what they enqueue stay unlogged
        self.job: Job[Any] | None = None  # that runs now
        self.block: TaskBlock | None = None  # a task's transaction, whose statements the writer runs
        self.transaction: Transaction | None = None
        self.waiting: tuple[Job[Any], float] | None = None  # for SQLite's lock, and since when
        self.taken: dict[object, Transaction] = {}  # from threads and tasks that are still in their block: max_hold
        self.telling: tuple[Job[Any], float] | None = None  # whose callbacks are called, and since when

    def become_inherited(self, error: BaseException) -> None:
        """In a forked child. The numbers of threads survive a fork, and so may a lock that another thread holds."""
        self.forked, self.broken, self.health = True, error, f"broken: {error}"
        self.lock = threading.RLock()
        if self.transaction is not None:
            self.transaction.close(INHERITED)
        self.writer_thread, self.job, self.transaction, self.block, self.taken = 0, None, None, None, {}

    def enter(self, job: Job[Any], transaction: Transaction | None) -> None:
        self.job, self.transaction = job, transaction

    def leave(self) -> float:
        """Returns the time."""
        now = monotonic()
        self.warn_if_slow(now)
        self.job = self.transaction = None
        return now

    def warn_if_slow(self, now: float) -> None:
        """Name, once, the job that holds the writer longer than ``slow_after``."""
        job = self.job
        if job is None or now - job.started_at <= self.slow_after:
            return
        with self.lock:
            first, self._warned_of = self._warned_of != job.started_at, job.started_at
        if first:
            report(self, logging.WARNING, "slow: %s", self.describe())

    def count_timeout(self) -> None:
        """A call ends with WriteTimeoutError."""
        with self.lock:
            self.tally.timed_out += 1

    def is_slow(self, now: float) -> bool:
        """Whether a job has the writer, or waits for SQLite's lock, for longer than ``slow_after``."""
        job, waiting = self.job, self.waiting
        since = getattr(job, "started_at", now) if job is not None else now if waiting is None else waiting[1]
        return now - since > self.slow_after

    def wait_for_lock(self, job: Job[Any]) -> None:
        self.waiting = (job, monotonic())

    def has_lock(self) -> None:
        self.waiting = None

    def current(self) -> Transaction | None:
        """The open transaction that belongs to the calling thread, if there is one."""
        if self.taken:
            self.refuse_if_taken(threading.current_thread())
        return self._current()

    def _current(self) -> Transaction | None:
        transaction = self.transaction
        if transaction is None:
            if self.job is not None and self.writer_thread == threading.get_ident():
                raise ReentrantWriteError(IN_STATEMENT)
            return None
        if transaction.thread != threading.get_ident():
            return None
        # The system gives the numbers of ended threads to others.
        if transaction.borrower is not None and transaction.borrower is not threading.current_thread():
            return None
        return transaction

    def refuse_if_taken(self, borrower: object) -> None:
        """Raise inside a block that ``max_hold`` has ended: a write there would be committed alone."""
        transaction = self.taken.get(borrower)
        if transaction is not None:
            raise transaction.closed_error()

    def place(self) -> tuple[Transaction, int] | None:
        """The calling thread's open transaction, and how many savepoints deep it is in it."""
        transaction = self.current()
        return None if transaction is None else (transaction, transaction.depth)

    def is_mine(self) -> bool:
        """Whether the calling thread is the writer thread or holds the open transaction."""
        if threading.get_ident() == self.writer_thread:
            return True
        return self.transaction is not None and self._current() is not None

    def waits_endlessly(self) -> bool:
        """Whether the writer could not go on while this thread waits for it."""
        # Who owns the lock here is a finalizer or signal handler inside it.
        if self.is_mine() or self.lock._is_owned():  # type: ignore[attr-defined]
            return True
        # A task's block cannot end while its loop's thread waits, nor while the task itself does.
        return self.block is not None and self.block.thread == threading.get_ident()

    def awaits_endlessly(self) -> bool:
        """The same for the running task."""
        if self.block_here() is not None:
            return True
        # A block of another task of this loop ends although this one waits.
        task = getattr(self.job, "task", None)
        return self.is_mine() and (task is None or task is running_task())

    def block_here(self) -> TaskBlock | None:
        """The open block that the running task has begun."""
        block = self.block
        return block if block is not None and block.task is not None and block.task is running_task() else None

    def refuse_endless_wait(self, what: str, awaits: bool = False) -> None:
        if self.forked:
            raise forked_error()
        if self.awaits_endlessly() if awaits else self.waits_endlessly():
            raise ReentrantWriteError(
                f"{what} inside a job or callback of the writer waits for the writer itself, so it would never end: "
                "call it outside, or use on_commit or enqueue without waiting"
            )

    def refuse_if_broken(self) -> None:
        if self.broken is not None:
            raise forked_error() if self.forked else broken_error(self.broken)

    def note_corruption(self, error: BaseException) -> None:
        """Say once, loudly, that the file is damaged; every job that it hits fails with SQLite's error."""
        if error_code(error) & 0xFF in CORRUPT and self.health == "ok":
            self.health = f"degraded: {error}"
            report(self, logging.CRITICAL, "the database is damaged: %s; restore it from a backup", error)

    def _describe_lock(self) -> str:
        told_at, text = self._lock_told
        if monotonic() - told_at > FRESH:  # a thousand tasks may ask at once, in their loop
            text = describe_lock(self._path)
            self._lock_told = monotonic(), text
        return text

    def describe(self, has_lock: bool = False) -> str:
        """Who holds the writer, for messages: label, since when, and where it was called from."""
        job, waiting, telling = self.job, self.waiting, self.telling
        if job is not None:
            return f"the writer is held by {job.describe()} for {monotonic() - job.started_at:.2f} s"
        if waiting is not None:
            if has_lock:
                return f"to run {waiting[0].describe()}"
            text = f"the writer waits since {monotonic() - waiting[1]:.2f} s for SQLite's lock, held elsewhere, to run"
            return f"{text} {waiting[0].describe()}; {self._describe_lock()}"
        if telling is not None:
            return f"the writer calls the callbacks of {telling[0].describe()} for {monotonic() - telling[1]:.2f} s"
        return "the writer is between jobs"


def running_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return None


def broken_error(cause: BaseException) -> WriterBrokenError:
    error = WriterBrokenError(f"the gateway is out of service: {cause}; close it and open a new DbWriter")
    error.__cause__ = cause
    return error
