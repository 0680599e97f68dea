"""One SQL statement: what its text says, its parameters, its Result."""

from __future__ import annotations

import array
import copy
import functools
import itertools
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

Parameters: TypeAlias = tuple[Any, ...] | Mapping[str, Any]

TOKEN = re.compile(
    r"""(?P<skip>\s+|--[^\n]*|/\*.*?(?:\*/|\Z))
      | (?P<quoted>'(?:[^']|'')*(?:'|\Z)|"(?:[^"]|"")*(?:"|\Z)|`(?:[^`]|``)*(?:`|\Z)|\[[^\]]*(?:\]|\Z))
      | (?P<word>[^\W\d]\w*)
      | (?P<other>\d\w*|.)""",
    re.VERBOSE | re.DOTALL,
)
VERBS = frozenset(("INSERT", "REPLACE", "UPDATE", "DELETE", "SELECT", "VALUES"))
TEXTUAL = (str, bytes, bytearray, memoryview)
BUFFERS = frozenset((bytearray, memoryview, array.array))


class Description(NamedTuple):
    """What a statement's text says about it."""

    verb: str  # INSERT, UPDATE, PRAGMA …; behind WITH the verb of the main statement
    behind_with: bool
    returning: bool
    upsert: bool  # ON CONFLICT … DO UPDATE
    table: str  # where INSERT and REPLACE insert
    isolated: bool  # can undo or change the transaction it runs in, so it does not share one


class Result:
    """The outcome of one statement: plain data, free of any connection.

    Attributes:
        rows: all rows, as a list.
        rowcount: rows inserted, updated or deleted; -1 for statements that do neither.
        lastrowid: the rowid of the last row that INSERT or REPLACE inserted; None for other statements, for an upsert
            with DO UPDATE, and if nothing was inserted.
        description: as in ``sqlite3.Cursor``.
    """

    __slots__ = ("_position", "description", "lastrowid", "rowcount", "rows")

    def __init__(self, rows: list[Any], rowcount: int, lastrowid: int | None, description: Any) -> None:
        self.rows = rows
        self.rowcount = rowcount
        self.lastrowid = lastrowid
        self.description = description
        self._position = 0

    def __repr__(self) -> str:
        return f"Result(rows={len(self.rows)}, rowcount={self.rowcount}, lastrowid={self.lastrowid})"

    def __iter__(self) -> Iterator[Any]:
        """The rows that ``fetch…`` has not given out yet."""
        return iter(self.rows[self._position :])

    def fetchone(self) -> Any:
        """The next row, or None."""
        return next(iter(self.fetchmany(1)), None)

    def fetchmany(self, size: int = 1) -> list[Any]:
        """The next ``size`` rows, or fewer at the end."""
        rows = self.rows[self._position : self._position + size]
        self._position += len(rows)
        return rows

    def fetchall(self) -> list[Any]:
        """The rows not fetched yet."""
        return self.fetchmany(len(self.rows))


@functools.lru_cache(maxsize=1024)
def describe_sql(sql: str) -> Description:
    words = _words(sql)
    verb, main = (words[0][0] if words else ""), 0
    if verb in ("WITH", "EXPLAIN"):
        main = next((i for i, (word, depth) in enumerate(words) if depth == 0 and word in VERBS), 0)
        verb = words[main][0] if verb == "WITH" else verb
    flat = {word for word, _ in words}
    top = [word for word, depth in words if depth == 0]
    return Description(
        verb=verb,
        behind_with=main > 0,
        returning="RETURNING" in top and verb in ("INSERT", "REPLACE", "UPDATE", "DELETE"),
        upsert=any(pair == ("DO", "UPDATE") for pair in itertools.pairwise(top)),
        table=_target(sql) if verb in ("INSERT", "REPLACE") else "",
        isolated=not flat.isdisjoint(("ROLLBACK", "PRAGMA", "DEFERRED")),
    )


def _words(sql: str) -> list[tuple[str, int]]:
    """The words of ``sql`` in upper case, each with its depth in parentheses; no strings, comments, quoted names."""
    words, depth = [], 0
    for match in TOKEN.finditer(sql):
        if match.lastgroup == "word":
            words.append((match.group().upper(), depth))
        elif match.lastgroup == "other":
            depth += {"(": 1, ")": -1}.get(match.group(), 0)
    return words


def _target(sql: str) -> str:
    """The table named behind INTO, without its quotes and schema."""
    tokens = [m for m in TOKEN.finditer(sql) if m.lastgroup != "skip"]
    into = next((i for i, m in enumerate(tokens) if m.group().upper() == "INTO"), None)
    if into is None:
        return ""
    names = [m.group() for m in tokens[into + 1 : into + 4]]
    name = names[2] if len(names) > 2 and names[1] == "." else (names or [""])[0]
    return name[1:-1].replace(name[0] * 2, name[0]) if name[:1] in ("'", '"', "`", "[") else name


