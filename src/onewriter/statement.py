"""One SQL statement: what its text says, its parameters, its Result."""

from __future__ import annotations

import functools
import re
import sqlite3
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias, cast

from onewriter.guard import OF_ITS_OWN, Guard
from onewriter.retry import error_code

Parameters: TypeAlias = tuple[Any, ...] | Mapping[str, Any]

# A quote that is doubled inside quotes: two quoted texts, side by side.
QUOTED = r"""'[^']*+(?:'|\Z)|"[^"]*+(?:"|\Z)|`[^`]*+(?:`|\Z)|\[[^\]]*+(?:\]|\Z)"""
COMMENT = r"--[^\n]*+|/\*(?:[^*]++|\*(?!/))*+(?:\*/|\Z)"
BLANK = rf"(?:\s|{COMMENT})"
# A text can have millions of values: what looks at all of it is one call of one expression, and no loop here.
NOISE = re.compile(f"{QUOTED}|{COMMENT}", re.DOTALL)
NOTHING = re.compile(f"{BLANK}*+", re.DOTALL)
ONE = rf"[^;'\"`\[/-]*+(?:(?:{QUOTED}|{COMMENT}|[/-])[^;'\"`\[/-]*+)*+;"
STATEMENT = re.compile(ONE, re.DOTALL)
STATEMENTS = re.compile(f"(?:{ONE}){{1,500}}+", re.DOTALL)
TRIGGER = re.compile(
    rf"{BLANK}*+(?:EXPLAIN{BLANK}++(?:QUERY{BLANK}++PLAN{BLANK}++)?+)?+"
    rf"CREATE{BLANK}++(?:TEMP(?:ORARY)?{BLANK}++)?+TRIGGER\b",
    re.DOTALL | re.IGNORECASE,
)
TRIGGER_END = re.compile(rf"{BLANK}*+END{BLANK}*+;", re.DOTALL | re.IGNORECASE)
INNERMOST = re.compile(r"\([^()]*+\)")
PARENTHESIS = re.compile(r"[()]")
WORD = re.compile(r"(?<![\w$:@])[^\W\d][\w$]*+")  # not the name of a parameter
MAIN_VERB = re.compile(r"\b(?:INSERT|REPLACE|UPDATE|DELETE|SELECT|VALUES)\b")
UPSERT = re.compile(r"\bDO\s+UPDATE\b")
INTO = re.compile(rf"{QUOTED}|{COMMENT}|\b(?P<into>INTO)\b", re.DOTALL | re.IGNORECASE)
NAME = re.compile(rf"{BLANK}*+(?P<name>(?:{QUOTED})++|[\w$\x80-\U0010ffff]++|\.)", re.DOTALL)
CHANGING = frozenset(("INSERT", "REPLACE", "UPDATE", "DELETE"))
READING = frozenset(("SELECT", "VALUES", "EXPLAIN", "PRAGMA"))
ASKING = ("SELECT", "VALUES")
ISOLATED = ("ROLLBACK", "PRAGMA", "DEFERRED")
LONG = 10_000  # characters, from which on a text has values in it, and comes once
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
    text = NOISE.sub(" ", sql).upper()
    first = WORD.search(text)
    verb = first.group() if first else ""
    main = None
    if verb in ("WITH", "EXPLAIN"):
        main = MAIN_VERB.search(_outside_parentheses(text), len(verb))
        verb = main.group() if main and verb == "WITH" else verb
    inserting = verb in ("INSERT", "REPLACE")
    return Description(
        verb=verb,
        behind_with=main is not None,
        returning=verb in CHANGING and "RETURNING" in text and _has(_outside_parentheses(text), "RETURNING"),
        inserts=inserting and not ("DO" in text and UPSERT.search(text) and UPSERT.search(_outside_parentheses(text))),
        table=_target(sql) if inserting else "",
        fails=_has(text, "FAIL"),
        isolated=any(_has(text, word) for word in ISOLATED),
    )


_describe_short, _describe_long = functools.lru_cache(1024)(_describe), functools.lru_cache(2)(_describe)


def words_of(sql: str) -> set[str]:
    """The words of ``sql`` in upper case; no strings, comments, quoted names."""
    return set(WORD.findall(NOISE.sub(" ", sql).upper()))


def _has(text: str, word: str) -> bool:
    return word in text and re.search(rf"(?<![\w$:@]){word}(?![\w$])", text) is not None


def _outside_parentheses(text: str) -> str:
    for _ in range(4):  # most texts have no more levels, and what is left of others is short
        text = INNERMOST.sub(" ", text)
    parts, depth, start = [], 0, 0
    for match in PARENTHESIS.finditer(text):
        if match.group() == ")":
            depth -= 1
            start = match.end()
        elif depth == 0:
            parts.append(text[start : match.start()])
            depth = 1
        else:
            depth += 1
    if depth == 0:
        parts.append(text[start:])
    return " ".join(parts)


