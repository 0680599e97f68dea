"""Which tables a query reads, and which the write connection has written: SQLite's authorizer tells."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Collection
from typing import Any, TypeAlias

from onewriter.read.reader import Reader
from onewriter.sqlite.guard import ANYTHING
from onewriter.sqlite.pragma_values import decode, literal, rows_of
from onewriter.sqlite.statement import ASKING, Parameters, describe_sql
from onewriter.write.jobs import StatementJob
from onewriter.write.session import WriteSession
from onewriter.write.ticket import Job

Tables: TypeAlias = "frozenset[str] | None"  # None: any, since it is not known which

PURE = ("json_each", "json_tree")  # virtual tables that read no other
MOST_TEXTS = 1000  # whose tables are remembered
_numbers = itertools.count()


def tables_read(reader: Reader, sql: str, parameters: Parameters) -> Tables:
    """The tables that ``sql`` reads as the schema is now; those of its views and subqueries too."""
    if describe_sql(sql).verb not in ASKING:
        return None  # as of PRAGMA page_count
    try:
        names, opcodes = _explain(reader, sql, parameters)
        if "VOpen" in opcodes:
            # Anew, since declaring a virtual table for the first time looks like reading the schema.
            names = _explain(reader, sql, parameters)[0].difference(PURE)
            # What a virtual table reads is its own affair; it may be anything.
            if not all(_is_stored(reader, name) for name in names):
                return None
    except sqlite3.Error:
        return None  # if it is wrong, the read has told
    # SQLite itself writes its own tables, and asks nobody.
    return None if any(name.startswith("sqlite_") for name in names) else frozenset(names)


def _explain(reader: Reader, sql: str, parameters: Parameters) -> tuple[set[str], set[Any]]:
    """The tables that the authorizer is asked about, and the opcodes."""
    guard = reader.guard
    names: set[str] = set()
    guard.tables = names
    try:
        # A text of its own: the authorizer is not asked about one in the statement cache.
        return names, _opcodes(reader, f"EXPLAIN /* {next(_numbers)} */ {sql}", parameters)
    finally:
        guard.tables = None


def _opcodes(reader: Reader, sql: str, parameters: Parameters) -> set[Any]:
    connection = reader.connection
    factory, connection.text_factory = connection.text_factory, decode
    try:
        opcodes: set[Any] = reader.select(sql, parameters, _second_column, again=False)
        return opcodes
    finally:
        connection.text_factory = factory


def _second_column(cursor: sqlite3.Cursor) -> set[Any]:
    cursor.row_factory = None
    return {row[1] for row in cursor}


def _is_stored(reader: Reader, name: str) -> bool:
    kinds = {row[2] for row in rows_of(reader.connection, f"PRAGMA table_list({literal(name)})")}
    return bool(kinds) and kinds <= {"table", "view"}


class Written:
    """Which tables each batch may have written.

    SQLite asks the authorizer where it prepares a statement, so the guard notes the tables of all statements that were
    prepared since the authorizer was set last: that expires every prepared one, and SQLite asks about each that is used
    again. What a text writes is remembered while the schema stands.

    Threads: the writer's.
    """

    def __init__(self) -> None:
        self._by_text: dict[str, frozenset[str]] = {}
        self._is_new = False  # nothing has run since the authorizer was set

    def take(self, session: WriteSession, jobs: Collection[Job[Any]]) -> Tables:
        """Those of a batch that is over."""
        texts = {job.sql if type(job) is StatementJob else None for job in jobs}
        if texts <= self._by_text.keys():
            self._is_new = False
            return frozenset[str]().union(*(self._by_text[text] for text in texts if text is not None))
        guard = session.guard
        names, guard.tables = guard.tables, set()
        if names is None or names:
            session.connection.set_authorizer(guard.authorizer)
        # A changed schema may change the rows of any query, and so may a PRAGMA, as one that changes what triggers do.
        if names is None or ANYTHING in names or guard.settings_touched:
            self.forget()
            tables = None
        else:
            tables = frozenset(names)
            if self._is_new and len(texts) == 1 and all(job.failed_with is None for job in jobs):
                self._remember(texts.pop(), tables)
        self._is_new = True
        return tables

    def _remember(self, text: str | None, tables: frozenset[str]) -> None:
        if text is not None:
            if len(self._by_text) >= MOST_TEXTS:
                self._by_text.clear()
            self._by_text[text] = tables

    def forget(self) -> None:
        """The schema may be another."""
        self._by_text.clear()
