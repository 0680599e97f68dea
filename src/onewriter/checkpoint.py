"""Checkpointer: keeps the write-ahead log small, between batches, after the waiters were told."""

from __future__ import annotations

import logging
import math
import sqlite3
from time import monotonic
from typing import NamedTuple

from onewriter.connection import Settings
from onewriter.events import CheckpointEnded, Hook, tell
from onewriter.file import DatabaseFile
from onewriter.holder import Holder
from onewriter.locks import describe_wal_readers
from onewriter.log import report
from onewriter.readers import ReaderPool
from onewriter.retry import is_busy
from onewriter.transaction import WriteSession

OFTEN = 256  # commits, or some changed rows each, after which the first checkpoint comes
ROWS = 8  # changed rows that count as much as a commit
PAGES = 1000  # that the log is to have at a checkpoint, as in SQLite itself
HOLD_BACK = 0.05  # seconds that new reads wait, at most, so that the log can begin anew


class Checkpoint(NamedTuple):
    """What a checkpoint did; https://www.sqlite.org/pragma.html#pragma_wal_checkpoint

    Attributes:
        busy: somebody was in the way, so that it is not complete.
        log: pages in the logs of the database and of attached ones; -1 in the rollback-journal modes, which have none.
        checkpointed: pages of them that are in the database files.
    """

    busy: bool
    log: int
    checkpointed: int


class Checkpointer:
    """When, and how thoroughly. Belongs to the thread that is the writer.

    By growth, since the size of the file stays although the log begins anew after a complete checkpoint. How many pages
    the growth came to is known at each checkpoint only; it says how far off the next one may be. And at once when the
    file has grown by as much as the log may have: a few large values do that.
    FULL and TRUNCATE, not PASSIVE: they take the write lock where it can be had, without which another process can
    commit meanwhile, which SQLite before 3.51.3 may answer with a damaged log (https://www.sqlite.org/wal.html).
    """

    def __init__(
        self, settings: Settings, file: DatabaseFile, readers: ReaderPool, holder: Holder, on_event: Hook | None
    ) -> None:
        self._settings = settings
        self._file = file
        self._readers = readers
        self._holder = holder
        self._on_event = on_event
        self._over_since = math.inf  # when the log could not be emptied for the first time
        self._told_at = 0  # bytes of the log at the last warning
        self.starved = ""  # why the log is over its limit
        self._growth = self._changes = 0
        self._often = OFTEN
        self._size = 0  # of the logs' files after the last checkpoint
        self._largest = 0  # bytes in one of the logs at the last checkpoint
        self._version: list[object] = []  # PRAGMA data_version, when the size of the file was remembered
        self.last: tuple[Checkpoint, float] | None = None

    @property
    def has_work(self) -> bool:
        """Whether something was written since the log was last emptied."""
        return self._growth > 0 and self._settings.auto_checkpoint and bool(self._file.logged)

    def after_batch(self, session: WriteSession) -> None:
        """Count what a batch wrote, and checkpoint if it is time."""
        changes = session.connection.total_changes
        self._growth += 1 + abs(changes - self._changes) // ROWS
        self._changes = changes
        if not self.has_work:
            return
        most = max(self._settings.wal_limit, PAGES * session.page_size)
        if self._growth < self._often and self._file.wal_bytes() <= self._size + most:
            return
        pages = max(1, self.run(session, "FULL").log)
        wanted = min(PAGES, self._settings.wal_limit // session.page_size // 2)
        self._often = max(OFTEN, min(4 * self._growth, self._growth * wanted // pages))
        self._growth = 1
        if self._largest > self._settings.wal_limit:
            with self._readers.held_back(HOLD_BACK):
                self.empty(session)
        self._size = self._file.wal_bytes()

    def empty(self, session: WriteSession) -> None:
        """Cut the log off, unless somebody reads from it."""
        found = self.run(session, "TRUNCATE")
        if not found.busy:
            self._growth = 0
        self._note_size(found, self._largest)

    def _note_size(self, found: Checkpoint, size: int) -> None:
        """Say who keeps the log over its limit for longer than ``slow_after``; again when it has doubled."""
        if not found.busy or size <= self._settings.wal_limit:
            self.starved, self._told_at, self._over_since = "", 0, math.inf
            return
        self._over_since = min(self._over_since, monotonic())
        if monotonic() - self._over_since < self._holder.slow_after:
            return
        who = describe_wal_readers(self._file.logged, self._readers.borrowers)
        self.starved = f"the WAL has grown to {size:,} bytes (wal_limit: {self._settings.wal_limit:,}), read by {who}"
        if size >= self._told_at:
            self._told_at = 2 * size
            report(self._holder, logging.WARNING, "checkpoint starved: %s", self.starved)

    def ask_for(self, session: WriteSession, mode: str) -> Checkpoint:
        """What a user has asked for."""
        with self._readers.held_back(HOLD_BACK if mode in ("RESTART", "TRUNCATE") else 0.0):
            found = self.run(session, mode)
        if mode == "TRUNCATE" and not found.busy:
            self._growth = 0
        return found

    def run(self, session: WriteSession, mode: str) -> Checkpoint:
        """Each database by itself: of all in one, SQLite tells only about the first."""
        began = monotonic()
        busy, log, checkpointed, self._largest = False, -1, -1, 0
        for name in session.logs or ["main"]:
            rows = session.own(f'PRAGMA "{name}".wal_checkpoint({mode})')
            was_busy, pages, done = rows[0]
            busy |= bool(was_busy)
            if pages >= 0:
                log, checkpointed = max(0, log) + pages, max(0, checkpointed) + done
                self._largest = max(self._largest, pages * session.page_sizes[name])
        found = Checkpoint(busy, log, checkpointed)
        self.last = found, monotonic()
        self.remember_size(session)
        if self._on_event is not None:
            tell(self._holder, self._on_event, CheckpointEnded(mode, *found, monotonic() - began))
        return found

    def remember_size(self, session: WriteSession) -> None:
        """From now on only another process makes the file smaller, and SQLite tells of its commits."""
        try:
            if session.own("PRAGMA auto_vacuum")[0][0]:
                self._file.forget_size()  # any commit may make it smaller
                return
            self._version = session.own("PRAGMA data_version")
            self._file.remember_size()
        except sqlite3.Error:  # a lock, or damage, which others will meet too
            self._file.forget_size()

    def judge_size(self, session: WriteSession) -> None:
        """The file is smaller than it was: raise FileMovedError if no connection of SQLite has made it so."""
        if session.connection.in_transaction:
            return
        try:
            if session.own("PRAGMA data_version") != self._version:
                self._file.forget_size()
                return
        except sqlite3.DatabaseError as error:
            if is_busy(error):
                return
        self._file.refuse_smaller()
