"""ReaderPool: lends read-only connections, in the order of asking, and takes them back reset."""

from __future__ import annotations

import contextlib
import functools
import math
import sqlite3
import threading
import weakref
from _thread import start_new_thread
from asyncio import _get_running_loop
from collections import OrderedDict
from collections.abc import Callable, Iterator
from threading import get_ident
from time import monotonic
from typing import Any, TypeVar

from onewriter.base import garbage
from onewriter.base.state import State
from onewriter.base.waiting import SLICE, Flag, thread_signal, wake
from onewriter.read.claim import NOBODY, Claim, Limit, new_claim
from onewriter.read.clock import GRACE, ReadClock
from onewriter.read.places import NONE_IDLE, Places
from onewriter.read.reader import Reader, Snapshot, new_reader
from onewriter.sqlite.file import DatabaseFile
from onewriter.sqlite.settings import Settings

T = TypeVar("T")


class ReaderPool(Places):
    """Up to ``size`` connections, opened when they are needed, lent in the order of asking.

    Locks:   as ``Places``. No SQLite call runs while its lock is held, but for interrupt().
    Threads: any.
    """

    def __init__(self, settings: Settings, size: int, state: State, file: DatabaseFile) -> None:
        super().__init__(size, state)
        self._settings = settings
        self._file = file
        self._slow_after = state.slow_after
        self._stop = Flag()
        self.clock = ReadClock(
            self._lock, self._lent, state, self._interrupt, self._end_pause, self._help_those_that_wait
        )

    # Claims -----------------------------------------------------------------------------------------------------------

    def use(self, claim: Claim, function: Callable[..., T], *args: Any) -> T:
        """Wait for a connection if need be, call ``function`` with it, and give it back: all in this thread.

        Raises:
            ReadTimeoutError: none was free before its deadline.
            WriterClosedError, WriterBrokenError: the gateway is closed, or out of service.
        """
        try:
            try:
                reader = self._door.last
            except IndexError:
                reader = None
            if reader is None:
                reader = self.wait_for(claim)
            else:
                reader.claim = claim
                if claim.deadline < self.clock.rings_at:
                    self.clock.set(claim.deadline)
            result = function(reader, *args)
            if monotonic() - claim.since > self._slow_after:
                self.clock.warn_if_slow(claim, "was open")
            if reader.guard.leaves_traces:
                self.end(claim)
            else:
                reader.claim = NOBODY
                self._idle.append(reader)
                if self._is_watched:
                    self._end_idle(claim)
            return result
        except BaseException:
            # Ctrl-C can hit the entry of ``end``, for which this is written twice. Measured: once loses 1.8 % of them.
            try:
                try:
                    self.end(claim)
                finally:
                    self.end(claim)
            except RecursionError:  # no room for a call: a thread has a stack of its own
                vars(claim).pop("ends_in", None)
                start_new_thread(self.end, (claim,))
                raise
            raise

    def lend(self, claim: Claim, function: Callable[[Reader], T]) -> T:
        """The same with a claim that was admitted before."""
        try:
            result = function(self.reader_of(claim))
            self.end(claim)
            return result
        except BaseException:
            try:  # as in ``use``; whoever calls this has room for a call
                self.end(claim)
            finally:
                self.end(claim)
            raise

    def use_beside(self, label: str, function: Callable[[Reader], T]) -> T:
        """The same with a connection in addition to the pool's, so that no read has to wait for it."""

        def call(reader: Reader) -> T:
            reader.guard.is_spoilt = True  # it is not lent again
            return function(reader)

        claim = new_claim(label)
        claim.is_extra = True
        try:
            self._line_up(claim, thread_signal)
            return self.lend(claim, call)
        finally:
            self.end(claim)

    @contextlib.contextmanager
    def snapshot(self, label: str, until: float, job: Limit | None = None) -> Iterator[Snapshot]:
        """Lend, for the ``with`` block, a connection with one snapshot; its statements end with ``job``, that of a
        function around it. Raises as ``use`` does.
        """
        claim = new_claim(label, until)
        claim.job = job
        try:
            reader = self.wait_for(claim)
            with reader.snapshot() as snapshot:
                self.clock.watch(claim, math.inf if job is None else job.held_until)
                # Only inside does the scope say that a signal handler's close would wait for its own thread.
                loop = _get_running_loop()
                claim.thread, claim.loop = 0, None if loop is None else weakref.ref(loop)
                try:
                    yield snapshot
                finally:
                    claim.thread = get_ident()
            self.end(claim)
        except BaseException:
            try:  # as in ``use``
                try:
                    self.end(claim)
                finally:
                    self.end(claim)
            except RecursionError:
                vars(claim).pop("ends_in", None)
                start_new_thread(self.end, (claim,))
                raise
            raise

    def backup(self, label: str, copy: Callable[[sqlite3.Connection], T]) -> T:
        """Call ``copy`` with a pinned connection in addition to the pool's, since it takes long."""

        def copy_from(reader: Reader) -> T:
            reader.pin()
            self.clock.watch(reader.claim, math.inf)
            try:
                return copy(reader.connection)
            except sqlite3.DatabaseError as error:
                reader.guard.explain(error)
                raise

        return self.use_beside(label, copy_from)

    def wait_for(self, claim: Claim) -> Reader:
        """In a thread: ask, and wait. Raises as ``use`` does."""
        me = get_ident()
        claim.is_nested = me in self._asking
        try:
            self._asking.add(me)
            if not self.ask(claim, thread_signal):
                if self._state.is_inside():
                    self._state.refuse_endless_wait(f"waiting for a connection for {claim.label}")
                left, signal = claim.deadline - monotonic(), claim.signal
                if signal is not None:
                    signal.acquire(timeout=-1 if left == math.inf else max(0.0, min(left, threading.TIMEOUT_MAX)))
                self.check_admitted(claim)
            return self.reader_of(claim)
        finally:
            if not claim.is_nested:
                self._asking.discard(me)

    def reader_of(self, claim: Claim) -> Reader:
        """The connection of an admitted claim, which may have to be opened; its time is limited from now on."""
        reader = self._lent_to(claim)
        if reader is None:
            reader = self._new()
            with self._lock:
                reader.claim = claim
                self._readers[reader] = None
                self._opening.pop(claim, None)
        if claim.deadline < self.clock.rings_at:
            self.clock.set(claim.deadline)
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

    def _interrupt(self, claim: Claim) -> None:
        """End the statement of this claim, and no other: a connection given back now is not lent before the end."""
        self._door, self._is_watched = NONE_IDLE, True
        reader = self._lent_to(claim)
        if reader is not None:
            with contextlib.suppress(sqlite3.ProgrammingError):  # it is closed in this moment
                reader.connection.interrupt()
        self._serve()

    # The end of a claim -----------------------------------------------------------------------------------------------

    def end(self, claim: Claim) -> None:
        """Leave the line, or give back what it has: reset, to the next in line. May be called again, by any thread: the
        block of a task that is collected is left in several at the same time.
        """
        reader = self._lent_to(claim) or self._leave(claim)
        if reader is None or reader.is_inherited:
            return
        if (reader.inside or reader.shares) and reader.ends_later(functools.partial(self.end, claim)):
            return
        if vars(claim).setdefault("ends_in", get_ident()) != get_ident():
            return
        if monotonic() - claim.since > self._slow_after:
            self.clock.warn_if_slow(claim, "was open")
        if not (reader.reset() and self._put_back(claim, reader)):
            reader.guard.is_spoilt = True  # and so it is, if Ctrl-C comes before the place is given up
            reader.connection.close()
            self._close_place(claim, reader)

    def end_unused(self, claim: Claim) -> bool:
        """End a claim whose connection was not used, without a call into SQLite. False: that needs one, by ``end``."""
        reader = self._lent_to(claim) or self._leave(claim)
        return reader is None or self._put_back(claim, reader)

    def _end_idle(self, claim: Claim) -> None:
        """End it again, with one that is idle: others wait for that, or it must be closed."""
        with self._lock:
            if self._idle:
                reader = self._idle.last
                reader.claim = claim
        self.end(claim)

    # The end of the pool ----------------------------------------------------------------------------------------------

    def warn_if_slow(self) -> None:
        """Log those that have had a connection for longer than ``slow_after``, once each."""
        self.clock.warn()

    def look_at_block(self, since: float) -> None:
        """Have it logged if it is open for long; perhaps no other thread is awake then."""
        soon = since + self._state.slow_after - GRACE
        if soon < self.clock.rings_at:
            self.clock.set(soon)

    def close(self, patience: float | None = None) -> None:
        """Refuse new claims, wait until all connections are back (or ``stop_waiting``), and close them."""
        with self._lock:
            self._closed = True
            self._most = 0  # what comes back is closed
            waiting, self._line = list(self._line), OrderedDict()
            self._serve()
        wake(claim.signal for claim in waiting if claim.signal is not None)
        closing = new_claim("close")
        try:
            while self._idle:
                self._end_idle(closing)
        finally:
            self.end(closing)
        until = math.inf if patience is None else monotonic() + patience
        search = garbage.Search(monotonic(), SLICE)
        while not self._all_back.wait(max(0.0, min(SLICE, until - monotonic()))) and monotonic() < until:
            self.end_lost()
            if search.is_due(monotonic()):
                garbage.collect_soon()
        self.clock.stop()

    def stop_waiting(self) -> None:
        """Let ``close`` return although connections are lent; each is closed when it comes back."""
        self._stop.set()
        self._all_back.set()