def split_script(script: str) -> Iterator[str]:
    """The statements of ``script``, one by one; a trigger's body stays whole."""
    start = 0
    for match in TOKEN.finditer(script):
        # Quotes and comments are tokens of their own, so this is a real end, unless it is inside a trigger.
        if match.group() == ";" and sqlite3.complete_statement(script[start : match.end()]):
            yield script[start : match.end()]
            start = match.end()
    if any(m.lastgroup != "skip" for m in TOKEN.finditer(script, start)):
        yield script[start:]


def capture(parameters: Any) -> Parameters:
    """A copy of one statement's parameters, so that later changes by the caller change nothing."""
    if type(parameters) is tuple and not parameters:
        return ()
    if isinstance(parameters, TEXTUAL):
        raise TypeError(
            f"parameters are a sequence or a mapping, not {type(parameters).__name__}: it would bind one by one; "
            "put a lone value into a tuple: (value,)"
        )
    if isinstance(parameters, Mapping):
        named = copy.copy(parameters)
        return named if BUFFERS.isdisjoint(map(type, named.values())) else {k: _frozen(v) for k, v in named.items()}
    if isinstance(parameters, set | frozenset) or not (isinstance(parameters, Iterable) or _is_sequence(parameters)):
        raise TypeError(f"parameters are a sequence or a mapping, not {type(parameters).__name__}")
    values = tuple(parameters)
    return values if BUFFERS.isdisjoint(map(type, values)) else tuple(map(_frozen, values))


def _is_sequence(value: object) -> bool:
    return hasattr(type(value), "__getitem__") and hasattr(type(value), "__len__")


def _frozen(value: Any) -> Any:
    return bytes(value) if type(value) in BUFFERS else value


def capture_many(rows: Any) -> list[Parameters]:
    """A copy of many rows of parameters; a generator is consumed here, once, in the caller's thread."""
    if isinstance(rows, (*TEXTUAL, Mapping)) or not isinstance(rows, Iterable):
        raise TypeError(f"seq_of_params is an iterable of rows, not {type(rows).__name__}")
    return [capture(row) for row in rows]


def check_many(sql: str) -> None:
    if describe_sql(sql).returning:
        raise sqlite3.ProgrammingError(
            "run_many and executemany cannot give back the rows of RETURNING: use run, or execute in a loop"
        )


class Executor:
    """Runs statements on one connection and gives Results. Belongs to the thread that holds the connection."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._last_rowid: int | None = None

    def execute(self, sql: str, parameters: Parameters) -> Result:
        cursor = sqlite3.Connection.execute(self._connection, sql, parameters)
        try:
            # To the end, since an unread row would make COMMIT say BUSY for ever.
            rows = cursor.fetchall() if cursor.description is not None else []
            rowcount, lastrowid, description = cursor.rowcount, cursor.lastrowid, cursor.description
        finally:
            cursor.close()
        text = describe_sql(sql)
        if text.behind_with and rowcount == -1 and (description is None or text.returning):
            rowcount = self._changes()  # sqlite3 counts only statements that begin with their verb
        return Result(rows, rowcount, self._inserted(text, rowcount, lastrowid), description)

    def execute_many(self, sql: str, rows: list[Parameters]) -> Result:
        cursor = sqlite3.Connection.executemany(self._connection, sql, rows)
        self._last_rowid = None  # sqlite3 does not tell it after executemany
        try:
            return Result([], cursor.rowcount if rows else 0, None, None)
        finally:
            cursor.close()

    def _changes(self) -> int:
        cursor = sqlite3.Connection.execute(self._connection, "SELECT changes()")
        try:
            # A row_factory of the user's must not be asked about our own row.
            cursor.row_factory = None
            count: int = cursor.fetchone()[0]
            return count
        finally:
            cursor.close()

    def _inserted(self, text: Description, rowcount: int, lastrowid: int | None) -> int | None:
        before, self._last_rowid = self._last_rowid, lastrowid
        if text.verb not in ("INSERT", "REPLACE") or text.upsert or rowcount < 1:
            return None
        # sqlite3 reports the connection's last rowid; a WITHOUT ROWID table leaves that of an earlier statement there.
        if (lastrowid == before or before is None) and not self._has_rowid(text.table):
            return None
        return lastrowid

    def _has_rowid(self, table: str) -> bool:
        cursor = sqlite3.Connection.execute(
            self._connection, "SELECT count(*) FROM pragma_table_list WHERE name = ? COLLATE NOCASE AND wr", (table,)
        )
        try:
            cursor.row_factory = None
            return bool(cursor.fetchone()[0] == 0)
        finally:
            cursor.close()
