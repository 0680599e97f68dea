"""WriteConnection: opens the write connection, puts back what jobs change on it, and closes one that is in doubt."""

from __future__ import annotations

import logging
import sqlite3

from onewriter.base.log import report
from onewriter.base.state import State
from onewriter.sqlite.connection import close_whole, configure, is_closed, open_whole, open_writer
from onewriter.sqlite.file import DatabaseFile, exposure
from onewriter.sqlite.guard import Guard
from onewriter.sqlite.pragma_values import read_only_files, set_pragma
from onewriter.sqlite.retry import FAILURES, LockPolicy
from onewriter.sqlite.settings import Settings
from onewriter.write.checkpoint import Checkpointer
from onewriter.write.last_rowid import LastRowid
from onewriter.write.session import WriteSession


class WriteConnection:
    """The write connection for the length of a gateway's life: one session after the other. The only ROLLBACK.

    Threads: the writer's.
    """

    def __init__(
        self,
        settings: Settings,
        label: str,
        policy: LockPolicy,
        state: State,
        file: DatabaseFile,
        checkpointer: Checkpointer,
    ) -> None:
        self.session: WriteSession | None = None  # None: in doubt or not open yet; the next job opens one
        self.whole: sqlite3.Connection | None = None  # that a function has for its own
        self.guard = Guard(settings.journal_mode, settings.puts_back)
        self.last_rowid = LastRowid(state, label)
        self._settings = settings
        self._label = label
        self._policy = policy
        self._state = state
        self.file = file
        self._checkpointer = checkpointer
        self._mode_before = ""  # the file's journal mode, before a function had its own connection

    def open(self) -> WriteSession:
        """Open it, or raise why that cannot be."""
        self.file.check()  # SQLite would create it again
        again = self.file.identity is not None
        make, tell = self._new_session, self.tell_waiting
        session = open_writer(self._settings, self.guard, self._policy, tell, make, again=again)
        self.session = session
        try:
            self.file.remember(session.files.values(), session.logs.values(), read_only_files(session.connection))
        except BaseException:
            self.drop()
            raise
        self._checkpointer.open(session)
        self._tell_exposed()
        self.guard.schema_changed = True
        return session

    def _new_session(self, connection: sqlite3.Connection, guard: Guard) -> WriteSession:
        return WriteSession(connection, guard, self._state.call_lock)

    def open_whole(self) -> sqlite3.Connection:
        """Open a connection that a function has for itself; ``close_whole`` closes it. The session stays open
        meanwhile, idle, so that the other one is not the last: closing that would checkpoint, and delete the log.
        """
        self.file.check()  # a file that has taken the place of ours must not be opened
        self.whole, self._mode_before = open_whole(self._settings, self.guard, self._policy, self.tell_waiting)
        return self.whole

    def close_whole(self) -> bool:
        """Returns whether a transaction was open, and is rolled back."""
        connection, self.whole = self.whole, None
        assert connection is not None
        self.file.forget_size()  # VACUUM makes it smaller
        try:
            if is_closed(connection):  # by the function, which may have changed the file's journal mode
                connection, _ = open_whole(self._settings, self.guard, self._policy, self.tell_waiting)
            was_open = close_whole(connection, self._mode_before, self._settings.journal_mode)
        finally:
            self._checkpointer.count_others()
        self.file.check()
        return was_open

    @property
    def in_transaction(self) -> bool:
        return self.session is not None and self.session.connection.in_transaction

    def check_file(self, now: float) -> None:
        """Look whether the file is still there; raises FileMovedError. To be called when ``look_again_at`` is over."""
        self.file.look(now)
        if self.file.is_smaller and self.session is not None:
            self._checkpointer.judge_size(self.session)

    def roll_back(self) -> None:
        # SQLite has rolled back by itself after some errors (disk full, RAISE(ROLLBACK)): a second ROLLBACK would fail.
        if self.session is not None and self.session.connection.in_transaction:
            try:
                self.session.internal("ROLLBACK")
            except FAILURES:
                self.drop()

    def undo_job(self) -> None:
        """Undo the job that runs, alone."""
        assert self.session is not None
        try:
            self.session.undo_to_mark()
            self.session.release_mark()
        except FAILURES:
            self.roll_back()  # everything: the others run again

    def restore(self) -> None:
        """Put back what a job's PRAGMA may have changed, and drop the TEMP objects that it has made."""
        self.guard.settings_touched = False
        self._tell_what_was_in_vain()
        self.file.forget_size()  # VACUUM makes it smaller
        has_temp, self.guard.temp_touched = self.guard.temp_touched, False
        session = self.session
        if session is not None:
            try:
                if has_temp:
                    set_pragma(session.connection, "foreign_keys", 0)  # or else DROP looks at them
                    session.drop_temp_objects()
                try:
                    configure(session.connection, self._settings, session.databases)
                except ValueError as error:  # as a limit on a size that is surpassed
                    report(self._state, logging.WARNING, "%s: %s", self._label, error)
                session.restore_factories()
                # Texts that were allowed for this job are asked again, for the next.
                self.guard.install(session.connection)
                if session.find_logs() != session.logs:  # an attached file's mode was changed: its log is to be counted
                    self.drop()
            except FAILURES:
                self.drop()

    def drop(self) -> None:
        """Close it, which rolls back."""
        session, self.session = self.session, None
        if session is not None:
            session.close_cursors()
            self.file.close(session.connection)

    def after_fork_in_child(self) -> list[object]:
        """In a forked child: returns what must never be closed there."""
        return [self.whole, *([] if self.session is None else self.session.after_fork_in_child())]

    def tell_waiting(self, has_it: bool, text: str) -> None:
        """Log how the wait for SQLite's lock goes."""
        where = f"opening {self._settings.path}" if self.session is None else self._state.describe(has_it)
        report(self._state, logging.WARNING, "%s: %s (%s)", self._label, text, where)

    def _tell_exposed(self) -> None:
        before = self.file.exposed
        self.file.exposed = exposure(self.file.files)
        if self.file.exposed and self.file.exposed != before:
            report(self._state, logging.CRITICAL, "%s: %s", self._label, self.file.exposed)

    def _tell_what_was_in_vain(self) -> None:
        if self.guard.in_vain:
            text = (
                "%s: PRAGMA %s of run_without_transaction was reset at once, since the gateway sets it: use the "
                "argument of DbWriter, or foreign_keys=False on a job that rebuilds a table"
            )
            report(self._state, logging.WARNING, text, self._label, self.guard.in_vain)
            self.guard.in_vain = ""
