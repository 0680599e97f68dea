"""migrate: each step once, in order, in a transaction with its version."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from helpers import BRIEFLY, DEADLINE, eventually, in_threads, notes_of, parked, rows, run_child
from onewriter import AsyncDbWriter, DbWriter, ReentrantWriteError, Transaction, WriterClosedError, WriteTimeoutError

FIRST = "CREATE TABLE t (n); INSERT INTO t VALUES (1)"


def second(tx: Transaction) -> None:
    tx.execute("INSERT INTO t VALUES (2)")


STEPS = (FIRST, second, "INSERT INTO t VALUES (3)")


def version_of(db: DbWriter) -> Any:
    return db.read_value("PRAGMA user_version")


def test_steps_run_once_each_in_order(any_db: DbWriter) -> None:
    assert any_db.migrate(STEPS[:2]) == 2
    assert any_db.migrate(STEPS) == 3
    assert any_db.migrate(STEPS) == 3
    assert rows(any_db) == [1, 2, 3]
    assert version_of(any_db) == 3


def test_none_is_a_version_too(any_db: DbWriter) -> None:
    assert any_db.migrate([]) == 0


def test_what_is_at_the_newest_version_waits_for_no_writer(db: DbWriter) -> None:
    db.migrate(STEPS)
    with parked(db):
        assert db.migrate(STEPS, timeout=DEADLINE) == 3


def test_a_failing_step_names_itself_and_leaves_the_version_before_it(any_db: DbWriter) -> None:
    def broken(tx: Transaction) -> None:
        tx.execute("INSERT INTO t VALUES (9)")
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        any_db.migrate([FIRST, second, broken, "DROP TABLE t"])
    assert "in step 3 of migrate" in notes_of(caught.value)
    assert "broken" in notes_of(caught.value)
    assert (rows(any_db), version_of(any_db)) == ([1, 2], 2)
    with pytest.raises(sqlite3.OperationalError) as refused:
        any_db.migrate([FIRST, second, "INSERT INTO t VALUES (9); INSERT INTO nowhere VALUES (1)"])
    assert "step 3 of migrate, 'INSERT INTO t VALUES (9)" in notes_of(refused.value)
    assert any_db.migrate(STEPS) == 3
    assert rows(any_db) == [1, 2, 3]


def test_a_step_that_lasts_is_named_to_who_waits_for_the_writer(db: DbWriter) -> None:
    entered, release = threading.Event(), threading.Event()

    def long(tx: Transaction) -> None:
        entered.set()
        release.wait(DEADLINE)

    thread = threading.Thread(target=db.migrate, args=[[FIRST, long]])
    thread.start()
    try:
        assert entered.wait(DEADLINE)
        with pytest.raises(WriteTimeoutError, match=r"held by 'migrate' .*, in step 2 of migrate, '.*long'"):
            db.run("DELETE FROM t", timeout=BRIEFLY)
    finally:
        release.set()
        thread.join(DEADLINE)
    assert version_of(db) == 2


@pytest.mark.parametrize("version", [4, -1])
def test_a_database_of_another_version_is_refused(any_db: DbWriter, version: int) -> None:
    any_db.run(f"PRAGMA user_version = {version}")
    for dry_run in (False, True):
        with pytest.raises(ValueError, match=f"version {version} "):
            any_db.migrate(STEPS, dry_run=dry_run)
    assert any_db.read("SELECT * FROM sqlite_schema") == []


def test_a_database_that_becomes_newer_meanwhile_is_refused(db: DbWriter) -> None:
    with parked(db) as release:
        db.enqueue("PRAGMA user_version = 7")
        threading.Timer(BRIEFLY, release.set).start()
        with pytest.raises(ValueError, match="version 7 "):
            db.migrate(STEPS)


def test_a_dry_run_tells_the_version_and_runs_nothing(any_db: DbWriter) -> None:
    any_db.migrate(STEPS[:1])
    version = any_db.migrate(STEPS, dry_run=True)
    assert STEPS[version:] == STEPS[1:]
    assert rows(any_db) == [1]


KEYS = """
CREATE TABLE parent (id INTEGER PRIMARY KEY);
CREATE TABLE child (parent REFERENCES parent ON DELETE CASCADE);
INSERT INTO parent VALUES (1), (2);
INSERT INTO child VALUES (1), (2);
"""
REBUILD = """
CREATE TABLE rebuilt (id INTEGER PRIMARY KEY, name);
INSERT INTO rebuilt (id) SELECT id FROM parent {};
DROP TABLE parent;
ALTER TABLE rebuilt RENAME TO parent;
"""


def test_a_table_is_rebuilt_and_keys_are_checked_before_commit(any_db: DbWriter) -> None:
    with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY") as caught:
        any_db.migrate([KEYS, REBUILD.format("WHERE id = 1")])
    assert "in step 2 of migrate, 'CREATE TABLE rebuilt" in notes_of(caught.value)
    assert version_of(any_db) == 1
    assert any_db.migrate([KEYS, REBUILD.format("")]) == 2
    assert any_db.read("SELECT parent FROM child") == [(1,), (2,)]
    assert any_db.run_without_transaction("PRAGMA foreign_keys").rows == [(1,)]


def test_keys_that_the_gateway_does_not_enforce_are_not_checked(path: Path) -> None:
    with DbWriter(path, foreign_keys=False) as db:
        assert db.migrate([KEYS, "DELETE FROM parent"]) == 2
        assert db.read("SELECT parent FROM child") == [(1,), (2,)]


def test_a_step_that_is_a_transaction_of_its_own_runs(any_db: DbWriter) -> None:
    assert any_db.migrate([f"BEGIN;\n{FIRST};\nCOMMIT;"]) == 1
    assert rows(any_db) == [1]


def test_factories_of_the_users_do_not_disturb_it(path: Path) -> None:
    with DbWriter(path, row_factory=lambda cursor, row: {"only": row}) as db:
        assert db.migrate(STEPS) == 3


def test_inside_a_job_or_block_it_is_refused(any_db: DbWriter) -> None:
    with any_db.transaction(), pytest.raises(ReentrantWriteError):
        any_db.migrate(STEPS)
    with pytest.raises(ReentrantWriteError):
        any_db.run(lambda tx: any_db.migrate(STEPS))
    assert version_of(any_db) == 0


def test_its_arguments_are_checked(any_db: DbWriter) -> None:
    async def later(tx: Transaction) -> None: ...

    calls: list[Any] = [[3], [later], [FIRST, b"SELECT 1"]]
    for steps in calls:
        with pytest.raises(TypeError):
            any_db.migrate(steps)
    no_sequences: list[Any] = [FIRST, 3, {FIRST}, dict.fromkeys(STEPS)]
    for steps in no_sequences:
        with pytest.raises(TypeError, match="steps must be a sequence"):
            any_db.migrate(steps)
    with pytest.raises(TypeError):
        any_db.migrate(STEPS, label=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="timeout"):
        any_db.migrate(STEPS, timeout=-1)
    assert version_of(any_db) == 0


def test_a_step_that_does_not_start_in_time_is_withdrawn(db: DbWriter) -> None:
    with parked(db), pytest.raises(WriteTimeoutError) as late:
        db.migrate(STEPS, label="mine", timeout=BRIEFLY)
    assert not late.value.started
    assert "'mine'" in str(late.value)
    assert version_of(db) == 0


def test_no_other_job_makes_a_step_run_twice(path: Path) -> None:
    ran: list[int] = []

    def step(tx: Transaction) -> None:
        ran.append(1)

    def undo_all(tx: Transaction) -> None:
        tx.execute("INSERT OR ROLLBACK INTO t VALUES (1)")

    with DbWriter(path, foreign_keys=False) as db:
        db.run("CREATE TABLE t (n UNIQUE)")
        db.run("INSERT INTO t VALUES (1)")
        with parked(db):
            thread = threading.Thread(target=db.migrate, args=[[step]])
            thread.start()
            eventually(lambda: db.stats().queue_depth == 1)
            failed = db.enqueue(undo_all)
        thread.join(DEADLINE)
        assert isinstance(failed.exception(DEADLINE), sqlite3.IntegrityError)
        assert version_of(db) == 1
    assert ran == [1]


def test_threads_that_start_at_once_run_each_step_once(path: Path) -> None:
    ran: list[int] = []
    steps: list[Any] = [FIRST, *(lambda tx, n=n: ran.append(n) for n in range(20))]
    with DbWriter(path) as one, DbWriter(path) as other:
        assert in_threads(*[lambda: one.migrate(steps), lambda: other.migrate(steps)] * 4) == [21] * 8
    assert ran == list(range(20))


def test_another_process_goes_on_where_this_one_ended(path: Path) -> None:
    with DbWriter(path) as db:
        db.migrate(STEPS[:1])
        code = f"""
