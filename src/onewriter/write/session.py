"""WriteSession: the open write connection, and the gateway's own statements on it."""

from __future__ import annotations

import contextlib
import functools
import sqlite3
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from onewriter.errors import forked_error
from onewriter.sqlite.execute import Executor
from onewriter.sqlite.guard import Guard, Mode
from onewriter.sqlite.inherited import Inherited
from onewriter.sqlite.pragma_values import database_files, decode
from onewriter.sqlite.statement import OwnNumber, words_of

UNDOES_ALL = ("ROLLBACK", "DEFERRED")  # in a schema: RAISE, ON CONFLICT, and keys that COMMIT checks for all


class _Texts(dict[str, str]):
    """The gateway's own statements, as the guard knows them."""

    def __init__(self, guard: Guard) -> None:
        super().__init__()
        self._guard = guard

    def __missing__(self, sql: str) -> str:
        text = self[sql] = self._guard.internal(sql)
        return text


def _refuse() -> NoReturn:
    raise forked_error()


class _Calls(dict[str, Callable[[], object]]):
    """What runs BEGIN or COMMIT, made once: each costs no more than the call of SQLite itself."""

    def __init__(self, cursor: Any, texts: _Texts) -> None:
        super().__init__()
        self._cursor = cursor
        self._texts = texts

    def __missing__(self, sql: str) -> Callable[[], object]:
        call = self[sql] = functools.partial(self._cursor.execute, self._texts[sql])
        return call


