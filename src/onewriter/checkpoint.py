"""Checkpointer: keeps the write-ahead log small, between batches, after the waiters were told."""

from __future__ import annotations

from typing import NamedTuple

from onewriter.connection import Settings
from onewriter.readers import ReaderPool
from onewriter.transaction import WriteSession

OFTEN = 256  # commits, or some changed rows each, between two checkpoints
ROWS = 8  # changed rows that count as much as a commit
HOLD_BACK = 0.05  # seconds that new reads wait, at most, so that the log can begin anew


class Checkpoint(NamedTuple):
    """What a checkpoint did; https://www.sqlite.org/pragma.html#pragma_wal_checkpoint

    ``busy``: somebody was in the way, so that it is not complete. ``log``, ``done``: pages in the log, and copied.
    """

    busy: bool
    log: int
    done: int


class Checkpointer:
    """When, and how thoroughly. Belongs to the thread that is the writer.

    By growth, not by the size of the file, which stays although the log begins anew after a complete checkpoint.
    FULL and TRUNCATE, not PASSIVE: they take the write lock where it can be had, without which another process can
    commit meanwhile, which SQLite before 3.51.3 may answer with a damaged log (https://www.sqlite.org/wal.html).
    """

    def __init__(self, settings: Settings, readers: ReaderPool) -> None:
        self._settings = settings
        self._readers = readers
        self._growth = 0
        self._changes = 0
        self.last: Checkpoint | None = None

    @property
    def has_work(self) -> bool:
        """Whether something was written since the log was last emptied."""
        return self._growth > 0 and self._settings.checkpoints

    def after_batch(self, session: WriteSession) -> None:
        """Count what a batch wrote, and checkpoint if it is time."""
        changes = session.connection.total_changes
        self._growth += 1 + abs(changes - self._changes) // ROWS
        self._changes = changes
        if self._growth < OFTEN or not self._settings.checkpoints:
            return
        self._growth = 1
        if self.run(session, "FULL").log * session.page_size > self._settings.wal_limit:
            with self._readers.held_back(HOLD_BACK):
                self.empty(session)

    def empty(self, session: WriteSession) -> None:
        """Cut the log off, unless somebody reads from it."""
        if not self.run(session, "TRUNCATE").busy:
            self._growth = 0

    def run(self, session: WriteSession, mode: str) -> Checkpoint:
        busy, log, done = session.own(f"PRAGMA wal_checkpoint({mode})")[0]
        self.last = Checkpoint(bool(busy), log, done)
        return self.last
