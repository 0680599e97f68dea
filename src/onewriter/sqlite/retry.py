"""Waiting for SQLite's lock: which errors mean "try again", how often, and when that is logged."""

from __future__ import annotations

import errno
import os
import random
import sqlite3
import time
from collections.abc import Callable
from time import monotonic
from typing import Any, TypeAlias, TypeVar

import tenacity

from onewriter.base.waiting import Flag

T = TypeVar("T")
AskWriter: TypeAlias = Callable[[Any], object]  # gets what it has returned before, and raises what has failed that
# What sqlite3 raises where a statement of the gateway's own fails: without memory, it is not one of its own errors.
Failure: TypeAlias = sqlite3.Error | MemoryError
FAILURES = (sqlite3.Error, MemoryError)
POLL, JITTER = 0.001, 0.0005  # seconds from one attempt to the next, and how much longer by chance
SOONER, SOONEST = 20.0, 5.0  # the longer it has waited the more often it tries: each second by that; at most
ROUND = 0.01  # seconds of attempts between two looks of tenacity, of which each costs as much as ten attempts
NOTICEABLE = 0.1  # seconds of waiting after which it is logged, and again each time it has doubled


def error_code(error: BaseException) -> int:
    """SQLite's extended result code; 0 if the error is not SQLite's, whatever attributes it has."""
    if not issubclass(type(error), sqlite3.Error):  # isinstance would read its __class__, which may raise anything
        return 0
    try:
        code = error.sqlite_errorcode  # type: ignore[attr-defined]
    except BaseException:
        return 0
    return code if type(code) is int else 0


def is_corrupt(error: BaseException) -> bool:
    """Whether the file is damaged, or no database; or it, or its log, ends before something that was written there."""
    code = error_code(error)
    return code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or code == sqlite3.SQLITE_IOERR_SHORT_READ


def is_busy(error: BaseException) -> bool:
    """Whether another connection holds the lock, so that another attempt may succeed.

    Not BUSY_SNAPSHOT: a stale snapshot stays stale (https://www.sqlite.org/rescode.html#busy_snapshot).
    """
    code = error_code(error)
    return (code & 0xFF == sqlite3.SQLITE_BUSY and code != sqlite3.SQLITE_BUSY_SNAPSHOT) or needs_writer(error)


def needs_writer(error: BaseException) -> bool:
    """Whether a connection that only reads has met what a killed process has left of a transaction, in the
    rollback-journal modes: the first that may write rolls it back
    (https://www.sqlite.org/rescode.html#readonly_rollback).
    """
    return error_code(error) == sqlite3.SQLITE_READONLY_ROLLBACK


def with_help(attempt: Callable[[], T], ask_writer: AskWriter) -> Callable[[], T]:
    """``attempt``, for a connection that only reads: when it needs the writer, that is asked. Perhaps not the first
    time: who has held the lock may have been killed meanwhile.
    """
    asked: Any = None

    def call() -> T:
        nonlocal asked
        try:
            return attempt()
        except sqlite3.Error as error:
            if needs_writer(error):
                asked = ask_writer(asked)
            raise

    return call


def note_descriptors(error: BaseException) -> None:
    """Add a note if the process has run out of file descriptors: SQLite says only that it could not open a file."""
    if error_code(error) & 0xFF in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR):
        try:
            os.close(os.open(os.devnull, os.O_RDONLY))
        except OSError as reason:
            if reason.errno in (errno.EMFILE, errno.ENFILE):
                name = errno.errorcode[reason.errno]
                text = "each open file, socket and pipe counts; `ulimit -n` shows the limit of a process"
                error.add_note(f"onewriter: {name}, {reason.strerror}: {text}")


def is_interrupted(error: BaseException) -> bool:
    """Whether the statement was interrupted. Inside a table-valued PRAGMA SQLite loses the code and keeps the text."""
    code = error_code(error)
    return code == sqlite3.SQLITE_INTERRUPT or (code == sqlite3.SQLITE_ERROR and str(error) == "interrupted")


class LockPolicy:
    """How one thread waits for SQLite's lock.

    Args:
        lock_timeout: seconds to keep trying.
        stop: set by close; ends the wait at once.
        sleep: called between two attempts; tests pass a function that releases the lock.

    Threads: used by one thread at a time. ``attempts`` and ``waited`` describe its last ``call``.
    """

    def __init__(self, lock_timeout: float, stop: Flag, sleep: Callable[[float], Any] | None = None) -> None:
        self.lock_timeout = lock_timeout
        self.stop = stop
        self.sleep: Callable[[float], Any] = sleep or time.sleep  # half the price of stop.wait
        self.attempts = 0
        self.waited = 0.0

    def call(self, attempt: Callable[[], T], log: Callable[[bool, str], object], budget: float | None = None) -> T:
        """Call ``attempt`` until it does not fail with BUSY; after ``lock_timeout`` seconds raise SQLite's error.

        ``log(acquired, text)`` is called when the wait becomes noticeable, and when it ends.
        """
        self.attempts, self.waited = 1, 0.0
        try:
            return attempt()
        except sqlite3.OperationalError as error:
            if not is_busy(error):
                raise
            return self.keep_trying(attempt, log, error, budget)

    def keep_trying(
        self,
        attempt: Callable[[], T],
        log: Callable[[bool, str], object],
        first: BaseException | None,
        budget: float | None = None,
    ) -> T:
        """Go on after a first attempt, which raised ``first``. Separate, since tenacity always costs 7 µs."""
        began, threshold = monotonic(), NOTICEABLE
        seconds = self.lock_timeout if budget is None else budget
        is_late = tenacity.stop_after_delay(seconds)

        def count(state: tenacity.RetryCallState) -> None:
            nonlocal threshold
            self.waited = monotonic() - began
            if self.waited >= threshold:
                threshold *= 2
                log(False, f"waits for SQLite's lock: {self._so_far()}")

        def next_attempt() -> T:
            nonlocal first
            if first is not None:
                error, first = first, None
                raise error
            return self._round(attempt, began, began + seconds)

        try:
            result = tenacity.Retrying(
                retry=tenacity.retry_if_exception(is_busy),
                stop=lambda state: self.stop.is_set or is_late(state),
                wait=tenacity.wait_random(0, POLL),
                sleep=self.sleep,
                before_sleep=count,
                reraise=True,
            )(next_attempt)
        except BaseException as error:
            self.waited = monotonic() - began
            if is_busy(error):
                log(False, f"did not get SQLite's lock: {self._so_far()}")
            raise
        self.waited = monotonic() - began
        if self.waited >= NOTICEABLE:
            log(True, f"got SQLite's lock: {self._so_far()}")
        return result

    def _round(self, attempt: Callable[[], T], began: float, deadline: float) -> T:
        """Some attempts, until the deadline at the latest."""
        until = min(monotonic() + ROUND, deadline)
        while True:
            self.attempts += 1
            try:
                return attempt()
            except sqlite3.OperationalError as error:
                if (now := monotonic()) >= until or self.stop.is_set or not is_busy(error):
                    raise
            self.sleep((POLL + JITTER * random.random()) / min(SOONEST, 1.0 + SOONER * (now - began)))

    def _so_far(self) -> str:
        return f"{self.attempts} attempts in {self.waited:.3f} s"
