"""ReadClock: ends reads whose time goes into Python code."""

from __future__ import annotations

import contextlib
import math
import sqlite3
import threading
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any, Protocol

GRACE = 0.05  # seconds: a statement whose time goes into SQLite's own steps has ended by itself by then
AGAIN = 0.1  # seconds between two interrupts of one read, whose next statement would not know of the first


class Timed(Protocol):
    connection: sqlite3.Connection
    deadline: float


class ReadClock:
    """Interrupts readers whose deadline has passed: functions, factories and converters are no steps of SQLite's.

    Python code cannot be stopped; the statement that called it ends when it returns. A late interrupt hits nobody:
    SQLite forgets it when the next statement begins, and the deadline of a reader that was given back is never.

    Locks:   ``lock``, the pool's, guards ``rings_at`` and ``_thread``, and is held around interrupt().
    Threads: one of its own, from the first read with a time limit to the first deadline at which no read is there. A
             read looks at ``rings_at`` only, which comes before its own deadline unless that is an early one.
    """

    def __init__(self, lock: Any, readers: Callable[[], Iterable[Timed]]) -> None:
        self.lock = lock
        self.rings_at = math.inf
        self._readers = readers
        self._bell = threading.Lock()  # released to have the thread look again
        self._bell.acquire()
        self._thread: threading.Thread | None = None
        self._is_stopped = False

    def turn_off(self) -> None:
        self.rings_at = -math.inf

    def set(self, deadline: float) -> None:
        """Look again at ``deadline``, or earlier; to be called after the reader has that."""
        started = None
        with self.lock:
            if deadline >= self.rings_at:
                return
            self.rings_at = deadline
            if self._thread is None:
                started = self._thread = threading.Thread(target=self._run, name="onewriter-clock", daemon=True)
        if started is None:
            self._ring()
            return
        try:
            started.start()
        except BaseException as error:
            with self.lock:
                self._thread, self.rings_at = None, math.inf
            if not isinstance(error, RuntimeError):  # at the end of the interpreter no thread can be started
                raise

    def stop(self) -> None:
        """Have the thread end, or as soon as there is nobody to interrupt."""
        thread = self._thread
        self.end()
        if thread is not None and thread.ident is not None:
            thread.join(1.0)

    def end(self) -> None:
        """The same, without waiting for it."""
        self._is_stopped = True
        self._ring()

    def _ring(self) -> None:
        with contextlib.suppress(RuntimeError):  # it was rung already
            self._bell.release()

    def _run(self) -> None:
        while (next_look := self._next_look()) is not None:
            self._bell.acquire(timeout=max(0.0, min(next_look - monotonic(), threading.TIMEOUT_MAX)))

    def _next_look(self) -> float | None:
        with self.lock:
            now = monotonic()
            if self.rings_at + GRACE <= now or self._is_stopped:
                self.rings_at = math.inf  # before the look, so that a deadline that comes with it rings
                self.rings_at = self._look(now)
            if self.rings_at == math.inf:
                self._thread = None
                return None
            return self.rings_at + GRACE

    def _look(self, now: float) -> float:
        """Interrupt who is late; returns the next deadline."""
        deadlines = [math.inf]
        for reader in self._readers():
            if reader.deadline + GRACE <= now:
                with contextlib.suppress(sqlite3.ProgrammingError):  # it is closed in this moment
                    reader.connection.interrupt()
                deadlines.append(now + AGAIN - GRACE)
            else:
                deadlines.append(reader.deadline)
        return min(deadlines)
