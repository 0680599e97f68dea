"""Executor: runs statements and scripts on the write connection."""

from __future__ import annotations

import sqlite3
from typing import cast

from onewriter.sqlite.guard import OF_ITS_OWN, Guard
from onewriter.sqlite.result import Result
from onewriter.sqlite.retry import error_code
from onewriter.sqlite.statement import ASKING, CHANGING, READING, WITHOUT_ROWID, Parameters, describe_sql, words_of

# A constraint that SQLite checks before it writes, or undoes: unless FAIL says otherwise, nothing is left behind.
UNDONE = frozenset(
    (
        sqlite3.SQLITE_CONSTRAINT_UNIQUE,
        sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY,
        sqlite3.SQLITE_CONSTRAINT_ROWID,
        sqlite3.SQLITE_CONSTRAINT_NOTNULL,
        sqlite3.SQLITE_CONSTRAINT_CHECK,
        sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY,
    )
)


class Executor:
    """Runs statements on one connection and gives Results. Belongs to the thread that holds the connection."""

    def __init__(self, connection: sqlite3.Connection, guard: Guard) -> None:
        self._connection = connection
        self._guard = guard
        self._cursor = sqlite3.Connection.cursor(connection)  # making one for each statement would cost as much as it
        self._last_rowid: int | None = None
        self._known: str | None = None  # the last plain INSERT
        self._table = ""  # and its table

    def execute(self, sql: str, parameters: Parameters) -> Result:
        """Run one statement to its end."""
        result = self.insert(sql, parameters)
        return Result([], 1, result, None) if type(result) is int else cast(Result, result)

    def _execute(self, sql: str, parameters: Parameters) -> Result:
        cursor, text, guard = self._cursor, describe_sql(sql), self._guard
        guard.is_asking = text.verb in ASKING and guard.mode in OF_ITS_OWN
        try:
            # SQLite does not ask the guard again about a text that was allowed to a job of many statements.
            cursor.execute(guard.asked_anew(sql) if guard.is_asking else sql, parameters)
            # To the end, since an unread row would make COMMIT say BUSY for ever.
            rows = cursor.fetchall() if cursor.description is not None else None
        except BaseException as error:
            if isinstance(error, sqlite3.Error) and text.verb == "VACUUM":
                self._explain_vacuum(error)
            self._last_rowid = None
            try:
                cursor.close()  # it may have rows left
            finally:  # Ctrl-C comes behind a call
                self._cursor = sqlite3.Connection.cursor(self._connection)
            raise
        finally:
            guard.is_asking = False
        rowcount, description = cursor.rowcount, cursor.description
        if rowcount == -1 and text.verb in CHANGING and (rows is None or text.returning):
            rowcount = self._ask("SELECT changes()")  # sqlite3 counts only statements that begin with their verb
        lastrowid = None
        if text.inserts:
            lastrowid = self._inserted(text.table, rowcount, cursor.lastrowid)
        elif text.verb not in READING:
            self._last_rowid = None  # an upsert has changed it, perhaps, or CREATE VIRTUAL TABLE
        return Result(rows or [], rowcount, lastrowid, description)

    def insert(self, sql: str, parameters: Parameters) -> Result | int:
        """Run one statement, as ``execute``; where a plain INSERT adds one row, its rowid stands for the Result."""
        if sql is not self._known:
            text = describe_sql(sql)
            if not text.inserts or text.returning or text.behind_with:
                return self._execute(sql, parameters)
            self._known, self._table = sql, text.table
        cursor, before = self._cursor, self._last_rowid
        self._last_rowid = None  # if it fails
        cursor.execute(sql, parameters)
        rowid = cursor.lastrowid
        if rowid != before and before is not None and cursor.rowcount == 1:  # so it is not left from an earlier one
            self._last_rowid = rowid
            return rowid or 0
        self._last_rowid = before
        rowcount = cursor.rowcount if cursor.rowcount >= 0 else self._ask("SELECT changes()")
        return Result([], rowcount, self._inserted(self._table, rowcount, rowid), None)

    def _explain_vacuum(self, error: sqlite3.Error) -> None:
        if self._connection.in_transaction:
            text = "VACUUM cannot run inside a transaction, and a job is one: use run_without_transaction"
            BaseException.add_note(error, f"onewriter: {text}")

    def forget_rowid(self) -> None:
        """Others use the connection too."""
        self._last_rowid = None

    def execute_script(self, sql: str) -> None:
        """Run many statements, in the transaction that is open."""
        self._last_rowid = None
        guard = self._guard
        guard.hidden_commit = True
        try:
            sqlite3.Connection.executescript(self._connection, sql).close()
        except sqlite3.OperationalError as error:
            if "VACUUM" in str(error) and "VACUUM" in words_of(sql):  # which of them it was is not told otherwise
                self._explain_vacuum(error)
            raise
        finally:
            guard.hidden_commit = False

    def execute_many(self, sql: str, rows: list[Parameters]) -> Result:
        text = describe_sql(sql)
        if text.behind_with and text.verb in CHANGING:  # of which sqlite3 counts nothing
            return Result([], sum(self._execute(sql, row).rowcount for row in rows), None, None)
        self._last_rowid = None  # sqlite3 does not tell it after executemany
        cursor = sqlite3.Connection.executemany(self._connection, sql, rows)
        try:
            return Result([], cursor.rowcount if rows else 0, None, None)
        finally:
            cursor.close()

    def _inserted(self, table: str, rowcount: int, lastrowid: int | None) -> int | None:
        before, self._last_rowid = self._last_rowid, lastrowid
        if rowcount < 1:
            return None
        # sqlite3 reports the connection's last rowid; a WITHOUT ROWID table leaves that of an earlier statement there.
        if (lastrowid == before or before is None) and self._ask(WITHOUT_ROWID, (table,)):
            return None
        return lastrowid

    def _ask(self, sql: str, parameters: Parameters = ()) -> int:
        cursor = sqlite3.Connection.execute(self._connection, sql, parameters)
        try:
            cursor.row_factory = None  # one of the user's must not be asked about our own row
            return int(cursor.fetchone()[0])
        finally:
            cursor.close()

    def surely_had_no_effect(self, sql: str, error: BaseException, schema_fails: bool) -> bool:
        """Whether it is certain that the statement that raised ``error`` has changed nothing."""
        text = describe_sql(sql)
        if text.returning or not issubclass(type(error), sqlite3.Error):
            return False  # it can have been done, and the error come from reading its rows
        if text.verb in ASKING:
            return True
        code = error_code(error)
        if code == sqlite3.SQLITE_ERROR:  # bad SQL, or a failure midway
            try:
                sqlite3.Connection.execute(self._connection, f"EXPLAIN {sql}").close()
            except sqlite3.OperationalError:
                return True
            except sqlite3.Error:
                pass  # it has parameters, so it was prepared
            return False
        return code == 0 or code == sqlite3.SQLITE_AUTH or (code in UNDONE and not text.fails and not schema_fails)
