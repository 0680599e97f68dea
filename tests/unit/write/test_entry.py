"""By what a thread enters and leaves a block."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import eventually, rows, state_of
from onewriter import DbWriter, ReentrantWriteError

INSERT = "INSERT INTO t VALUES (?)"


def test_a_block_is_entered_once(table_db: DbWriter) -> None:
    block = table_db.transaction()
    with block as tx:
        tx.execute(INSERT, (1,))
        with pytest.raises(RuntimeError, match="entered once"):
            block.__enter__()
    with pytest.raises(RuntimeError, match="entered once"):
        block.__enter__()
    assert rows(table_db) == [1]


def test_a_block_whose_end_cannot_be_waited_for_calls_its_callbacks(db: DbWriter) -> None:
    db.run("CREATE TABLE t (n)")
    told: list[str] = []
    block = db.transaction()
    tx = block.__enter__()
    tx.on_commit(lambda: told.append("committed"))
    tx.execute(INSERT, (1,))
    with pytest.raises(ReentrantWriteError), state_of(db).lock:  # as in a finalizer inside it
        block.__exit__(None, None, None)
    eventually(lambda: told)
    assert (told, rows(db)) == (["committed"], [1])


def test_a_block_that_is_left_inside_a_function_of_sql_is_rolled_back_and_calls_its_callbacks(path: Path) -> None:
    leave: list[Callable[[], bool | None]] = []

    def on_connect(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.create_function("leave", 0, lambda: leave[0]())

    with DbWriter(path, on_connect=on_connect) as db:
        db.run("CREATE TABLE t (n)")
        told: list[str] = []
        block = db.transaction()
        leave.append(lambda: block.__exit__(None, None, None))
        tx = block.__enter__()
        tx.on_rollback(lambda: told.append("rolled back"))
        tx.execute(INSERT, (1,))
        with pytest.raises(sqlite3.OperationalError):
            tx.execute("SELECT leave()")
        eventually(lambda: told)
        assert (told, rows(db)) == (["rolled back"], [])
