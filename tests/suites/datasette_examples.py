"""Datasette's writes, by its write thread or by a gateway in its place: its source distribution has no fixtures."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasette.app import Datasette
from datasette.database import Database

from onewriter import AsyncDbWriter, DbWriter
from suites.plugin import OURS


@pytest.fixture
def file(tmp_path: Path) -> Path:
    with sqlite3.connect(tmp_path / "app.db") as connection:
        connection.executescript("PRAGMA journal_mode=WAL; CREATE TABLE roadside (id INTEGER PRIMARY KEY, name TEXT)")
    connection.close()
    return tmp_path / "app.db"


@pytest.fixture
def gateway(file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not OURS:
        yield
        return
    with DbWriter(file) as db:

        async def execute_write_fn(self: Database, fn: Callable[[sqlite3.Connection], Any], block: bool = True) -> Any:
            ticket = AsyncDbWriter.wrap(db).enqueue(lambda tx: without_cursor(fn(tx.connection)))
            return await ticket if block else ticket

        monkeypatch.setattr(Database, "execute_write_fn", execute_write_fn)
        yield


def without_cursor(result: Any) -> Any:
    """A cursor ends with the job, and Datasette returns the one of its own INSERT."""
    return None if isinstance(result, sqlite3.Cursor) else result


def on_datasette(file: Path, use: Callable[[Database], Awaitable[None]]) -> None:
    async def run() -> None:
        datasette = Datasette([str(file)])
        await datasette.invoke_startup()
        await use(datasette.get_database("app"))

    asyncio.run(run())


@pytest.mark.usefixtures("gateway")
def test_a_write_is_seen_by_the_next_read(file: Path) -> None:
    async def use(database: Database) -> None:
        await database.execute_write("INSERT INTO roadside (name) VALUES (?)", ["Big Duck"])
        rows = await database.execute("SELECT name FROM roadside")
        assert [tuple(row) for row in rows] == [("Big Duck",)]

    on_datasette(file, use)


@pytest.mark.usefixtures("gateway")
def test_scripts_and_many_rows_are_written(file: Path) -> None:
    async def use(database: Database) -> None:
        await database.execute_write_script("CREATE TABLE a (n); CREATE TABLE b (n); INSERT INTO a VALUES (1)")
        await database.execute_write_many("INSERT INTO b VALUES (?)", ((n,) for n in range(3)))
        assert (await database.execute("SELECT count(*) FROM b")).single_value() == 3

    on_datasette(file, use)


@pytest.mark.usefixtures("gateway")
def test_a_function_gets_the_connection_and_returns_a_value(file: Path) -> None:
    async def use(database: Database) -> None:
        def write(connection: sqlite3.Connection) -> int:
            with connection:
                return connection.execute("INSERT INTO roadside (name) VALUES ('Big Duck')").lastrowid or 0

        assert await database.execute_write_fn(write) == 1

    on_datasette(file, use)


@pytest.mark.usefixtures("gateway")
def test_a_function_that_fails_is_undone_and_raises(file: Path) -> None:
    async def use(database: Database) -> None:
        def write(connection: sqlite3.Connection) -> None:
            with connection:
                connection.execute("INSERT INTO roadside (name) VALUES ('Big Duck')")
                connection.execute("INSERT INTO nowhere VALUES (1)")

        with pytest.raises(sqlite3.OperationalError, match="no such table"):
            await database.execute_write_fn(write)
        assert (await database.execute("SELECT count(*) FROM roadside")).single_value() == 0

    on_datasette(file, use)


@pytest.mark.usefixtures("gateway")
def test_a_write_that_nobody_waits_for_is_done(file: Path) -> None:
    async def use(database: Database) -> None:
        await database.execute_write("INSERT INTO roadside (name) VALUES ('Big Duck')", block=False)
        await database.execute_write("INSERT INTO roadside (name) VALUES ('Corn Palace')")
        assert (await database.execute("SELECT count(*) FROM roadside")).single_value() == 2

    on_datasette(file, use)
