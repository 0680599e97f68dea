"""LastRowid: last_insert_rowid() and changes(), which SQLite does not undo, as an undone run must leave them."""

from __future__ import annotations

import logging
import sqlite3

from onewriter.base.log import report
from onewriter.base.state import State
from onewriter.write.session import WriteSession


class LastRowid:
    """What an undone run has left of it on the connection is put back before the next job: it is to run as if alone.

    Threads: the writer's.
    """

    def __init__(self, state: State, label: str) -> None:
        self.wanted: tuple[int, int] | None = None  # that the next transaction is to find; None: what is there
        self._state = state
        self._label = label
        self._before: tuple[int, int] | None = None
        self._left: tuple[int, int] | None = None

    def note(self, session: WriteSession) -> None:
        """A shared transaction has begun."""
        self._before = session.history()

    def undo(self) -> None:
        """The shared transaction is undone."""
        self.wanted = self._before

    def keep(self, session: WriteSession | None) -> None:
        """Remember what the job that undid the others has left: its turn comes after theirs."""
        self._left = None if session is None else session.history()

    def take_turn(self) -> None:
        """It is that job's turn."""
        self.wanted, self._left = self._left, None

    def restore(self, session: WriteSession) -> None:
        """Outside any transaction, have the connection say what is wanted."""
        wanted, self.wanted = self.wanted, None
        try:
            if wanted is not None and session.history() != wanted:
                session.set_history(*wanted)
        except sqlite3.Error as error:  # no room for a temporary file
            text = "%s: last_insert_rowid() could not be restored after a rollback: %s"
            report(self._state, logging.WARNING, text, self._label, error)
