"""ReaderPool: lends read-only connections, takes them back clean."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any, TypeVar

from onewriter.connection import Settings, open_reader
from onewriter.errors import ReadTimeoutError
from onewriter.file import DatabaseFile
from onewriter.fork import forked_error
from onewriter.guard import ReadGuard
from onewriter.holder import Holder
from onewriter.job import refuse_live, wake
from onewriter.lent import LentConnection
from onewriter.log import report
from onewriter.queue import closed_error
from onewriter.retry import LockPolicy, is_busy
from onewriter.statement import Parameters
from onewriter.watch import Watch

T = TypeVar("T")
Fetch = Callable[[sqlite3.Cursor], T]

HELD_BACK = 0.05  # seconds that a loan is held back at most
STEPS = 250_000  # of SQLite's virtual machine between two looks at the clock


class Reader:
    """One connection of the pool. Belongs to the thread it is lent to."""

    def __init__(self, connection: sqlite3.Connection, guard: ReadGuard, policy: LockPolicy) -> None:
        self.connection = connection
        self.deadline = math.inf
        self.label, self.since, self.is_named = "", 0.0, False  # of the loan; named: a warning was given
        self.is_inherited = False  # this is a child of the process that it belongs to
        self.guard = guard
        self.is_pinned = False
        self._policy = policy
        self._row_factory, self._text_factory = connection.row_factory, connection.text_factory
        self.watch = Watch(self._is_late)
        self.watch.set_on(connection, STEPS)

    def fetch(self, sql: str, parameters: Parameters, fetch: Fetch[T]) -> T:
        cursor = sqlite3.Connection.execute(self.connection, sql, parameters)
        try:
            return fetch(cursor)
        finally:
            cursor.close()

    def attempt(self, label: str, function: Callable[..., T], *args: Any) -> T:
        """Read; wait while a lock is in the way (a recovery, or a COMMIT in the rollback-journal modes)."""
        try:
            return function(*args)
        except sqlite3.DatabaseError as error:
            return self.recover(error, label, function, *args)

    def recover(self, error: sqlite3.DatabaseError, label: str, function: Callable[..., T], *args: Any) -> T:
        """Try again if it was a lock; raise ``error``, or that there is no time left."""
        late: BaseException = error
        try:
            self.watch.raise_caught()
            if is_busy(error):
                try:
                    left = max(0.0, self.deadline - monotonic())
                    return self._policy.call(lambda: function(*args), _say_nothing, left)
                except sqlite3.OperationalError as again:
                    late = again
            if self._is_late() and (is_busy(late) or getattr(late, "sqlite_errorcode", 0) == sqlite3.SQLITE_INTERRUPT):
                raise ReadTimeoutError(f"{label} did not end in time") from late
            raise late
        finally:
            del error, late  # the traceback holds this frame

    def pin(self) -> None:
        """Begin a transaction that sees this moment until ``clean``."""
        if not self.connection.in_transaction:  # tried again after it met a lock, it has begun already
            self._own("BEGIN")
        self._own("PRAGMA schema_version")  # BEGIN alone pins no snapshot: the first read does
        self.is_pinned = True

    def _own(self, sql: str) -> None:
        self.guard.is_own = True
        try:
            self.fetch(self.guard.own(sql), (), _nothing)
        finally:
            self.guard.is_own = False

    def clean(self) -> None:
        """Be as new for the next borrower, whatever the last one did."""
        if self.is_pinned:
            self.is_pinned = False
            self.connection.row_factory, self.connection.text_factory = self._row_factory, self._text_factory
        if self.connection.in_transaction:
            self._own("ROLLBACK")

    def _is_late(self) -> bool:
        return monotonic() > self.deadline


class Snapshot:
    """The loan of a reader whose transaction is pinned; what ``LentConnection`` asks."""

    def __init__(self, reader: Reader, outside: object) -> None:
        self.reader = reader
        self.connection = reader.connection
        self.outside = outside  # the transaction that the thread was in at entry
        self.lent = LentConnection(self)
        self._lock = threading.RLock()  # a SQL function may read too
        self._ended = False

    def call(self, function: Callable[..., T], *args: Any, **options: Any) -> T:
        if self.reader.is_inherited:
            raise forked_error()
        with self._lock:
            if self._ended:
                raise sqlite3.ProgrammingError("the reader() block or read() of this connection has ended")
            try:
                return function(*args, **options)
            except sqlite3.OperationalError:
                self.reader.watch.raise_caught()
                raise

    def savepoint(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def undo(self, end_cursors: Callable[[], None]) -> None:
        pass

    def outlasts(self, name: str) -> None:
        self.reader.guard.is_spoilt = True

    def end(self) -> None:
        if self.reader.is_inherited:
            return
        with self._lock:
            self._ended = True
        self.lent.close_cursors()


class ReaderPool:
    """Up to ``size`` connections, opened when they are needed, lent in the order of asking.

    Locks:   _lock guards _idle, _count, _waiting and _closed. Nothing blocks and no SQLite call runs while it is held.
    Threads: any.
    """

    def __init__(self, settings: Settings, size: int, holder: Holder, file: DatabaseFile) -> None:
        self._settings = settings
        self._file = file
        self.size = size
        self._holder = holder
        self._stop = threading.Event()
        self._lock = threading.RLock()  # a finalizer or signal handler may read while its thread is inside
        self._idle: list[Reader] = []
        self._count = 0  # idle or lent
        self._extras = 0  # lent beside them
        self._waiting: deque[Waiter] = deque()
        self._lent: set[Reader] = set()
        self._snapshots = 0  # open ones, of all threads: most reads need not look for one of their thread
        self._local = threading.local()
        self._closed = False
        self._all_back = threading.Event()
        self.holds_back = False  # new loans wait for the event
        self._open_again = threading.Event()
        self._returned = threading.Event()

    @contextlib.contextmanager
    def lend(self, label: str, deadline: float) -> Iterator[Reader]:
        """Lend a connection for the ``with`` block.

        Raises:
            ReadTimeoutError: none was free in time.
            WriterClosedError, WriterBrokenError: the gateway is closed, or out of service.
        """
        reader = self._check_out(label, deadline)
        try:
            reader.deadline = deadline
            yield reader
        except sqlite3.DatabaseError as error:
            self._holder.note_corruption(error)
            raise
        finally:
            self.check_in(reader)

    @contextlib.contextmanager
    def snapshot(self, label: str, deadline: float) -> Iterator[Snapshot]:
        """Lend a connection that sees one moment; the deadline is for the waiting only."""
        with self.lend(label, deadline) as reader:
            reader.attempt(label, reader.pin)
            reader.deadline = math.inf
            with self._seen(reader) as snapshot:
                yield snapshot

    @contextlib.contextmanager
    def _seen(self, reader: Reader) -> Iterator[Snapshot]:
        """For the ``with`` block the thread's own reads use the pinned ``reader``."""
        snapshot = Snapshot(reader, self._holder.current())
        stack = self._stack()
        stack.append(snapshot)
        with self._lock:
            self._snapshots += 1
        try:
            yield snapshot
        finally:
            with self._lock:
                self._snapshots -= 1
            stack.remove(snapshot)  # of the thread that entered, which need not be this one
            snapshot.end()

    def current(self) -> Snapshot | None:
        """The snapshot that the calling thread's reads belong to, unless it is in a transaction begun later."""
        stack = self._stack()
        if stack and not stack[-1].reader.is_inherited and stack[-1].outside is self._holder.current():
            return stack[-1]
        return None

    def read(self, sql: str, parameters: Parameters, fetch: Fetch[T], label: str, deadline: float) -> T:
        snapshot = self.current() if self._snapshots else None
        if snapshot is None:
            reader = self._check_out(label, deadline)
            try:
                reader.deadline = deadline
                cursor = sqlite3.Connection.execute(reader.connection, sql, parameters)
                try:
                    return fetch(cursor)
                finally:
                    cursor.close()
            except sqlite3.DatabaseError as error:
                self._holder.note_corruption(error)
                rows: T = reader.recover(error, label, reader.fetch, sql, parameters, fetch)
                return rows
            finally:
                self.check_in(reader)
        reader = snapshot.reader
        before, reader.deadline = reader.deadline, min(deadline, reader.deadline)
        try:
            seen: T = snapshot.call(reader.attempt, label, reader.fetch, sql, parameters, fetch)
            return seen
        finally:
            reader.deadline = before

    def call(self, function: Callable[[sqlite3.Connection], T], label: str, deadline: float) -> T:
        """What ``function`` returns, called with a connection on one snapshot."""
        snapshot = self.current()
        if snapshot is not None:
            return refuse_live(function(snapshot.lent))
        reader = self._check_out(label, deadline)
        reader.deadline = deadline
        return self.call_and_return(reader, function, label, own=False)

    def call_and_return(
        self, reader: Reader, function: Callable[[sqlite3.Connection], T], label: str, *, own: bool
    ) -> T:
        """Call ``function`` with a lent ``reader``, and take that back; ``own``: it is a statement of the gateway."""
        try:
            if own:
                return reader.attempt(label, function, reader.connection)
            reader.attempt(label, reader.pin)
            with self._seen(reader) as snapshot:
                try:
                    return refuse_live(function(snapshot.lent))
                except sqlite3.OperationalError as error:
                    if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_INTERRUPT:
                        return reader.recover(error, label, function)
                    raise
        except sqlite3.DatabaseError as error:
            self._holder.note_corruption(error)
            raise
        finally:
            self.check_in(reader)

    @property
    def in_use(self) -> int:
        return len(self._lent)

    @property
    def waiting(self) -> int:
        """How many wait for a connection."""
        return len(self._waiting)

    @property
    def borrowers(self) -> list[str]:
        """The labels of those that have one."""
        return [reader.label for reader in self._lent.copy()]

    def seconds_until_slow(self) -> float | None:
        """When ``warn_if_slow`` has somebody to name; None: nobody is there."""
        since = [reader.since for reader in self._lent.copy() if not reader.is_named]
        return max(0.01, min(since) + self._holder.slow_after - monotonic()) if since else None

    @contextlib.contextmanager
    def held_back(self, seconds: float) -> Iterator[None]:
        """For the ``with`` block, and no longer than that, new loans wait; those out come back meanwhile."""
        self._open_again.clear()
        self.holds_back = True
        until = monotonic() + seconds
        try:
            while self._lent and monotonic() < until:
                self._returned.wait(until - monotonic())
                self._returned.clear()
            yield
        finally:
            self.holds_back = False
            self._open_again.set()

    def warn_if_slow(self) -> None:
        """Name those that have a reader for longer than ``slow_after``, once each."""
        for reader in self._lent.copy():
            self._warn(reader, "is open")

    def _warn(self, reader: Reader, state: str) -> None:
        seconds = monotonic() - reader.since
        if seconds > self._holder.slow_after and not reader.is_named:
            reader.is_named = True
            text = "slow: %s %s since %.1f s; while it is, the WAL cannot shrink"
            report(self._holder, logging.WARNING, text, reader.label, state, seconds)

    def _stack(self) -> list[Snapshot]:
        try:
            return self._local.stack  # type: ignore[no-any-return]
        except AttributeError:
            self._local.stack = []
            return self._stack()

    def close(self) -> None:
        """Refuse new loans, wait until all connections are back (or ``stop_waiting``), and close them."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            self._count -= len(idle)
            waiting, self._waiting = list(self._waiting), deque()
            self._all_back_if_closed()
        wake(waiter.wakeup for waiter in waiting)
        for reader in idle:
            reader.connection.close()
        self._all_back.wait()

    def stop_waiting(self) -> None:
        """Let ``close`` return although connections are lent; each is closed when it comes back."""
        self._stop.set()
        self._all_back.set()

    def become_inherited(self) -> list[object]:
        """In a forked child: lend nothing, take nothing back; returns what must never be closed there."""
        self._lock = threading.RLock()
        self._closed = True
        self.holds_back = False
        readers = [*self._idle, *self._lent]
        for reader in readers:
            reader.is_inherited = True
        return [thing for reader in readers for thing in (reader, reader.connection)]

    def _check_out(self, label: str, deadline: float) -> Reader:
        if self.holds_back:
            self._open_again.wait(HELD_BACK)
        found = self.take_or_line_up(label)
        if isinstance(found, Reader):
            return found
        return self.open(label) if found is None else self._wait(found, label, deadline)

    def take_or_line_up(self, label: str, future: asyncio.Future[None] | None = None) -> Reader | Waiter | None:
        """A free connection; a place in the line for one; or None: the right to ``open`` one."""
        with self._lock:
            if self._closed or self._holder.broken is not None:
                self._refuse_if_closed()
            if self._idle:
                reader = self._idle.pop()  # the last one back: its page cache is warm
                reader.label, reader.since, reader.is_named = label, monotonic(), False
                self._lent.add(reader)
                return reader
            if self._count < self.size:
                self._count += 1
                return None
            waiter = Waiter(future)
            self._waiting.append(waiter)
            return waiter

    def open(self, label: str) -> Reader:
        try:
            return self._lend(self._new(), label)
        except BaseException:
            self._give_up_place()
            raise

    def _new(self) -> Reader:
        policy, guard = LockPolicy(self._settings.lock_timeout, self._stop), ReadGuard()
        self._file.check()  # or else it could be the connection of another database
        reader = Reader(open_reader(self._settings, guard, policy), guard, policy)
        try:
            self._file.check()
        except BaseException:
            reader.connection.close()
            raise
        return reader

    @contextlib.contextmanager
    def extra(self, label: str) -> Iterator[sqlite3.Connection]:
        """A pinned connection beside those of the pool, for what takes long."""
        with self._lock:
            self._refuse_if_closed()
            self._extras += 1
        reader = None
        try:
            reader = self._lend(self._new(), label)
            reader.attempt(label, reader.pin)
            yield reader.connection
        finally:
            if reader is not None and not reader.is_inherited:
                self._lent.discard(reader)
                self._returned.set()
                reader.connection.close()
            with self._lock:
                self._extras -= 1
                self._all_back_if_closed()

    def _lend(self, reader: Reader, label: str) -> Reader:
        reader.label, reader.since, reader.is_named = label, monotonic(), False
        self._lent.add(reader)
        return reader

    def _wait(self, waiter: Waiter, label: str, deadline: float) -> Reader:
        left = deadline - monotonic()
        try:
            waiter.wakeup.acquire(timeout=-1 if left == math.inf else max(0.0, min(left, threading.TIMEOUT_MAX)))
        except BaseException:  # Ctrl-C
            self.leave_line(waiter)
            raise
        return self.granted(waiter, label)

    def granted(self, waiter: Waiter, label: str) -> Reader:
        """What the wait has brought; may open a connection."""
        with self._lock:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
        if waiter.reader is not None:
            return self._lend(waiter.reader, label)
        if waiter.granted:
            return self.open(label)
        self._refuse_if_closed()
        labels = ", ".join(self.borrowers)
        raise ReadTimeoutError(f"no connection for {label} in time: all {self.size} are lent, to {labels}")

    def leave_line(self, waiter: Waiter) -> None:
        """Wait no more; what was handed over in that moment goes to the next."""
        with self._lock:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
        if waiter.granted:
            self._give_up_place() if waiter.reader is None else self.check_in(waiter.reader)

    def check_in(self, reader: Reader) -> None:
        if reader.is_inherited:
            return
        self._lent.discard(reader)
        if self.holds_back:
            self._returned.set()
        if monotonic() - reader.since > self._holder.slow_after:
            self._warn(reader, "was open")
        reader.deadline = math.inf
        try:
            if reader.is_pinned or reader.connection.in_transaction:
                reader.clean()
            is_good = not reader.guard.is_spoilt
        except sqlite3.Error:
            is_good = False
        if not is_good:
            reader.connection.close()
            self._give_up_place()
            return
        with self._lock:
            if not self._closed:
                if self._waiting:
                    self._waiting.popleft().grant(reader)
                else:
                    self._idle.append(reader)
                return
        reader.connection.close()
        self._give_up_place()

    def _give_up_place(self) -> None:
        """A connection is no more: the next in line opens its own."""
        with self._lock:
            if self._waiting and not self._closed:
                self._waiting.popleft().grant(None)
                return
            self._count -= 1
            self._all_back_if_closed()

    def _all_back_if_closed(self) -> None:
        if self._closed and not self._count and not self._extras:
            self._all_back.set()

    def _refuse_if_closed(self) -> None:
        self._holder.refuse_if_broken()
        if self._closed:
            raise closed_error()


class Waiter:
    """A borrower in line; whoever gives a connection (or the right to open one) back, grants it to the first."""

    def __init__(self, future: asyncio.Future[None] | None) -> None:
        self.granted = False
        self.reader: Reader | None = None
        self.wakeup: Any = future
        if future is None:
            self.wakeup = threading.Lock()
            self.wakeup.acquire()

    def grant(self, reader: Reader | None) -> None:
        self.granted, self.reader = True, reader
        wake([self.wakeup])


def _nothing(cursor: sqlite3.Cursor) -> None:
    cursor.row_factory = None
    cursor.fetchall()


def _say_nothing(has_it: bool, text: str) -> None:
    pass
