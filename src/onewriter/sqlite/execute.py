"""Executor: runs statements and scripts on the write connection."""

from __future__ import annotations

import sqlite3
from typing import cast

from onewriter.base.arguments import check_sql
from onewriter.sqlite.guard import OF_ITS_OWN, Guard
from onewriter.sqlite.result import Result
from onewriter.sqlite.retry import FAILURES, error_code
from onewriter.sqlite.statement import (
    ASKING,
    CHANGING,
    READING,
    WITHOUT_ROWID,
    OwnText,
    Parameters,
    describe_sql,
    words_of,
)

NO_ROWID = object()  # not that of any row, so that each INSERT of a row has another
# Constraint errors after which SQLite has undone the whole statement, unless its conflict clause is FAIL.
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
    """Runs statements on one connection and returns Results. Belongs to the thread that holds the connection."""

    def __init__(self, connection: sqlite3.Connection, guard: Guard) -> None:
        self._connection = connection
        self._guard = guard
        self._cursor = sqlite3.Connection.cursor(connection)  # a new one for each statement would double its cost
        self._last_rowid: object = None  # None: it is not known
        self._known: object = object()  # the text of the last plain INSERT
        self._table = OwnText()  # of that INSERT

    def execute(self, sql: str, parameters: Parameters) -> Result:
        """Run one statement to completion."""
        result = self.insert(sql, parameters)
        return Result([], 1, result, None) if type(result) is int else cast(Result, result)

    def execute_bare(self, sql: str, parameters: Parameters) -> Result:
        """The same outside any transaction. It commits by itself, so nothing is asked behind it: a lock that refuses
        the question would be taken for one that has refused the statement.
        """
        text = describe_sql(check_sql(sql))
        before: object = NO_ROWID
        if text.inserts and self._ask(WITHOUT_ROWID, (text.table,)):  # or one of that name in another file
            before = self._ask("SELECT last_insert_rowid()")
        self._last_rowid = NO_ROWID
        try:
            result = self.execute(sql, parameters)
        finally:
            self._last_rowid = None
        if result.lastrowid == before:
            result.lastrowid = None
        return result

    def _execute(self, sql: str, parameters: Parameters) -> Result:
        cursor, text, guard = self._cursor, describe_sql(sql), self._guard
        if text.verb == "PRAGMA" and "INCREMENTAL_VACUUM" in words_of(sql):
            # Its rows have no columns: sqlite3 would leave it half run, since it fetches none before Python 3.12. A
            # script has no parameters, and may be several statements: what ``execute`` refuses is refused here first.
            sqlite3.Connection.execute(self._connection, f"EXPLAIN {sql}", parameters).close()
            self.execute_script(sql)
            return Result([], -1, None, None)
        guard.is_asking = text.verb in ASKING and guard.mode in OF_ITS_OWN
        try:
            # The statement cache would skip the authorizer for a text that a job of many statements was allowed.
            cursor.execute(guard.asked_anew(sql) if guard.is_asking else sql, parameters)
            # All rows: a statement that is not reset would make COMMIT fail with BUSY for ever.
            rows = cursor.fetchall() if cursor.description is not None else None
        except BaseException as error:
            if isinstance(error, sqlite3.Error) and text.verb == "VACUUM":
                self._explain_vacuum(error)
            self._last_rowid = None
            try:
                cursor.close()  # it may have pending rows
            finally:  # KeyboardInterrupt can be raised after any call
                self._cursor = sqlite3.Connection.cursor(self._connection)
            raise
        finally:
            guard.is_asking = False
        rowcount, description = cursor.rowcount, cursor.description
        if rowcount == -1 and text.verb in CHANGING and (rows is None or text.returning):
            rowcount = self._ask("SELECT changes()")  # sqlite3 sets rowcount only if the text begins with the verb
        lastrowid = None
        if text.inserts:
            lastrowid = self._inserted(text.table, rowcount, cursor.lastrowid)
        elif text.verb not in READING:
            self._last_rowid = None  # an upsert or CREATE VIRTUAL TABLE may have changed it
        return Result(rows or [], rowcount, lastrowid, description)

    def insert(self, sql: str, parameters: Parameters) -> Result | int:
        """Like ``execute``, but returns only the rowid if a plain INSERT has added one row."""
        if sql is not self._known:
            sql = check_sql(sql)
            text = describe_sql(sql)
            if not text.inserts or text.returning or text.behind_with:
                return self._execute(sql, parameters)
            self._known, self._table = sql, text.table
        cursor, before = self._cursor, self._last_rowid
        try:
            cursor.execute(sql, parameters)
        except BaseException:
            self._last_rowid = None
            raise
        rowid = cursor.lastrowid
        if rowid != before and before is not None and cursor.rowcount == 1:  # so it is not that of an earlier INSERT
            self._last_rowid = rowid
            return rowid or 0
        rowcount = cursor.rowcount if cursor.rowcount >= 0 else self._ask("SELECT changes()")
        return Result([], rowcount, self._inserted(self._table, rowcount, rowid), None)

    def _explain_vacuum(self, error: sqlite3.Error) -> None:
        if self._connection.in_transaction:
            text = "VACUUM cannot run inside a transaction, and a job is one: use run_without_transaction"
            BaseException.add_note(error, f"onewriter: {text}")

    def close(self) -> None:
        self._cursor.close()

    def forget_rowid(self) -> None:
        """Another job is about to use the connection."""
        self._last_rowid = None

    def execute_script(self, sql: str) -> None:
        """Run many statements in the open transaction."""
        self._last_rowid = None
        guard = self._guard
        guard.hidden_commit = True
        try:
            sqlite3.Connection.executescript(self._connection, sql).close()
        except sqlite3.OperationalError as error:
            if "VACUUM" in str(error) and "VACUUM" in words_of(sql):  # nothing else says which statement failed
                self._explain_vacuum(error)
            raise
        finally:
            guard.hidden_commit = False

    def execute_many(self, sql: str, rows: list[Parameters]) -> Result:
        text = describe_sql(sql)
        if text.behind_with and text.verb in CHANGING:  # sqlite3 reports no rowcount for these
            return Result([], sum(self._execute(sql, row).rowcount for row in rows), None, None)
        self._last_rowid = None  # sqlite3 does not report it after executemany
        cursor = sqlite3.Connection.executemany(self._connection, sql, rows)
        try:
            return Result([], cursor.rowcount if rows else 0, None, None)
        finally:
            cursor.close()

    def _inserted(self, table: OwnText, rowcount: int, lastrowid: int | None) -> int | None:
        before, self._last_rowid = self._last_rowid, lastrowid
        if rowcount < 1:
            return None
        # sqlite3 reports the connection's last rowid, which an INSERT into a WITHOUT ROWID table leaves unchanged.
        if (lastrowid == before or before is None) and self._ask(WITHOUT_ROWID, (table,)):
            return None
        return lastrowid

    def _ask(self, sql: str, parameters: Parameters = ()) -> int:
        cursor = sqlite3.Connection.execute(self._connection, sql, parameters)
        try:
            cursor.row_factory = None  # the user's must not see an internal row
            return int(cursor.fetchone()[0])
        finally:
            cursor.close()

    def surely_had_no_effect(self, sql: str, error: BaseException, schema_fails: bool) -> bool:
        """Whether it is certain that the statement that raised ``error`` has changed nothing."""
        text = describe_sql(sql)
        if text.returning or not issubclass(type(error), sqlite3.Error):
            return False  # it may have completed, and reading its rows have raised
        if text.verb in ASKING:
            return True
        code = error_code(error)
        if code == sqlite3.SQLITE_ERROR:  # a syntax error, or a failure while it ran
            try:
                sqlite3.Connection.execute(self._connection, f"EXPLAIN {sql}").close()
            except sqlite3.OperationalError:
                return True
            except FAILURES:
                pass  # its parameters are missing, so it was prepared; or there is no memory
            return False
        return code == 0 or code == sqlite3.SQLITE_AUTH or (code in UNDONE and not text.fails and not schema_fails)
