"""What a job's function gets, and what it may do with it."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from helpers import BRIEFLY, DEADLINE, core_of, eventually, holding_lock, inserting, parked, rows, session_of, state_of
from onewriter import (
    DbWriter,
    ReadTimeoutError,
    ReentrantWriteError,
    Result,
    Ticket,
    Transaction,
    TransactionAbortedError,
    TransactionClosedError,
)
from onewriter.write import loan
from onewriter.write.block import ThreadBlock
from onewriter.write.parts import Parts

INSERT = "INSERT INTO t VALUES (?)"
ENDLESS = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT max(n) FROM c"


@pytest.fixture
def db(any_db: DbWriter) -> DbWriter:
    any_db.run("CREATE TABLE t (n UNIQUE)")
    return any_db


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
        with pytest.raises(sqlite3.IntegrityError):
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


@pytest.mark.parametrize(
    ("caught_at", "kept"), [(0, []), (1, [1]), (2, [1, 2]), (3, [1, 2, 3])], ids=["nowhere", "first", "second", "third"]
)
def test_a_failure_three_savepoints_deep_undoes_as_far_as_it_gets(
    db: DbWriter, caught_at: int, kept: list[int]
) -> None:
    def level(tx: Transaction, depth: int) -> None:
        tx.execute(INSERT, (depth,))
        if depth == 4:
            raise LookupError
        caught = contextlib.suppress(LookupError) if depth == caught_at else contextlib.nullcontext()
        with caught, tx.savepoint():
            level(tx, depth + 1)

    expected = contextlib.nullcontext() if caught_at else pytest.raises(LookupError)
    with expected:
        db.run(lambda tx: level(tx, 1))
    assert rows(db) == kept
    db.run(INSERT, (9,))
    assert rows(db) == [*kept, 9]


def test_what_a_job_undid_itself_can_be_done_again_in_it(db: DbWriter) -> None:
    def job(tx: Transaction) -> None:
        for n in range(100):
            with contextlib.suppress(LookupError), tx.savepoint():
                tx.execute(INSERT, (n,))
                if n % 2:
                    raise LookupError
        for n in range(1, 100, 2):
            tx.execute(INSERT, (n,))

    db.run(job)
    assert sorted(rows(db)) == list(range(100))


def test_a_savepoint_that_is_left_open_ends_with_its_job(db: DbWriter) -> None:
    kept: list[Any] = []

    def job(tx: Transaction) -> None:
        kept.append(tx.savepoint())
        kept[0].__enter__()
        tx.execute(INSERT, (1,))

    db.run(job)
    with pytest.raises(TransactionClosedError):
        kept[0].__exit__(None, None, None)
    db.run(INSERT, (2,))
    assert rows(db) == [1, 2]


def test_a_system_exit_inside_a_nested_call_undoes_the_nested_part_only_if_it_is_caught(db: DbWriter) -> None:
    def exits(tx: Transaction) -> None:
        tx.execute(INSERT, (2,))
        raise SystemExit(1)

    def job(tx: Transaction) -> None:
        tx.execute(INSERT, (1,))
        with pytest.raises(SystemExit):
            db.run(exits)
        with pytest.raises(SystemExit), db.transaction() as inner:
            exits(inner)

    db.run(job)
    assert rows(db) == [1]


@pytest.mark.parametrize(
    "call",
    [
        lambda db, tx: db.run_many(INSERT, [(5,), (6,), (5,)]),
        lambda db, tx: db.run_script("INSERT INTO t VALUES (5); INSERT INTO t VALUES (5);"),
        lambda db, tx: tx.executescript("INSERT INTO t VALUES (5); INSERT INTO t VALUES (5);"),
        lambda db, tx: db.run("INSERT INTO t VALUES (5), (5)"),
        lambda db, tx: db.run("INSERT OR FAIL INTO t VALUES (5), (5)"),
    ],
    ids=["run_many", "run_script", "executescript", "run", "run OR FAIL"],
)
def test_a_part_that_fails_midway_and_is_caught_leaves_nothing_of_itself(db: DbWriter, call: Any) -> None:
    def job(tx: Transaction) -> None:
        tx.execute(INSERT, (1,))
        with pytest.raises(sqlite3.IntegrityError):
            call(db, tx)
        tx.execute(INSERT, (2,))

    db.run(job)
    with pytest.raises(LookupError), db.transaction() as tx:
        tx.execute("DELETE FROM t")
        job(tx)
        raise LookupError
    assert rows(db) == [1, 2]


def test_a_script_that_fails_undoes_nothing_of_another_thread(db: DbWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(1) as pool, db.transaction() as tx:

        def with_another_in_between(script: str) -> Iterator[str]:
            first, second = script.split(";")
            yield first
            others.append(pool.submit(tx.execute, INSERT, (2,)))
            wait(others, BRIEFLY)
            yield second

        others: list[Future[Result]] = []
        monkeypatch.setattr(loan, "script_parts", with_another_in_between)
        with pytest.raises(sqlite3.IntegrityError):
            tx.executescript("INSERT INTO t VALUES (1); INSERT INTO t VALUES (1)")
        others[0].result(DEADLINE)
    assert rows(db) == [2]


def test_callbacks_of_nested_calls_run_in_their_order_after_the_whole(db: DbWriter) -> None:
    told: list[int] = []

    def note(n: int) -> Callable[[], object]:
        return lambda: told.append(n)

    def job(tx: Transaction) -> None:
        tx.on_commit(note(1))
        db.run(lambda inner: inner.on_commit(note(2)))
        with db.transaction() as inner:
            inner.on_commit(note(3))
        with pytest.raises(LookupError), db.transaction() as inner:
            inner.on_commit(note(-1))
            with inner.savepoint():
                inner.on_commit(note(-2))
            raise LookupError
        tx.on_commit(note(4))
        assert told == []

    db.run(job)
    db.flush()
    assert told == [1, 2, 3, 4]


def test_the_lock_is_free_when_callbacks_run(db: DbWriter, path: Path) -> None:
    told: list[str] = []

    def tell(what: str) -> None:
        with holding_lock(path):
            told.append(what)

    def job(tx: Transaction) -> None:
        tx.execute(INSERT, (1,))
        tx.on_commit(lambda: tell("committed"))
        tx.on_rollback(lambda: tell("rolled back"))

    def failing(tx: Transaction) -> None:
        job(tx)

    db.run(job)
    db.flush()
    with pytest.raises(sqlite3.IntegrityError):
        db.run(failing)
    db.flush()
    assert told == ["committed"]  # the second had not come to its callbacks

    def failing_later(tx: Transaction) -> None:
        tx.on_rollback(lambda: tell("rolled back"))
        job(tx)

    with pytest.raises(sqlite3.IntegrityError):
        db.run(failing_later)
    db.flush()
    assert told == ["committed", "rolled back"]


@pytest.mark.parametrize("kind", [LookupError, SystemExit, KeyboardInterrupt])
def test_a_callback_that_raises_is_logged_and_neither_the_next_nor_the_job_is_hurt(
    db: DbWriter, caplog: pytest.LogCaptureFixture, kind: type[BaseException]
) -> None:
    told: list[int] = []

    def fail() -> None:
        raise kind("of the callback")

    def job(tx: Transaction) -> str:
        tx.on_commit(fail)
        tx.on_commit(lambda: told.append(1))
        tx.on_commit(fail)
        return "done"

    if core_of(db).options.inline and kind is not LookupError:  # it is the caller's own thread
        with pytest.raises(kind, match="of the callback"):
            db.run(job)
        assert told == [1]
        db.run(INSERT, (1,))
        return
    assert db.run(job) == "done"
    db.flush()
    assert told == [1]
    logged = [record for record in caplog.records if record.exc_info and record.exc_info[0] is kind]
    assert [record.levelno for record in logged] == [logging.ERROR] * 2
    db.run(INSERT, (1,))


def test_a_callback_may_enqueue_and_read(db: DbWriter) -> None:
    tickets: list[Ticket[Any]] = []
    seen: list[Any] = []

    def after() -> None:
        seen.extend(rows(db))
        tickets.append(db.enqueue(INSERT, (2,)))

    def job(tx: Transaction) -> None:
        tx.execute(INSERT, (1,))
        tx.on_commit(after)

    db.run(job)
    db.flush(DEADLINE)
    assert tickets[0].result(DEADLINE).rowcount == 1
    assert (seen, rows(db)) == ([1], [1, 2])


def undone_in_a_savepoint(tx: Transaction) -> None:
    with tx.savepoint():
        tx.execute("INSERT OR ROLLBACK INTO t VALUES (1)")


UNDOES: dict[str, Callable[[Transaction], object]] = {
    "OR ROLLBACK": lambda tx: tx.execute("INSERT OR ROLLBACK INTO t VALUES (1)"),
    "RAISE(ROLLBACK)": lambda tx: tx.execute("DELETE FROM t WHERE n = 1"),
    "in a savepoint": undone_in_a_savepoint,
    "in a script": lambda tx: tx.executescript("INSERT INTO t VALUES (7); INSERT OR ROLLBACK INTO t VALUES (1);"),
    "many": lambda tx: tx.executemany("INSERT OR ROLLBACK INTO t VALUES (?)", [(8,), (1,)]),
    "lent": lambda tx: tx.connection.execute("INSERT OR ROLLBACK INTO t VALUES (1)"),
}


@pytest.mark.parametrize("undo", UNDOES.values(), ids=UNDOES)
def test_a_job_that_swallows_a_rollback_of_sqlites_own_fails_and_later_statements_are_not_done_alone(
    db: DbWriter, undo: Callable[[Transaction], object]
) -> None:
    db.run(INSERT, (1,))
    db.run("CREATE TRIGGER keep BEFORE DELETE ON t BEGIN SELECT RAISE(ROLLBACK, 'kept'); END")
    told: list[str] = []
    used: list[int] = []

    def job(tx: Transaction) -> None:
        tx.on_commit(lambda: told.append("committed"))
        tx.on_rollback(lambda: told.append("rolled back"))
        tx.execute(INSERT, (2,))
        lent = tx.connection
        with pytest.raises(sqlite3.IntegrityError):
            undo(tx)
        uses: list[Callable[[], object]] = [
            lambda: tx.execute(INSERT, (3,)),
            lambda: tx.executemany(INSERT, [(3,)]),
            lambda: tx.executescript("INSERT INTO t VALUES (3)"),
            lambda: tx.savepoint().__enter__(),
            lambda: tx.connection,
            lambda: lent.execute(INSERT, (3,)),
            lambda: lent.commit(),
            lambda: tx.on_commit(print),
            lambda: tx.on_rollback(print),
            lambda: db.run(INSERT, (3,)),
            lambda: db.read("SELECT 1"),
        ]
        for use in uses:
            with pytest.raises(TransactionAbortedError):
                use()
        used.append(len(uses))

    with pytest.raises(TransactionAbortedError):
        db.run(job)
    db.flush()
    with pytest.raises(TransactionAbortedError), db.transaction() as tx:
        job(tx)
    assert told == ["rolled back"] * 2
    assert len(used) == 2
    assert rows(db) == [1]
    db.run(INSERT, (4,))
    assert rows(db) == [1, 4]


def test_an_error_of_the_job_itself_after_such_a_rollback_is_the_one_that_is_told(db: DbWriter) -> None:
    db.run(INSERT, (1,))

    def job(tx: Transaction) -> None:
        with pytest.raises(sqlite3.IntegrityError):
            tx.execute("INSERT OR ROLLBACK INTO t VALUES (1)")
        raise LookupError("its own")

    with pytest.raises(LookupError, match="its own"):
        db.run(job)
    with pytest.raises(LookupError, match="its own"), db.transaction() as tx:
        job(tx)
    assert rows(db) == [1]


@pytest.mark.parametrize(
    "run",
    [
        lambda tx: tx.execute("INSERT INTO t SELECT call_back()"),
        lambda tx: tx.executemany("INSERT INTO t SELECT call_back() + ?", [(0,)]),
        lambda tx: tx.executescript("INSERT INTO t SELECT call_back(); COMMIT"),
    ],
)
def test_whatever_runs_a_sql_function_the_transaction_is_not_used_in_it(
    path: Path, run: Callable[[Transaction], object]
) -> None:
    """It would be used in the midst of a statement, and what follows that be allowed all that the gateway may do."""
    current: list[Transaction] = []
    refused: list[bool] = []

    def call_back() -> int:
        try:
            current[0].execute("INSERT INTO t VALUES (-1)")
        except ReentrantWriteError:
            refused.append(True)
        return 1

    def job(tx: Transaction) -> None:
        current[:] = [tx]
        with contextlib.suppress(sqlite3.DatabaseError):  # COMMIT in the script
            run(tx)

    with DbWriter(path, on_connect=lambda connection, _: connection.create_function("call_back", 0, call_back)) as db:
        db.run("CREATE TABLE t (n)")
        db.run(job)
        assert refused == [True]
        assert db.read("SELECT count(*) FROM t WHERE n = -1") == [(0,)]


@pytest.mark.parametrize("inline", [False, True])
def test_a_sql_function_that_calls_the_gateway_gets_a_named_error(path: Path, inline: bool) -> None:
    errors: list[BaseException] = []
    current: list[Transaction] = []

    def hook(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.create_function("call_back", 0, call_back)

    def call_back() -> int:
        calls: list[Callable[[], object]] = [
            lambda: db.run(INSERT, (-1,)),
            lambda: db.run(lambda tx: tx.execute(INSERT, (-2,)) and None),
            lambda: db.run_many(INSERT, [(-3,)]),
            lambda: db.run_script("INSERT INTO t VALUES (-4)"),
            lambda: db.transaction().__enter__(),
            lambda: db.run_without_transaction("VACUUM"),
            lambda: db.read("SELECT 1"),
            *[(lambda tx=tx: tx.connection.execute("SELECT 1")) for tx in current],
            *[(lambda tx=tx: tx.execute(INSERT, (-5,))) for tx in current],
            *[(lambda tx=tx: tx.savepoint().__enter__()) for tx in current],
        ]
        for call in calls:
            try:
                call()
            except ReentrantWriteError as error:
                errors.append(error)
        return len(calls)

    def job(tx: Transaction) -> int:
        current[:] = [tx]
        count: int = tx.execute("SELECT call_back()").rows[0][0]
        current.clear()
        return count

    def in_a_block() -> int:
        with db.transaction() as tx:
            return job(tx)

    with DbWriter(path, on_connect=hook, inline=inline) as db:
        db.run("CREATE TABLE t (n)")
        for call in (
            lambda: db.run("SELECT call_back()").rows[0][0],
            lambda: db.run("INSERT INTO t SELECT call_back() RETURNING n").rows[0][0],
            lambda: db.enqueue("SELECT call_back()").result(DEADLINE).rows[0][0],
            lambda: db.run_without_transaction("SELECT call_back()").rows[0][0],
            lambda: db.run(job),
            in_a_block,
        ):
            count = call()
            assert len(errors) == count > 5
            errors.clear()
        assert db.run("DELETE FROM t RETURNING n").rows == [(7,)]


def test_a_transaction_of_another_job_is_dead_even_in_the_writer_thread(db: DbWriter) -> None:
    kept: list[Transaction] = []
    db.run(kept.append, label="the first")
    with pytest.raises(TransactionClosedError, match="the first"):
        kept[0].execute("SELECT 1")

    def job(tx: Transaction) -> None:
        tx.execute(INSERT, (1,))
        uses: list[Callable[[], object]] = [
            lambda: kept[0].execute(INSERT, (2,)),
            lambda: kept[0].executemany(INSERT, [(2,)]),
            lambda: kept[0].executescript("INSERT INTO t VALUES (2)"),
            lambda: kept[0].savepoint().__enter__(),
            lambda: kept[0].on_commit(print),
            lambda: kept[0].on_rollback(print),
            lambda: kept[0].connection,
        ]
        for use in uses:
            with pytest.raises(TransactionClosedError):
                use()

    db.run(job)
    assert rows(db) == [1]


def test_every_use_in_another_thread_raises_and_changes_nothing(db: DbWriter) -> None:
    def job(tx: Transaction) -> None:
        lent = tx.connection
        uses: list[Callable[[], object]] = [
            lambda: tx.execute(INSERT, (2,)),
            lambda: tx.executemany(INSERT, [(2,)]),
            lambda: tx.executescript("INSERT INTO t VALUES (2)"),
            lambda: tx.savepoint().__enter__(),
            lambda: tx.on_commit(print),
            lambda: lent.execute(INSERT, (2,)),
            lambda: lent.commit(),
            lambda: lent.cursor(),
        ]
        tx.execute(INSERT, (1,))
        with ThreadPoolExecutor(1) as pool:
            for use in uses:
                with pytest.raises(TransactionClosedError, match="another thread"):
                    pool.submit(use).result(DEADLINE)

    db.run(job)
    assert rows(db) == [1]


def test_a_part_that_was_rolled_back_is_told_once_whatever_becomes_of_the_whole(db: DbWriter) -> None:
    told: list[str] = []

    def job(tx: Transaction) -> None:
        with contextlib.suppress(ZeroDivisionError), tx.savepoint():
            tx.on_rollback(lambda: told.append("part"))
            raise ZeroDivisionError
        tx.on_rollback(lambda: told.append("rest"))
        raise LookupError

    with pytest.raises(LookupError):
        db.run(job)
    db.flush(DEADLINE)  # the callbacks come after the outcome
    assert told == ["part", "rest"]


def test_savepoints_that_end_in_the_wrong_order_end_with_the_one_around_them(db: DbWriter) -> None:
    for kind, expected in ((None, [1, 2, 3]), (LookupError, [3])):
        db.run("DELETE FROM t")

        def job(tx: Transaction, kind: Any = kind) -> None:
            outer, inner = tx.savepoint(), tx.savepoint()
            outer.__enter__()
            tx.execute(INSERT, (1,))
            inner.__enter__()
            tx.execute(INSERT, (2,))
            outer.__exit__(kind, kind and kind(), None)
            with pytest.raises(TransactionClosedError, match="ended with the one around it"):
                inner.__exit__(None, None, None)
            with tx.savepoint():
                tx.execute(INSERT, (3,))
                with contextlib.suppress(LookupError), tx.savepoint():
                    tx.execute(INSERT, (4,))
                    raise LookupError

        db.run(job)
        assert db.read("SELECT n FROM t ORDER BY n") == [(n,) for n in expected]


def test_a_transaction_is_made_without_a_dict(db: DbWriter) -> None:
    def look(tx: Transaction) -> bool:
        return hasattr(tx, "__dict__")

    assert not db.run(look)


def test_a_read_in_a_block_that_is_taken_back_leaves_the_writer_writable(db: DbWriter) -> None:
    for n in range(5):
        with pytest.raises(TransactionClosedError), db.transaction(max_hold=0.03):
            db.read(ENDLESS)
        with pytest.raises(TransactionClosedError), db.transaction(max_hold=0.03):
            db.read(lambda connection: threading.Event().wait(0.1))
            db.read("SELECT 1")
        db.run("INSERT INTO t VALUES (?)", (n,))


def test_a_block_with_a_limit_that_is_left_well_waits_for_the_statement_of_another_thread(any_db: DbWriter) -> None:
    entered = threading.Event()

    def hold() -> int:
        entered.set()
        eventually(lambda: tx._loan.is_closed)
        return 0

    any_db.run("CREATE TABLE t (n)")
    session_of(any_db).connection.create_function("hold", 0, hold)
    steps = "WITH RECURSIVE n (i) AS (SELECT hold() UNION ALL SELECT i + 1 FROM n LIMIT 10000)"
    with ThreadPoolExecutor(1) as threads:
        with any_db.transaction(max_hold=DEADLINE) as tx:
            statement = threads.submit(tx.execute, f"INSERT INTO t {steps} SELECT max(i) FROM n")
            assert entered.wait(DEADLINE)
        assert statement.result(DEADLINE).rowcount == 1
    assert rows(any_db) == [9999]


def test_a_use_after_max_hold_is_refused_although_the_writer_has_not_come_to_take_the_block_back(
    db: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under load, where its thread may have to wait for long."""
    monkeypatch.setattr(ThreadBlock, "_patience", lambda block, until: DEADLINE)
    with pytest.raises(TransactionClosedError, match="max_hold"), db.transaction(max_hold=0.001) as tx:
        eventually(lambda: tx._loan.held_until < monotonic())
        tx.execute("INSERT INTO t VALUES (1)")
    assert rows(db) == []


