"""What a job's function gets, and what it may do with it."""

from __future__ import annotations

import functools
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from helpers import DEADLINE, parked
from onewriter import (
    DbWriter,
    ReentrantWriteError,
    Ticket,
    Transaction,
    TransactionAbortedError,
    TransactionClosedError,
)

INSERT = "INSERT INTO t VALUES (?)"


@pytest.fixture
def db(any_db: DbWriter) -> DbWriter:
    any_db.run("CREATE TABLE t (n UNIQUE)")
    return any_db


def rows(db: DbWriter) -> list[Any]:
    return [n for (n,) in db.read("SELECT n FROM t ORDER BY n")]


def test_savepoints_nest_and_an_inner_failure_that_is_caught_undoes_the_inner_part(db: DbWriter) -> None:
    def job(tx: Transaction) -> None:
        tx.execute(INSERT, (1,))
        with tx.savepoint():
            tx.execute(INSERT, (2,))
            with pytest.raises(LookupError), tx.savepoint():
                tx.execute(INSERT, (3,))
                with tx.savepoint():
                    tx.execute(INSERT, (4,))
                raise LookupError
            with tx.savepoint():
                db.run(INSERT, (5,))
            with pytest.raises(sqlite3.IntegrityError):
                db.run(INSERT, (1,))
        tx.execute(INSERT, (6,))

    db.run(job)
    assert rows(db) == [1, 2, 5, 6]


def test_an_inner_failure_that_is_not_caught_undoes_all(db: DbWriter) -> None:
    def job(tx: Transaction) -> None:
        tx.execute(INSERT, (1,))
        with tx.savepoint(), tx.savepoint():
            raise LookupError

    with pytest.raises(LookupError):
        db.run(job)
    assert rows(db) == []


@pytest.mark.parametrize("kind", ["run", "run_many", "run_script", "function", "block"])
def test_calls_inside_a_job_are_savepoints_of_it(db: DbWriter, kind: str) -> None:
    def inner(n: int) -> None:
        match kind:
            case "run":
                db.run(INSERT, (n,))
            case "run_many":
                db.run_many(INSERT, [(n,)])
            case "run_script":
                db.run_script(f"INSERT INTO t VALUES ({n});")
            case "function":
                db.run(lambda tx: tx.execute(INSERT, (n,)) and None)
            case "block":
                with db.transaction() as tx:
                    tx.execute(INSERT, (n,))

    def job(tx: Transaction) -> list[Any]:
        inner(1)
        with pytest.raises(sqlite3.IntegrityError):
            inner(1)
        inner(2)
        return rows(db)

    assert db.run(job) == [1, 2]
    with pytest.raises(LookupError), db.transaction():
        inner(3)
        assert rows(db) == [1, 2, 3]
        raise LookupError
    assert rows(db) == [1, 2]


def test_callbacks_run_once_in_order_after_the_end(db: DbWriter) -> None:
    told: list[object] = []

    def job(tx: Transaction) -> str:
        tx.on_rollback(lambda: told.append("never"))
        tx.on_commit(lambda: told.append(rows(db)))
        with pytest.raises(LookupError), tx.savepoint():
            tx.on_commit(lambda: told.append("never"))
            tx.on_rollback(lambda: told.append("undone"))
            raise LookupError
        tx.execute(INSERT, (1,))
        tx.on_commit(lambda: told.append(2))
        return "result"

    assert db.run(job) == "result"
    db.flush()
    assert told == ["undone", [1], 2]


def test_callbacks_of_a_failed_job_are_those_of_rollback(db: DbWriter) -> None:
    told: list[str] = []

    def job(tx: Transaction) -> None:
        tx.on_commit(lambda: told.append("never"))
        tx.on_rollback(lambda: told.append("rolled back"))
        raise LookupError

    with pytest.raises(LookupError):
        db.run(job)
    db.flush()
    assert told == ["rolled back"]


def test_a_wait_in_a_callback_of_the_writer_raises(db: DbWriter) -> None:
    errors: list[BaseException] = []

    def wait() -> None:
        for call in (lambda: db.run("SELECT 1"), db.flush, db.close, lambda: db.enqueue("SELECT 1").result()):
            try:
                call()
            except ReentrantWriteError as error:
                errors.append(error)

    db.run(lambda tx: tx.on_commit(wait))
    db.flush()
    assert len(errors) == 4


def test_a_transaction_ends_with_its_job(db: DbWriter) -> None:
    kept: list[Transaction] = []
    db.run(lambda tx: kept.append(tx), label="the first")
    with pytest.raises(TransactionClosedError, match="the first"):
        kept[0].execute("SELECT 1")
    with pytest.raises(TransactionClosedError):
        db.run(lambda tx: kept[0].execute("SELECT 1") and None)

    def elsewhere(tx: Transaction) -> None:
        with ThreadPoolExecutor() as pool, pytest.raises(TransactionClosedError, match="another thread"):
            pool.submit(tx.execute, "SELECT 1").result(DEADLINE)

    db.run(elsewhere)


def test_after_a_rollback_by_sqlite_every_use_raises(db: DbWriter) -> None:
    db.run(INSERT, (1,))
    uses: list[Callable[[Transaction], object]] = [
        lambda tx: tx.execute(INSERT, (2,)),
        lambda tx: tx.executemany(INSERT, [(3,)]),
        lambda tx: tx.executescript("SELECT 1"),
        lambda tx: tx.connection.execute("SELECT 1"),
        lambda tx: tx.connection.rollback(),
        lambda tx: db.run(INSERT, (4,)),
        lambda tx: db.read("SELECT 1"),
    ]

    def job(tx: Transaction) -> None:
        with pytest.raises(sqlite3.IntegrityError):
            tx.execute("INSERT OR ROLLBACK INTO t VALUES (1)")
        for use in uses:
            with pytest.raises(TransactionAbortedError):
                use(tx)

    with pytest.raises(TransactionAbortedError):
        db.run(job)
    assert rows(db) == [1]


