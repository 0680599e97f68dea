"""LentCursor: a cursor of a lent connection."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Self

from onewriter.errors import TransactionAbortedError
from onewriter.sqlite.connection import open_scratch
from onewriter.sqlite.lending import LentShell
from onewriter.sqlite.statement import split_script

MANY = 500  # cursors of one closed connection, which keeps a weak reference to each, also of those that are gone


class LentCursor(sqlite3.Cursor):
    """A cursor of a lent connection: a shell around the real one.

    Its base is a cursor of a closed connection, or a closed one of a scratch database: C code that gets this cursor,
    such as ``sqlite3.Row``, reads the base's ``description``.
    """

    _onewriter_lent: LentShell | None = None  # set in a class that was made for one connection

    # Two underscores: subclasses in libraries have attributes of their own.
    __lent: LentShell
    __raw: sqlite3.Cursor
    __factory: Any = None  # the row_factory
    __applies = False  # the factory is called here, with this cursor; sqlite3 would pass the real one
    __described: Any = None  # the description that the base has
    __rowcount: int | None = None  # the sum, where many statements have run
    __lastrowid: int | None = None  # of a cursor that this one has replaced
    __is_closed = False

    def __new__(cls, connection: Any = None, *_: Any, **__: Any) -> Self:
        lent = cls._onewriter_lent or connection
        if not isinstance(lent, LentShell):
            raise TypeError("a lent connection's cursors are made by its cursor()")
        self = cls._of(lent)
        lent._loan.call(LentCursor.__open, self)
        return self

    def __init__(self, connection: Any, /) -> None:
        if connection is not self.__lent:
            raise sqlite3.ProgrammingError("this cursor belongs to another connection")

    @classmethod
    def _of(cls, lent: LentShell) -> Self:
        """The shell alone."""
        self = sqlite3.Cursor.__new__(cls)
        sqlite3.Cursor.__init__(self, _closed if next(_made) % MANY else _another_closed())
        self.__lent = lent
        return self

    def __open(self) -> None:
        lending = self.__lent._lending
        lending.sweep()
        self.__raw = raw = sqlite3.Connection.cursor(lending.loan.connection)
        lending.live[raw] = None
        raw.row_factory = None if self.__applies else self.__factory  # it has inherited the gateway's

    def __open_and_execute(self, *args: Any) -> None:
        LentCursor.__open(self)
        self.__lent._lending.transaction.run(sqlite3.Cursor.execute, self.__raw, *args)

    @staticmethod
    def _execute_new(lent: LentShell, args: tuple[Any, ...]) -> LentCursor:
        """``lent.cursor().execute(*args)``, with one call of the loan."""
        self = LentCursor._of(lent)
        factory = lent.row_factory
        if factory is not None:
            self.__factory, self.__applies = factory, not is_plain_row(factory)
        lent._loan.call(LentCursor.__open_and_execute, self, *args)
        return self

    def __del__(self) -> None:
        try:
            self.__lent._lending.drop(self.__raw)
        except AttributeError:  # __new__ has failed
            pass

    @property
    def connection(self) -> Any:
        return self.__lent

    @property
    def description(self) -> Any:
        return self.__raw.description

    @property
    def lastrowid(self) -> Any:
        rowid = self.__raw.lastrowid
        return self.__lastrowid if rowid is None else rowid

    @property
    def rowcount(self) -> int:
        return self.__raw.rowcount if self.__rowcount is None else self.__rowcount

    @property
    def arraysize(self) -> int:
        return self.__raw.arraysize

    @arraysize.setter
    def arraysize(self, value: int) -> None:
        self.__raw.arraysize = value

    @property
    def row_factory(self) -> Any:
        return self.__factory

    @row_factory.setter
    def row_factory(self, factory: Any) -> None:
        self._set_row_factory(factory)

    def _set_row_factory(self, factory: Any) -> None:
        self.__applies = factory is not None and not is_plain_row(factory)
        self.__factory = factory
        self.__raw.row_factory = None if self.__applies else factory

    def execute(self, *args: Any) -> Self:
        self.__rowcount = None
        lent = self.__lent
        lent._loan.call(lent._lending.transaction.run, sqlite3.Cursor.execute, self.__raw, *args)
        return self

    def executemany(self, sql: str, rows: Any, /) -> Self:
        self.__rowcount = None
        if type(rows) in (list, tuple):
            lent = self.__lent
            lent._loan.call(lent._lending.transaction.run, sqlite3.Cursor.executemany, self.__raw, sql, rows)
        else:
            self.__execute_each(sql, iter(rows))
        return self

    def __execute_each(self, sql: str, rows: Any) -> None:
        # The rows may come from another cursor of this connection, or from this one, so no call holds the lock while
        # the next row is fetched. Nor are they collected first: the generator may yield one object again and again.
        old, call, count = self.__raw, self.__lent._loan.call, -1
        if self.__is_closed or not is_text(sql):
            call(sqlite3.Cursor.executemany, old, sql, ())  # raises why
        call(LentCursor.__open, self)
        new, self.__raw = self.__raw, old
        try:
            new.arraysize = old.arraysize
            call(self.__lent._lending.transaction.run, sqlite3.Cursor.executemany, new, sql, ())
            count = new.rowcount
            for row in rows:
                call(sqlite3.Cursor.executemany, new, sql, (row,))
                count += new.rowcount if count >= 0 else 0
        except BaseException:
            count = -1  # as of any that fails
            with contextlib.suppress(Exception):  # the loan has ended: so has the statement
                # Resets it: a row that RETURNING has left would be in the way of a COMMIT.
                call(sqlite3.Cursor.executemany, new, sql, ())
            raise
        finally:
            self.__raw, self.__rowcount, self.__lastrowid = new, count, self.lastrowid
            self.__lent._lending.drop(old)
            if self.__is_closed:  # by what gives the rows
                self.close()

    def executescript(self, sql: str, /) -> Self:
        lent = self.__lent
        lent._loan.call(LentCursor.__run_script, self, sql)
        return self

    def __run_script(self, sql: str) -> None:
        """In one call of the loan, so that no other statement comes between."""
        if self.__is_closed or not is_text(sql):
            sqlite3.Cursor.executescript(self.__raw, sql)  # raises why, before it does anything
        lending = self.__lent._lending
        # By another one: what this cursor has to give, and says of its last statement, stays as it is.
        raw = sqlite3.Connection.cursor(lending.loan.connection)
        lending.live[raw] = None
        raw.row_factory = None

        def run(statement: str) -> None:
            try:
                lending.transaction.run_bare(sqlite3.Cursor.execute, raw, statement)
                deque(raw, 0)  # to its end: no signal handler comes in between, and leaves it half run
            except BaseException:
                raw.close()  # a row could not be made: the statement is open yet, and nothing could be undone
                raise

        try:
            lending.transaction.script(split_script(sql), run)
        finally:
            lending.drop(raw)

    def fetchone(self) -> Any:
        row = self.__fetch(sqlite3.Cursor.fetchone)
        return self.__factory(self, row) if self.__applies and row is not None else row

    def fetchmany(self, *args: Any, **options: Any) -> list[Any]:
        return self.__rows_of(self.__fetch(sqlite3.Cursor.fetchmany, *args, **options))

    def fetchall(self) -> list[Any]:
        return self.__rows_of(self.__fetch(sqlite3.Cursor.fetchall))

    def __next__(self) -> Any:
        row = self.__fetch(sqlite3.Cursor.__next__)
        return self.__factory(self, row) if self.__applies else row

    def __iter__(self) -> Self:
        return self

    def __fetch(self, method: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
        if self.__applies:
            return self.__lent._loan.call(LentCursor.__fetch_and_describe, self, method, *args, **options)
        return self.__lent._loan.call(method, self.__raw, *args, **options)

    def __fetch_and_describe(self, method: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
        """Give the base the same description: the factory may pass this cursor to ``sqlite3.Row``."""
        raw = self.__raw
        rows = method(raw, *args, **options)
        columns = raw.description
        if columns is not self.__described and columns is not None:
            names = ", ".join('NULL AS "{}"'.format(name.replace('"', '""')) for name, *_ in columns)
            sqlite3.Cursor.__init__(self, _scratch())
            sqlite3.Cursor.execute(self, f"SELECT {names} WHERE 0")
            sqlite3.Cursor.close(self)
            self.__described = columns
        return rows

    def __rows_of(self, rows: list[Any]) -> list[Any]:
        if self.__applies:
            factory = self.__factory
            return [factory(self, row) for row in rows]
        return rows

    def close(self) -> None:
        """Reset its statement. Allowed after the loan has ended, where there is nothing left to do."""
        loan = self.__lent._loan
        if not loan.is_over:
            with contextlib.suppress(TransactionAbortedError):  # it would hide why SQLite has rolled back
                loan.call(sqlite3.Cursor.close, self.__raw)
                self.__is_closed = True


def is_plain_row(factory: Any) -> bool:
    """Whether sqlite3 makes such a row without calling Python code, which would see the real cursor."""
    row = sqlite3.Row
    return factory is row or (
        type(factory) is type
        and issubclass(factory, row)
        and factory.__new__ is row.__new__
        and factory.__init__ is row.__init__
    )


def is_text(sql: object) -> bool:
    """Whether SQLite can be given it; raises UnicodeEncodeError as sqlite3 does."""
    return isinstance(sql, str) and b"\0" not in str.encode(sql)


def _scratch() -> sqlite3.Connection:
    """This thread's in-memory connection, which allows nothing but SELECTs of constants."""
    try:
        scratch: sqlite3.Connection = _of_thread.scratch
    except AttributeError:
        scratch = _of_thread.scratch = open_scratch()
    scratch.cursor()  # where it drops its weak references to cursors that are gone
    return scratch


def _another_closed() -> LentShell:
    """A closed connection has no such place."""
    global _closed
    _closed = LentShell.__new__(LentShell)
    return _closed


_of_thread = threading.local()
_closed = LentShell.__new__(LentShell)  # the bases of the next cursors belong to it
_made = itertools.count(1)
