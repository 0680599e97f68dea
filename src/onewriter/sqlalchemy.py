"""SQLAlchemy on a gateway: engines whose transactions are jobs of it. Needs ``onewriter[sqlalchemy]``.

Everything above the engine is SQLAlchemy's own: sessions, autoflush, savepoints, SQLModel, Alembic.
"""

from __future__ import annotations

import contextlib
import sqlite3
import sys
from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy import Engine, create_engine
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.pool import NullPool

from onewriter.base.call_site import called_from
from onewriter.gateway import DbWriter
from onewriter.write.transaction import Transaction

# Between the user's code and this.
LIBRARIES = ("onewriter.", "contextlib.", "sqlalchemy.", "sqlmodel.", "alembic.", "pandas.")
Borrow = Callable[[], contextlib.AbstractContextManager[sqlite3.Connection]]


def engine(db: DbWriter, *, readonly: bool = False, **options: Any) -> Engine:
    """An engine whose transactions are ``transaction()`` blocks of ``db``, committed when SQLAlchemy commits.

    Nothing else writes from the beginning of a transaction (the first statement, or ``begin()``) to its end.
    Inside a job or block of the same context, thread and task it is a savepoint of that. May be used by any thread.

    Args:
        readonly: transactions are ``reader()`` blocks instead: each sees one snapshot, and waits for no writer (WAL).
        options: of ``sqlalchemy.create_engine``.

    Raises:
        WriteTimeoutError: a transaction could not begin within 30 s. Not committed.
        WriterClosedError: ``db`` is closed. Not committed.
        sqlalchemy.exc.DBAPIError: COMMIT failed; ``orig`` is SQLite's error. Rolled back.
    """

    @contextlib.contextmanager
    def write() -> Iterator[sqlite3.Connection]:
        with db.transaction(label=_label()) as tx:
            yield tx.connection

    def read() -> contextlib.AbstractContextManager[sqlite3.Connection]:
        return db.reader(label=_label())

    return _create(read if readonly else write, read, options)


def engine_on(tx: Transaction, **options: Any) -> Engine:
    """An engine on the transaction of a block or job: what SQLAlchemy commits becomes part of it.

    A commit keeps what was done so far, a rollback undoes what was done since; the end of the block or job commits or
    rolls back all of it. The engine can be used where and while ``tx`` can; connections that are open at the same time
    share the transaction.

    Args:
        options: of ``sqlalchemy.create_engine``.
    """

    @contextlib.contextmanager
    def part() -> Iterator[sqlite3.Connection]:
        with tx.savepoint():
            yield tx.connection

    return _create(part, lambda: contextlib.nullcontext(tx.connection), options)


def on_connect(connection: sqlite3.Connection, readonly: bool = False) -> None:
    """Create the SQL functions that SQLAlchemy expects, ``regexp`` and ``floor``: give it to ``DbWriter``."""
    SQLiteDialect_pysqlite(dbapi=sqlite3).on_connect()(connection)  # type: ignore[arg-type]


def _label() -> str:
    """For messages: the line of the user's code whose session or connection begins, far below."""
    return f"SQLAlchemy in {called_from(sys._getframe(1), LIBRARIES)}"


def _create(transaction: Borrow, outside: Borrow, options: dict[str, Any]) -> Engine:
    # No pool: a connection is borrowed for each transaction, and lending one costs less than a pool's bookkeeping.
    options.setdefault("poolclass", NullPool)
    return create_engine("sqlite+onewriter://", creator=lambda: _Borrowed(transaction, outside), **options)


class _Undo(Exception):
    """Ends a block that SQLAlchemy rolls back."""


class _Borrowed:
    """What SQLAlchemy takes for a connection: another one is borrowed for each transaction.

    States: outside ⇄ in a transaction; in each with a borrowed connection or without one.
    """

    isolation_level: str | None = ""  # SQLAlchemy sets it, to no effect: its BEGIN is ours

    def __init__(self, transaction: Borrow, outside: Borrow) -> None:
        self._transaction = transaction
        self._outside = outside
        self._loan: contextlib.AbstractContextManager[sqlite3.Connection] | None = None
        self._connection: sqlite3.Connection | None = None
        self._begun = False

    def begin(self) -> None:
        self._give_back(None)
        self._borrow(self._transaction)
        self._begun = True

    def _borrow(self, borrow: Borrow) -> sqlite3.Connection:
        loan = borrow()
        self._connection = loan.__enter__()
        self._loan = loan
        return self._connection

    def commit(self) -> None:
        self._give_back(None)

    def rollback(self) -> None:
        self._give_back(_Undo() if self._begun else None)

    close = rollback

    def _give_back(self, error: _Undo | None) -> None:
        loan, self._loan, self._connection, self._begun = self._loan, None, None, False
        if loan is not None:
            with contextlib.suppress(_Undo):
                loan.__exit__(None if error is None else _Undo, error, None)

    def cursor(self, *args: Any) -> _Cursor:
        return _Cursor(lambda: self._now().cursor(*args))

    def _now(self) -> sqlite3.Connection:
        """Outside a transaction SQLAlchemy looks around: at the schema, and at settings."""
        return self._connection or self._borrow(self._outside)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._now(), name)


class _Cursor:
    """Made by its first use: SQLAlchemy asks for the first cursor of a transaction before it begins that."""

    def __init__(self, make: Callable[[], sqlite3.Cursor]) -> None:
        self._make = make

    def __getattr__(self, name: str) -> Any:
        if name == "_cursor":
            self._cursor = self._make()
            return self._cursor
        return getattr(self._cursor, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._cursor)


class OneWriterDialect(SQLiteDialect_pysqlite):
    """SQLite, with BEGIN, COMMIT and ROLLBACK as the gateway has them."""

    supports_statement_cache = True

    def on_connect(self) -> None:  # type: ignore[override]
        """Nothing: a function that is made on a borrowed connection would be made for each transaction."""

    def do_begin(self, dbapi_connection: Any) -> None:
        dbapi_connection.begin()

    def get_isolation_level_values(self, dbapi_connection: Any) -> list[Any]:
        return ["SERIALIZABLE"]

    def set_isolation_level(self, dbapi_connection: Any, level: str) -> None:
        """Nothing: there is one."""


registry.register("sqlite.onewriter", __name__, OneWriterDialect.__name__)