def test_a_statement_that_calls_back_cannot_use_its_own_connection(db: DbWriter) -> None:
    errors: list[type[BaseException]] = []

    def job(tx: Transaction) -> None:
        def call_back() -> None:
            uses: list[Callable[[], object]] = [
                lambda: tx.execute("SELECT 1"),
                lambda: tx.connection.execute("SELECT 1"),
                lambda: rows(db),
            ]
            for use in uses:
                try:
                    use()
                except ReentrantWriteError as error:
                    errors.append(type(error))

        tx.connection.create_function("call_back", 0, call_back)
        tx.execute("SELECT call_back()")
        tx.execute(INSERT, (1,))

    db.run(job)
    assert errors == [ReentrantWriteError] * 3
    assert rows(db) == [1]


def test_a_function_runs_once_even_beside_failing_statements(path: Any) -> None:
    runs = 0

    def count(tx: Transaction) -> None:
        nonlocal runs
        runs += 1
        tx.execute("INSERT INTO t VALUES (?)", (100 + runs,))

    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n UNIQUE)")
        with parked(db):
            first = db.enqueue(INSERT, (1,))
            db.enqueue(count)
            failing = db.enqueue("INSERT INTO t SELECT abs(?)", (-(2**63),))
            db.enqueue(count)
            last = db.enqueue(INSERT, (2,))
        assert isinstance(failing.exception(DEADLINE), sqlite3.OperationalError)
        assert (first.exception(DEADLINE), last.exception(DEADLINE)) == (None, None)
        assert (runs, rows(db)) == (2, [1, 2, 101, 102])


def test_what_undid_a_shared_transaction_makes_the_others_run_again(path: Any) -> None:
    runs: list[int] = []
    told: list[str] = []

    def job(n: int) -> Callable[[Transaction], int]:
        def insert(tx: Transaction) -> int:
            runs.append(n)
            tx.on_commit(lambda: told.append(f"{n} committed"))
            tx.on_rollback(lambda: told.append(f"{n} undone"))
            tx.execute(INSERT, (n,))
            return n

        return insert

    def undo_all(tx: Transaction) -> None:
        tx.execute("INSERT OR ROLLBACK INTO t VALUES (1)")

    with DbWriter(path) as db:
        db.run("CREATE TABLE t (n UNIQUE)")
        with parked(db):
            tickets = [db.enqueue(job(n)) for n in (1, 2)]
            failing = db.enqueue(undo_all)
            failing_alone = db.enqueue("INSERT INTO t VALUES (1)")
            tickets.append(db.enqueue(job(3)))
        assert [ticket.result(DEADLINE) for ticket in tickets] == [1, 2, 3]
        assert isinstance(failing.exception(DEADLINE), sqlite3.IntegrityError)
        assert isinstance(failing_alone.exception(DEADLINE), sqlite3.IntegrityError)
        db.flush()
    assert runs == [1, 2, 1, 2, 3]
    assert told == ["1 undone", "2 undone", "1 committed", "2 committed", "3 committed"]


def test_the_error_of_a_job_has_a_note_and_none_of_the_gateways_frames(db: DbWriter) -> None:
    def job(tx: Transaction) -> None:
        raise LookupError("mine")

    ticket = db.enqueue(job, label="the failing one")
    error = ticket.exception(DEADLINE)
    assert error is not None
    (note,) = error.__notes__
    assert "the failing one" in note
    assert "attempts" not in note  # one was enough
    assert error.__traceback__ is not None
    assert error.__traceback__.tb_frame.f_code.co_name == "job"


def test_an_idle_writer_keeps_nothing_of_its_last_job_alive(path: Any) -> None:
    import gc
    import weakref

    class Thing:
        pass

    gone = threading.Event()
    with DbWriter(path) as db:
        thing: Thing | None = Thing()
        weakref.finalize(thing, gone.set)
        db.run(functools.partial(lambda thing, tx: None, thing))
        thing = None
        db.run("SELECT 1")
        gc.collect()
        assert gone.wait(DEADLINE)


def test_what_undid_all_keeps_its_error_when_the_others_cannot_run_again(path: Any) -> None:
    """Something undoes the shared transaction, and somebody else takes the lock before its jobs run again."""
    import contextlib

    with contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:

        def good(tx: Transaction) -> None:
            tx.on_rollback(lambda: other.execute("BEGIN IMMEDIATE"))
            tx.execute(INSERT, (2,))

        def bad(tx: Transaction) -> None:
            raise LookupError("its own")

        with DbWriter(path, lock_timeout=0.05) as db:
            db.run("CREATE TABLE t (n UNIQUE)")
            db.run(INSERT, (1,))
            with parked(db):
                tickets: list[Ticket[Any]] = [
                    db.enqueue(good),
                    db.enqueue(bad),
                    db.enqueue(lambda tx: tx.execute("INSERT OR ROLLBACK INTO t VALUES (1)") and None),
                ]
            errors = [ticket.exception(DEADLINE) for ticket in tickets]
            other.execute("ROLLBACK")
            assert [type(error) for error in errors] == [
                sqlite3.OperationalError,
                sqlite3.OperationalError,  # it is run again too, and cannot be
                sqlite3.IntegrityError,
            ]
            db.run(INSERT, (3,))
            assert rows(db) == [1, 3]
