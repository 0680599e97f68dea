"""By what a thread enters and leaves a block."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from helpers import DEADLINE, eventually, in_threads, raising, rows, state_of
from onewriter import DbWriter, ReentrantWriteError, TransactionClosedError
from onewriter.write import entry

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
    with pytest.raises(ReentrantWriteError, match="finalizer"), state_of(db).lock:  # as in a finalizer inside it
        block.__exit__(None, None, None)
    eventually(lambda: told)
    assert (told, rows(db)) == (["committed"], [1])


class Leaving:
    """A gateway whose SQL function ``leave()`` leaves the block that was opened last."""

    def __init__(self, path: Path, error: BaseException | None = None) -> None:
        self.raised: list[BaseException] = []
        self.told: list[str] = []
        self._error = error
        self.db = DbWriter(path, on_connect=self._on_connect)
        self.db.run("CREATE TABLE t (n)")
        self.block = self.db.transaction()

    def _on_connect(self, connection: sqlite3.Connection, readonly: bool) -> None:
        connection.create_function("leave", 0, self._leave)

    def _leave(self) -> None:
        try:
            self.block.__exit__(None if self._error is None else type(self._error), self._error, None)
        except BaseException as error:
            self.raised.append(error)

    def run(self) -> None:
        with self.db:
            tx = self.block.__enter__()
            tx.on_rollback(lambda: self.told.append("rolled back"))
            tx.execute(INSERT, (1,))
            with contextlib.suppress(sqlite3.OperationalError):  # interrupted
                tx.execute("SELECT leave()")
            eventually(lambda: self.told)
            assert rows(self.db) == []


def test_a_block_that_is_left_inside_a_function_of_sql_is_rolled_back_and_calls_its_callbacks(path: Path) -> None:
    leaving = Leaving(path)
    leaving.run()
    assert leaving.told == ["rolled back"]
    assert "cannot be left here" in str(leaving.raised[0])


def test_the_own_error_of_a_block_that_is_left_inside_a_function_of_sql_is_not_hidden(path: Path) -> None:
    leaving = Leaving(path, LookupError("of the block"))
    leaving.run()
    assert leaving.raised == []


def test_a_block_in_a_function_that_runs_alone_is_refused_with_the_reason(table_db: DbWriter) -> None:
    def nest(connection: sqlite3.Connection) -> None:
        with pytest.raises(ReentrantWriteError, match="reads and writes on its connection"):
            table_db.transaction().__enter__()

    table_db.run_without_transaction(nest)


@pytest.mark.parametrize("inline", [False, True])
def test_a_function_that_sqlite_calls_is_told_why_it_cannot_use_the_gateway(path: Path, inline: bool) -> None:
    told: list[str] = []

    def ask() -> None:
        with pytest.raises(ReentrantWriteError) as caught:
            db.run("SELECT 1")
        told.append(str(caught.value))

    def connect(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.create_function("ask", 0, ask)

    with DbWriter(path, inline=inline, on_connect=connect) as db:
        db.run("SELECT ask()")
        db.run(lambda tx: tx.execute("SELECT ask()"))
        with db.transaction() as tx:
            tx.execute("SELECT ask()")
            tx.connection.execute("SELECT ask()").fetchall()
        db.run_without_transaction("SELECT ask()")
    assert len(told) == 5
    assert all(text.startswith("a function that SQLite calls while it runs a statement cannot") for text in told)


def test_a_block_that_is_collected_while_it_is_open_calls_its_callbacks_and_names_what_is_lost(
    db: DbWriter, caplog: pytest.LogCaptureFixture
) -> None:
    db.run("CREATE TABLE t (n)")
    told: list[str] = []
    block = db.transaction(label="dropped")
    block.__enter__().on_rollback(lambda: told.append("rolled back"))
    db.run(INSERT, (1,))
    del block
    gc.collect()
    assert (told, rows(db)) == (["rolled back"], [])
    eventually(lambda: "1 writes that were made inside 'dropped'" in caplog.text)


def test_a_block_that_was_left_in_the_thread_of_a_loop_is_not_kept(db: DbWriter) -> None:
    async def main() -> None:
        with db.transaction():
            assert len(state_of(db).blocks) == 1
        assert state_of(db).blocks == set()

    asyncio.run(main())


def test_a_block_that_was_left_by_an_error_says_so_when_it_is_left_again(table_db: DbWriter) -> None:
    block = table_db.transaction()
    block.__enter__().execute("INSERT INTO t VALUES (1)")
    error = LookupError()
    block.__exit__(LookupError, error, None)
    with pytest.raises(TransactionClosedError, match="was left by an error before, and is rolled back"):
        block.__exit__(None, None, None)
    assert table_db.read("SELECT * FROM t") == []


def test_of_threads_that_leave_a_block_at_the_same_time_one_ends_it(table_db: DbWriter) -> None:
    called: list[int] = []
    for n in range(30):
        block = table_db.transaction()
        tx = block.__enter__()
        tx.execute(INSERT, (n,))
        tx.on_commit(lambda n=n: called.append(n))  # type: ignore[misc]
        together = threading.Barrier(3)

        def leave(block: Any = block, together: threading.Barrier = together) -> None:
            together.wait(DEADLINE)
            block.__exit__(None, None, None)

        in_threads(leave, leave, leave)
    assert rows(table_db) == list(range(30))
    assert called == list(range(30))


def test_the_callbacks_of_a_block_that_is_left_twice_are_called_once(table_db: DbWriter) -> None:
    called: list[int] = []
    block = table_db.transaction()
    block.__enter__().on_commit(lambda: called.append(1))
    block.__exit__(None, None, None)
    block.__exit__(None, None, None)
    assert called == [1]


def test_a_block_whose_thread_has_no_room_to_leave_it_is_rolled_back_by_another(
    db: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    db.run("CREATE TABLE t (n)")
    monkeypatch.setattr(entry, "_leave", raising(RecursionError))
    with pytest.raises(RecursionError) as kept, db.transaction() as tx:  # and with its traceback the block
        tx.execute(INSERT, (1,))
    db.run(INSERT, (2,), timeout=DEADLINE)  # outside it
    assert rows(db) == [2]
    assert kept.value.__traceback__ is not None