from onewriter import DbWriter
with DbWriter({str(path)!r}) as db:
    print(db.migrate([{FIRST!r}, "INSERT INTO t VALUES (2)"]))
"""
        assert run_child(code).stdout == "2\n"
        assert db.migrate(STEPS) == 3
        assert rows(db) == [1, 2, 3]


def test_a_task_migrates(path: Path) -> None:
    async def main() -> None:
        async with AsyncDbWriter(path) as db:
            assert await db.migrate(STEPS, dry_run=True) == 0
            assert await asyncio.gather(*[db.migrate(STEPS) for _ in range(5)]) == [3] * 5
            assert await db.read("SELECT n FROM t") == [(1,), (2,), (3,)]
            async with db.transaction():
                with pytest.raises(ReentrantWriteError):
                    await db.migrate(STEPS)
        with pytest.raises(WriterClosedError):
            await db.migrate(STEPS)

    asyncio.run(main())


async def a_coroutine() -> None: ...


@pytest.mark.parametrize("step", [lambda tx: (tx.execute("SELECT 1") for _ in "ab"), lambda tx: a_coroutine()])
def test_a_step_that_only_makes_what_would_run_is_refused(any_db: DbWriter, step: Any) -> None:
    with pytest.raises(TypeError, match=r"live (generator|coroutine)"):
        any_db.migrate([step])
    assert any_db.read_value("PRAGMA user_version") == 0