def _target(sql: str) -> str:
    """The table named behind INTO, without its quotes and schema."""
    into = next((match for match in INTO.finditer(sql) if match["into"]), None)
    name = ""
    position = into.end() if into else len(sql)
    for _ in range(3):  # schema, dot, table
        found = NAME.match(sql, position)
        if found is None or (name not in ("", ".") and found["name"] != "."):
            break
        name, position = found["name"], found.end()
    return name[1:-1].replace(name[0] * 2, name[0]) if name[:1] in ("'", '"', "`", "[") else name


def split_script(script: str) -> Iterator[str]:
    """The statements of ``script``, one by one; a trigger's body stays whole."""
    start = 0
    while (end := _end(script, start)) is not None:
        yield script[start:end]
        start = end
    if _has_something(script, start):
        yield script[start:]


def script_parts(script: str) -> Iterator[str]:
    """``script`` in parts of whole statements, up to 500 of them."""
    start = 0
    while several := STATEMENTS.match(script, start):
        stop = several.end()
        if "TRIGGER" not in several.group().upper():
            yield script[start:stop]
            start = stop
        while start < stop:  # it may end inside one
            end = _end(script, start)
            if end is None:
                yield script[start:]
                return
            yield script[start:end]
            start = end
    if _has_something(script, start):
        yield script[start:]


def _end(script: str, start: int) -> int | None:
    """Where the statement that begins at ``start`` ends, if it does."""
    end = STATEMENT.match(script, start)
    if end and TRIGGER.match(script, start):  # which ends by END, as if that were a statement
        while end and not (last := TRIGGER_END.match(script, end.end())):
            end = STATEMENT.match(script, end.end())
        end = end and last
    return end.end() if end else None


def _has_something(script: str, start: int) -> bool:
    nothing = NOTHING.match(script, start)
    return nothing is None or nothing.end() < len(script)


def check_many(sql: str) -> None:
    if describe_sql(sql).returning:
        raise sqlite3.ProgrammingError(
            "run_many and executemany cannot give back the rows of RETURNING: use run, or execute in a loop"
        )


class Executor:
    """Runs statements on one connection and gives Results. Belongs to the thread that holds the connection."""

    def __init__(self, connection: sqlite3.Connection, guard: Guard) -> None:
        self._connection = connection
        self._guard = guard
        self._cursor = sqlite3.Connection.cursor(connection)  # making one for each statement would cost as much as it
        self._last_rowid: int | None = None
        self._known: str | None = None  # the last plain INSERT
        self._table = ""  # and its table

    def execute(self, sql: str, parameters: Parameters) -> Result:
        """Run one statement to its end."""
        result = self.insert(sql, parameters)
        return Result([], 1, result, None) if type(result) is int else cast(Result, result)

    def _execute(self, sql: str, parameters: Parameters) -> Result:
        cursor, text, guard = self._cursor, describe_sql(sql), self._guard
        guard.is_asking = text.verb in ASKING and guard.mode in OF_ITS_OWN
        try:
            # SQLite does not ask the guard again about a text that was allowed to a job of many statements.
            cursor.execute(guard.asked_anew(sql) if guard.is_asking else sql, parameters)
            # To the end, since an unread row would make COMMIT say BUSY for ever.
            rows = cursor.fetchall() if cursor.description is not None else None
        except BaseException as error:
            if isinstance(error, sqlite3.Error) and text.verb == "VACUUM":
                self._explain_vacuum(error)
            self._last_rowid = None
            try:
                cursor.close()  # it may have rows left
            finally:  # Ctrl-C comes behind a call
                self._cursor = sqlite3.Connection.cursor(self._connection)
            raise
        finally:
            guard.is_asking = False
        rowcount, description = cursor.rowcount, cursor.description
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
            BaseException.add_note(error, f"onewriter: {text}")

    def forget_rowid(self) -> None:
        """Others use the connection too."""
        self._last_rowid = None

    def execute_script(self, sql: str) -> None:
        """Run many statements, in the transaction that is open."""
        self._last_rowid = None
        guard = self._guard
        guard.hidden_commit = True
        try:
            sqlite3.Connection.executescript(self._connection, sql).close()
        except sqlite3.OperationalError as error:
            if "VACUUM" in str(error) and "VACUUM" in words_of(sql):  # which of them it was is not told otherwise
                self._explain_vacuum(error)
            raise
        finally:
            guard.hidden_commit = False

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
        if text.returning or not issubclass(type(error), sqlite3.Error):
            return False  # it can have been done, and the error come from reading its rows
        if text.verb in ASKING:
            return True
        code = error_code(error)
        if code == sqlite3.SQLITE_ERROR:  # bad SQL, or a failure midway
            try:
                sqlite3.Connection.execute(self._connection, f"EXPLAIN {sql}").close()
            except sqlite3.OperationalError:
                return True
            except sqlite3.Error:
                pass  # it has parameters, so it was prepared
            return False
        return code == 0 or code == sqlite3.SQLITE_AUTH or (code in UNDONE and not text.fails and not schema_fails)
