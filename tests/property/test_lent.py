"""A lent connection does what a plain one does: the same random calls on both, with the same outcomes."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import tempfile
from collections.abc import Callable
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
        self.plain.execute(TABLE)
        self.block = self.db.transaction()
        self.lent = self.block.__enter__().connection
        self.cursors: list[Any] = []
        self.is_undone = False  # by SQLite itself, so the job is

    def both(self, call: Callable[[sqlite3.Connection], Any]) -> None:
        expected, found = (outcome_of(call, connection) for connection in (self.plain, self.lent))
        assert found == expected

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
        self.both(lambda c: c.execute("INSERT OR REPLACE INTO t VALUES (?) RETURNING n", (n,)).fetchall())
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

    @precondition(lambda self: not self.is_undone and len(self.cursors) < 3)
    @rule()
    def open_cursors(self) -> None:
        cursors = [c.execute(ALL) for c in (self.plain, self.lent)]
        assert cursors[0].fetchone() == cursors[1].fetchone()
        self.cursors.append(cursors)

    @precondition(lambda self: not self.is_undone and self.cursors)
    @rule()
    def fetch(self) -> None:
        plain, lent = self.cursors.pop()
        assert outcome_of(sqlite3.Cursor.fetchmany, plain) == outcome_of(lambda c: c.fetchmany(), lent)

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
            assert self.lent.execute(ALL).fetchall() == self.plain.execute(ALL).fetchall()

    def teardown(self) -> None:
        expected = self.plain.execute(ALL).fetchall()
        self.cursors.clear()
        with pytest.raises(TransactionAbortedError) if self.is_undone else contextlib.nullcontext():
            self.block.__exit__(None, None, None)
        assert self.db.read(ALL) == ([] if self.is_undone else expected)
        self.plain.close()
        self.db.close()
        self.folder.cleanup()


def outcome_of(call: Callable[[Any], Any], connection: Any) -> Any:
    """What it returned, or what it raised."""
    try:
        return call(connection)
    except (sqlite3.Error, CaughtError) as error:
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
