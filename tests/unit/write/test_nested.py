"""A job inside another job or block: a savepoint of that, with a loan and a lent connection of its own."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import sqlite3
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers import DEADLINE, UnhelpfulError, raising, rows, rows_in
from onewriter import AsyncDbWriter, DbWriter, Transaction, TransactionClosedError
from onewriter.write import part
from onewriter.write.loan import TOO_LONG

INSERT = "INSERT INTO t VALUES (?)"
RETURNING = "INSERT INTO t VALUES (7), (8) RETURNING n"
Work = Callable[[Transaction], Any]


def in_a_job(db: DbWriter, work: Work) -> None:
    db.run(work, label="inner")


def in_a_block(db: DbWriter, work: Work) -> None:
    with db.transaction(label="inner") as tx:
        work(tx)


NESTED = pytest.mark.parametrize("nest", [in_a_job, in_a_block])
Nest = Callable[[DbWriter, Work], None]


@pytest.mark.parametrize("is_block", [True, False], ids=["block", "job"])
@NESTED
def test_what_a_lent_connection_rolls_back_or_commits_is_that_of_its_own_job(
    table_db: DbWriter, nest: Nest, is_block: bool
) -> None:
    def helper(tx: Transaction) -> None:
        assert not tx.connection.in_transaction
        tx.connection.execute(INSERT, (2,))
        tx.connection.rollback()
        tx.connection.execute(INSERT, (3,))
        tx.connection.commit()

    def caller(tx: Transaction) -> None:
        tx.connection.execute(INSERT, (1,))
        nest(table_db, helper)
        assert tx.connection.in_transaction

    if is_block:
        with table_db.transaction() as tx:
            caller(tx)
    else:
        table_db.run(caller)
    assert rows_in(Path(table_db.path)) == [1, 3]


@NESTED
def test_what_the_caller_rolls_back_includes_what_a_helper_has_committed(table_db: DbWriter, nest: Nest) -> None:
    def helper(tx: Transaction) -> None:
        with tx.connection as connection:
            connection.execute(INSERT, (2,))

    def caller(tx: Transaction) -> None:
        tx.connection.execute(INSERT, (1,))
        nest(table_db, helper)
        tx.connection.rollback()

    table_db.run(caller)
    assert rows_in(Path(table_db.path)) == []


@NESTED
def test_its_transaction_ends_with_it_and_has_its_label(table_db: DbWriter, nest: Nest) -> None:
    kept: list[Any] = []

    def helper(tx: Transaction) -> None:
        kept.extend((tx, tx.connection, tx.label))

    def caller(tx: Transaction) -> None:
        nest(table_db, helper)
        assert tx.label == "outer"
        with pytest.raises(TransactionClosedError, match=r"'inner' \(called from test_nested.py"):
            kept[0].execute(INSERT, (1,))
        with pytest.raises(sqlite3.ProgrammingError):
            kept[1].execute(INSERT, (1,))

    table_db.run(caller, label="outer")
    assert kept[2] == "inner"


def test_its_error_names_it_and_then_the_job_around_it(table_db: DbWriter) -> None:
    with pytest.raises(sqlite3.OperationalError) as caught:
        table_db.run(lambda tx: table_db.run("INSERT INTO none VALUES (1)", label="inner"), label="outer")
    inner, outer = (note for note in caught.value.__notes__ if "job" in note)
    assert ("'inner'" in inner, "'outer'" in outer) == (True, True)


@NESTED
@pytest.mark.parametrize("by", ["statement", "lent"])
def test_nothing_nested_in_a_read_of_a_job_can_write(table_db: DbWriter, nest: Nest, by: str) -> None:
    def write(tx: Transaction) -> None:
        (tx if by == "statement" else tx.connection).execute(INSERT, (1,))

    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        table_db.run(lambda tx: table_db.read(lambda connection: nest(table_db, write)))
    assert rows_in(Path(table_db.path)) == []


def in_a_savepoint(db: DbWriter, work: Work) -> None:
    with outer[0].savepoint():
        work(outer[0])


outer: list[Transaction] = []


@pytest.mark.parametrize("nest", [in_a_job, in_a_block, in_a_savepoint])
def test_an_error_is_not_hidden_by_a_statement_that_it_keeps_half_read(table_db: DbWriter, nest: Nest) -> None:
    def fail(tx: Transaction) -> None:
        cursor = tx.connection.execute(RETURNING)
        cursor.fetchone()
        raise LookupError  # whose traceback has the cursor

    def caller(tx: Transaction) -> None:
        outer[:] = [tx]
        tx.execute(INSERT, (1,))
        with pytest.raises(LookupError):
            nest(table_db, fail)
        tx.execute(INSERT, (2,))

    table_db.run(caller)
    assert rows_in(Path(table_db.path)) == [1, 2]


def test_a_savepoint_that_cannot_be_kept_is_undone(table_db: DbWriter) -> None:
    """Its RELEASE is refused while a statement that writes is half read."""
    kept: list[sqlite3.Cursor] = []

    def caller(tx: Transaction) -> None:
        tx.execute(INSERT, (1,))
        with pytest.raises(sqlite3.OperationalError, match="in progress"), tx.savepoint():
            kept.append(tx.connection.execute(RETURNING))
            kept[0].fetchone()
        tx.execute(INSERT, (2,))

    table_db.run(caller)
    assert rows_in(Path(table_db.path)) == [1, 2]


def test_a_savepoint_that_a_function_of_sql_has_left_is_undone_before_anything_else(path: Path) -> None:
    """It cannot be ended there, nor undone: the statement around it goes on."""
    parts: list[Any] = []

    def leave() -> None:
        parts.pop().__exit__(None, None, None)

    def hook(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.create_function("leave", 0, leave)

    def caller(tx: Transaction) -> None:
        parts.append(tx.savepoint())
        parts[0].__enter__()
        tx.execute(INSERT, (1,))
        with pytest.raises(sqlite3.OperationalError, match="exception"):
            tx.execute("SELECT leave()")
        tx.execute(INSERT, (2,))

    with DbWriter(path, on_connect=hook) as db:
        db.run("CREATE TABLE t (n)")
        db.run(caller)
        assert rows(db) == [2]


@pytest.mark.parametrize("is_dropped", [True, False], ids=["dropped", "failed"])
def test_a_nested_block_that_fails_or_is_dropped_in_a_function_of_sql_is_undone_too(
    path: Path, is_dropped: bool
) -> None:
    blocks: list[Any] = []
    came: list[object] = []

    def end() -> None:
        block = blocks.pop()
        if is_dropped:
            del block
            gc.collect()
        else:
            came.append(block.__exit__(LookupError, LookupError(), None))

    def hook(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.create_function("finish", 0, end)

    def caller(tx: Transaction) -> None:
        blocks.append(db.transaction())
        blocks[0].__enter__().execute(INSERT, (1,))
        tx.execute("SELECT finish()")
        tx.execute(INSERT, (2,))

    with DbWriter(path, on_connect=hook) as db:
        db.run("CREATE TABLE t (n)")
        db.run(caller)
        assert rows(db) == [2]
    assert came == [None] * (not is_dropped)  # its own error goes on


def test_the_note_of_such_a_refusal_tells_of_no_lock(table_db: DbWriter) -> None:
    kept: list[sqlite3.Cursor] = []

    def caller(tx: Transaction) -> None:
        with tx.savepoint():
            kept.append(tx.connection.execute(RETURNING))
            kept[0].fetchone()

    with pytest.raises(sqlite3.OperationalError) as caught:
        table_db.run(caller)
    assert not [note for note in caught.value.__notes__ if "SQLite's lock" in note]


def test_a_job_in_a_block_of_a_task_has_a_loan_of_its_own_too(path: Path) -> None:
    async def main() -> None:
        async with AsyncDbWriter(path) as db:
            await db.run("CREATE TABLE t (n)")
            async with db.transaction(label="outer") as tx:
                await tx.execute(INSERT, (1,))
                label = await db.run(keep, label="inner")
                assert (label, tx.label) == ("inner", "outer")
                with pytest.raises(sqlite3.OperationalError) as caught:
                    await db.run("INSERT INTO none VALUES (1)", label="failing")
                assert "'failing'" in str(caught.value.__notes__)
                async with db.transaction(label="nested") as nested:
                    assert nested.label == "nested"
            with pytest.raises(TransactionClosedError):
                kept[0].execute(INSERT, (2,))

    def keep(tx: Transaction) -> str:
        kept.append(tx)
        return tx.label

    kept: list[Transaction] = []
    asyncio.run(main())
    assert rows_in(path) == [1]


def test_a_call_in_another_context_than_its_jobs_is_told_so(table_db: DbWriter) -> None:
    with pytest.raises(Exception, match="in another context"):
        table_db.run(lambda tx: contextvars.Context().run(table_db.run, INSERT, (1,)))


def test_a_function_of_sql_may_read_the_committed_state_in_every_kind_of_job(path: Path) -> None:
    def count() -> int:
        with db.reader() as connection:
            return int(connection.execute("SELECT count(*) FROM t").fetchone()[0])

    def connect(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.create_function("committed", 0, count)

    with DbWriter(path, on_connect=connect) as db:
        db.run("CREATE TABLE t (n)")
        db.run("INSERT INTO t VALUES (committed())")
        db.run(lambda tx: tx.execute("INSERT INTO t VALUES (committed())"))
        db.run_many("INSERT INTO t VALUES (committed() + ?)", [(0,)])
        assert db.read("SELECT n FROM t") == [(0,), (1,), (2,)]


def test_a_savepoint_in_a_reader_in_its_transaction_sees_that_again(table_db: DbWriter) -> None:
    with table_db.transaction() as tx, table_db.reader():
        tx.execute(INSERT, (1,))
        assert table_db.read("SELECT n FROM t") == []
        with tx.savepoint():
            assert table_db.read("SELECT n FROM t") == [(1,)]
        assert table_db.read("SELECT n FROM t") == []


def test_a_savepoint_that_ends_with_the_one_around_it_says_whose_outcome_it_shares(table_db: DbWriter) -> None:
    with table_db.transaction() as tx:
        outer, inner = tx.savepoint(), tx.savepoint()
        outer.__enter__()
        inner.__enter__()
        outer.__exit__(None, None, None)
        with pytest.raises(TransactionClosedError) as caught:
            inner.__exit__(None, None, None)
        assert "whose outcome it shares" in str(caught.value)


def test_a_savepoint_that_fails_in_a_transaction_which_was_taken_away_says_nothing_of_being_kept(
    table_db: DbWriter,
) -> None:
    with pytest.raises(LookupError), table_db.transaction() as tx, tx.savepoint():
        tx.execute(INSERT, (1,))
        tx._loan.close(TOO_LONG)
        raise LookupError
    assert rows_in(Path(table_db.path)) == []


@NESTED
def test_a_job_that_was_queued_inside_a_block_may_write_as_any(table_db: DbWriter, nest: Nest) -> None:
    with table_db.transaction() as tx:
        tx.execute(INSERT, (1,))
        ticket = table_db.enqueue(lambda tx: nest(table_db, lambda inner: inner.execute(INSERT, (2,))))
    ticket.result(DEADLINE)
    assert rows_in(Path(table_db.path)) == [1, 2]


def test_where_sqlite_rolls_back_all_the_callbacks_of_the_inner_part_come_first(table_db: DbWriter) -> None:
    told: list[str] = []
    with pytest.raises(sqlite3.IntegrityError), table_db.transaction() as tx:
        tx.execute(INSERT, (1,))
        tx.on_rollback(lambda: told.append("outer"))
        with tx.savepoint():
            tx.on_rollback(lambda: told.append("inner"))
            tx.execute("INSERT OR ROLLBACK INTO t VALUES (1)")
    assert told == ["inner", "outer"]


@pytest.mark.parametrize("is_nested", [True, False], ids=["block", "savepoint"])
def test_what_an_interrupt_ends_as_it_begins_is_over_for_its_thread(
    table_db: DbWriter, is_nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with table_db.transaction() as tx:
        tx.execute(INSERT, (1,))
        with monkeypatch.context() as patched:
            patched.setattr(part, "weakref", SimpleNamespace(ref=raising(KeyboardInterrupt)))
            with pytest.raises(KeyboardInterrupt) as kept:  # and with its traceback the part
                (table_db.transaction() if is_nested else tx.savepoint()).__enter__()
    table_db.run(INSERT, (2,))  # outside it
    assert rows(table_db) == [1, 2]
    assert kept.value.__traceback__ is not None


@pytest.mark.parametrize("nest", [in_a_job, in_a_block, None], ids=["job", "block", "savepoint"])
def test_an_unhelpful_exception_comes_out_as_it_is(table_db: DbWriter, nest: Nest | None) -> None:
    def fail(inner: Transaction) -> None:
        inner.execute(INSERT, (1,))
        raise UnhelpfulError

    def in_a_savepoint(work: Work) -> None:
        with tx.savepoint():
            work(tx)

    with table_db.transaction() as tx:
        try:  # not pytest.raises: pytest cannot show one that has this in its context
            in_a_savepoint(fail) if nest is None else nest(table_db, fail)
        except Exception as error:
            came = type(error)
        tx.execute(INSERT, (2,))
    assert (came, rows(table_db)) == (UnhelpfulError, [2])


@NESTED
def test_a_part_that_cannot_be_undone_since_all_is_interrupted_raises_its_own_error(
    table_db: DbWriter, nest: Nest
) -> None:
    """As long as a statement runs, and a half read one does, SQLite refuses others after interrupt()."""

    def fail(inner: Transaction) -> None:
        inner.execute(INSERT, (3,))
        tx.connection.interrupt()
        raise LookupError("its own")

    with table_db.transaction() as tx:
        tx.connection.execute("INSERT INTO t VALUES (1), (2)")
        half_read = tx.connection.execute("SELECT n FROM t")
        assert half_read.fetchone() == (1,)
        with pytest.raises(LookupError, match="its own"):
            nest(table_db, fail)
    assert rows(table_db) == [1, 2]  # undone at the end of the block, which has closed the cursor


def test_a_part_that_is_dropped_while_it_is_open_is_undone(table_db: DbWriter) -> None:
    with table_db.transaction() as tx:
        part = tx.savepoint()
        part.__enter__()
        tx.execute(INSERT, (1,))
        del part
        gc.collect()
        tx.execute(INSERT, (2,))
        nested = table_db.transaction()
        inner = nested.__enter__()
        inner.execute(INSERT, (3,))
        del nested
        gc.collect()
        with pytest.raises(TransactionClosedError):
            inner.execute(INSERT, (4,))
        tx.execute(INSERT, (5,))
    assert rows(table_db) == [2, 5]


def test_callbacks_that_were_called_are_not_kept_by_the_transaction(table_db: DbWriter) -> None:
    class Called:
        def __call__(self) -> None:
            pass

    called = Called()
    with table_db.transaction() as tx:
        tx.on_commit(called)
    kept = weakref.ref(called)
    del called
    assert kept() is None


def test_a_nested_block_that_is_open_behind_the_end_of_its_block_keeps_nobody_from_waiting(path: Path) -> None:
    def inside(db: DbWriter) -> Iterator[None]:
        with db.transaction():
            yield

    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n)")
        with db.transaction():
            generator = inside(db)
            next(generator)
        with pytest.raises(TransactionClosedError):
            db.run("INSERT INTO t VALUES (1)")  # which is inside the one that has ended
        db.enqueue("INSERT INTO t VALUES (2)").result(DEADLINE)
        db.close(DEADLINE)
        with pytest.raises(TransactionClosedError):
            next(generator)
    assert rows_in(path) == [2]
