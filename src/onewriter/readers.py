"""ReaderPool: lends read-only connections, takes them back clean."""

from __future__ import annotations

import contextlib
import math
import sqlite3
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from time import monotonic
from typing import Any

from onewriter.connection import Settings, open_reader
from onewriter.errors import ReadTimeoutError
from onewriter.holder import Holder
from onewriter.queue import closed_error
from onewriter.retry import LockPolicy

STEPS = 1000  # of SQLite's virtual machine between two looks at the clock; costs nothing measurable


class ReadConnection(sqlite3.Connection):
    """A read-only connection on loan: it is the pool that ends its transaction and closes it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._live: weakref.WeakSet[sqlite3.Cursor | sqlite3.Blob] = weakref.WeakSet()

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        cursor = super().cursor(*args, **kwargs)
        self._live.add(cursor)
        return cursor

    # sqlite3's own versions of these do not call an overridden cursor().
    def execute(self, *args: Any) -> sqlite3.Cursor:
        cursor: sqlite3.Cursor = self.cursor().execute(*args)
        return cursor

    def executemany(self, *args: Any) -> sqlite3.Cursor:
        cursor: sqlite3.Cursor = self.cursor().executemany(*args)
        return cursor

    def blobopen(self, *args: Any, **kwargs: Any) -> sqlite3.Blob:
        blob = super().blobopen(*args, **kwargs)
        self._live.add(blob)
        return blob

    def commit(self) -> None:
        pass

    def rollback(self) -> None:
        pass

    def close(self) -> None:
        pass

    def clean(self) -> None:
        """End what the borrower left open: a live cursor would pin its snapshot for ever."""
        for live in list(self._live):
            live.close()
        if self.in_transaction:
            super().rollback()


class Reader:
    """One connection of the pool. Belongs to the thread it is lent to."""

    def __init__(self, connection: ReadConnection, policy: LockPolicy) -> None:
        self.connection = connection
        self.policy = policy
        self.deadline = math.inf
        self.row_factory, self.text_factory = connection.row_factory, connection.text_factory
        # Not interrupt(): one that comes late would hit the next borrower's statement.
        connection.set_progress_handler(self.is_late, STEPS)

    def is_late(self) -> bool:
        return monotonic() > self.deadline

    def clean(self) -> None:
        self.deadline = math.inf
        self.connection.clean()
        self.connection.row_factory, self.connection.text_factory = self.row_factory, self.text_factory


class ReaderPool:
    """Up to ``size`` connections, opened when they are needed, lent in the order of asking.

    Locks:   _lock guards _idle, _count, _waiting and _closed. Nothing blocks and no SQLite call runs while it is held.
    Threads: any.
    """

    def __init__(self, settings: Settings, size: int, holder: Holder) -> None:
        self._settings = settings
        self._size = size
        self._holder = holder
        self._stop = threading.Event()
        self._lock = threading.RLock()  # a finalizer or signal handler may read while its thread is inside
        self._idle: list[Reader] = []
        self._count = 0  # idle or lent
        self._waiting: deque[_Waiter] = deque()
        self._lent: dict[int, str] = {}
        self._closed = False
        self._all_back = threading.Event()

    @contextlib.contextmanager
    def lend(self, label: str, timeout: float | None) -> Iterator[Reader]:
        """Lend a connection for the ``with`` block.

        Raises:
            ReadTimeoutError: none was free in time.
            WriterClosedError, WriterBrokenError: the gateway is closed, or out of service.
        """
        deadline = math.inf if timeout is None else monotonic() + timeout
        reader = self._check_out(label, deadline)
        try:
            reader.deadline = deadline
            yield reader
        finally:
            self._check_in(reader)

    def close(self) -> None:
        """Refuse new loans, wait until all connections are back (or ``stop_waiting``), and close them."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            self._count -= len(idle)
            waiting, self._waiting = list(self._waiting), deque()
            if not self._count:
                self._all_back.set()
        for waiter in waiting:
            waiter.wakeup.release()
        for reader in idle:
            sqlite3.Connection.close(reader.connection)
        self._all_back.wait()

    def stop_waiting(self) -> None:
        """Let ``close`` return although connections are lent; each is closed when it comes back."""
        self._stop.set()
        self._all_back.set()

    def _check_out(self, label: str, deadline: float) -> Reader:
        waiter = None
        with self._lock:
            self._refuse_if_closed()
            if self._idle:
                reader = self._idle.pop()  # the last one back: its page cache is warm
                self._lent[id(reader)] = label
                return reader
            if self._count < self._size:
                self._count += 1
            else:
                waiter = _Waiter()
                self._waiting.append(waiter)
        if waiter is None:
            return self._open(label)
        return self._wait(waiter, label, deadline)

    def _open(self, label: str) -> Reader:
        try:
            policy = LockPolicy(self._settings.lock_timeout, self._stop)
            reader = Reader(open_reader(self._settings, ReadConnection, policy), policy)
        except BaseException:
            self._give_up_place()
            raise
        self._lent[id(reader)] = label
        return reader

    def _wait(self, waiter: _Waiter, label: str, deadline: float) -> Reader:
        left = deadline - monotonic()
        try:
            waiter.wakeup.acquire(timeout=-1 if left == math.inf else max(0.0, min(left, threading.TIMEOUT_MAX)))
        except BaseException:  # Ctrl-C: what was handed over in that moment goes to the next
            self._leave_line(waiter)
            if waiter.granted:
                self._give_up_place() if waiter.reader is None else self._check_in(waiter.reader)
            raise
        self._leave_line(waiter)
        if waiter.reader is not None:
            self._lent[id(waiter.reader)] = label
            return waiter.reader
        if waiter.granted:
            return self._open(label)
        self._refuse_if_closed()
        labels = ", ".join(map(repr, list(self._lent.values())))
        raise ReadTimeoutError(f"no connection for {label!r} in time: all {self._size} are lent, to {labels}")

    def _leave_line(self, waiter: _Waiter) -> None:
        with self._lock:
            if not waiter.granted and waiter in self._waiting:
                self._waiting.remove(waiter)

    def _check_in(self, reader: Reader) -> None:
        self._lent.pop(id(reader), None)
        try:
            reader.clean()
        except sqlite3.Error:
            sqlite3.Connection.close(reader.connection)
            self._give_up_place()
            return
        with self._lock:
            if not self._closed:
                if self._waiting:
                    self._waiting.popleft().grant(reader)
                else:
                    self._idle.append(reader)
                return
        sqlite3.Connection.close(reader.connection)
        self._give_up_place()

    def _give_up_place(self) -> None:
        """A connection is no more: the next in line opens its own."""
        with self._lock:
            if self._waiting and not self._closed:
                self._waiting.popleft().grant(None)
                return
            self._count -= 1
            if self._closed and not self._count:
                self._all_back.set()

    def _refuse_if_closed(self) -> None:
        self._holder.refuse_if_broken()
        if self._closed:
            raise closed_error()


class _Waiter:
    """A borrower in line; whoever gives a connection (or the right to open one) back, grants it to the first."""

    def __init__(self) -> None:
        self.granted = False
        self.reader: Reader | None = None
        self.wakeup = threading.Lock()
        self.wakeup.acquire()

    def grant(self, reader: Reader | None) -> None:
        self.granted, self.reader = True, reader
        self.wakeup.release()