def test_a_read_whose_end_an_interrupt_meets_leaves_the_writer_writable(
    new_db: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, met = session_of(new_db), threading.Event()
    internal = session.internal

    def interrupted(sql: str, *parameters: Any) -> list[Any]:
        if sql == "PRAGMA query_only=0" and not met.is_set():
            met.set()
            raise sqlite3.OperationalError("interrupted")
        return internal(sql, *parameters)

    monkeypatch.setattr(session, "internal", interrupted)
    with new_db.transaction():
        new_db.read("SELECT 1")
    new_db.run("CREATE TABLE t (n)")
    assert met.is_set()


def test_a_read_inside_a_job_or_block_ends_at_its_timeout_too(db: DbWriter) -> None:
    def job(tx: Any) -> None:
        tx.execute("INSERT INTO t VALUES (1)")
        for read in (ENDLESS, lambda connection: connection.execute(ENDLESS).fetchall()):
            with pytest.raises(ReadTimeoutError):
                db.read(read, timeout=0.03)
        tx.execute("INSERT INTO t VALUES (2)")

    db.run(job)
    db.run("DELETE FROM t")
    with db.transaction() as tx:
        job(tx)
    assert db.read("SELECT n FROM t") == [(1,), (2,)]


def test_an_error_of_a_read_inside_a_block_that_is_late_is_told_as_it_is(db: DbWriter) -> None:
    with db.transaction(), pytest.raises(sqlite3.OperationalError, match="no such table"):
        db.read("SELECT * FROM missing", timeout=0)


def test_a_nested_block_leaves_the_factories_of_the_outer_one(new_db: DbWriter) -> None:
    with new_db.transaction() as tx:
        tx.connection.text_factory = bytes
        with new_db.transaction() as inner:
            assert inner.connection.execute("SELECT 'x'").fetchone() == (b"x",)
            inner.connection.text_factory = str
        assert tx.connection.execute("SELECT 'x'").fetchone() == (b"x",)
    assert new_db.run("SELECT 'x'").rows == [("x",)]


def test_a_nested_block_that_ends_after_its_outer_one_was_taken_changes_nothing_of_the_connection(path: Path) -> None:
    with DbWriter(path) as new_db:
        with pytest.raises(TransactionClosedError), new_db.transaction(max_hold=0.05) as tx:
            tx.connection.text_factory = bytes
            with new_db.transaction() as inner:
                assert inner.connection.execute("SELECT 'x'").fetchone() == (b"x",)
                eventually(lambda: not new_db.in_writer())
                other = threading.Thread(target=new_db.run, args=("SELECT 1",))
                other.start()
                other.join(DEADLINE)
        assert new_db.run("SELECT 'x'").rows == [("x",)]


def test_the_parts_of_a_transaction_are_made_with_nobody_beside(
    new_db: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[bool] = []

    def made(session: Any) -> Parts:
        with ThreadPoolExecutor(1) as pool:
            held.append(not pool.submit(state_of(new_db).lock.acquire, blocking=False).result(DEADLINE))
        return Parts(session)

    monkeypatch.setattr(loan, "Parts", made)
    with new_db.transaction() as tx:
        tx.on_commit(int)
        tx.on_commit(int)
    assert held == [True]


def test_rollback_undoes_what_was_done_so_far_and_the_block_goes_on(any_db: DbWriter) -> None:
    any_db.run("CREATE TABLE t (n)")
    called: list[str] = []

    def work(tx: Transaction) -> None:
        tx.execute("INSERT INTO t VALUES (1)")
        tx.on_commit(lambda: called.append("undone"))
        tx.on_rollback(lambda: called.append("rolled back"))
        tx.rollback()
        tx.execute("INSERT INTO t VALUES (2)")
        with tx.savepoint():
            tx.execute("INSERT INTO t VALUES (3)")
            tx.rollback()
            tx.execute("INSERT INTO t VALUES (4)")
        tx.on_commit(lambda: called.append("committed"))

    with any_db.transaction() as tx:
        work(tx)
    assert called == ["rolled back", "committed"]
    any_db.run(work)
    assert any_db.read("SELECT n FROM t") == [(2,), (4,), (2,), (4,)]
    with pytest.raises(TransactionClosedError):
        tx.rollback()


def test_rollback_in_a_job_leaves_those_that_share_its_transaction(new_db: DbWriter) -> None:
    db = new_db
    db.run("CREATE TABLE t (n UNIQUE)")

    def undo(tx: Transaction) -> None:
        tx.execute("INSERT INTO t VALUES (9)")
        tx.rollback()

    with parked(db):
        for job in (inserting(1), undo, inserting(2)):
            db.enqueue(job)
    db.flush(DEADLINE)
    assert rows(db) == [1, 2]


def nest_a_write(db: DbWriter, tx: Transaction) -> None:
    db.run(INSERT, (2,))


def nest_a_block(db: DbWriter, tx: Transaction) -> None:
    with db.transaction() as inner:
        inner.execute(INSERT, (2,))


def use_a_savepoint(db: DbWriter, tx: Transaction) -> None:
    with tx.savepoint():
        tx.execute(INSERT, (2,))


CALLS: list[Callable[[DbWriter, Transaction], object]] = [
    lambda db, tx: tx.execute(INSERT, (2,)),
    lambda db, tx: tx.executemany(INSERT, [(2,)]),
    lambda db, tx: tx.executescript("INSERT INTO t VALUES (2)"),
    lambda db, tx: tx.rollback(),
    lambda db, tx: tx.on_commit(str),
    lambda db, tx: tx.connection.execute(INSERT, (2,)).close(),
    lambda db, tx: db.read("SELECT * FROM t"),
    nest_a_write,
    nest_a_block,
    use_a_savepoint,
]


@pytest.mark.parametrize("call", CALLS)
def test_what_a_function_must_not_do_is_refused_after_any_other_call(
    db: DbWriter, call: Callable[[DbWriter, Transaction], object]
) -> None:
    refused = []

    def job(tx: Transaction) -> None:
        call(db, tx)
        for sql in ("SAVEPOINT mine", "PRAGMA journal_mode=DELETE", "COMMIT"):
            with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
                tx.execute(sql)
            refused.append(sql)

    db.run(job)
    assert len(refused) == 3


def test_a_function_whose_transaction_sqlite_has_ended_can_do_nothing_more(db: DbWriter) -> None:
    db.run(INSERT, (1,))
    refused = []

    def job(tx: Transaction) -> None:
        tx.execute(INSERT, (2,))
        with pytest.raises(sqlite3.IntegrityError):
            tx.execute("INSERT OR ROLLBACK INTO t VALUES (1)")
        for number in (3, 4):
            with pytest.raises(TransactionAbortedError):
                tx.execute(INSERT, (number,))
            refused.append(number)

    with pytest.raises(TransactionAbortedError):
        db.run(job)
    assert (refused, rows(db)) == ([3, 4], [1])


def test_what_a_function_leaves_open_is_around_no_other_of_its_batch(db: DbWriter) -> None:
    kept: list[Any] = []

    def leave_open(tx: Transaction) -> None:
        kept.append(db.reader())
        kept[-1].__enter__()

    def look(tx: Transaction) -> Any:
        tx.execute(INSERT, (1,))
        return db.read_value("SELECT count(*) FROM t")

    is_inline = state_of(db).reporter is None  # where nothing waits, so that there is no batch
    with contextlib.nullcontext() if is_inline else parked(db):
        first, second = db.enqueue(leave_open), db.enqueue(look)
    assert (first.result(DEADLINE), second.result(DEADLINE)) == (None, 1)
    db.run(leave_open)
    db.run(INSERT, (2,))
    assert rows(db) == [1, 2]  # nor around the caller, whose thread the writer may be
    kept.pop().__exit__(None, None, None)
    kept.pop().__exit__(None, None, None)


@pytest.mark.parametrize("sql", [None, 1, b"SELECT 1", ["SELECT 1"]])
def test_sql_that_is_no_str_is_refused_in_a_function_too(db: DbWriter, sql: Any) -> None:
    with pytest.raises(TypeError, match="the SQL must be a str"):
        db.run(lambda tx: tx.execute(sql))


def test_letters_are_no_parameters_in_a_function_either(db: DbWriter) -> None:
    with pytest.raises(TypeError, match="put a lone value into a tuple"):
        db.run(lambda tx: tx.execute(INSERT, "x"))  # type: ignore[arg-type]


OR_ROLLBACK = "INSERT OR ROLLBACK INTO t VALUES (?)"


def in_a_nested_block(db: DbWriter, tx: Transaction) -> None:
    with db.transaction() as inner:
        inner.execute(OR_ROLLBACK, (1,))


@pytest.mark.parametrize(
    "undo",
    [
        lambda db, tx: tx.execute(OR_ROLLBACK, (1,)),
        lambda db, tx: tx.executemany(OR_ROLLBACK, [(2,), (1,)]),
        lambda db, tx: tx.executescript("INSERT OR ROLLBACK INTO t VALUES (1)"),
        lambda db, tx: db.run(OR_ROLLBACK, (1,)),
        lambda db, tx: db.run(lambda inner: inner.execute(OR_ROLLBACK, (1,))),
        in_a_nested_block,
        lambda db, tx: tx.connection.execute(OR_ROLLBACK, (1,)),
    ],
    ids=["execute", "executemany", "executescript", "run", "run of a function", "block", "connection"],
)
def test_a_function_whose_transaction_sqlite_has_ended_writes_nothing_more_whatever_ended_it(
    db: DbWriter, undo: Callable[[DbWriter, Transaction], object]
) -> None:
    def job(tx: Transaction) -> None:
        with pytest.raises(sqlite3.IntegrityError):
            undo(db, tx)
        with pytest.raises(TransactionAbortedError):
            tx.execute(INSERT, (3,))

    db.run("CREATE UNIQUE INDEX one ON t (n)")
    db.run(INSERT, (1,))
    with pytest.raises(TransactionAbortedError):
        db.run(job)
    assert rows(db) == [1]


def test_a_script_goes_no_further_when_max_hold_is_over(path: Path) -> None:
    def wait_for_it(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.create_function("hold", 0, lambda: threading.Event().wait(0.1))

    with DbWriter(path, max_hold=0.05, on_connect=wait_for_it) as db:
        db.run("CREATE TABLE t (n)")
        with pytest.raises(TransactionClosedError, match="longer than max_hold"):
            db.run(lambda tx: tx.executescript("INSERT INTO t VALUES (hold()); INSERT INTO t VALUES (2)"))
        assert rows(db) == []
