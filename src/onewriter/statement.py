"""One SQL statement: what its text says, its parameters, its Result."""

from __future__ import annotations

import array
import copy
import functools
import itertools
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias, cast

Parameters: TypeAlias = tuple[Any, ...] | Mapping[str, Any]

TOKEN = re.compile(
    r"""(?P<skip>\s+|--[^\n]*|/\*(?:[^*]++|\*(?!/))*+(?:\*/|\Z))
      | (?P<quoted>'(?:[^']++|'')*+(?:'|\Z)|"(?:[^"]++|"")*+(?:"|\Z)|`(?:[^`]++|``)*+(?:`|\Z)|\[[^\]]*(?:\]|\Z))
      | (?P<word>[^\W\d]\w*)
      | (?P<other>\d\w*|.)""",
    re.VERBOSE | re.DOTALL,
)
CHANGING = frozenset(("INSERT", "REPLACE", "UPDATE", "DELETE"))
READING = frozenset(("SELECT", "VALUES", "EXPLAIN", "PRAGMA"))
VERBS = frozenset(("INSERT", "REPLACE", "UPDATE", "DELETE", "SELECT", "VALUES"))
LONG = 10_000  # characters, from which on a text has values in it, and comes once
TEXTUAL = (str, bytes, bytearray, memoryview)
WITHOUT_ROWID = "SELECT count(*) FROM pragma_table_list(?) WHERE wr"  # the argument: it looks at no other table
# A constraint that SQLite checks before it writes, or undoes: unless FAIL says otherwise, nothing is left behind.
UNDONE = frozenset(
    (
        sqlite3.SQLITE_CONSTRAINT_UNIQUE,
        sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY,
        sqlite3.SQLITE_CONSTRAINT_ROWID,
        sqlite3.SQLITE_CONSTRAINT_NOTNULL,
        sqlite3.SQLITE_CONSTRAINT_CHECK,
        sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY,
    )
)
BUFFERS = (bytearray, memoryview, array.array)
UNCHANGEABLE = frozenset((int, float, str, bytes, bool, type(None)))


class Description(NamedTuple):
    """What a statement's text says about it."""

    verb: str  # INSERT, UPDATE, PRAGMA …; behind WITH the verb of the main statement
    behind_with: bool
    returning: bool
    inserts: bool  # INSERT or REPLACE, and no upsert: what ``lastrowid`` is for
    table: str  # where INSERT and REPLACE insert
    fails: bool  # speaks of FAIL, which leaves half a statement behind
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
        """The next ``size`` rows, or fewer at the end; as in ``sqlite3``, all of them if ``size`` is below 1."""
        rows = self.rows[self._position : self._position + size if size > 0 else None]
        self._position += len(rows)
        return rows

    def fetchall(self) -> list[Any]:
        """The rows not fetched yet."""
        return self.fetchmany(len(self.rows))


def describe_sql(sql: str) -> Description:
    return _describe_short(sql) if len(sql) < LONG else _describe_long(sql)


def _describe(sql: str) -> Description:
    words = _words(sql)
    verb, main = (words[0][0] if words else ""), 0
    if verb in ("WITH", "EXPLAIN"):
        main = next((i for i, (word, depth) in enumerate(words) if depth == 0 and word in VERBS), 0)
        verb = words[main][0] if verb == "WITH" else verb
    flat = words_of(sql)
    top = [word for word, depth in words if depth == 0]
    return Description(
        verb=verb,
        behind_with=main > 0,
        returning="RETURNING" in top and verb in ("INSERT", "REPLACE", "UPDATE", "DELETE"),
        inserts=verb in ("INSERT", "REPLACE") and ("DO", "UPDATE") not in itertools.pairwise(top),
        table=_target(sql) if verb in ("INSERT", "REPLACE") else "",
        fails="FAIL" in flat,
        isolated=not flat.isdisjoint(("ROLLBACK", "PRAGMA", "DEFERRED")),
    )


_describe_short, _describe_long = functools.lru_cache(1024)(_describe), functools.lru_cache(2)(_describe)


def words_of(sql: str) -> set[str]:
    return {word for word, _ in _words(sql)}


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
    tokens = (m.group() for m in TOKEN.finditer(sql) if m.lastgroup != "skip")
    behind = itertools.dropwhile(lambda text: text.upper() != "INTO", tokens)
    names = list(itertools.islice(behind, 1, 4))
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
    if type(parameters) is not tuple:
        if isinstance(parameters, TEXTUAL):
            raise TypeError(
                f"parameters are a sequence or a mapping, not {type(parameters).__name__}: it would bind one by one; "
                "put a lone value into a tuple: (value,)"
            )
        if isinstance(parameters, Mapping):
            # A defaultdict keeps its defaults; what is no dict would be taken for a sequence.
            named = copy.copy(parameters) if isinstance(parameters, dict) else dict(parameters)
            if UNCHANGEABLE.issuperset(map(type, named.values())):
                return named
            return {name: _frozen(value) for name, value in named.items()}
        if isinstance(parameters, set | frozenset) or not (
            isinstance(parameters, Iterable) or _is_sequence(parameters)
        ):
            raise TypeError(f"parameters are a sequence or a mapping, not {type(parameters).__name__}")
        parameters = tuple(parameters)
    return parameters if UNCHANGEABLE.issuperset(map(type, parameters)) else tuple(map(_frozen, parameters))


