"""A lent connection does what a plain one does: the same random calls on both, with the same outcomes."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from helpers import session_of
from onewriter import DbWriter, TransactionAbortedError

TABLE = "CREATE TABLE t (n INTEGER PRIMARY KEY)"
ALL = "SELECT n FROM t ORDER BY n"
NUMBERS = st.integers(0, 8)
NAMES = st.sampled_from(["a", "b", "A"])
CONTROL = st.sampled_from(
    ["BEGIN", "BEGIN IMMEDIATE", "BEGIN EXCLUSIVE TRANSACTION", "COMMIT", "END", "ROLLBACK", "ROLLBACK TRANSACTION"]
)
SCRIPT = st.lists(
    st.sampled_from(
        ["BEGIN", "COMMIT", "SAVEPOINT a", "RELEASE a", "INSERT OR IGNORE INTO t VALUES (1)", "DELETE FROM t"]
    ),
    max_size=4,
)
STATEMENTS: list[tuple[Any, ...]] = [
    *(("INSERT INTO t VALUES (1)",), ("INSERT INTO t VALUES (:n)", {"n": 2}), ("INSERT INTO t VALUES (?)", (3,))),
    *(("INSERT OR IGNORE INTO t VALUES (1), (4)",), ("UPDATE t SET n = n + 9 WHERE n < 2",), ("DELETE FROM t",)),
    *(("REPLACE INTO t VALUES (5) RETURNING n",), ("INSERT INTO t VALUES (6), (7), (8) RETURNING n AS m",)),
    *(("WITH x AS (SELECT 6) INSERT INTO t SELECT * FROM x",), ("SELECT n, n * 2 AS m FROM t ORDER BY n",)),
    *(("SELECT changes(), last_insert_rowid()",), ("VALUES (1), (2)",), ("SELECT ?", (1, 2))),
    *(("SELECT :a", {}), ("SELECT ?", 5), ("SELECT ?",), ("INSERT INTO t VALUES ('x')",)),
    *(("SELECT 1; SELECT 2",), ("/* first */ BEGIN",), ("begin -- it",), ("BEGIN;",)),
    *(("BEGIN; SELECT 1",), ("COMMIT; SELECT 1",), (" \n commit ;; ",), ("COMMIT", (1,)), (5,)),
    *(("INSERT INTO t VALUES (1);",), ("SELECT '\0'",), ("SELECT '\ud800'",), ("\0",), (b"SELECT 1",), (None,)),
    *(("PRAGMA user_version",), ("PRAGMA user_version = 3",), ("PRAGMA table_info(t)",), ("PRAGMA foreign_keys",)),
    *(("CREATE TABLE u (a, b)",), ("DROP TABLE u",), ("ALTER TABLE u ADD COLUMN c",), ("CREATE INDEX i ON u (a)",)),
    *(("INSERT INTO u SELECT n, n FROM t RETURNING *",), ("EXPLAIN QUERY PLAN INSERT INTO t VALUES (1)",), ("x y",)),
    *(
        ("SELECT abs(-9223372036854775808)",),
        ("SELECT n, abs(n - 9223372036854775807 - 2) FROM t",),
        ("VALUES (1)", []),
    ),
    *(('SAVEPOINT "A b"',), ("RELEASE 'A b'",), ("ROLLBACK TO [a B]",), ("SELECT 1", (), ()), ("SELECT 1", None)),
]
MANY: list[tuple[Any, ...]] = [
    *(("INSERT INTO t VALUES (?)", [(1,), (11,)]), ("INSERT OR IGNORE INTO t VALUES (?)", [(1,), (12,)])),
    *(("INSERT INTO t VALUES (?)", []), ("SELECT ?", [(1,)]), ("INSERT INTO t VALUES (?) RETURNING n", [(13,)])),
    *(("INSERT INTO t VALUES (?)", [(14,), (1, 2)]), ("BEGIN", [()]), ("x y", [])),
    *(("DELETE FROM t WHERE n = ?", ((1,), (2,), (3,))), ("INSERT INTO t VALUES (:n)", [{"n": 15}]), ("COMMIT", [])),
    *(("INSERT INTO nowhere VALUES (?)", [(1,)]), (None, []), ("", [()]), ("SELECT 1", [])),
    *(
        ("CREATE TABLE u (a, b)", [()]),
        ("PRAGMA user_version = 4", [()]),
        ("WITH x AS (SELECT ?) SELECT * FROM x", [(1,)]),
    ),
]


class Each(list[Any]):
    """Rows that are not in a plain list: they are fetched one by one."""


MANY += [(sql, Each(rows)) for sql, rows in MANY]
# That work, or do nothing at all: a lent connection undoes one that fails, and a plain one half of it.
SCRIPTS: list[tuple[Any, ...]] = [
    *(("INSERT OR IGNORE INTO t VALUES (16); VALUES (1), (2)",), ("",), ("DELETE FROM t WHERE n > 9",)),
    *((5,), (None,), (b"SELECT 1",), ("SELECT '\0'",), ("SELECT '\ud800'",)),
]
ROW_FACTORIES = [None, sqlite3.Row, lambda cursor, row: [column[0] for column in cursor.description] + list(row)]
LEVELS: list[Any] = ["deferred", "Exclusive", "x", 1, b"", "IMMEDIATE\0", "\xe9", "BEGIN"]
MODES: list[tuple[str, Any]] = [("isolation_level", level) for level in ("", None, "IMMEDIATE")]
if sys.version_info >= (3, 12):
    MODES += [("autocommit", value) for value in (True, False, sqlite3.LEGACY_TRANSACTION_CONTROL)]


class CaughtError(Exception):
    """What a ``with`` block raises."""


class Machine(RuleBasedStateMachine):
    """``plain`` is the model: what is in its table at the end, committed or not, is what the job commits."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(prefix="onewriter-lent-")
        self.db = DbWriter(Path(self.folder.name) / "app.db", inline=True, synchronous="OFF")
        self.db.run(TABLE)
        self.plain = sqlite3.connect(":memory:")
        self.plain.execute("PRAGMA foreign_keys = ON")
        self.plain.execute(TABLE)
        self.block = self.db.transaction()
        self.lent = self.block.__enter__().connection
        self.cursors: list[Any] = []
        self.is_undone = False  # by SQLite itself, so the job is
        self.changes_schema = False  # then a rollback ends half-read cursors, as SQLite does in a transaction

    def both(self, call: Callable[[sqlite3.Connection], Any]) -> None:
        expected, found = (outcome_of(call, connection) for connection in (self.plain, self.lent))
        assert found == expected, (found, expected)

    @initialize(mode=st.sampled_from(MODES))
    def begin(self, mode: tuple[str, Any]) -> None:
        self.both(lambda c: setattr(c, *mode))

    @precondition(lambda self: not self.is_undone)
    @rule(mode=st.sampled_from(MODES))
    def set_mode(self, mode: tuple[str, Any]) -> None:
        self.both(lambda c: setattr(c, *mode))

    @precondition(lambda self: not self.is_undone)
    @rule(n=NUMBERS)
    def insert(self, n: int) -> None:
        self.both(lambda c: c.execute("INSERT INTO t VALUES (?)", (n,)).lastrowid)

    @precondition(lambda self: not self.is_undone)
    @rule(numbers=st.lists(NUMBERS, max_size=4), from_cursor=st.booleans())
    def insert_many(self, numbers: list[int], from_cursor: bool) -> None:
        values = ", ".join(f"({n})" for n in numbers) or "(9)"
        self.both(
            lambda c: (
                c.executemany(
                    "INSERT INTO t VALUES (?)",
                    c.execute(f"VALUES {values}") if from_cursor else [(n,) for n in numbers],
                ).rowcount
            )
        )

    @precondition(lambda self: not self.is_undone)
    @rule(n=NUMBERS)
    def change(self, n: int) -> None:
        self.both(lambda c: c.execute("DELETE FROM t WHERE n > ?", (n,)).rowcount)
        self.both(lambda c: c.execute("INSERT OR REPLACE INTO t VALUES (?) RETURNING n", (n,)).fetchone()[0])
        self.both(lambda c: c.execute("INSERT INTO nowhere VALUES (1)"))

    # With autocommit=False a text that ends the transaction leaves sqlite3 without one, and its commit() raises.
    @precondition(lambda self: not self.is_undone and getattr(self.plain, "autocommit", None) is not False)
    @rule(sql=CONTROL)
    def control(self, sql: str) -> None:
        self.both(lambda c: c.execute(sql).fetchall())

    @precondition(lambda self: not self.is_undone and getattr(self.plain, "autocommit", None) is not False)
    @rule(verb=st.sampled_from(["SAVEPOINT", "RELEASE", "RELEASE SAVEPOINT", "ROLLBACK TO"]), name=NAMES)
    def savepoint(self, verb: str, name: str) -> None:
        self.both(lambda c: c.execute(f"{verb} {name}").fetchall())

    @precondition(lambda self: not self.is_undone)
    @rule(keeps=st.booleans())
    def end(self, keeps: bool) -> None:
        self.both(lambda c: c.commit() if keeps else c.rollback())

    @precondition(lambda self: not self.is_undone)
    @rule(n=NUMBERS, fails=st.booleans())
    def with_statement(self, n: int, fails: bool) -> None:
        def use(connection: sqlite3.Connection) -> None:
            with connection:
                connection.execute("INSERT OR IGNORE INTO t VALUES (?)", (n,))
                if fails:
                    raise CaughtError

        self.both(use)

    @precondition(lambda self: not self.is_undone)
    @rule(script=SCRIPT)
    def script(self, script: list[str]) -> None:
        """One that works: a lent connection undoes one that fails, and a plain one half of it."""
        with contextlib.closing(sqlite3.connect(":memory:")) as trial:
            self.plain.backup(trial) if not self.plain.in_transaction else trial.execute(TABLE)
            for name in ("isolation_level", "autocommit"):
                with contextlib.suppress(AttributeError):
                    setattr(trial, name, getattr(self.plain, name))
            with contextlib.suppress(sqlite3.Error):
                trial.executescript(";".join(script))
                if getattr(self.plain, "autocommit", -1) == -1:
                    self.both(lambda c: c.executescript(";".join(script)).fetchall())

    @precondition(lambda self: not self.is_undone and getattr(self.plain, "autocommit", None) is not False)
    @rule(
        calls=st.lists(st.sampled_from(STATEMENTS + MANY + 4 * SCRIPTS), min_size=1, max_size=4),
        size=st.sampled_from([0, 1, 2, None]),
        then=st.sampled_from(["fetchall", "fetchone", "__next__", "close", "commit", "rollback"]),
        factory=st.sampled_from([None, *ROW_FACTORIES]),
    )
    def one_cursor(self, calls: list[tuple[Any, ...]], size: int | None, then: str, factory: Any) -> None:
        """Several statements on one cursor, some of which are not read to their end."""

        def use(connection: sqlite3.Connection) -> list[Any]:
            return list(outcomes(connection, calls, size, then, factory))

        self.both(use)
        self.changes_schema |= any("TABLE u" in str(call[0]) for call in calls)

    @precondition(lambda self: not self.is_undone)
    @rule(factory=st.sampled_from(ROW_FACTORIES), text=st.sampled_from([str, bytes]))
    def set_factories(self, factory: Any, text: Any) -> None:
        for name, value in (("row_factory", factory), ("text_factory", text)):
            self.both(lambda c, name=name, value=value: setattr(c, name, value))  # type: ignore[misc]

    @precondition(lambda self: not self.is_undone)
    @rule(level=st.sampled_from(LEVELS))
    def set_level(self, level: Any) -> None:
        self.both(lambda c: outcome_of(lambda c: setattr(c, "isolation_level", level), c, Exception))
        assert self.lent.isolation_level == self.plain.isolation_level

    @precondition(lambda self: not self.is_undone)
    @rule(function=st.sampled_from([lambda: 1, lambda n: 1 // n, lambda *a: None, 5, None]), arity=st.integers(-2, 2))
    def make_functions(self, function: Any, arity: int) -> None:
        def use(connection: sqlite3.Connection) -> list[Any]:
            made = outcome_of(lambda c: c.create_function("f", arity, function), connection, Exception)
            called = outcome_of(lambda c: listed(c.execute("SELECT f(0), f(1)").fetchall()), connection, Exception)
            return [made, called, connection.in_transaction]

        self.both(use)

    @precondition(lambda self: not self.is_undone and not self.plain.in_transaction)
    @rule()
    def dump(self) -> None:
        self.both(lambda c: outcome_of(lambda c: list(c.iterdump()), c, Exception))

    @precondition(lambda self: not self.is_undone and len(self.cursors) < 3)
    @rule()
    def open_cursors(self) -> None:
        cursors = [c.execute(ALL) for c in (self.plain, self.lent)]
        assert listed(cursors[0].fetchone()) == listed(cursors[1].fetchone())
        self.cursors.append(cursors)

    @precondition(lambda self: not self.is_undone and self.cursors)
    @rule()
    def fetch(self) -> None:
        plain, lent = self.cursors.pop()
        plain_rows, lent_rows = (outcome_of(lambda c: listed(c.fetchmany()), cursor) for cursor in (plain, lent))
        is_aborted = lent_rows[-1:] == (sqlite3.SQLITE_ABORT_ROLLBACK,) and self.changes_schema
        assert plain_rows == lent_rows or is_aborted

    @precondition(lambda self: not self.is_undone)
    @rule(n=NUMBERS)
    def have_sqlite_roll_back(self, n: int) -> None:
        self.both(lambda c: c.execute("WITH x AS (SELECT ?) INSERT OR ROLLBACK INTO t SELECT * FROM x", (n,)).rowcount)
        self.is_undone = not session_of(self.db).connection.in_transaction

    @precondition(lambda self: self.is_undone)
    @rule()
    def go_on_all_the_same(self) -> None:
        self.lent.rollback()
        with pytest.raises(TransactionAbortedError):
            self.lent.commit()

    @invariant()
    def same(self) -> None:
        assert self.lent.in_transaction == self.plain.in_transaction
        if not self.is_undone:
            assert self.lent.total_changes == self.plain.total_changes
            assert listed(self.lent.execute(ALL).fetchall()) == listed(self.plain.execute(ALL).fetchall())

    def teardown(self) -> None:
        self.plain.row_factory = None
        expected = self.plain.execute(ALL).fetchall()
        self.cursors.clear()
        with pytest.raises(TransactionAbortedError) if self.is_undone else contextlib.nullcontext():
            self.block.__exit__(None, None, None)
        assert self.db.read(ALL) == ([] if self.is_undone else expected)
        self.plain.close()
        self.db.close()
        self.folder.cleanup()


def outcomes(connection: Any, calls: list[Any], size: int | None, then: str, factory: Any) -> Iterator[Any]:
    cursor, before, has_failed = connection.cursor(), connection.total_changes, False
    if factory is not None:
        cursor.row_factory = factory
    for call in calls:
        methods = {id(MANY): cursor.executemany, id(SCRIPTS): cursor.executescript}
        bound = [next((methods[id(those)] for those in (MANY, SCRIPTS) if call in those), cursor.execute), *call]
        found = outcome_of(lambda bound: bound[0](*bound[1:]) is cursor, bound, Exception)
        yield found
        if found is True:
            yield cursor.description, cursor.rowcount
        has_failed |= found is not True
        if not has_failed:  # a BEGIN that fails has run something else
            yield cursor.lastrowid
        if size is not None:
            yield outcome_of(lambda size: listed(cursor.fetchmany(size)), size, Exception)
        # A BEGIN while a RETURNING is half read is refused.
        name = "fetchall" if "RETURNING" in str(call[0]) else then
        on = connection if name in ("commit", "rollback") else cursor
        yield outcome_of(lambda method: listed(method()), getattr(on, name), Exception)
        yield connection.in_transaction, connection.total_changes - before


def listed(rows: Any) -> Any:
    """Rows of any factory."""
    return [listed(row) for row in rows] if isinstance(rows, list | tuple | sqlite3.Row) else rows


def outcome_of(call: Callable[[Any], Any], connection: Any, errors: Any = (sqlite3.Error, CaughtError)) -> Any:
    """What it returned, or what it raised."""
    try:
        return call(connection)
    except errors as error:
        return type(error), str(error), getattr(error, "sqlite_errorcode", None)


def test_a_lent_connection_does_what_a_plain_one_does() -> None:
    few = settings(
        max_examples=30,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=False,
    )
    run_state_machine_as_test(Machine, settings=few)
