"""yoyo's migrations, on one connection: its source distribution has no tests."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yoyo
from yoyo.backends.core.sqlite3 import SQLiteBackend
from yoyo.connections import parse_uri


class Backend(SQLiteBackend):
    """On one connection: yoyo takes a second one for each step."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._given = connection
        super().__init__(parse_uri("sqlite:///given"), "_yoyo_migration")
        self.init_database()

    def connect(self, dburi: object) -> sqlite3.Connection:
        self._given.isolation_level = None
        return self._given

    def copy(self) -> Any:
        return contextlib.nullcontext(self)


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        yield connection


@pytest.fixture
def steps(tmp_path: Path) -> Any:
    (tmp_path / "0001.sql").write_text("CREATE TABLE topping (name TEXT);")
    (tmp_path / "0001.rollback.sql").write_text("DROP TABLE topping;")
    (tmp_path / "0002.sql").write_text("INSERT INTO topping VALUES ('basil');")
    (tmp_path / "0002.rollback.sql").write_text("DELETE FROM topping;")
    return yoyo.read_migrations(str(tmp_path))


def test_pending_migrations_are_applied_once(connection: sqlite3.Connection, steps: Any) -> None:
    backend = Backend(connection)
    for _ in range(2):
        with backend.lock():
            backend.apply_migrations(backend.to_apply(steps))
    assert connection.execute("SELECT name FROM topping").fetchall() == [("basil",)]


def test_they_are_rolled_back(connection: sqlite3.Connection, steps: Any) -> None:
    backend = Backend(connection)
    with backend.lock():
        backend.apply_migrations(backend.to_apply(steps))
        backend.rollback_migrations(backend.to_rollback(steps))
    with pytest.raises(sqlite3.OperationalError):
        connection.execute("SELECT * FROM topping")


def test_one_that_fails_leaves_those_before_it(connection: sqlite3.Connection, tmp_path: Path) -> None:
    (tmp_path / "0001.sql").write_text("CREATE TABLE topping (name TEXT);")
    (tmp_path / "0002.sql").write_text("INSERT INTO topping VALUES ('basil'); INSERT INTO nowhere VALUES (1);")
    backend = Backend(connection)
    with pytest.raises(sqlite3.OperationalError), backend.lock():
        backend.apply_migrations(backend.to_apply(yoyo.read_migrations(str(tmp_path))))
    assert connection.execute("SELECT name FROM topping").fetchall() == []


def test_a_transaction_is_undone(connection: sqlite3.Connection) -> None:
    backend = Backend(connection)
    backend.execute("CREATE TABLE topping (name TEXT)")
    with pytest.raises(LookupError), backend.transaction():
        backend.execute("INSERT INTO topping VALUES ('olives')")
        raise LookupError
    assert connection.execute("SELECT name FROM topping").fetchall() == []


def test_savepoints_nest(connection: sqlite3.Connection) -> None:
    backend = Backend(connection)
    backend.execute("CREATE TABLE topping (name TEXT)")
    with backend.transaction():
        backend.execute("INSERT INTO topping VALUES ('basil')")
        with pytest.raises(LookupError), backend.transaction():
            backend.execute("INSERT INTO topping VALUES ('olives')")
            raise LookupError
    assert connection.execute("SELECT name FROM topping").fetchall() == [("basil",)]
