"""ReaderPool: lends read-only connections, takes them back clean."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import sqlite3
import threading
from asyncio import AbstractEventLoop, _get_running_loop
from collections import OrderedDict
from collections.abc import Callable, Iterator
from threading import get_ident
from time import monotonic
from typing import Any, TypeVar

from onewriter.base.log import report
from onewriter.base.state import State
from onewriter.base.waiting import wake
from onewriter.errors import ReadTimeoutError, closed_error
from onewriter.read.clock import ReadClock
from onewriter.read.reader import Fetch, Reader, Snapshot
from onewriter.sqlite.connection import open_reader
from onewriter.sqlite.file import DatabaseFile
from onewriter.sqlite.guard import ReadGuard
from onewriter.sqlite.options import Settings
from onewriter.sqlite.result import refuse_live
from onewriter.sqlite.retry import LockPolicy
from onewriter.sqlite.statement import Parameters

T = TypeVar("T")
HELD_BACK = 0.05  # seconds that a loan is held back at most
LONG = 4 * HELD_BACK  # seconds; who has a connection for longer hardly comes back in that time


class Borrowing:
    """One connection for one read or block: not yet, in line for it, having it, or over. ``ReaderPool.end`` ends all.

    Made before anything is asked for, so that whatever happens in between, Ctrl-C too, its ``end`` knows what to do.
    That is called in two nested ``finally``, written out each time: Ctrl-C can hit the entry of a function for it.

    Locks: the pool's guards all of it.
    """

    reader: Reader | None = None
    has_place = False  # a connection, or the right to open one
    is_over = False
    is_named = False  # a warning was given
    wakeup: Any = None
    loop: AbstractEventLoop | None = None  # in whose thread the block was entered

    def __init__(self, label: str) -> None:
        self.label = label
        self.since = monotonic()
        self.thread = get_ident()  # which gives it back; 0: any may
        self.runs_in = 0  # the thread of a task's call


class ReaderPool:
    """Up to ``size`` connections, opened when they are needed, lent in the order of asking.

    Locks:   _lock guards _idle, _count, _waiting, _closed and every Borrowing. Nothing blocks and no SQLite call runs
             while it is held.
    Threads: any.
    """

    def __init__(self, settings: Settings, size: int, state: State, file: DatabaseFile) -> None:
        self._settings = settings
        self._file = file
        self.size = size
        self._state = state
        self._stop = threading.Event()
        self._lock = threading.RLock()  # a finalizer or signal handler may read while its thread is inside
        state.locks = (*state.locks, self._lock)
        self._idle: list[Reader] = []
        self._count = 0  # idle or lent; above ``size`` while threads that have one need another
        self._extras = 0  # lent beside them
        self._waiting: OrderedDict[Borrowing, None] = OrderedDict()  # in order; any may leave
        self._lent: set[Borrowing] = set()
        self._closed = False
        self._all_back = threading.Event()
        self._on_all_back: Callable[[], object] = _return
        self.holds_back = False  # new loans wait for the event
        self._open_again = threading.Event()
        self._returned = threading.Event()
        lent = self._lent
        self.clock = ReadClock(self._lock, lambda: [one.reader for one in lent.copy() if one.reader is not None])

    @contextlib.contextmanager
    def snapshot(self, label: str, deadline: float, until: float = math.inf) -> Iterator[Snapshot]:
        """Lend a connection that sees one moment; the deadline is for the waiting only, ``until`` for its statements.

        Raises:
            ReadTimeoutError: none was free in time.
            WriterClosedError, WriterBrokenError: the gateway is closed, or out of service.
        """
        borrowing = Borrowing(label)
        try:
            reader = self._borrow(borrowing, deadline)
            self.pin(reader, label)
            reader.limit(until)
            snapshot = Snapshot(reader)
            try:
                with self.inside(snapshot):
                    # Only inside does the scope say that a signal handler's close would wait for its own thread.
                    borrowing.thread, borrowing.loop = 0, _get_running_loop()
                    try:
                        yield snapshot
                    finally:
                        borrowing.thread = get_ident()
            finally:
                snapshot.end()
        except sqlite3.DatabaseError as error:
            self._state.note_corruption(error)
            raise
        finally:
            try:
                self.end(borrowing)
            finally:
                if not borrowing.is_over:  # Ctrl-C came in the midst of it
                    self.end(borrowing)

    def pin(self, reader: Reader, label: str) -> None:
        """Have it see this moment until it is given back."""
        reader.seen = self._state.tally.committed
        reader.attempt(label, reader.pin)

    def inside(self, snapshot: Snapshot) -> contextlib.AbstractContextManager[None]:
        """For the ``with`` block the caller's reads see it."""
        return self._state.scopes.inside(snapshot, writes=False)

    def read(self, sql: str, parameters: Parameters, fetch: Fetch[T], label: str, deadline: float) -> T:
        borrowing = Borrowing(label)
        try:
            reader = self._borrow(borrowing, deadline)
            try:
                reader.guard.text = sql
                cursor = sqlite3.Connection.execute(reader.connection, sql, parameters)
                try:
                    return fetch(cursor)
                finally:
                    cursor.close()
            except sqlite3.DatabaseError as error:
                self._state.note_corruption(error)
                rows: T = reader.recover(error, label, reader.fetch, sql, parameters, fetch)
                return rows
        finally:
            try:
                self.end(borrowing)
            finally:
                if not borrowing.is_over:  # Ctrl-C came in the midst of it
                    self.end(borrowing)

    def call(self, function: Callable[[sqlite3.Connection], T], label: str, deadline: float) -> T:
        """What ``function`` returns, called with a connection on one snapshot."""
        borrowing = Borrowing(label)
        try:
            self._borrow(borrowing, deadline)
            return self.call_and_return(borrowing, function, label, own=False)
        finally:
            try:
                self.end(borrowing)
            finally:
                if not borrowing.is_over:  # Ctrl-C came in the midst of it
                    self.end(borrowing)

    def call_and_return(
        self, borrowing: Borrowing, function: Callable[[sqlite3.Connection], T], label: str, *, own: bool
    ) -> T:
        """Call ``function`` with a connection and take that back; ``own``: it is a statement of the gateway."""
        reader = borrowing.reader
        assert reader is not None
        try:
            if own:
                reader.guard.text = label  # has the text in it
                return reader.attempt(label, function, reader.connection)
            self.pin(reader, label)
            snapshot = Snapshot(reader)
            try:
                with self.inside(snapshot):
                    return refuse_live(reader.in_time(label, function, snapshot.to_lend))
            finally:
                snapshot.end()
        except sqlite3.DatabaseError as error:
            self._state.note_corruption(error)
            raise
        finally:
            try:
                self.end(borrowing)
            finally:
                if not borrowing.is_over:  # Ctrl-C came in the midst of it
                    self.end(borrowing)

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
        return [borrowing.label for borrowing in self._lent.copy()]

    @property
    def has_mine(self) -> bool:
        """Whether one cannot come back while the calling thread waits."""
        me, loop = get_ident(), _get_running_loop()
        if self._has_one(me):
            return True
        borrowings = (*self._lent.copy(), *list(self._waiting))
        return any(one.thread == me or (loop is not None and one.loop is loop) for one in borrowings)

    def _has_one(self, thread: int) -> bool:
        return any(thread in (borrowing.thread, borrowing.runs_in) for borrowing in self._lent.copy())

    def out_for(self, seconds: float) -> list[Borrowing]:
        """Those that have a connection for longer than that."""
        now = monotonic()
        return [borrowing for borrowing in self._lent.copy() if now - borrowing.since > seconds]

    def is_out(self, borrowing: Borrowing) -> bool:
        return borrowing in self._lent

    def seconds_until_slow(self) -> float | None:
        """When ``warn_if_slow`` has somebody to name; None: nobody is there."""
        since = [borrowing.since for borrowing in self._lent.copy() if not borrowing.is_named]
        return max(0.01, min(since) + self._state.slow_after - monotonic()) if since else None

    @contextlib.contextmanager
    def held_back(self, seconds: float) -> Iterator[None]:
        """For the ``with`` block, and no longer than that, new loans wait; those out come back meanwhile.

        Unless one is out for long already, and would be in the way all the same.
        """
        if self.out_for(LONG):
            yield
            return
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
        for borrowing in self._lent.copy():
            self._warn(borrowing, "is open")

    def _warn(self, borrowing: Borrowing, state: str) -> None:
        seconds = monotonic() - borrowing.since
        if seconds > self._state.slow_after and not borrowing.is_named:
            borrowing.is_named = True
            text = "slow: %s %s since %.1f s; while it is, the WAL cannot shrink"
            report(self._state, logging.WARNING, text, borrowing.label, state, seconds)

    def close(self, patience: float | None = None) -> None:
        """Refuse new loans, wait until all connections are back (or ``stop_waiting``), and close them."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            self._count -= len(idle)
            waiting, self._waiting = list(self._waiting), OrderedDict()
            self._all_back_if_closed()
        wake(borrowing.wakeup for borrowing in waiting)
        for reader in idle:
            reader.connection.close()
        self._all_back.wait(patience)
        self.clock.stop()

    def when_all_back(self, function: Callable[[], object]) -> None:
        """Call it when the last connection has come back and is closed; now, if that is so."""
        with self._lock:
            self._on_all_back = function
        self._call_if_all_back()

    def _call_if_all_back(self) -> None:
        if self._closed and not self._count and not self._extras:
            self.clock.end()
            with self._lock:
                function, self._on_all_back = self._on_all_back, _return
            function()

    def stop_waiting(self) -> None:
        """Let ``close`` return although connections are lent; each is closed when it comes back."""
        self._stop.set()
        self._all_back.set()

    def after_fork_in_child(self) -> list[object]:
        """In a forked child: lend nothing, take nothing back; returns what must never be closed there."""
        self._lock = self.clock.lock = threading.RLock()
        self._closed = True
        self._on_all_back = _return
        self.holds_back = False
        readers = [*self._idle, *[borrowing.reader for borrowing in self._lent if borrowing.reader is not None]]
        for reader in readers:
            reader.is_inherited = True
        return [thing for reader in readers for thing in (reader, reader.connection)]

    def _borrow(self, borrowing: Borrowing, deadline: float) -> Reader:
        if self.holds_back:
            self._open_again.wait(HELD_BACK)
            borrowing.since = monotonic()
        if not self.take_or_line_up(borrowing):
            if self._state.is_inside():
                self._state.refuse_endless_wait(f"waiting for a connection for {borrowing.label}")
            left = deadline - monotonic()
            borrowing.wakeup.acquire(timeout=-1 if left == math.inf else max(0.0, min(left, threading.TIMEOUT_MAX)))
            self.refuse_unless_granted(borrowing)
        reader = borrowing.reader
        if reader is None:
            return self.reader_of(borrowing, deadline)
        reader.deadline = deadline
        if deadline < self.clock.rings_at:
            self.clock.set(deadline)
        return reader

    def take_or_line_up(self, borrowing: Borrowing) -> bool:
        """Whether there is a connection, or the right to open one; if not, it is in line, and its turn wakes it."""
        with self._lock:
            if self._closed or self._state.broken is not None:
                self._refuse_if_closed()
            # Ctrl-C comes behind a call: there is none between what is taken here and who has it.
            if self._idle:
                borrowing.reader = self._idle[-1]  # the last one back: its page cache is warm
                del self._idle[-1]
            elif self._count < self.size or (
                borrowing.wakeup is None and borrowing.thread and self._has_one(borrowing.thread)
            ):
                # A read in a row factory, say, would wait for its own thread: it has one beside the others. No task
                # waits in a thread.
                self._count += 1
            else:
                if borrowing.wakeup is None:
                    borrowing.wakeup = threading.Lock()
                    borrowing.wakeup.acquire()
                self._waiting[borrowing] = None
                return False
            borrowing.has_place = True
            self._lent.add(borrowing)
            return True

    def refuse_unless_granted(self, borrowing: Borrowing) -> None:
        """Called when the wait in line is over."""
        if not borrowing.has_place:
            self._refuse_if_closed()
            labels = ", ".join(self.borrowers)
            text = f"no connection for {borrowing.label} in time: all {self.size} are lent, to {labels}"
            raise ReadTimeoutError(text)

    def reader_of(self, borrowing: Borrowing, deadline: float) -> Reader:
        """Its connection, which may have to be opened, and whose time is limited from now on."""
        if borrowing.reader is None:
            borrowing.reader = self._new()
        borrowing.reader.limit(deadline)
        return borrowing.reader

    def _new(self) -> Reader:
        policy, guard = LockPolicy(self._settings.lock_timeout, self._stop), ReadGuard()
        self._file.check()  # or else it could be the connection of another database
        reader = Reader(open_reader(self._settings, guard, policy), guard, policy, self.clock)
        try:
            self._file.check()
        except BaseException:
            reader.connection.close()
            raise
        return reader

    @contextlib.contextmanager
    def extra(self, label: str) -> Iterator[sqlite3.Connection]:
        """A pinned connection beside those of the pool, for what takes long."""
        borrowing, reader = Borrowing(label), None
        with self._lock:
            self._refuse_if_closed()
            self._extras += 1
            self._lent.add(borrowing)
        try:
            reader = borrowing.reader = self._new()
            reader.attempt(label, reader.pin)
            yield reader.connection
        finally:
            if reader is not None and not reader.is_inherited:
                reader.connection.close()
            with self._lock:
                self._lent.discard(borrowing)
                self._extras -= 1
                self._all_back_if_closed()
            if self.holds_back:
                self._returned.set()
            self._call_if_all_back()

    def expire(self, borrowing: Borrowing) -> None:
        """End the statement that runs there, unless the connection is somebody else's by now."""
        with self._lock:
            if borrowing.is_over or borrowing.reader is None:
                return
            borrowing.reader.deadline = 0.0
        self.clock.set(0.0)

    def end(self, borrowing: Borrowing) -> None:
        """Leave the line, or give back what it has: clean, to the next in line. May be called again."""
        reader = borrowing.reader
        if borrowing.is_over or (reader is not None and reader.is_inherited):
            return
        if reader is not None and reader.inside:
            reader.when_out.append(functools.partial(self.end, borrowing))
            return
        if monotonic() - borrowing.since > self._state.slow_after and reader is not None:
            self._warn(borrowing, "was open")
        is_good = reader is not None and reader.reset()
        with self._lock:
            if not borrowing.has_place:
                self._waiting.pop(borrowing, None)
                borrowing.is_over = True
                return
            reader = borrowing.reader  # which may have come in this moment
            is_good = is_good and self._count <= self.size
            if is_good and reader is not None and not self._closed and not borrowing.is_over:
                self._lent.discard(borrowing)
                first = next(iter(self._waiting), None)
                if first is None:  # from here on no call, behind which Ctrl-C comes: it is given on, or it is not
                    borrowing.is_over = True
                    self._idle += [reader]
                else:
                    borrowing.is_over, first.reader, first.has_place = True, reader, True
                    self._tell(first)
        if not borrowing.is_over:
            self._end_place(borrowing, reader)
        if self.holds_back:
            self._returned.set()

    def _end_place(self, borrowing: Borrowing, reader: Reader | None) -> None:
        """There is no connection to give on: the next in line opens another."""
        if reader is not None:
            reader.connection.close()
        with self._lock:
            if not borrowing.is_over:
                self._lent.discard(borrowing)
                first = next(iter(self._waiting), None)
                if first is None or self._closed or self._count > self.size:
                    borrowing.is_over = True  # and no call in between, as above
                    self._count -= 1
                    self._all_back_if_closed()
                else:
                    borrowing.is_over, first.has_place = True, True
                    self._tell(first)
        self._call_if_all_back()

    def _tell(self, first: Borrowing) -> None:
        """Wake the first in line, which has a place now."""
        try:
            self._waiting.pop(first, None)
            first.since = monotonic()
            self._lent.add(first)
        finally:
            wake([first.wakeup])

    def _all_back_if_closed(self) -> None:
        if self._closed and not self._count and not self._extras:
            self._all_back.set()

    def _refuse_if_closed(self) -> None:
        self._state.refuse_if_broken()
        if self._closed:
            raise closed_error()


def _return() -> None:
    pass
