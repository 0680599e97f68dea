"""Waiting for SQLite's lock: which errors mean "try again", how often, and how that is told."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any, TypeVar

import tenacity

CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
T = TypeVar("T")
POLL = 0.001  # seconds; constant, since backing off punishes whoever has waited longest
JITTER = 0.0005
NOTICEABLE = 0.1  # seconds of waiting after which it is logged, and again whenever it has doubled


def error_code(error: BaseException) -> int:
    """SQLite's extended code; 0 where the error is not SQLite's, whatever attributes it has."""
    if not issubclass(type(error), sqlite3.Error):  # isinstance would ask its class, which may raise anything
        return 0
    try:
        code = error.sqlite_errorcode  # type: ignore[attr-defined]
    except BaseException:
        return 0
    return code if type(code) is int else 0


def is_busy(error: BaseException) -> bool:
    """Whether another connection holds the lock, so that trying again can help.

    Not BUSY_SNAPSHOT: a stale snapshot stays stale (https://www.sqlite.org/rescode.html#busy_snapshot).
    """
    code = error_code(error)
    return code & 0xFF == sqlite3.SQLITE_BUSY and code != sqlite3.SQLITE_BUSY_SNAPSHOT


def note_descriptors(error: BaseException) -> None:
    """Say so if the reason is that no more files can be opened: SQLite tells only that it could not open one."""
    if error_code(error) & 0xFF in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR):
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError as reason:
            if reason.errno in (errno.EMFILE, errno.ENFILE):
                name = errno.errorcode[reason.errno]
                text = "every file, socket and pipe counts; `ulimit -n` is the limit of a process"
                error.add_note(f"onewriter: {name}, {reason.strerror}: {text}")


def is_interrupted(error: BaseException) -> bool:
    """Whether the statement was ended from outside. Of a table-valued PRAGMA SQLite keeps the text alone."""
    code = error_code(error)
    return code == sqlite3.SQLITE_INTERRUPT or (code == sqlite3.SQLITE_ERROR and str(error) == "interrupted")


class LockPolicy:
    """How one thread waits for SQLite's lock.

    Args:
        lock_timeout: seconds to keep trying.
        stop: set by close; ends a wait at once.
        sleep: waits between two attempts; tests put a function here that releases the lock.

    Threads: used by one thread at a time. ``attempts`` and ``waited`` tell of its last ``call``.
    """

    def __init__(self, lock_timeout: float, stop: threading.Event, sleep: Callable[[float], Any] | None = None) -> None:
        self.lock_timeout = lock_timeout
        self.stop = stop
        self.sleep: Callable[[float], Any] = sleep or stop.wait
        self.attempts = 0
        self.waited = 0.0

    def call(self, attempt: Callable[[], T], tell: Callable[[bool, str], object], budget: float | None = None) -> T:
        """Call ``attempt`` until it does not meet BUSY; after ``lock_timeout`` seconds raise SQLite's own error.

        ``tell(has_it, text)`` logs; it is called when the wait becomes noticeable, and at its end.
        """
        self.attempts, self.waited = 1, 0.0
        try:
            return attempt()
        except sqlite3.OperationalError as error:
            if not is_busy(error):
                raise
            return self.keep_trying(attempt, tell, error, budget)

    def keep_trying(
        self,
        attempt: Callable[[], T],
        tell: Callable[[bool, str], object],
        first: BaseException | None,
        budget: float | None = None,
    ) -> T:
        """Go on after a first attempt, which raised ``first``: retrying costs 7 µs a call even when nothing fails."""
        began, told = monotonic(), NOTICEABLE

        def count(state: tenacity.RetryCallState) -> None:
            nonlocal told
            self.waited = monotonic() - began
            if self.waited >= told:
                told *= 2
                tell(False, f"waits for SQLite's lock: {self._so_far()}")

        def next_attempt() -> T:
            nonlocal first
            if first is not None:
                error, first = first, None
                raise error
            self.attempts += 1
            return attempt()

        try:
            result = tenacity.Retrying(
                retry=tenacity.retry_if_exception(is_busy),
                stop=tenacity.stop_after_delay(self.lock_timeout if budget is None else budget)
                | tenacity.stop_when_event_set(self.stop),
                wait=tenacity.wait_fixed(POLL) + tenacity.wait_random(0, JITTER),
                sleep=self.sleep,
                before_sleep=count,
                reraise=True,
            )(next_attempt)
        except BaseException as error:
            self.waited = monotonic() - began
            if is_busy(error):
                tell(False, f"gave up on SQLite's lock: {self._so_far()}")
            raise
        self.waited = monotonic() - began
        if self.waited >= NOTICEABLE:
            tell(True, f"got SQLite's lock: {self._so_far()}")
        return result

    def _so_far(self) -> str:
        return f"{self.attempts} attempts in {self.waited:.3f} s"
