"""State: which job is on the write connection now."""

from __future__ import annotations

import logging
import math
import operator
import threading
import weakref
from asyncio import AbstractEventLoop, _get_running_loop
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any, Protocol

from onewriter.base.log import Reporter, report, text_of
from onewriter.base.scopes import Scopes, enclosing
from onewriter.base.tally import Tally
from onewriter.errors import ReentrantWriteError, WriterBrokenError, forked_error

IN_STATEMENT = "a function that SQLite calls while it runs a statement cannot use the connection of that statement"
HAS_ITS_OWN = "a function of run_without_transaction reads and writes on its connection: the writer waits for its end"
ELSEWHERE = "in another context a call is not inside its job, and waits for its end: give it a copy of the context"
INHERITED = "belongs to the parent of this process"
is_owned = operator.methodcaller("_is_owned")  # in C; of whatever class locks have: gevent has its own
FRESH = 0.05  # seconds for which a look at who holds SQLite's lock is good


class Work(Protocol):
    """A job, as messages and figures need it."""

    created_at: float
    started_at: float

    @property
    def label(self) -> str: ...
    @property
    def called_from(self) -> str: ...
    @property
    def lent(self) -> bool: ...
    @property
    def in_transaction(self) -> bool: ...
    @property
    def in_stats(self) -> bool:
        """It is of the user's, and not what the gateway does between two transactions."""

    def describe(self) -> str: ...
    def end_at_exit(self) -> bool: ...


class Block(Protocol):
    """A block that a task has, or that was entered on the thread of a loop."""

    created_at: float

    def needs(self, loop: AbstractEventLoop) -> bool: ...


class Loan(Protocol):
    """The running job's loan of the connection."""

    @property
    def is_inside(self) -> bool: ...
    def close(self, why: str) -> None: ...


class Live(Protocol):
    """The queries that are watched; ``session`` is the write connection's, or None."""

    def settled(self, session: Any, jobs: Any) -> None: ...
    def look(self, session: Any) -> None: ...
    def end(self, session: Any) -> None: ...


