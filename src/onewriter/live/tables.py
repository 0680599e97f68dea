"""Which tables a query reads, and which the write connection has written: SQLite's authorizer tells."""

from __future__ import annotations

import itertools
import sqlite3
from typing import Any, TypeAlias

from onewriter.read.reader import Reader
from onewriter.sqlite.guard import ANYTHING
from onewriter.sqlite.pragmas import decode, literal, rows_of
from onewriter.sqlite.statement import ASKING, Parameters, describe_sql
from onewriter.write.session import WriteSession

Tables: TypeAlias = "frozenset[str] | None"  # None: any, since it is not known which

PURE = ("json_each", "json_tree")  # virtual tables that read no other
_numbers = itertools.count()


def tables_read(reader: Reader, sql: str, parameters: Parameters) -> Tables:
    """The tables that ``sql`` reads as the schema is now; those of its views and subqueries too."""
    if describe_sql(sql).verb not in ASKING:
        return None  # as of PRAGMA page_count
    guard = reader.guard
    guard.tables = names = set[str]()
    try:
        # A text of its own: the authorizer is not asked about one in the statement cache.
        opcodes = _opcodes(reader, f"EXPLAIN /* {next(_numbers)} */ {sql}", parameters)
    except sqlite3.Error:
        return None  # if it is wrong, the read will tell
    finally:
        guard.tables = None
    if any(name.startswith("sqlite_") for name in names):
        return None  # SQLite itself writes these, and asks nobody
    if "VOpen" in opcodes:
        ordinary = {name for name in names if name not in PURE}
        # What a virtual table reads is its own affair; it may be anything.
        return frozenset(ordinary) if all(_is_stored(reader, name) for name in ordinary) else None
    return frozenset(names)


def _opcodes(reader: Reader, sql: str, parameters: Parameters) -> set[Any]:
    connection = reader.connection
    factory, connection.text_factory = connection.text_factory, decode
    try:
        return reader.fetch(sql, parameters, _second_column)
    finally:
        connection.text_factory = factory


def _second_column(cursor: sqlite3.Cursor) -> set[Any]:
    cursor.row_factory = None
    return {row[1] for row in cursor}


def _is_stored(reader: Reader, name: str) -> bool:
    kinds = {row[2] for row in rows_of(reader.connection, f"PRAGMA table_list({literal(name)})")}
    return bool(kinds) and kinds <= {"table", "view"}


def take_written(session: WriteSession) -> Tables:
    """The tables that the write connection may have written since the last time; from now on, it is noted anew.

    A changed schema may change the rows of any query, and so may a PRAGMA, as one that changes what triggers do.
    """
    guard = session.guard
    names, guard.tables = guard.tables, set()
    if names is None or names:
        # SQLite asks the authorizer where it prepares a statement, and setting one expires all that are prepared. So
        # it will ask about each that is used again.
        session.connection.set_authorizer(guard.authorizer)
    return None if names is None or ANYTHING in names or guard.settings_touched else frozenset(names)
