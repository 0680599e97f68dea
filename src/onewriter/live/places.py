"""Which places a query reads, and which the write connection has written: SQLite's authorizer tells."""

from __future__ import annotations

import itertools
import re
import sqlite3
from collections.abc import Collection, Iterable, Iterator
from typing import Any, TypeAlias

from onewriter.read.reader import Reader
from onewriter.sqlite.guard import ANYTHING, Place
from onewriter.sqlite.pragma_values import database_names, decode, literal, pragma, rows_of
from onewriter.sqlite.statement import ASKING, Parameters, describe_sql
from onewriter.write.jobs import StatementJob
from onewriter.write.session import WriteSession
from onewriter.write.ticket import Job

Places: TypeAlias = "frozenset[Place] | None"  # None: any, since it is not known which
Program: TypeAlias = set[tuple[str, int, int]]  # opcodes with their P2 and P3

PURE = ("json_each", "json_tree")  # virtual tables that read no other
# SQLite asks nobody about the columns of such a join, so not about a table of which no others are read.
JOINS_BY_NAME = re.compile(r"\b(natural|using)\b", re.IGNORECASE)
OPENS = ("OpenRead", "ReopenIdx")  # of a B-tree: P2 is its root page, P3 the number of its database
SCHEMA_PAGE = 1  # the root page of sqlite_schema
EXPRESSION = -2  # among the columns of an index
MOST_TEXTS = 1000  # whose places are remembered
_numbers = itertools.count()


def schema_versions(reader: Reader) -> list[int] | None:
    """Those of its databases, as they are in the files; None: a lock is in the way."""
    try:
        return [pragma(reader.connection, f'"{name}".schema_version') for name in database_names(reader.connection)]
    except sqlite3.Error as error:
        reader.guard.explain(error)  # which raises what a signal handler did
        return None


def places_read(reader: Reader, sql: str, parameters: Parameters) -> Places:
    """What ``sql`` reads by the schema that the connection knows; what its views and subqueries read, too."""
    if describe_sql(sql).verb not in ASKING:
        return None  # as of PRAGMA page_count
    asked, program = _explain(reader, sql, parameters)
    is_virtual = any(opcode == "VOpen" for opcode, _, _ in program)
    if is_virtual:  # anew, since declaring a virtual table for the first time looks like reading the schema
        asked, program = _explain(reader, sql, parameters)
        asked = {place for place in asked if place[0].lower() not in PURE}
    names = {table for table, _ in asked}
    is_plain = not JOINS_BY_NAME.search(sql) and all(_is_plain(reader, name) for name in names)
    if is_virtual and not is_plain:
        return None  # what a virtual table reads is its own affair; it may be anything
    for schema, table in _opened(reader, program):
        if not _is_plain(reader, table):
            return None  # it is a virtual table's, which writes it when it likes
        asked.add((table, ""))
        asked.update(_columns(reader, schema, table, needs_all=not is_plain))
    # SQLite itself writes its own tables, and asks nobody.
    return None if any(table.startswith("sqlite_") for table, _ in asked) else frozenset(asked)


def _explain(reader: Reader, sql: str, parameters: Parameters) -> tuple[set[Place], Program]:
    """What the authorizer is asked about, and the program."""
    guard = reader.guard
    asked: set[Place] = set()
    guard.places = asked
    try:
        # A text of its own: the authorizer is not asked about one in the statement cache.
        return asked, _program(reader, f"EXPLAIN /* {next(_numbers)} */ {sql}", parameters)
    finally:
        guard.places = None


def _program(reader: Reader, sql: str, parameters: Parameters) -> Program:
    connection = reader.connection
    factory, connection.text_factory = connection.text_factory, decode
    try:
        program: Program = reader.select(sql, parameters, _instructions, again=False)
        return program
    finally:
        connection.text_factory = factory


def _instructions(cursor: sqlite3.Cursor) -> Program:
    cursor.row_factory = None
    return {(opcode, p2, p3) for _, opcode, _, p2, p3, *_ in cursor}


def _is_plain(reader: Reader, name: str) -> bool:
    """Whether it is a table of its own, and no view, which may join by name."""
    kinds = {row[2] for row in rows_of(reader.connection, f"PRAGMA table_list({literal(name)})")}
    return kinds == {"table"}


def _opened(reader: Reader, program: Program) -> Iterator[tuple[str, str]]:
    """The tables that it opens, or an index of them, each with its database."""
    databases = {number: name for number, name, _ in rows_of(reader.connection, "PRAGMA database_list")}
    opened: dict[int, set[int]] = {}
    for opcode, page, database in program:
        if opcode in OPENS:
            opened.setdefault(database, set()).add(page)
    for database, pages in opened.items():
        schema = databases[database].replace('"', '""')
        if SCHEMA_PAGE in pages:
            yield schema, "sqlite_schema"
        listed = ", ".join(map(str, pages))
        sql = f'SELECT DISTINCT +tbl_name FROM "{schema}".sqlite_schema WHERE rootpage IN ({listed})'
        for (table,) in rows_of(reader.connection, sql):
            yield schema, table


def _columns(reader: Reader, schema: str, table: str, *, needs_all: bool) -> Iterable[Place]:
    """Those that may decide the order of the rows: of the primary key and of indexes. All, if they are to be told by
    others: by an expression in an index, or a generated column, which is written with those that it is made of."""

    def rows(pragma: str, name: str) -> list[Any]:
        return rows_of(reader.connection, f'PRAGMA "{schema}".{pragma}({literal(name)})')

    columns = rows("table_xinfo", table)  # number, name, type, NOT NULL, default, place in the primary key, hidden
    indexes = rows("index_list", table)
    indexed = [column for index in indexes for column in rows("index_xinfo", index[1]) if column[5]]
    needs_all |= any(column[6] for column in columns) or any(column[1] == EXPRESSION for column in indexed)
    keys = {column[2] for column in indexed}
    return ((table, column[1]) for column in columns if needs_all or column[5] or column[1] in keys)


class Written:
    """What each batch may have written.

    SQLite asks the authorizer where it prepares a statement, so the guard notes the places of all statements that were
    prepared since the authorizer was set last: that expires every prepared one, and SQLite asks about each that is used
    again. What a text writes is remembered while the schema stands.

    Threads: the writer's.
    """

    def __init__(self) -> None:
        self._by_text: dict[str, frozenset[Place]] = {}
        self._is_new = False  # nothing has run since the authorizer was set

    def take(self, session: WriteSession, jobs: Collection[Job[Any]]) -> Places:
        """Those of a batch that is over."""
        texts = {job.sql if type(job) is StatementJob else None for job in jobs}
        if texts <= self._by_text.keys():
            self._is_new = False
            return frozenset[Place]().union(*(self._by_text[text] for text in texts if text is not None))
        guard = session.guard
        noted, guard.places = guard.places, set()
        if noted is None or noted:
            session.connection.set_authorizer(guard.authorizer)
        # A changed schema may change the rows of any query, and so may a PRAGMA, as one that changes what triggers do.
        if noted is None or ANYTHING in noted or guard.settings_touched:
            self.forget()
            places = None
        else:
            places = frozenset(noted)
            if self._is_new and len(texts) == 1 and all(job.failed_with is None for job in jobs):
                self._remember(texts.pop(), places)
        self._is_new = True
        return places

    def _remember(self, text: str | None, places: frozenset[Place]) -> None:
        if text is not None:
            if len(self._by_text) >= MOST_TEXTS:
                self._by_text.clear()
            self._by_text[text] = places

    def forget(self) -> None:
        """The schema may be another."""
        self._by_text.clear()