class State:
    """The one place that says which job holds the writer, in which thread, and since when.

    Locks:   ``lock`` guards the state of every ticket of this gateway. Nothing blocks and no callback runs while it is
             held; it is re-entrant because finalizers and signal handlers may cancel or enqueue at any moment.
    Threads: the rest is written by the writer thread and read by any; each attribute is read in one step.
    """

    def __init__(self, slow_after: float) -> None:
        self.slow_after = slow_after
        self._in_the_way: Callable[[], str] = str  # says which process holds the lock that ``waiting`` waits for
        self._lock_described = -FRESH, ""  # who holds SQLite's lock, and when that was looked up
        self._warned_of = 0.0  # the job that a warning has named: when it started
        self.lock = threading.RLock()
        self.locks: tuple[Any, ...] = (self.lock,)  # of the gateway, those that a finalizer or signal handler may find
        # Held around every call into SQLite of a Transaction. Re-entrant: a signal handler may come just behind its
        # acquisition, before the loan says that its thread is inside.
        self.call_lock = threading.RLock()
        self.tally = Tally()  # guarded by lock
        self.forget: Callable[[Any], object] = id  # the queue's: what is withdrawn makes room there
        self.is_awaited: Callable[[], object] = bool  # the queue's: whether jobs, or close, wait for the writer
        self.health = "ok"
        self.broken: BaseException | None = None  # why the gateway is out of service
        self.lacks_room = False  # a job has met a full disk: a checkpoint may make room
        self.readers_block_commits = False  # as in the rollback-journal modes
        self.reads_here: Callable[[], bool] = bool  # the pool's: whether this thread is in a read that has a snapshot
        self.forked = False  # this is a child of the process that it belongs to
        self.writer_thread = 0
        self.reporting: set[int] = set()  # threads inside our log calls: failures of what they enqueue stay unlogged
        self.reporter: Reporter | None = None  # of the writer thread; without one, the writer is a thread of the user's
        self.interrupt: BaseException | None = None  # raised in a callback there; it comes out at the end of the turn
        self.entering: set[int] = set()  # threads that wait for the turn of a block, have it to begin, or to end
        self.job: Work | None = None  # that runs now
        self.transaction: Loan | None = None
        self.scopes: Scopes[Any] = Scopes()
        # That tasks have, or wait for. Weak: one whose loop is closed is never taken out, and would keep its task.
        self.blocks: set[weakref.ref[Block]] = set()
        self.waiting: tuple[Work, float] | None = None  # for SQLite's lock, and since when
        self.live: Live | None = None  # while something is watched
        self.calling_back: tuple[Work | None, float] | None = None  # whose callbacks are called (None: on_event), since

    def after_fork_in_child(self, error: BaseException) -> None:
        """In a forked child. The numbers of threads survive a fork, and so may a lock that another thread holds."""
        self.forked, self.broken, self.health = True, error, f"broken: {error}"
        self.lock = threading.RLock()
        self.reporter = None
        if self.transaction is not None:
            self.transaction.close(INHERITED)
        self.writer_thread, self.job, self.transaction, self.blocks = 0, None, None, set()
        self.scopes = Scopes()  # no call is inside a scope of the parent's

    def enter(self, job: Work, transaction: Loan | None) -> None:
        self.job, self.transaction = job, transaction

    def leave(self) -> float:
        """The job has ended. Returns the time."""
        now, job = monotonic(), self.job
        if job is not None:
            if now - job.started_at > self.slow_after:
                self.warn_if_slow(now)
            self.job = self.transaction = self.scopes.job.what = None
        return now

    def warn_if_slow(self, now: float) -> None:
        """Log, once, the job that has held the writer, or whose callbacks have, longer than ``slow_after``."""
        job, calling_back = self.job, self.calling_back
        if job is not None:
            since = job.started_at
        elif calling_back is not None:
            since = calling_back[1]
        else:
            return
        if now - since <= self.slow_after:
            return
        with self.lock:
            first, self._warned_of = self._warned_of != since, since
        if first:
            report(self, logging.WARNING, "slow: %s", self.describe())

    @property
    def slow_at(self) -> float:
        """When the block that holds the writer is to be logged."""
        job = self.job
        if job is None or not job.lent or job.started_at == self._warned_of:
            return math.inf
        return job.started_at + self.slow_after

    def begin_callbacks(self, job: Work | None) -> None:
        """The writer calls the callbacks of ``job``; None: it calls ``on_event``."""
        self.end_callbacks()
        self.calling_back = job, monotonic()

    def end_callbacks(self) -> None:
        if self.calling_back is not None:
            self.warn_if_slow(monotonic())
            self.calling_back = None

    def count_timeout(self) -> None:
        """A call ends with WriteTimeoutError."""
        with self.lock:
            self.tally.timed_out += 1

    def is_slow(self, now: float) -> bool:
        """Whether a job runs, waits for SQLite's lock, or has its callbacks called, for longer than ``slow_after``."""
        job, other = self.job, self.waiting or self.calling_back
        since = getattr(job, "started_at", now) if job is not None else now if other is None else other[1]
        return now - since > self.slow_after

    def wait_for_lock(self, job: Work, in_the_way: Callable[[], str]) -> None:
        self._in_the_way, self._lock_described = in_the_way, (-FRESH, "")
        self.waiting = (job, monotonic())

    def has_lock(self) -> None:
        self.waiting = None

    def here(self) -> Any:
        """The block or job that a call which writes belongs to: a Transaction, or the object of a task's block."""
        here = self.scopes.innermost(writes=True)
        job = self.job
        if here is None and job is not None and job.in_stats and self.writer_thread == threading.get_ident():
            if self.transaction is None:
                raise ReentrantWriteError(IN_STATEMENT if job.in_transaction else HAS_ITS_OWN)
            raise ReentrantWriteError(IN_STATEMENT if self.transaction.is_inside else ELSEWHERE)
        if here is not None and self.entering and threading.get_ident() in self.entering:
            self.refuse_endless_wait("a write")  # by a signal handler, as its thread begins or ends the block
        return here

    def is_mine(self) -> bool:
        """Whether the caller is inside a job or block, or is the writer thread."""
        return self.would_deadlock_task(commits=False)

    def is_in_writer(self) -> bool:
        """The same, but not if the block's transaction was ended by ``max_hold``."""
        here = self.scopes.innermost(writes=True)
        return threading.get_ident() == self.writer_thread or (here is not None and not here.lends().is_closed)

    def cannot_wait(self) -> bool:
        """Whether the caller has interrupted the writer, or one of the locks that it needs."""
        return threading.get_ident() == self.writer_thread or self.is_inside() or is_owned(self.call_lock)

    def would_deadlock(self, since: float = math.inf, commits: bool = True) -> bool:
        """Whether the writer could not go on while this thread waits for what was queued at ``since``, or now."""
        if self.cannot_wait() or self._holds_it_up(commits):
            return True
        if commits and self.readers_block_commits and self.reads_here():
            return True
        # A block that a task has, or will have before that, cannot end while the thread of its loop waits.
        loop = _get_running_loop() if self.blocks else None
        return loop is not None and any(self._needs(loop, since))

    def _needs(self, loop: AbstractEventLoop, since: float) -> Iterator[bool]:
        for known in tuple(self.blocks):
            block = known()
            yield block is not None and block.needs(loop) and block.created_at <= since

    def note_block(self, block: Block) -> None:
        self.blocks.add(weakref.ref(block, self.blocks.discard))

    def forget_block(self, block: Block) -> None:
        self.blocks.discard(weakref.ref(block))

    def is_inside(self) -> bool:
        """Whether a finalizer or signal handler made this call, which interrupted its thread inside a lock of ours, or
        as it waits for, begins or ends a block: the writer needs that thread to go on."""
        return any(map(is_owned, self.locks)) or (bool(self.entering) and threading.get_ident() in self.entering)

    def would_deadlock_task(self, commits: bool = True) -> bool:
        """The same for the running task: blocks of other tasks of its loop can end although it waits."""
        return threading.get_ident() == self.writer_thread or self._holds_it_up(commits)

    def _holds_it_up(self, commits: bool) -> bool:
        """Whether the caller is inside what must end before the writer goes on, or ``commits``."""
        if enclosing() is None:  # as nearly always
            return False
        return self.is_inside_open(writes=not (commits and self.readers_block_commits))

    def is_inside_open(self, writes: bool = False) -> bool:
        """Whether the caller is inside a job, block or reader that has not ended; ``writes``: a job or block.

        A generator may keep a part of a block open that has ended: that holds up nobody.
        """
        return self.scopes.innermost(writes=writes, counts=is_open) is not None

    def refuse_endless_wait(
        self, what: str, *, awaits: bool = False, since: float = math.inf, commits: bool = True
    ) -> None:
        """``commits``: it waits for a COMMIT, as nearly everything does."""
        if self.forked:
            raise forked_error()
        if self.is_inside():
            raise ReentrantWriteError(
                f"{what} in a finalizer or signal handler that interrupted a call of this gateway waits for that call, "
                "so it would never end: set a flag there, and make the call elsewhere"
            )
        if self.would_deadlock_task(commits) if awaits else self.would_deadlock(since, commits):
            here = self.scopes.innermost()
            is_reading = here is not self.scopes.innermost(writes=True) or (here is None and self.reads_here())
            if self.readers_block_commits and is_reading:
                where = "a read or backup" if here is None else "a reader()"
                raise ReentrantWriteError(
                    f"{what} inside {where} waits for a COMMIT, which in this journal mode waits for that, so it would "
                    "never end: call it outside, or use journal_mode='WAL'"
                )
            raise ReentrantWriteError(
                f"{what} inside a job, block or callback waits for the writer, which waits for the caller, so it would "
                "never end: call it outside, or use on_commit or enqueue without waiting"
            )

    def refuse_if_broken(self) -> None:
        if self.broken is not None:
            raise forked_error() if self.forked else broken_error(self.broken)

    def note_corruption(self, error: BaseException) -> None:
        """Log once, at CRITICAL, that the file is damaged; every job that meets it fails with SQLite's ``error``."""
        if self.health == "ok":
            self.health = f"degraded: {text_of(error)}"
            report(self, logging.CRITICAL, "the database is damaged: %s; restore it from a backup", text_of(error))

    def _describe_lock(self) -> str:
        described_at, text = self._lock_described
        if monotonic() - described_at > FRESH:  # a thousand tasks may ask at once, in their loop
            text = self._in_the_way()
            self._lock_described = monotonic(), text
        return text

    def describe(self, has_lock: bool = False) -> str:
        """What holds the writer, for messages: the job, for how long, and where it was called from."""
        job, waiting, calling_back = self.job, self.waiting, self.calling_back
        if job is not None:
            return f"the writer is held by {job.describe()}, for {monotonic() - job.started_at:.2f} s so far"
        if waiting is not None:
            if has_lock:
                return f"to run {waiting[0].describe()}"
            text = f"the writer has waited {monotonic() - waiting[1]:.2f} s for SQLite's lock, held elsewhere, to run"
            return f"{text} {waiting[0].describe()}; {self._describe_lock()}"
        if calling_back is not None:
            whose = "on_event" if calling_back[0] is None else f"the callbacks of {calling_back[0].describe()}"
            return f"the writer calls {whose}, for {monotonic() - calling_back[1]:.2f} s so far"
        return "the writer is between jobs"


def is_open(what: Any) -> bool:
    """Whether the outcome of the job or block is not known yet; a reader has none."""
    job = getattr(what.lends(), "job", None)
    return job is None or not job.done()


def broken_error(cause: BaseException) -> WriterBrokenError:
    error = WriterBrokenError(f"the gateway is out of service: {text_of(cause)}; close it and open a new DbWriter")
    error.__cause__ = cause
    return error
