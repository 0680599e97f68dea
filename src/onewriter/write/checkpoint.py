"""Checkpointer: keeps the write-ahead log small, between batches, after waiting callers were woken."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from time import monotonic
from typing import Any, NamedTuple, Protocol

from onewriter.base.log import report
from onewriter.base.state import State
from onewriter.events import CheckpointEnded, Hook, publish
from onewriter.sqlite.file import DatabaseFile
from onewriter.sqlite.lock_holders import describe_wal_readers
from onewriter.sqlite.retry import FAILURES, is_busy, is_corrupt
from onewriter.sqlite.settings import Settings
from onewriter.write.session import WriteSession

COMMITS = 256  # or some changed rows for each, after which the first checkpoint comes
ROWS = 8  # changed rows that count as much as a commit
PAGES = 1000  # size of the log at which it is checkpointed, as in SQLite itself
FEWEST = 100  # to which a small wal_limit brings that down: each checkpoint costs some fsyncs
HOLD_BACK = 0.05  # seconds that new reads wait, at most, so that the log can be reset
FAR = 2  # times wal_limit: a larger log is reported at once
SOON, RARELY = 0.005, 1.0  # seconds after an attempt that failed until the next, at first and at most
LONG = 0.2  # seconds; a read that lasts longer will hardly end while new reads wait


class Readers(Protocol):
    """The pool of readers, as the writer sees it: which keep the log from being reset, and how new ones are held."""

    @property
    def in_use(self) -> int: ...
    @property
    def borrowers(self) -> list[str]: ...
    def out_for(self, seconds: float) -> Collection[Any]: ...
    def is_out(self, claim: Any) -> bool: ...
    def pause(self, seconds: float) -> AbstractContextManager[None]: ...
    @property
    def waiting(self) -> int: ...
    def free_lost(self) -> None: ...
    def refuse(self) -> None: ...
    def stop_waiting(self) -> None: ...
    def warn_if_slow(self) -> None: ...
    def look_at_block(self, since: float) -> None: ...
    def close(self, patience: float | None = None) -> None: ...
    def when_all_back(self, function: Callable[[], object]) -> None: ...
    def after_fork_in_child(self) -> list[Any]: ...


class Checkpoint(NamedTuple):
    """What a checkpoint did; https://www.sqlite.org/pragma.html#pragma_wal_checkpoint

    Attributes:
        busy: a reader or another writer kept it from completing.
        log: pages in the logs of the database and of attached ones; -1 in the rollback-journal modes, which have none.
        checkpointed: pages of them that are in the database files.
    """

    busy: bool
    log: int
    checkpointed: int


class Checkpointer:
    """When, and how thoroughly. Belongs to the thread that is the writer.

    By growth, since the size of the file stays although the log is reset after a complete checkpoint. How many pages
    the growth came to is known at each checkpoint only; it says how far off the next one may be. And at once when the
    file has grown by as much as the log may have: a few large values do that.
    FULL and TRUNCATE, not PASSIVE: they take the write lock where it can be had, without which another process can
    commit meanwhile, which SQLite before 3.51.3 may answer with a damaged log (https://www.sqlite.org/wal.html).
    """

    def __init__(
        self, settings: Settings, label: str, file: DatabaseFile, readers: Readers, state: State, on_event: Hook | None
    ) -> None:
        self._settings = settings
        self._label = label
        self._file = file
        self._readers = readers
        self._state = state
        self._on_event = on_event
        self._kept_size = 0  # of the log, when it could not be emptied although it is over its limit
        self._kept_by: Collection[Any] = []  # readers that were out for long then, and
        self._kept_since = math.inf  # when that was for the first time
        self._again_at = self._pause = 0.0  # when to hold back reads again, and the seconds from the last time to that
        self._told_at = 0  # bytes of the log from which on there is something to warn of
        self._growth = self._changes = 0
        self._often = COMMITS
        self._size = 0  # of the logs' files after the last checkpoint
        self._largest = 0  # bytes in one of the logs at the last checkpoint
        self._is_counting = False  # there is a log, and it is ours to empty
        self._room = 0  # bytes that they may grow by before the next one
        self._schema: list[object] = []
        self._version: list[object] = []  # PRAGMA data_version, when the size of the file was remembered
        self._failed = False  # the last attempt, and that was logged
        self._room_again_at = 0.0
        self.last: tuple[Checkpoint, float] | None = None

    @property
    def has_work(self) -> bool:
        """Whether something was written since the log was last emptied."""
        return self._growth > 0

    def attempt(self, checkpoint: Callable[[WriteSession], object], session: WriteSession | None) -> None:
        """Call one of the functions below; a failure is logged, and fails no job."""
        if session is not None:
            try:
                checkpoint(session)
                self._failed = False
            except FAILURES as error:
                if is_corrupt(error):
                    self._state.note_corruption(error)
                if not self._failed:  # a full disk fails each of them
                    report(self._state, logging.WARNING, "%s: a checkpoint failed: %s", self._label, error)
                self._failed = True

    def at_end(self, session: WriteSession | None) -> None:
        """The last one, before the connection is closed."""
        if self._settings.auto_checkpoint and self._file.logged:
            self.attempt(self.empty, session)

    def open(self, session: WriteSession) -> None:
        """A connection was opened."""
        self._is_counting = self._settings.auto_checkpoint and bool(self._file.logged)
        self._room = max(self._settings.wal_limit, FEWEST * session.page_size)
        self.remember_size(session)

    def after_batch(self, session: WriteSession) -> None:
        """Count what a batch wrote, and checkpoint if it is time."""
        is_due = self.is_due(session)
        if self._state.lacks_room:
            self._make_room(session)
        elif is_due:
            self.attempt(self._checkpoint, session)

    def _make_room(self, session: WriteSession) -> None:
        """It may be the log that has filled the disk, and no commit comes which would make a checkpoint due."""
        self._state.lacks_room, now = False, monotonic()
        if self._is_counting and now >= self._room_again_at and self._file.wal_bytes():
            self.attempt(self.empty, session)
            if self._file.wal_bytes():
                self._room_again_at = now + RARELY

    def is_due(self, session: WriteSession) -> bool:
        """Count what a batch wrote; whether it is time for a checkpoint."""
        if self._settings.journal_mode != "WAL":  # every commit is in the file
            self.remember_size(session)
        if not self._is_counting:
            return False
        changes = session.connection.total_changes
        self._growth += 1 + abs(changes - self._changes) // ROWS
        self._changes = changes
        return self._growth >= self._often or self._file.wal_bytes() > self._size + self._room

    def _checkpoint(self, session: WriteSession) -> None:
        if not self._can_fare_better():
            self._warn()
            return
        pages = max(1, self.run(session, "FULL").log)
        wanted = min(PAGES, self._settings.wal_limit // session.page_size // 2)
        self._often = max(COMMITS, min(4 * self._growth, self._growth * wanted // pages))
        self._growth = 1
        if self._largest > self._settings.wal_limit:
            began = monotonic()
            with self._readers.pause(HOLD_BACK if began >= self._again_at else 0.0):
                self.empty(session)
            self._count_hold_back(monotonic() - began)
        self._size = self._file.wal_bytes()

    def count_others(self) -> None:
        """Another connection of this process has written, it is not known how much: look after the next batch."""
        if self._is_counting:
            self._growth += self._often

    def _count_hold_back(self, seconds: float) -> None:
        """After an attempt that failed the next one comes later, each time more so, since reads wait meanwhile."""
        if not self._kept_size:
            self._pause = self._again_at = 0.0
        elif seconds >= HOLD_BACK or not self._kept_by:
            self._pause = min(RARELY, 2 * self._pause or SOON)
            self._again_at = monotonic() + self._pause

    def _can_fare_better(self) -> bool:
        """Whether another attempt at emptying the log may succeed: the longer the log, the more each one costs."""
        if not self._kept_size or self._largest_file() >= 2 * self._kept_size:
            return True
        if self._kept_by:
            return not all(self._readers.is_out(claim) for claim in self._kept_by)
        return monotonic() >= self._again_at  # the reader has ended since, or is of another process

    def empty(self, session: WriteSession) -> None:
        """Truncate the log, unless a reader uses it."""
        found = self.run(session, "TRUNCATE")
        if not found.busy:
            self._growth = 0
        self._note(found)
        self._warn()

    def _note(self, found: Checkpoint) -> None:
        if not found.busy or self._largest <= self._settings.wal_limit:
            self._kept_size, self._kept_by, self._kept_since, self._told_at = 0, [], math.inf, 0
            return
        self._kept_size, self._kept_by = self._largest_file(), self._readers.out_for(LONG)
        self._kept_since = min(self._kept_since, monotonic())

    def _largest_file(self) -> int:
        return max(self._file.log_sizes(), default=0)

    @property
    def starved(self) -> str:
        """Why the log is over its limit now, by far or for longer than ``slow_after``; empty if it is not."""
        size, limit = self._largest_file(), self._settings.wal_limit
        is_kept = monotonic() - self._kept_since >= self._state.slow_after
        if (
            not self.has_work
            or size <= limit
            or not (is_kept or (size > FAR * limit and self._readers.out_for(HOLD_BACK)))
        ):
            return ""
        who = describe_wal_readers(self._file.logged, self._readers.borrowers)
        return f"the WAL has grown to {size:,} bytes (wal_limit: {limit:,}), read by {who}"

    def _warn(self) -> None:
        """Name the readers that keep the log over its limit longer than ``slow_after``; again when it has doubled."""
        if monotonic() - self._kept_since >= self._state.slow_after and self._largest_file() >= self._told_at:
            text = self.starved
            if text:
                self._told_at = 2 * self._largest_file()
                report(self._state, logging.WARNING, "the log cannot be reset: %s", text)

    def ask_for(self, session: WriteSession, mode: str) -> Checkpoint:
        """What a user has asked for."""
        with self._readers.pause(HOLD_BACK if mode in ("RESTART", "TRUNCATE") else 0.0):
            found = self.run(session, mode)
        if mode == "TRUNCATE" and not found.busy:
            self._growth = 0
            self._note(found)
        return found

    def run(self, session: WriteSession, mode: str) -> Checkpoint:
        """Each database by itself: of all in one, SQLite tells only about the first."""
        began = monotonic()
        busy, log, checkpointed, self._largest = False, -1, -1, 0
        for name in session.logs or ["main"]:
            rows = session.internal(f'PRAGMA "{name}".wal_checkpoint({mode})')
            was_busy, pages, done = rows[0]
            busy |= bool(was_busy)
            if pages >= 0:
                log, checkpointed = max(0, log) + pages, max(0, checkpointed) + done
                self._largest = max(self._largest, pages * session.page_sizes[name])
        found = Checkpoint(busy, log, checkpointed)
        self.last = found, monotonic()
        self.remember_size(session)
        if self._on_event is not None:
            publish(self._state, self._on_event, CheckpointEnded(mode, *found, monotonic() - began))
        return found

    def remember_size(self, session: WriteSession) -> None:
        """From now on only another process makes the file smaller, and SQLite tells of its commits."""
        try:
            if session.internal("PRAGMA auto_vacuum")[0][0]:
                self._file.forget_size()  # any commit may make it smaller
                return
            self._version = session.internal("PRAGMA data_version")
            self._schema = session.internal("PRAGMA schema_version")
            self._file.remember_size(session.internal("PRAGMA page_count")[0][0] * session.page_size)
        except FAILURES:  # a lock, or damage, which others will meet too
            self._file.forget_size()

    def judge_size(self, session: WriteSession) -> None:
        """The file is smaller than it was: raise FileMovedError if no connection of SQLite has made it so."""
        try:
            if session.internal("PRAGMA data_version") != self._version and not self._is_put_back(session):
                self._file.forget_size()
                return
        except FAILURES as error:
            if is_busy(error) or isinstance(error, MemoryError):  # it is asked again
                return
        self._file.refuse_smaller()

    def _is_put_back(self, session: WriteSession) -> bool:
        """In the rollback-journal modes, where SQLite takes any change of the file for a commit: whether it cannot have
        been VACUUM, which increments the version of the schema."""
        return self._settings.journal_mode != "WAL" and session.internal("PRAGMA schema_version") <= self._schema
