"""LastRowid: restores last_insert_rowid() and changes() after a run that was undone, since ROLLBACK does not."""

from __future__ import annotations

import contextlib
import logging
import sqlite3

from onewriter.base.log import report
from onewriter.base.state import State
from onewriter.sqlite.retry import FAILURES
from onewriter.write.session import WriteSession


class LastRowid:
    """Restores what an undone run has changed of them before the next job, which must run as if it were alone.

    Threads: the writer's.
    """

    def __init__(self, state: State, label: str) -> None:
        self.wanted: tuple[int, int] | None = None  # to be restored for the next transaction; None: nothing
        self._state = state
        self._label = label
        self._before: tuple[int, int] | None = None
        self._left: tuple[int, int] | None = None

    def note(self, session: WriteSession) -> None:
        """A shared transaction has begun."""
        self._before = session.history()

    def undo(self) -> None:
        """The shared transaction was rolled back."""
        self.wanted = self._before

    def keep(self, session: WriteSession | None) -> None:
        """Remember what the job that rolled back the others has left: it comes after them."""
        self._left = None
        with contextlib.suppress(*FAILURES):  # no memory, say
            self._left = None if session is None else session.history()

    def take_turn(self) -> None:
        """That job comes next."""
        self.wanted, self._left = self._left, None

    def restore(self, session: WriteSession) -> None:
        """Outside any transaction, have the connection return the wanted values."""
        wanted, self.wanted = self.wanted, None
        assert wanted is not None  # or else it need not be called
        try:
            if session.history() != wanted:
                session.set_history(*wanted)
        except sqlite3.Error as error:  # no room for a temporary file
            text = "%s: last_insert_rowid() could not be restored after a rollback: %s"
            report(self._state, logging.WARNING, text, self._label, error)
