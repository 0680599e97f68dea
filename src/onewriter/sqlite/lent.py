"""LentConnection: a ``sqlite3.Connection`` for libraries that need one, valid while the loan lasts."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import types
import weakref
from typing import Any, NoReturn, Self

from onewriter.sqlite.lending import Lender, Lending, LentShell, Loan
from onewriter.sqlite.lent_blob import LentBlob
from onewriter.sqlite.lent_cursor import LentCursor
from onewriter.sqlite.lent_transaction import LentTransaction

MOST_SHELLS = 16  # kept for later loans


def lend(loan: Loan) -> Lending:
    """Make a connection for this loan."""
    try:
        connection = _shells.pop()
    except IndexError:
        connection = LentConnection.__new__(LentConnection)
    raw = loan.connection
    lending = Lending(loan, connection, LentTransaction(raw, loan.savepoints, loan.guard))
    lending.changes = raw.total_changes
    connection._begin(lending)
    return lending


def retire(lender: Lender) -> None:
    """End what ``lender`` has lent; called under the loan's lock. A shell without other references is reused for a
    later loan, since creating one takes longer than a read.
    """
    lending, lender.lent = lender.lent, None
    if lending is None:
        return
    lending.close_live()
    shell, lending.connection = lending.connection, None
    if _count_references(shell) == _ALONE and not weakref.getweakrefcount(shell) and len(_shells) < MOST_SHELLS:
        assert shell is not None
        shell.__dict__.clear()
        with contextlib.suppress(sqlite3.Error):  # sqlite3.Connection.__init__ was called on it again
            sqlite3.Connection.close(shell)
            _shells.append(shell)


def _count_references(lent: object) -> int:
    return sys.getrefcount(lent)


def _count_of_one() -> int:
    lent = LentConnection.__new__(LentConnection)
    return _count_references(lent)


def _delegated(name: str) -> Any:
    def call(self: LentConnection, *args: Any, **options: Any) -> Any:
        return self._loan.call(getattr(sqlite3.Connection, name), self._loan.connection, *args, **options)

    call.__name__ = name
    return call


def _outlasting(name: str) -> Any:
    def call(self: LentConnection, *args: Any, **options: Any) -> Any:
        # Not in a function that SQLite calls: that may be the function which is replaced.
        loan = self._loan
        return loan.call_outside(_note_and_call, loan, name, *args, **options)

    call.__name__ = name
    return call


def _note_and_call(loan: Loan, name: str, /, *args: Any, **options: Any) -> Any:
    loan.mark_dirty(name)
    return getattr(sqlite3.Connection, name)(loan.connection, *args, **options)


def _refused(name: str) -> Any:
    def call(self: LentConnection, *args: Any, **options: Any) -> NoReturn:
        raise sqlite3.NotSupportedError(
            f"{name} would stay in effect after this connection is given back: use on_connect"
        )

    call.__name__ = name
    return call


class LentConnection(LentShell):
    """Stands in for a connection of the gateway during a job, a block or a reader.

    Its transaction is a part of the job (``LentTransaction``); that of a reader has nothing to undo. ``close`` has
    no effect: the gateway closes connections.
    """

    _classes: dict[type[sqlite3.Cursor], type[LentCursor]]  # by the library's cursor class that each extends

    def _begin(self, lending: Lending) -> None:
        self._lending = lending
        self._loan = loan = lending.loan
        self.row_factory = loan.connection.row_factory
        self._classes = {}

    @property
    def isolation_level(self) -> Any:
        return self._transaction.isolation_level

    @isolation_level.setter
    def isolation_level(self, level: Any) -> None:
        self._loan.call(self._transaction.set_isolation_level, level)

    @property
    def autocommit(self) -> Any:
        _since_3_12()
        return self._transaction.autocommit

    @autocommit.setter
    def autocommit(self, value: Any) -> None:
        _since_3_12()
        self._loan.call(self._transaction.set_autocommit, value)

    @property
    def in_transaction(self) -> bool:
        # Without the loan's call, which raises if SQLite has rolled back by itself.
        return self._transaction.is_open and self._loan.connection.in_transaction

    @property
    def total_changes(self) -> int:
        lending = self._lending
        changes: int = self._loan.call(getattr, lending.loan.connection, "total_changes")
        return changes - lending.changes

    @property
    def _transaction(self) -> LentTransaction:
        loan = self._loan
        if loan.is_over:
            raise loan.ended()
        return self._lending.transaction

    @property
    def text_factory(self) -> Any:
        return self._loan.call(getattr, self._loan.connection, "text_factory")

    @text_factory.setter
    def text_factory(self, value: Any) -> None:
        self._loan.call(setattr, self._loan.connection, "text_factory", value)

    def cursor(self, factory: Any = LentCursor) -> Any:
        cursor = self._class_of(factory)(self)
        if not isinstance(cursor, LentCursor):
            raise TypeError(f"factory must return a cursor, not {type(cursor).__name__}")
        if self.row_factory is not None:
            LentCursor._set_row_factory(cursor, self.row_factory)
        return cursor

    def _class_of(self, factory: Any) -> type[LentCursor]:
        if factory is LentCursor or factory is sqlite3.Cursor:
            return LentCursor
        if not (isinstance(factory, type) and issubclass(factory, sqlite3.Cursor)):
            raise TypeError("the factory of a lent connection's cursors must be a subclass of sqlite3.Cursor")
        made = self._classes.get(factory)
        if made is None:  # the library's methods first: their super() is ours
            made = types.new_class(
                factory.__name__, (factory, LentCursor), None, lambda names: names.update(_onewriter_lent=self)
            )
            self._classes[factory] = made
        return made

    def execute(self, *args: Any) -> sqlite3.Cursor:
        return LentCursor._execute_new(self, args)

    def executemany(self, sql: str, rows: Any, /) -> sqlite3.Cursor:
        cursor: sqlite3.Cursor = self.cursor().executemany(sql, rows)
        return cursor

    def executescript(self, sql: str, /) -> sqlite3.Cursor:
        cursor: LentCursor = self.cursor()
        LentCursor.executescript(cursor, sql)
        return cursor

    def blobopen(self, *args: Any, **options: Any) -> Any:
        return self._loan.call(self._open_blob, *args, **options)

    def _open_blob(self, *args: Any, **options: Any) -> LentBlob:
        lending = self._lending
        lending.sweep()
        raw = sqlite3.Connection.blobopen(lending.loan.connection, *args, **options)
        if not options.get("readonly"):
            lending.loan.guard.written.add(options.get("name", "main"))  # SQLite asks nobody
        lending.live[raw] = None
        blob = LentBlob.__new__(LentBlob)
        blob._lent, blob._raw = self, raw
        return blob

    def iterdump(self, **options: Any) -> Any:
        from sqlite3.dump import _iterdump  # type: ignore[attr-defined]

        return _iterdump(self, **options)

    def commit(self) -> None:
        self._loan.call(self._transaction.commit)

    def rollback(self) -> None:
        # Where SQLite has rolled back by itself, there is nothing to do: an error would hide the one that says why.
        transaction, loan = self._transaction, self._loan
        if loan.connection.in_transaction:
            loan.call(transaction.rollback)

    def close(self) -> None:
        pass

    def backup(self, target: sqlite3.Connection, **options: Any) -> None:
        if target is self:
            raise ValueError("target cannot be the same connection instance")
        self._loan.backup(target, **options)

    def interrupt(self) -> None:
        self._loan.interrupt()

    def __enter__(self) -> Self:
        if self._loan.is_over:
            raise self._loan.ended()
        return self

    def __exit__(self, kind: object = None, *_: object) -> Any:
        if kind is not None:
            self.rollback()
            return False
        try:
            self.commit()
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # it may have ended: Ctrl-C comes behind that
                self.rollback()
            raise
        return False

    def __call__(self, *_: Any) -> NoReturn:
        if self._loan.is_over:
            raise self._loan.ended()
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
    set_authorizer = _refused("set_authorizer")
    set_progress_handler = _refused("set_progress_handler")
    setlimit = _refused("setlimit")
    setconfig = _refused("setconfig")
    deserialize = _refused("deserialize")

    # Those of the base are None, since it is closed.
    Warning, Error, InterfaceError, DatabaseError = (
        sqlite3.Warning,
        sqlite3.Error,
        sqlite3.InterfaceError,
        sqlite3.DatabaseError,
    )
    OperationalError, IntegrityError, DataError = sqlite3.OperationalError, sqlite3.IntegrityError, sqlite3.DataError
    ProgrammingError, InternalError = sqlite3.ProgrammingError, sqlite3.InternalError
    NotSupportedError = sqlite3.NotSupportedError


def _since_3_12() -> None:
    if sys.version_info < (3, 12):
        raise AttributeError("'sqlite3.Connection' object has no attribute 'autocommit'")


_shells: list[Any] = []  # LentConnections for later loans
_ALONE = _count_of_one()
