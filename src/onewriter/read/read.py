"""SqlRead, FunctionRead: one read, before it is known which connection runs it. For both faces."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any, Generic, TypeAlias, TypeVar

from onewriter.base.arguments import check_label, check_read, check_sql, exact, name_of
from onewriter.read.reader import FETCHALL, Fetch, Reader, Snapshot
from onewriter.sqlite.parameters import capture
from onewriter.sqlite.result import refuse_live
from onewriter.write.loan import WriteLoan
from onewriter.write.read_loan import query, read_with

T = TypeVar("T")


class SqlRead(Generic[T]):
    """One SELECT, and which part of its rows is wanted."""

    __slots__ = ("fetch", "label", "parameters", "sql")

    def __init__(self, sql: str, params: Any, fetch: Fetch[T], label: str | None) -> None:
        self.sql = sql
        self.parameters = capture(sql, params)
        self.fetch = fetch
        self.label = f"{label!r} ({sql})" if label else sql

    def inside(self, loan: WriteLoan | Snapshot, until: float) -> T:
        """Read in an open job, block or reader."""
        if isinstance(loan, Snapshot):
            return loan.query(self.sql, self.parameters, self.fetch, self.label, until)
        return query(loan, self.sql, self.parameters, self.fetch, until)

    def alone(self, reader: Reader) -> T:
        """Read with a connection of the pool."""
        return reader.select(self.sql, self.parameters, self.fetch)  # type: ignore[no-any-return]


class FunctionRead(Generic[T]):
    """A function of the user's, which sees one snapshot."""

    __slots__ = ("function", "label")

    def __init__(self, function: Callable[[sqlite3.Connection], T], label: str) -> None:
        self.function = function
        self.label = label

    def inside(self, loan: WriteLoan | Snapshot, until: float) -> T:
        """Call it in an open job, block or reader."""
        if isinstance(loan, Snapshot):
            return loan.read_with(self.function, self.label, until)
        return read_with(loan, self.function, until)

    def alone(self, reader: Reader) -> T:
        """Call it with a connection of the pool."""
        with reader.snapshot() as snapshot:
            return refuse_live(reader.attempt(self.label, self.function, snapshot.to_lend, again=False))


Read: TypeAlias = SqlRead[T] | FunctionRead[T]


def sql_read(sql: str, params: Any, fetch: Fetch[T], label: str | None) -> SqlRead[T]:
    """A SELECT with its parameters, copied now."""
    return SqlRead(check_sql(sql), params, fetch, check_label(label))


def read_of(what: str | Callable[[sqlite3.Connection], Any], params: Any, label: str | None) -> Read[Any]:
    """The read that ``read`` was called for."""
    label = check_label(label)
    if isinstance(what, str):
        return SqlRead(exact(what), params, FETCHALL, label)
    check_read(what, params)
    return FunctionRead(what, repr(label or name_of(what)))
