"""LentConnection: a ``sqlite3.Connection`` for libraries that want one, good while the loan lasts.

What a library gets are shells: SQLite's own connection, cursors and blobs stay inside, and every call on a shell asks
the loan, which has a lock. The methods of ``sqlite3`` itself, called on a shell past its class
(``sqlite3.Cursor.execute(cursor, …)``), find a base without a database, and raise ``sqlite3.ProgrammingError``.
"""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, NoReturn, Protocol, Self

from onewriter.sqlite.connection import open_scratch, seal
from onewriter.sqlite.statement import split_script

MOST_SHELLS = 16  # kept for later loans


class Loan(Protocol):
    """What lends: it runs one call at a time, and none after its end."""

    connection: sqlite3.Connection

    @property
    def is_over(self) -> bool:
        """Or inherited: nothing of it may be touched."""

    def call(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Any: ...
    def call_outside(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
        """The same, but not from code that SQLite calls."""

    def if_free(self, function: Callable[[], None]) -> None:
        """Call it under the lock, if that is free now."""

    def interrupt(self) -> None: ...
    def savepoint(self) -> contextlib.AbstractContextManager[None]: ...
    def undo(self, end_cursors: Callable[[], None]) -> None: ...
    def mark_dirty(self, name: str) -> None: ...


class Lender(Protocol):
    """What has lent, and forgets it at the end."""

    lent: Lending | None


class Lending:
    """What was made through one loan: the connection, and SQLite's cursors and blobs, which end with it.

    Not in the shell: sqlite3.Connection.__init__, called on that again, empties it.

    Locks: but for ``drop``, all is called under the loan's. ``live`` keeps cursors and blobs alive until they are ended
           under it: the collector drops a shell in any thread, while another may be inside SQLite.
    """

    def __init__(self, loan: Loan, connection: LentConnection | None) -> None:
        self.loan = loan
        self.connection = connection
        self.live: dict[sqlite3.Cursor | sqlite3.Blob, None] = {}
        self._dropped: list[sqlite3.Cursor | sqlite3.Blob] = []  # of shells that are gone

    def drop(self, thing: sqlite3.Cursor | sqlite3.Blob) -> None:
        """Its shell is gone: end it, now or with the next call or the end, whichever has the lock."""
        if thing in self.live:
            self._dropped.append(thing)
            self.loan.if_free(self.sweep)

    def sweep(self) -> None:
        while self._dropped:
            thing = self._dropped.pop()
            thing.close()  # a call that waits for the lock may have it in hand
            self.live.pop(thing, None)

    def close_live(self) -> None:
        """A live cursor would keep COMMIT or the next snapshot from happening."""
        live, self.live = self.live, {}
        for thing in live:
            with contextlib.suppress(sqlite3.ProgrammingError):  # its connection is closed
                thing.close()
        self._dropped.clear()


def lend(loan: Loan) -> Lending:
    """A connection for this loan."""
    try:
        connection = _shells.pop()
    except IndexError:
        connection = LentConnection.__new__(LentConnection)
    lending = Lending(loan, connection)
    connection._begin(lending)
    return lending


def retire(lender: Lender) -> None:
    """End, under the loan's lock, what ``lender`` has lent. If nobody else has the shell, it is kept for a later loan,
    since to make one takes longer than a read.
    """
    lending, lender.lent = lender.lent, None
    if lending is None:
        return
    lending.close_live()
    shell, lending.connection = lending.connection, None
    if _count_references(shell) == _ALONE and not weakref.getweakrefcount(shell) and len(_shells) < MOST_SHELLS:
        assert shell is not None
        shell.__dict__.clear()
        with contextlib.suppress(sqlite3.Error):  # of somebody who has opened it, by sqlite3.Connection.__init__
            sqlite3.Connection.close(shell)
            _shells.append(shell)


def _count_references(lent: object) -> int:
    return sys.getrefcount(lent)


def _count_of_one() -> int:
    lent = LentConnection.__new__(LentConnection)
    return _count_references(lent)


class LentCursor(sqlite3.Cursor):
    """A cursor of a lent connection: a shell around SQLite's own.

    The base is a cursor of a closed connection, or a closed one of a scratch database: C code that is
    given this cursor, as ``sqlite3.Row`` is, reads the base's ``description``.
    """

    _onewriter_lent: LentConnection | None = None  # of a class that was made for one connection

    # Two underscores, since the classes of libraries have attributes of their own.
    __lent: LentConnection
    __raw: sqlite3.Cursor
    __factory: Any = None  # the row_factory
    __applies = False  # it is called here, with this cursor, rather than by sqlite3 with its own
    __told: Any = None  # the description that the base has
    __rowcount: int | None = None  # where it is the sum of many statements

    def __new__(cls, connection: Any = None, *_: Any, **__: Any) -> Self:
        lent = cls._onewriter_lent or connection
        if not isinstance(lent, LentConnection):
            raise TypeError("a lent connection's cursors are made by its cursor()")
        self = cls._of(lent)
        lent._loan.call(LentCursor.__open, self)
        return self

    def __init__(self, connection: Any, /) -> None:
        if connection is not self.__lent:
            raise sqlite3.ProgrammingError("this cursor belongs to another connection")

    @classmethod
    def _of(cls, lent: LentConnection) -> Self:
        """The shell alone."""
        self = sqlite3.Cursor.__new__(cls)
        sqlite3.Cursor.__init__(self, _closed)
        self.__lent = lent
        return self

    def __open(self) -> None:
        lending = self.__lent._lending
        lending.sweep()
        self.__raw = raw = sqlite3.Connection.cursor(lending.loan.connection)
        lending.live[raw] = None
        raw.row_factory = None if self.__applies else self.__factory  # it had that of the gateway

    def __open_and_execute(self, *args: Any) -> None:
        LentCursor.__open(self)
        sqlite3.Cursor.execute(self.__raw, *args)

    @staticmethod
    def _execute_new(lent: LentConnection, args: tuple[Any, ...]) -> LentCursor:
        """``lent.cursor().execute(*args)``, in one call."""
        self = LentCursor._of(lent)
        factory = lent.row_factory
        if factory is not None:
            self.__factory, self.__applies = factory, not _is_plain_row(factory)
        lent._loan.call(LentCursor.__open_and_execute, self, *args)
        return self

    def __del__(self) -> None:
        try:
            self.__lent._lending.drop(self.__raw)
        except AttributeError:  # it never came so far
            pass

    @property
    def connection(self) -> Any:
        return self.__lent

    @property
    def description(self) -> Any:
        return self.__raw.description

    @property
    def lastrowid(self) -> Any:
        return self.__raw.lastrowid

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
        self.__applies = factory is not None and not _is_plain_row(factory)
        self.__factory = factory
        self.__raw.row_factory = None if self.__applies else factory

    def execute(self, *args: Any) -> Self:
        self.__rowcount = None
        self.__lent._loan.call(sqlite3.Cursor.execute, self.__raw, *args)
        return self

    def executemany(self, sql: str, rows: Any, /) -> Self:
        self.__rowcount = None
        if type(rows) in (list, tuple):
            self.__lent._loan.call(sqlite3.Cursor.executemany, self.__raw, sql, rows)
        else:
            self.__execute_each(sql, iter(rows))
        return self

    def __execute_each(self, sql: str, rows: Any) -> None:
        # Another cursor of this connection may be where they come from, or this one, so no call is under way as each
        # is asked for. Nor are they collected first: who makes them may use one object, changed, for all.
        old, call, count = self.__raw, self.__lent._loan.call, -1
        call(LentCursor.__open, self)
        new, self.__raw = self.__raw, old
        try:
            new.arraysize = old.arraysize
            call(sqlite3.Cursor.executemany, new, sql, ())
            count = new.rowcount
            for row in rows:
                call(sqlite3.Cursor.executemany, new, sql, (row,))
                count += new.rowcount if count >= 0 else 0
        finally:
            self.__raw, self.__rowcount = new, count
            self.__lent._lending.drop(old)

    def executescript(self, sql: str, /) -> Self:
        self.__lent.executescript(sql)
        return self

    def fetchone(self) -> Any:
        row = self.__fetch(sqlite3.Cursor.fetchone)
        return self.__factory(self, row) if self.__applies and row is not None else row

    def fetchmany(self, *args: Any, **options: Any) -> list[Any]:
        return self.__made(self.__fetch(sqlite3.Cursor.fetchmany, *args, **options))

    def fetchall(self) -> list[Any]:
        return self.__made(self.__fetch(sqlite3.Cursor.fetchall))

    def __next__(self) -> Any:
        row = self.__fetch(sqlite3.Cursor.__next__)
        return self.__factory(self, row) if self.__applies else row

    def __iter__(self) -> Self:
        return self

    def __fetch(self, method: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
        if self.__applies:
            return self.__lent._loan.call(LentCursor.__fetch_and_tell, self, method, *args, **options)
        return self.__lent._loan.call(method, self.__raw, *args, **options)

    def __fetch_and_tell(self, method: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
        """Have the base tell what the columns are: the factory may hand this cursor on to ``sqlite3.Row``."""
        raw = self.__raw
        rows = method(raw, *args, **options)
        columns = raw.description
        if columns is not self.__told and columns is not None:
            names = ", ".join('NULL AS "{}"'.format(name.replace('"', '""')) for name, *_ in columns)
            sqlite3.Cursor.__init__(self, _scratch())
            sqlite3.Cursor.execute(self, f"SELECT {names} WHERE 0")
            sqlite3.Cursor.close(self)
            self.__told = columns
        return rows

    def __made(self, rows: list[Any]) -> list[Any]:
        if self.__applies:
            factory = self.__factory
            return [factory(self, row) for row in rows]
        return rows

    def close(self) -> None:
        """End what it reads. After the loan, when that is done already, too."""
        loan = self.__lent._loan
        if not loan.is_over:
            loan.call(sqlite3.Cursor.close, self.__raw)


def _is_plain_row(factory: Any) -> bool:
    """Whether sqlite3 calls no Python code, which would see its own cursor, to make such a row."""
    row = sqlite3.Row
    return factory is row or (
        type(factory) is type
        and issubclass(factory, row)
        and factory.__new__ is row.__new__
        and factory.__init__ is row.__init__
    )


def _scratch() -> sqlite3.Connection:
    """This thread's: it answers SELECTs of constants, and nothing else."""
    try:
        return _of_thread.scratch  # type: ignore[no-any-return]
    except AttributeError:
        _of_thread.scratch = open_scratch()
        return _of_thread.scratch  # type: ignore[no-any-return]


def _of_blob(name: str) -> Any:
    method = getattr(sqlite3.Blob, name)

    def call(self: LentBlob, *args: Any, **options: Any) -> Any:
        return self._lent._loan.call(method, self._raw, *args, **options)

    call.__name__ = name
    return call


class LentBlob:
    """A blob of a lent connection: a shell around SQLite's own. ``sqlite3.Blob`` cannot be a base."""

    __slots__ = ("__weakref__", "_lent", "_raw")
    __class__ = property(lambda self: sqlite3.Blob)  # for isinstance

    _lent: LentConnection
    _raw: sqlite3.Blob

    def __init__(self) -> None:
        raise TypeError("a lent connection's blobs are made by its blobopen()")

    def __del__(self) -> None:
        try:
            self._lent._lending.drop(self._raw)
        except AttributeError:  # it never came so far
            pass

    def __reduce_ex__(self, _: object) -> NoReturn:
        raise TypeError("cannot pickle a blob")

    def __enter__(self) -> Self:
        self._lent._loan.call(sqlite3.Blob.__enter__, self._raw)
        return self

    def close(self) -> None:
        """End it. After the loan, when that is done already, too."""
        loan = self._lent._loan
        if not loan.is_over:
            loan.call(sqlite3.Blob.close, self._raw)

    read = _of_blob("read")
    write = _of_blob("write")
    seek = _of_blob("seek")
    tell = _of_blob("tell")
    __exit__ = _of_blob("__exit__")
    __len__ = _of_blob("__len__")
    __getitem__ = _of_blob("__getitem__")
    __setitem__ = _of_blob("__setitem__")
    __delitem__ = _of_blob("__delitem__")


def _delegated(name: str) -> Any:
    def call(self: LentConnection, *args: Any, **options: Any) -> Any:
        return self._loan.call(getattr(sqlite3.Connection, name), self._loan.connection, *args, **options)

    call.__name__ = name
    return call


def _outlasting(name: str) -> Any:
    def call(self: LentConnection, *args: Any, **options: Any) -> Any:
        # Not from code that SQLite calls: it could be the code that is replaced.
        loan = self._loan
        return loan.call_outside(_note_and_call, loan, name, *args, **options)

    call.__name__ = name
    return call


def _note_and_call(loan: Loan, name: str, /, *args: Any, **options: Any) -> Any:
    loan.mark_dirty(name)
    return getattr(sqlite3.Connection, name)(loan.connection, *args, **options)


def _refused(name: str) -> Any:
    def call(self: LentConnection, *args: Any, **options: Any) -> NoReturn:
        raise sqlite3.NotSupportedError(f"{name} would outlast the loan of this connection: it belongs in on_connect")

    call.__name__ = name
    return call


class _NoLoan:
    """Of a shell that sqlite3.Connection.__init__ has emptied."""

    is_over = True

    def __getattr__(self, name: str) -> NoReturn:
        raise sqlite3.ProgrammingError("this connection is not lent any more")


class LentConnection(sqlite3.Connection):
    """Stands for a connection of the gateway while a job, a block or a reader lasts.

    The gateway commits, rolls back and closes: here ``commit``, ``close`` and ``with`` do nothing, and ``rollback``
    undoes what this job or block has done so far. ``isolation_level`` and ``autocommit`` may be set and mean nothing.
    """

    _loan: Loan = _NoLoan()  # type: ignore[assignment]
    _lending: Lending = Lending(_loan, None)
    _classes: dict[type[sqlite3.Cursor], type[LentCursor]]  # of cursors, made for those of libraries

    def __new__(cls, *_: Any, **__: Any) -> Self:
        self = super().__new__(cls)
        seal(self)  # or else sqlite3.Cursor(connection) would crash
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        raise sqlite3.NotSupportedError("this connection is lent: it cannot be opened")

    def _begin(self, lending: Lending) -> None:
        self._lending = lending
        self._loan = loan = lending.loan
        self.isolation_level = ""
        self.autocommit = getattr(sqlite3, "LEGACY_TRANSACTION_CONTROL", -1)
        self.row_factory = loan.connection.row_factory
        self._classes = {}

    isolation_level: Any = None
    autocommit: Any = None
    row_factory: Any = None
    in_transaction = property(lambda self: self._loan.call(getattr, self._loan.connection, "in_transaction"))
    total_changes = property(lambda self: self._loan.call(getattr, self._loan.connection, "total_changes"))

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
        if made is None:  # its methods come first, and call ours
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
        # sqlite3's own begins with a COMMIT.
        with self._loan.savepoint():
            for statement in split_script(sql):
                self.execute(statement).close()
        cursor: sqlite3.Cursor = self.cursor()
        return cursor

    def blobopen(self, *args: Any, **options: Any) -> Any:
        return self._loan.call(self._open_blob, *args, **options)

    def _open_blob(self, *args: Any, **options: Any) -> LentBlob:
        lending = self._lending
        lending.sweep()
        raw = sqlite3.Connection.blobopen(lending.loan.connection, *args, **options)
        lending.live[raw] = None
        blob = LentBlob.__new__(LentBlob)
        blob._lent, blob._raw = self, raw
        return blob

    def iterdump(self, **options: Any) -> Any:
        from sqlite3.dump import _iterdump  # type: ignore[attr-defined]

        return _iterdump(self, **options)

    def commit(self) -> None:
        pass

    def rollback(self) -> None:
        self._loan.undo(self._lending.close_live)

    def close(self) -> None:
        pass

    def interrupt(self) -> None:
        self._loan.interrupt()

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
    set_authorizer = _refused("set_authorizer")
    set_progress_handler = _refused("set_progress_handler")
    setlimit = _refused("setlimit")
    setconfig = _refused("setconfig")
    deserialize = _refused("deserialize")
    backup = _refused("backup")


_shells: list[LentConnection] = []
_of_thread = threading.local()
_closed = LentConnection.__new__(LentConnection)  # of which the bases of all cursors are
_ALONE = _count_of_one()
