"""LentConnection: a ``sqlite3.Connection`` for libraries that want one, good while the loan lasts."""

from __future__ import annotations

import contextlib
import sqlite3
import weakref
from collections.abc import Callable
from typing import Any, NoReturn, Protocol, Self

from onewriter.statement import split_script


class Loan(Protocol):
    """What lends: it runs one call at a time, and none after its end."""

    connection: sqlite3.Connection

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any: ...
    def savepoint(self) -> contextlib.AbstractContextManager[None]: ...
    def undo(self, end_cursors: Callable[[], None]) -> None: ...
    def outlasts(self, name: str) -> None: ...


def _through_loan(name: str) -> Any:
    method = getattr(sqlite3.Cursor, name)

    def call(self: LentCursor, *args: Any, **options: Any) -> Any:
        return self.lent.loan.call(method, self, *args, **options)

    call.__name__ = name
    return call


class LentCursor(sqlite3.Cursor):
    """A cursor of a lent connection."""

    lent: LentConnection
    connection = property(lambda self: self.lent)
    execute = _through_loan("execute")
    executemany = _through_loan("executemany")
    fetchone = _through_loan("fetchone")
    fetchmany = _through_loan("fetchmany")
    fetchall = _through_loan("fetchall")
    __next__ = _through_loan("__next__")

    def executescript(self, sql: str, /) -> Self:
        self.lent.executescript(sql)
        return self


def _delegated(name: str) -> Any:
    def call(self: LentConnection, *args: Any, **options: Any) -> Any:
        return self.loan.call(getattr(sqlite3.Connection, name), self.loan.connection, *args, **options)

    call.__name__ = name
    return call


def _outlasting(name: str) -> Any:
    call = _delegated(name)

    def call_and_tell(self: LentConnection, *args: Any, **options: Any) -> Any:
        self.loan.outlasts(name)
        return call(self, *args, **options)

    call_and_tell.__name__ = name
    return call_and_tell


def _refused(name: str) -> Any:
    def call(self: LentConnection, *args: Any, **options: Any) -> NoReturn:
        raise sqlite3.NotSupportedError(f"{name} would outlast the loan of this connection: it belongs in on_connect")

    return call


class LentConnection(sqlite3.Connection):
    """Stands for a connection of the gateway while a job, a block or a reader lasts.

    The gateway commits, rolls back and closes: here ``commit``, ``close`` and ``with`` do nothing, and ``rollback``
    undoes what this job or block has done so far. ``isolation_level`` and ``autocommit`` may be set and mean nothing.
    """

    # It has no database of its own, so that what keeps it cannot reach a later loan: __init__ is not passed on, and
    # whatever is not replaced here raises "Base Connection.__init__ not called".
    def __init__(self, loan: Loan) -> None:
        self.loan = loan
        self.isolation_level = ""
        self.autocommit = getattr(sqlite3, "LEGACY_TRANSACTION_CONTROL", -1)
        self.row_factory = loan.connection.row_factory
        self._live: weakref.WeakSet[sqlite3.Cursor | sqlite3.Blob] = weakref.WeakSet()

    isolation_level: Any = None
    autocommit: Any = None
    row_factory: Any = None
    in_transaction = property(lambda self: self.loan.call(getattr, self.loan.connection, "in_transaction"))
    total_changes = property(lambda self: self.loan.call(getattr, self.loan.connection, "total_changes"))

    @property
    def text_factory(self) -> Any:
        return self.loan.call(getattr, self.loan.connection, "text_factory")

    @text_factory.setter
    def text_factory(self, value: Any) -> None:
        self.loan.call(setattr, self.loan.connection, "text_factory", value)

    def cursor(self, factory: Any = LentCursor) -> Any:
        if not (isinstance(factory, type) and issubclass(factory, sqlite3.Cursor)):
            raise TypeError("the factory of a lent connection's cursors must be a subclass of sqlite3.Cursor")
        if factory not in (sqlite3.Cursor, LentCursor):  # whose methods come first, and call ours
            factory = type(factory.__name__, (factory, LentCursor), {"lent": self})
        else:
            factory = LentCursor
        cursor = self.loan.call(sqlite3.Connection.cursor, self.loan.connection, factory)
        cursor.lent = self
        cursor.row_factory = self.row_factory
        self._live.add(cursor)
        return cursor

    def execute(self, *args: Any) -> sqlite3.Cursor:
        cursor: sqlite3.Cursor = self.cursor().execute(*args)
        return cursor

    def executemany(self, *args: Any) -> sqlite3.Cursor:
        cursor: sqlite3.Cursor = self.cursor().executemany(*args)
        return cursor

    def executescript(self, sql: str, /) -> sqlite3.Cursor:
        # sqlite3's own begins with a COMMIT.
        with self.loan.savepoint():
            for statement in split_script(sql):
                self.execute(statement).close()
        cursor: sqlite3.Cursor = self.cursor()
        return cursor

    def blobopen(self, *args: Any, **options: Any) -> sqlite3.Blob:
        blob: sqlite3.Blob = self.loan.call(sqlite3.Connection.blobopen, self.loan.connection, *args, **options)
        self._live.add(blob)
        return blob

    def iterdump(self, **options: Any) -> Any:
        from sqlite3.dump import _iterdump  # type: ignore[attr-defined]

        return _iterdump(self, **options)

    def commit(self) -> None:
        pass

    def rollback(self) -> None:
        self.loan.undo(self.close_cursors)

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> Any:
        return False

    def __call__(self, sql: str, /) -> NoReturn:
        raise sqlite3.NotSupportedError("statements are prepared by execute")

    create_function = _outlasting("create_function")
    create_aggregate = _outlasting("create_aggregate")
    create_window_function = _outlasting("create_window_function")
    create_collation = _outlasting("create_collation")
    enable_load_extension = _outlasting("enable_load_extension")
    load_extension = _outlasting("load_extension")
    set_trace_callback = _outlasting("set_trace_callback")
    getlimit = _delegated("getlimit")
    if hasattr(sqlite3.Connection, "getconfig"):
        getconfig = _delegated("getconfig")
    serialize = _delegated("serialize")
    interrupt = _delegated("interrupt")
    set_authorizer = _refused("set_authorizer")
    set_progress_handler = _refused("set_progress_handler")
    setlimit = _refused("setlimit")
    setconfig = _refused("setconfig")
    deserialize = _refused("deserialize")
    backup = _refused("backup")

    def close_cursors(self) -> None:
        """A live cursor would keep COMMIT or the next snapshot from happening."""
        for live in list(self._live):
            if isinstance(live, sqlite3.Cursor):
                sqlite3.Cursor.close(live)
            else:
                live.close()