def _is_sequence(value: object) -> bool:
    return hasattr(type(value), "__getitem__") and hasattr(type(value), "__len__")


def _frozen(value: Any) -> Any:
    return bytes(value) if isinstance(value, BUFFERS) else value


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
        self._cursor = sqlite3.Connection.cursor(connection)  # making one for each statement would cost as much as it
        self._last_rowid: int | None = None
        self._known: str | None = None  # the last plain INSERT
        self._table = ""  # and its table

    def execute(self, sql: str, parameters: Parameters) -> Result:
        """Run one statement to its end."""
        result = self.insert(sql, parameters)
        return Result([], 1, result, None) if type(result) is int else cast(Result, result)

    def _execute(self, sql: str, parameters: Parameters) -> Result:
        cursor = self._cursor
        try:
            cursor.execute(sql, parameters)
            # To the end, since an unread row would make COMMIT say BUSY for ever.
            rows = cursor.fetchall() if cursor.description is not None else None
        except BaseException as error:
            if isinstance(error, sqlite3.Error) and describe_sql(sql).verb == "VACUUM":
                self._explain_vacuum(error)
            self._last_rowid = None
            try:
                cursor.close()  # it may have rows left
            finally:  # Ctrl-C comes behind a call
                self._cursor = sqlite3.Connection.cursor(self._connection)
            raise
        text, rowcount, description = describe_sql(sql), cursor.rowcount, cursor.description
        if rowcount == -1 and text.verb in CHANGING and (rows is None or text.returning):
            rowcount = self._ask("SELECT changes()")  # sqlite3 counts only statements that begin with their verb
        lastrowid = None
        if text.inserts:
            lastrowid = self._inserted(text.table, rowcount, cursor.lastrowid)
        elif text.verb not in READING:
            self._last_rowid = None  # an upsert has changed it, perhaps, or CREATE VIRTUAL TABLE
        return Result(rows or [], rowcount, lastrowid, description)

    def insert(self, sql: str, parameters: Parameters) -> Result | int:
        """Run one statement, as ``execute``; where a plain INSERT adds one row, its rowid stands for the Result."""
        if sql is not self._known:
            text = describe_sql(sql)
            if not text.inserts or text.returning or text.behind_with:
                return self._execute(sql, parameters)
            self._known, self._table = sql, text.table
        cursor, before = self._cursor, self._last_rowid
        self._last_rowid = None  # if it fails
        cursor.execute(sql, parameters)
        rowid = cursor.lastrowid
        if rowid != before and before is not None and cursor.rowcount == 1:  # so it is not left from an earlier one
            self._last_rowid = rowid
            return rowid or 0
        self._last_rowid = before
        rowcount = cursor.rowcount if cursor.rowcount >= 0 else self._ask("SELECT changes()")
        return Result([], rowcount, self._inserted(self._table, rowcount, rowid), None)

    def _explain_vacuum(self, error: sqlite3.Error) -> None:
        if self._connection.in_transaction:
            text = "VACUUM cannot run inside a transaction, and a job is one: use run_without_transaction"
            error.add_note(f"onewriter: {text}")

    def forget_rowid(self) -> None:
        """Others use the connection too."""
        self._last_rowid = None

    def execute_many(self, sql: str, rows: list[Parameters]) -> Result:
        text = describe_sql(sql)
        if text.behind_with and text.verb in CHANGING:  # of which sqlite3 counts nothing
            return Result([], sum(self._execute(sql, row).rowcount for row in rows), None, None)
        self._last_rowid = None  # sqlite3 does not tell it after executemany
        cursor = sqlite3.Connection.executemany(self._connection, sql, rows)
        try:
            return Result([], cursor.rowcount if rows else 0, None, None)
        finally:
            cursor.close()

    def _inserted(self, table: str, rowcount: int, lastrowid: int | None) -> int | None:
        before, self._last_rowid = self._last_rowid, lastrowid
        if rowcount < 1:
            return None
        # sqlite3 reports the connection's last rowid; a WITHOUT ROWID table leaves that of an earlier statement there.
        if (lastrowid == before or before is None) and self._ask(WITHOUT_ROWID, (table,)):
            return None
        return lastrowid

    def _ask(self, sql: str, parameters: Parameters = ()) -> int:
        cursor = sqlite3.Connection.execute(self._connection, sql, parameters)
        try:
            cursor.row_factory = None  # one of the user's must not be asked about our own row
            return int(cursor.fetchone()[0])
        finally:
            cursor.close()

    def left_nothing(self, sql: str, error: BaseException, schema_fails: bool) -> bool:
        """Whether it is certain that the statement that raised ``error`` has changed nothing."""
        text = describe_sql(sql)
        if text.returning or not isinstance(error, sqlite3.Error):
            return False  # it can have been done, and the error come from reading its rows
        code = getattr(error, "sqlite_errorcode", None)
        if code == sqlite3.SQLITE_ERROR:  # bad SQL, or a failure midway
            try:
                sqlite3.Connection.execute(self._connection, f"EXPLAIN {sql}").close()
            except sqlite3.OperationalError:
                return True
            except sqlite3.Error:
                pass  # it has parameters, so it was prepared
            return False
        return code is None or code == sqlite3.SQLITE_AUTH or (code in UNDONE and not text.fails and not schema_fails)
