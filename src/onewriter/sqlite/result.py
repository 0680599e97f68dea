"""Result: what a statement returns; and a check that no live cursor outlives its transaction."""

from __future__ import annotations

import sqlite3
import types
from collections.abc import Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class Result:
    """The outcome of one statement: plain data, independent of any connection.

    Attributes:
        rows: all rows, as a list.
        rowcount: rows inserted, updated or deleted; -1 for statements that do neither.
        lastrowid: the rowid of the last row that INSERT or REPLACE inserted; None for other statements, for an upsert
            with DO UPDATE, and if nothing was inserted.
        description: as in ``sqlite3.Cursor``.
    """

    __slots__ = ("_position", "description", "lastrowid", "rowcount", "rows")
    _position: int

    def __init__(self, rows: list[Any], rowcount: int, lastrowid: int | None, description: Any) -> None:
        self.rows = rows
        self.rowcount = rowcount
        self.lastrowid = lastrowid
        self.description = description

    def __repr__(self) -> str:
        return f"Result(rows={len(self.rows)}, rowcount={self.rowcount}, lastrowid={self.lastrowid})"

    def __iter__(self) -> Iterator[Any]:
        """The rows not fetched yet."""
        return iter(self.rows[self._fetched :])

    def fetchone(self) -> Any:
        """The next row, or None."""
        return next(iter(self.fetchmany(1)), None)

    def fetchmany(self, size: int = 1) -> list[Any]:
        """The next ``size`` rows, or fewer at the end; as in ``sqlite3``, all of them if ``size`` is below 1."""
        fetched = self._fetched
        rows = self.rows[fetched : fetched + size if size > 0 else None]
        self._position = fetched + len(rows)
        return rows

    def fetchall(self) -> list[Any]:
        """The rows not fetched yet."""
        return self.fetchmany(len(self.rows))

    @property
    def _fetched(self) -> int:
        return getattr(self, "_position", 0)  # most results are never fetched from, and have none


LIVE_RESULTS = (sqlite3.Cursor, sqlite3.Blob, types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)


def refuse_live(result: T) -> T:
    """Return ``result``, unless it would use its connection after that was given back."""
    if isinstance(result, LIVE_RESULTS):
        if isinstance(result, types.CoroutineType | types.GeneratorType | sqlite3.Cursor | sqlite3.Blob):
            result.close()
        raise TypeError(
            f"the function returned a live {type(result).__name__}, which cannot leave its transaction: "
            "return plain data, for example list(…) or fetchall()"
        )
    return result


def first_value(cursor: sqlite3.Cursor) -> Any:
    cursor.row_factory = None
    row = cursor.fetchone()
    return None if row is None else row[0]
