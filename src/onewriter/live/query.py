"""Query: what is watched. Watches on the same SQL and parameters have one query, and share its reads."""

from __future__ import annotations

import sqlite3
import weakref
from threading import get_ident
from typing import Any, NamedTuple

from onewriter.base.scopes import running_task
from onewriter.base.waiting import Signal
from onewriter.live.places import Places, places_read, schema_versions
from onewriter.read.read import FunctionRead, Read, SqlRead
from onewriter.read.reader import Reader


class Known(NamedTuple):
    """What a query reads, and by which schema that is known: None, by none that can be told again."""

    places: Places = None
    schema: list[int] | None = None


class Answer(NamedTuple):
    """What a read has given.

    Attributes:
        number: those of later reads of the query are higher.
        raw: what is compared: the rows before the row factory.
        rows: what the loop gets.
    """

    number: float
    raw: Any
    rows: Any
    error: BaseException | None = None


class Found(NamedTuple):
    known: Known
    raw: Any
    rows: Any


class Caller:
    """A thread, or a task, as who reads a query."""

    def __init__(self) -> None:
        task = running_task()
        self._thread = 0 if task is not None else get_ident()
        self._task = None if task is None else weakref.ref(task)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Caller) and (self._thread, self._task) == (other._thread, other._task)

    @property
    def is_lost(self) -> bool:
        """Whether its loop is closed, so that it never goes on."""
        if self._task is None:
            return False
        task = self._task()
        return task is None or task.get_loop().is_closed()


class Query:
    """Locks: that of ``LiveQueries`` guards all that changes here."""

    def __init__(self, read: Read[Any], key: object) -> None:
        self.read = read
        self.key = key
        self.watches = 0
        self.known = Known()
        self.as_of = -1  # the last commit that is certainly in the answer, and in the schema by which that is known
        self.answer: Answer | None = None
        self.answers = 0
        self.begun = 0  # reads
        self.read_by: Caller | None = None  # who reads it now
        self.waiters: set[Signal] = set()

    @property
    def places(self) -> Places:
        return self.known.places

    def rows_of(self, answer: Answer) -> Any:
        """For one loop, which may change the list."""
        return list(answer.rows) if isinstance(self.read, SqlRead) else answer.rows


class Reading:
    """One read of a query, as the pool and the threads of tasks want it."""

    __slots__ = ("answers", "as_of", "asks_places", "known", "label", "number", "query")

    def __init__(self, query: Query, number: float, as_of: int, asks_places: bool) -> None:
        self.query = query
        self.number = number
        self.as_of = as_of
        self.asks_places = asks_places
        self.known = query.known
        self.answers = query.answers
        self.label = query.read.label

    def alone(self, reader: Reader) -> Found:
        reader.clock.lift(reader.claim)  # its deadline was for the wait
        try:
            return self._read(reader)
        except (StopIteration, StopAsyncIteration) as error:  # it would end the loop, as if the gateway were closed
            raise RuntimeError(f"the query raised {type(error).__name__}") from error

    def _read(self, reader: Reader) -> Found:
        read = self.query.read
        if isinstance(read, FunctionRead):
            result = read.alone(reader)
            return Found(self.known, result, result)
        # Before the read, which looks whether the schema that the connection knows still stands: so that is none older.
        schema = schema_versions(reader) if self.asks_places else self.known.schema
        raw, rows = reader.select(read.sql, read.parameters, _fetch)
        known = self.known
        if self.asks_places and (schema is None or schema != known.schema):
            known = _ask(reader, read, schema)
        return Found(known, raw, rows)


def _ask(reader: Reader, read: SqlRead[Any], schema: list[int] | None) -> Known:
    try:
        return Known(places_read(reader, read.sql, read.parameters), schema)
    except sqlite3.Error as error:
        reader.guard.explain(error)  # which raises what a signal handler did
        return Known()  # if it is wrong, the read has told


def _fetch(cursor: sqlite3.Cursor) -> tuple[list[Any], list[Any]]:
    """The rows without and with the row factory, whose objects need not be comparable."""
    factory, cursor.row_factory = cursor.row_factory, None
    raw = cursor.fetchall()
    return raw, raw if factory is None else [factory(cursor, row) for row in raw]


def same(one: Any, other: Any) -> bool:
    """Whether they are equal; what cannot be compared is not."""
    try:
        return one is other or bool(one == other)
    except Exception:  # the objects are the user's
        return False