class WriteSession:
    """The open write connection with its guard and executor; reopened, it is a new session.

    Threads: belongs to the thread that holds the writer.
    """

    def __init__(self, connection: sqlite3.Connection, guard: Guard, lock: threading.RLock) -> None:
        self.connection = connection
        self.guard = guard
        self.executor = Executor(connection, guard)
        self._cursor = sqlite3.Connection.cursor(connection)
        self._cursor.row_factory = None
        self._texts = _Texts(guard)
        self.row_factory, self.text_factory = connection.row_factory, connection.text_factory
        self.lock = lock
        # Held around interrupt(), which does not wait for the other one. A signal handler may interrupt, too.
        self.interrupting = threading.RLock()
        # Between jobs the guard's mode is the gateway's, and there are no rows to convert.
        self.control = calls = _Calls(self._cursor, self._texts)  # BEGIN and COMMIT, by their texts
        self.set_mark, self.release_mark, self.undo_to_mark = (  # the savepoint around a job
            calls[f"{verb} {guard.mark}_0"] for verb in ("SAVEPOINT", "RELEASE", "ROLLBACK TO")
        )
        self.files = files = database_files(connection)
        self.databases = list(files)
        self.logs = self.find_logs()
        self.page_sizes = {name: self.internal(f'PRAGMA "{name}".page_size')[0][0] for name in files}
        self.page_size: int = self.page_sizes["main"]
        # Those of on_connect. Looking into an empty TEMP schema would open it, and temp_store be settled by that.
        has_temp = any(row[1] == "temp" for row in self.internal("PRAGMA database_list"))
        self._kept = self._temp_objects() if has_temp else []
        self.schema_fails = True  # FAIL in it may leave half a statement's work behind
        self._schema_undoes_all = True
        self._schema_versions: list[Any] = []

    def after_fork_in_child(self) -> list[object]:
        """In a forked child: nothing reaches SQLite any more; returns what must never be closed there."""
        kept = [self.connection, self._cursor, self.executor]
        self.connection = self._cursor = self.executor = Inherited()  # type: ignore[assignment]
        self.control = _Calls(self._cursor, self._texts)
        self.set_mark = self.release_mark = self.undo_to_mark = _refuse
        return kept

    def close_cursors(self) -> None:
        """Before its connection is closed: a statement that is not finalized keeps SQLite's lock, and who has an error
        of a job keeps the session, by the frames of its traceback.
        """
        self._cursor.close()
        self.executor.close()

    def internal(self, sql: str, parameters: tuple[Any, ...] = ()) -> list[Any]:
        """Run a statement of the gateway's own, which no job's text can be mistaken for."""
        text = self._texts[sql]
        guard, cursor, connection = self.guard, self._cursor, self.connection
        mode, guard.mode = guard.mode, Mode.GATEWAY
        factory, connection.text_factory = connection.text_factory, decode  # not the user's
        try:
            cursor.execute(text, parameters)
            return cursor.fetchall()
        finally:
            guard.mode, connection.text_factory = mode, factory

    def check_keys(self) -> None:
        """Raise IntegrityError if a row refers to one that is not there."""
        if violations := self.internal("PRAGMA foreign_key_check"):
            table, rowid, parent, _ = violations[0]
            raise sqlite3.IntegrityError(
                f"FOREIGN KEY constraint failed: {len(violations)} rows; the first: {table} (rowid {rowid}) → {parent}"
            )

    def find_logs(self) -> dict[str, str]:
        """The files of the databases that are in WAL mode now, by name."""
        return {
            name: file
            for name, file in self.files.items()
            if file and self.internal(f'PRAGMA "{name}".journal_mode')[0][0] == "wal"
        }

    def forget_error(self) -> None:
        """Of a failed statement: sqlite3 would raise it again for the next one whose parameters cannot be bound."""
        with contextlib.suppress(MemoryError):
            self.internal("SELECT 1")

    def history(self) -> tuple[int, int]:
        """What SQLite does not undo: last_insert_rowid() and changes()."""
        return self.internal("SELECT last_insert_rowid(), changes()")[0]  # type: ignore[no-any-return]

    def set_history(self, rowid: int, changes: int) -> None:
        """Have them say this; there is a transaction of none but this around it."""
        table = f"temp.{self.guard.mark}"
        self.executor.forget_rowid()
        self.internal("BEGIN")
        try:
            self.internal(f"CREATE TABLE {table} (a)")
            self.internal(f"INSERT INTO {table} (rowid) VALUES (?)", (OwnNumber(rowid),))
            rows = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT ? FROM n LIMIT ?"
            self.internal(f"REPLACE INTO {table} (rowid) {rows}", (OwnNumber(rowid), OwnNumber(changes)))
        finally:
            self.internal("ROLLBACK")

    def _temp_objects(self) -> list[tuple[str, str]]:
        """Kind and name of what is in the TEMP schema, each before what it needs, virtual tables before others."""
        return self.internal(
            "SELECT +type, +name FROM temp.sqlite_schema WHERE sql IS NOT NULL ORDER BY "
            "type <> 'trigger', type <> 'view', type <> 'table', rootpage"
        )

    def drop_temp_objects(self) -> None:
        """Those that jobs have created; outside any transaction, and without enforcing foreign keys."""
        for kind, name in self._temp_objects():
            if (kind, name) not in self._kept:
                quoted = name.replace('"', '""')
                # Some have gone with their table by now.
                self.internal(f'DROP {kind} IF EXISTS temp."{quoted}"')

    def schema_undoes_all(self) -> bool:
        """Whether a statement may undo the work of others by what the schema says; asked inside a transaction."""
        versions = [self.internal(f'PRAGMA "{name}".schema_version') for name in self.databases]
        if self.guard.schema_changed or versions != self._schema_versions:
            found = self._words_in_schema(*UNDOES_ALL, "FAIL")
            self._schema_undoes_all, self.schema_fails = not found.isdisjoint(UNDOES_ALL), "FAIL" in found
            self._schema_versions = versions
            self.guard.schema_changed = False
        return self._schema_undoes_all

    def _words_in_schema(self, *words: str) -> set[str]:
        """The words, not in names, strings or comments, of what has one of these in the schemas of all databases."""
        found: set[str] = set()
        for name in (*self.databases, "temp"):
            # Not by LIKE, which on_connect may have replaced.
            for (text,) in self.internal(f'SELECT +sql FROM "{name}".sqlite_schema WHERE sql IS NOT NULL'):
                upper = text.upper()
                if any(word in upper for word in words):
                    found |= words_of(text)
        return found

    def restore_factories(self) -> None:
        self.connection.row_factory, self.connection.text_factory = self.row_factory, self.text_factory
