"""ReaderPool: lends read-only connections, in the order of asking, and takes them back reset."""

from __future__ import annotations

import contextlib
import functools
import math
import sqlite3
import threading
from asyncio import _get_running_loop
from collections import OrderedDict
from collections.abc import Callable, Iterator
from threading import get_ident
from time import monotonic
from typing import TypeVar

from onewriter.base.state import State
from onewriter.base.waiting import thread_signal, wake
from onewriter.errors import ReadTimeoutError, closed_error
from onewriter.read.claim import Claim
from onewriter.read.clock import GRACE, ReadClock
from onewriter.read.reader import Reader, Snapshot, new_reader
from onewriter.sqlite.file import DatabaseFile
from onewriter.sqlite.retry import is_corrupt
from onewriter.sqlite.settings import Settings

T = TypeVar("T")
LONG = 0.2  # seconds; who has a connection for longer hardly comes back in the time of a pause


class ReaderPool:
    """Up to ``size`` connections, opened when they are needed, lent in the order of asking.

    Locks:   _lock guards _idle, _count, _most, _line, _paused_until, _closed and every Claim. Nothing blocks and no
             SQLite call runs while it is held, but for interrupt().
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
        self._count = 0  # idle or lent; above _most while threads that have one need another
        self._most = size  # of _count, and one for each that is lent beside them; 0: closed
        self._line: OrderedDict[Claim, None] = OrderedDict()  # in order; any may leave
        self._lent: set[Claim] = set()  # admitted
        self._closed = False
        self._all_back = threading.Event()
        self._on_all_back: Callable[[], object] = _return
        self._paused_until = 0.0  # nobody is admitted until then; 0: there is no pause
        self._returned = threading.Event()  # in a pause: one has come back
        self.clock = ReadClock(self._lock, self._lent.copy, state, self._end_pause)

    # Claims -----------------------------------------------------------------------------------------------------------

    def line_up(self, claim: Claim) -> bool:
        """Admit it, if there is a connection or one may be opened; if not, its ``signal`` will tell. Never waits.

        Raises:
            WriterClosedError, WriterBrokenError: the gateway is closed, or out of service.
        """
        with self._lock:
            # Ctrl-C comes behind a call: there is none between what is taken and who has it.
            if self._idle and not claim.is_extra and not self._paused_until and self._state.broken is None:
                claim.reader = self._idle[-1]  # the last one back: its page cache is warm
                del self._idle[-1]
                claim.is_admitted = True
                self._lent.add(claim)
                return True
            return self._may_open_or_lines_up(claim)

    def _may_open_or_lines_up(self, claim: Claim) -> bool:
        self._refuse_if_closed()
        if claim.is_extra:
            self._most += 1
        elif (self._count >= self._most or self._paused_until) and not self._would_wait_for_itself(claim):
            if claim.signal is None:
                claim.signal = thread_signal()
            self._line[claim] = None
            self._end_pause(monotonic())
            return claim.is_admitted
        self._count += 1
        claim.is_admitted = True
        self._lent.add(claim)
        return True

    def _would_wait_for_itself(self, claim: Claim) -> bool:
        """A read in a row factory, say, has one beside the others. No task waits in a thread."""
        return claim.signal is None and claim.thread != 0 and self._has_one(claim.thread)

    def check_admitted(self, claim: Claim) -> None:
        """To be called when the wait for its signal is over; raises why it was in vain."""
        if not claim.is_admitted:
            self._refuse_if_closed()
            labels = ", ".join(self.borrowers)
            text = f"no connection for {claim.label} in time: all {self.size} are lent, to {labels}"
            raise ReadTimeoutError(text)

    def use(self, claim: Claim, function: Callable[[Reader], T], until: float) -> T:
        """Wait for a connection if need be, call ``function`` with it, and give it back: all in this thread.

        Raises:
            ReadTimeoutError: none was free ``until`` then.
            WriterClosedError, WriterBrokenError: the gateway is closed, or out of service.
        """
        try:
            return function(self.reader_of(claim, until))
        finally:
            # Ctrl-C can hit the entry of ``end``, for which this is written twice. Measured: once loses 1.8 % of them.
            try:
                self.end(claim)
            finally:
                if not claim.is_over:
                    self.end(claim)

    @contextlib.contextmanager
    def snapshot(self, label: str, until: float, end_at: float = math.inf) -> Iterator[Snapshot]:
        """Lend, for the ``with`` block, a connection that sees one moment; its statements end at ``end_at``. Raises as
        ``use`` does.
        """
        claim = Claim(label)
        try:
            reader = self.reader_of(claim, until)
            with reader.snapshot(label) as snapshot:
                reader.limit(end_at)
                self.clock.watch(claim)
                # Only inside does the scope say that a signal handler's close would wait for its own thread.
                claim.thread, claim.loop = 0, _get_running_loop()
                try:
                    yield snapshot
                finally:
                    claim.thread = get_ident()
        except sqlite3.DatabaseError as error:
            if is_corrupt(error):
                self._state.note_corruption(error)
            raise
        finally:
            try:
                self.end(claim)
            finally:
                if not claim.is_over:  # as in ``use``
                    self.end(claim)

    def backup(self, label: str, copy: Callable[[sqlite3.Connection], T]) -> T:
        """Call ``copy`` with a pinned connection beside those of the pool, for it takes long."""

        def copy_from(reader: Reader) -> T:
            reader.guard.is_spoilt = True  # it is not lent again
            reader.pin(label)
            self.clock.watch(claim)
            return copy(reader.connection)

        claim = Claim(label)
        claim.is_extra = True
        return self.use(claim, copy_from, math.inf)

    def reader_of(self, claim: Claim, until: float) -> Reader:
        """Its connection, once it is admitted, whose time is limited from now on."""
        if not claim.is_admitted and not self.line_up(claim):
            if self._state.is_inside():
                self._state.refuse_endless_wait(f"waiting for a connection for {claim.label}")
            left = until - monotonic()
            claim.signal.acquire(timeout=-1 if left == math.inf else max(0.0, min(left, threading.TIMEOUT_MAX)))
            self.check_admitted(claim)
        reader = claim.reader
        if reader is None:
            reader = claim.reader = self._new()
        reader.deadline = until
        if claim.is_expired:  # looked at after that: ``expire`` sets it before
            reader.deadline = 0.0
        if until < self.clock.rings_at:
            self.clock.set(until)
        return reader

    def _new(self) -> Reader:
        self._file.check()  # or else it could be the connection of another database
        reader = new_reader(self._settings, self._stop, self.clock, self._state)
        try:
            self._file.check()
        except BaseException:
            reader.connection.close()
            raise
        return reader

    def expire(self, claim: Claim) -> None:
        """End the statement that runs there, unless the connection is somebody else's by now."""
        with self._lock:
            if claim.is_over:
                return
            claim.is_expired = True
            if claim.reader is None:
                return
            claim.reader.deadline = 0.0
        self.clock.set(0.0)

    # The end of a claim -----------------------------------------------------------------------------------------------

    def end(self, claim: Claim) -> None:
        """Leave the line, or give back what it has: reset, to the next in line. May be called again."""
        if claim.is_over or (not claim.is_admitted and self._has_left(claim)):
            return
        reader = claim.reader
        if reader is None:
            self._end_place(claim)
            return
        if reader.is_inherited:
            return
        if reader.inside:
            reader.when_out.append(functools.partial(self.end, claim))
            return
        if monotonic() - claim.since > self._state.slow_after:
            self.clock.warn_if_slow(claim, "was open")
        if not (reader.reset() and self._hand_on(claim, reader)):
            self._end_place(claim)

    def end_unused(self, claim: Claim) -> bool:
        """End a claim whose connection was not used, without a call into SQLite. False: that needs one, by ``end``."""
        if claim.is_over or (not claim.is_admitted and self._has_left(claim)):
            return True
        if claim.reader is None:
            self._end_place(claim)
            return True
        return self._hand_on(claim, claim.reader)

    def _has_left(self, claim: Claim) -> bool:
        """Whether it is over, and in no line any more; False: it was admitted in this moment."""
        with self._lock:
            if not claim.is_admitted:
                claim.is_over = True
                self._line.pop(claim, None)
            return claim.is_over

    def _hand_on(self, claim: Claim, reader: Reader) -> bool:
        """Give its connection to the first in line, or keep it for the next. False: it must be closed."""
        with self._lock:
            if claim.is_over or self._count > self._most:
                return claim.is_over
            self._lent.discard(claim)
            # From here on one call at most, the last, since Ctrl-C comes behind a call: it is handed on, or it is not.
            if not self._line or (first := self._first()) is None:
                claim.is_over = True
                self._idle.append(reader)
            else:
                claim.is_over, first.reader, first.is_admitted = True, reader, True
                self._admit(first)
        if self._paused_until:
            self._returned.set()
        return True

    def _end_place(self, claim: Claim) -> None:
        """There is no connection to hand on: the next in line opens another."""
        reader, claim.reader = claim.reader, None  # first, so that after Ctrl-C nobody looks at one that is closed
        if reader is not None:
            reader.connection.close()
        with self._lock:
            if not claim.is_over:
                self._lent.discard(claim)
                first = None if self._count > self._most or claim.is_extra else self._first()
                if first is None:
                    claim.is_over = True  # and no call in between, as above
                    self._count -= 1
                    self._most -= claim.is_extra
                    self._set_if_all_back()
                else:
                    claim.is_over, first.is_admitted = True, True
                    self._admit(first)
        if self._paused_until:
            self._returned.set()
        self._call_if_all_back()

    def _first(self) -> Claim | None:
        """Who is to be admitted next."""
        return None if self._paused_until else next(iter(self._line), None)

    def _admit(self, first: Claim) -> None:
        """Wake the first in line, which has a place now."""
        try:
            self._line.pop(first, None)
            first.since = monotonic()
            self._lent.add(first)
        finally:
            wake([first.signal])

    # Pauses -----------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def pause(self, seconds: float) -> Iterator[None]:
        """Admit nobody for the ``with`` block, and for no longer than that; those who are lent one come back meanwhile.

        Unless one is out for long already, and would be in the way all the same.
        """
        if seconds <= 0.0 or self.out_for(LONG):
            yield
            return
        self._returned.clear()
        until = monotonic() + seconds
        try:
            with self._lock:
                self._paused_until = until
            self.clock.set(until - GRACE)
            while self._lent and (left := until - monotonic()) > 0.0:
                self._returned.wait(left)
                self._returned.clear()
            yield
        finally:
            with self._lock:
                self._resume()

    def _end_pause(self, now: float) -> float:
        """If it is over; or else returns when it will be."""
        if self._paused_until and now >= self._paused_until:
            self._resume()
        return self._paused_until or math.inf

    def _resume(self) -> None:
        """Admit those who have come in the pause, as far as there are connections."""
        self._paused_until = 0.0
        while (first := self._first()) is not None and (self._idle or self._count < self._most):
            if self._idle:
                first.reader, first.is_admitted = self._idle[-1], True
                del self._idle[-1]
            else:
                first.is_admitted = True
                self._count += 1
            self._admit(first)

    # Who has one ------------------------------------------------------------------------------------------------------

    @property
    def in_use(self) -> int:
        return len(self._lent)

    @property
    def waiting(self) -> int:
        """How many wait for a connection."""
        return len(self._line)

    @property
    def borrowers(self) -> list[str]:
        """The labels of those that have one."""
        return [claim.label for claim in self._lent.copy()]

    @property
    def has_mine(self) -> bool:
        """Whether one cannot come back while the calling thread waits."""
        me, loop = get_ident(), _get_running_loop()
        if self._has_one(me):
            return True
        claims = (*self._lent.copy(), *list(self._line))
        return any(claim.thread == me or (loop is not None and claim.loop is loop) for claim in claims)

    def _has_one(self, thread: int) -> bool:
        return any(thread in (claim.thread, claim.runs_in) for claim in self._lent.copy())

    def out_for(self, seconds: float) -> list[Claim]:
        """Those that have a connection for longer than that."""
        now = monotonic()
        return [claim for claim in self._lent.copy() if now - claim.since > seconds]

    def warn_if_slow(self) -> None:
        """Name those that have a connection for longer than ``slow_after``, once each."""
        self.clock.warn()

    def look_at_block(self, since: float) -> None:
        """Have it named if it is open for long; nobody else may be awake then."""
        soon = since + self._state.slow_after - GRACE
        if soon < self.clock.rings_at:
            self.clock.set(soon)

    def is_out(self, claim: Claim) -> bool:
        return claim in self._lent

    # The end of the pool ----------------------------------------------------------------------------------------------

    def close(self, patience: float | None = None) -> None:
        """Refuse new claims, wait until all connections are back (or ``stop_waiting``), and close them."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            self._count -= len(idle)
            self._most = 0  # what comes back is closed
            waiting, self._line = list(self._line), OrderedDict()
            self._set_if_all_back()
        wake(claim.signal for claim in waiting)
        for reader in idle:
            reader.connection.close()
        self._all_back.wait(patience)
        self.clock.stop()

    def when_all_back(self, function: Callable[[], object]) -> None:
        """Call it when the last connection has come back and is closed; now, if that is so."""
        with self._lock:
            self._on_all_back = function
        self._call_if_all_back()

    def _set_if_all_back(self) -> None:
        if self._closed and not self._count:
            self._all_back.set()

    def _call_if_all_back(self) -> None:
        if self._closed and not self._count:
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
        self._paused_until = 0.0
        readers = [*self._idle, *[claim.reader for claim in self._lent if claim.reader is not None]]
        for reader in readers:
            reader.is_inherited = True
        return [thing for reader in readers for thing in (reader, reader.connection)]

    def _refuse_if_closed(self) -> None:
        self._state.refuse_if_broken()
        if self._closed:
            raise closed_error()


def _return() -> None:
    pass
