"""run_without_transaction(fn): a function with a connection of its own, and with it the writer."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import sqlite3
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any, Literal, assert_type

import pytest

from helpers import (
    DEADLINE,
    attaching,
    checkpointer_of,
    eventually,
    file_of,
    holding_lock,
    log_size,
    notes_of,
    parked,
    rows,
    run_child,
    session_of,
)
from onewriter import (
    AsyncDbWriter,
    CommitUnknownError,
    DbWriter,
    ReentrantWriteError,
    Transaction,
    TransactionClosedError,
    WriterBrokenError,
)

MODES: list[tuple[str, object]] = [("isolation_level", "IMMEDIATE"), ("isolation_level", "")]
if sys.version_info >= (3, 12):
    MODES.append(("autocommit", False))
ENDLESS = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


def error_of(call: Callable[[], object]) -> BaseException | None:
    try:
        call()
    except BaseException as error:
        return error
    return None


def test_a_function_begins_and_commits_by_itself(table_db: DbWriter) -> None:
    def move(connection: sqlite3.Connection) -> int:
        assert type(connection) is sqlite3.Connection
        assert not connection.in_transaction
        connection.execute("BEGIN")
        connection.execute("INSERT INTO t VALUES (1)")
        connection.execute("COMMIT")
        connection.execute("BEGIN")
        connection.execute("INSERT INTO t VALUES (2)")
        connection.execute("ROLLBACK")
        with connection:
            connection.executescript("INSERT INTO t VALUES (3); VACUUM; BEGIN; INSERT INTO t VALUES (4); COMMIT;")
        return 7

    assert assert_type(table_db.run_without_transaction(move), int) == 7
    assert rows(table_db) == [1, 3, 4]
    table_db.run("INSERT INTO t VALUES (5)")
    assert rows(table_db) == [1, 3, 4, 5]


def test_it_attaches_a_file_and_copies_into_it(table_db: DbWriter, tmp_path: Path) -> None:
    def copy(connection: sqlite3.Connection) -> None:
        connection.execute("ATTACH ? AS other", (str(tmp_path / "other.db"),))
        connection.execute("CREATE TABLE other.t AS SELECT * FROM t")

    table_db.run("INSERT INTO t VALUES (1)")
    table_db.run_without_transaction(copy)
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as other:
        assert other.execute("SELECT * FROM t").fetchall() == [(1,)]
    assert len(table_db.run_without_transaction("PRAGMA database_list").rows) == 1


def test_nothing_that_it_sets_stays(table_db: DbWriter) -> None:
    def spoil(connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA cache_size = 3")
        connection.execute("CREATE TEMP TABLE mine (n)")
        connection.create_function("mine", 0, lambda: 1)
        connection.set_authorizer(lambda *_: sqlite3.SQLITE_DENY)
        connection.row_factory = sqlite3.Row
        connection.isolation_level = "IMMEDIATE"

    asked = ("foreign_keys", "synchronous", "cache_size", "journal_mode")
    before = [table_db.run_without_transaction(f"PRAGMA {name}").rows for name in asked]
    table_db.run_without_transaction(spoil)
    assert [table_db.run_without_transaction(f"PRAGMA {name}").rows for name in asked] == before
    with pytest.raises(sqlite3.OperationalError, match="no such"):
        table_db.run("SELECT mine() FROM temp.mine")
    assert table_db.run("SELECT 1").rows == [(1,)]


def test_it_is_set_up_as_the_writer_is(path: Path) -> None:
    def hook(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.create_function("is_readonly", 0, lambda: readonly)
        connection.isolation_level = "IMMEDIATE"

    def ask(connection: sqlite3.Connection) -> list[Any]:
        names = ("foreign_keys", "synchronous", "cache_size", "wal_autocheckpoint", "busy_timeout")
        asked = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names]
        return [*asked, connection.execute("SELECT is_readonly() AS a").fetchone()["a"], connection.isolation_level]

    with DbWriter(path, on_connect=hook, pragmas={"cache_size": 9}, row_factory=sqlite3.Row, lock_timeout=3.0) as db:
        assert db.run_without_transaction(ask) == [1, 2, 9, 0, 3000, 0, None]


def test_a_transaction_that_it_leaves_open_is_rolled_back_and_told(table_db: DbWriter) -> None:
    def leave_open(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO t VALUES (1)")
        connection.execute("BEGIN")
        connection.execute("INSERT INTO t VALUES (2)")
        connection.set_progress_handler(lambda: 1, 1)

    with pytest.raises(sqlite3.ProgrammingError, match="left a transaction open") as caught:
        table_db.run_without_transaction(leave_open, label="half")
    assert "'half'" in notes_of(caught.value)
    table_db.run("INSERT INTO t VALUES (3)")
    assert rows(table_db) == [1, 3]


def test_its_own_error_is_raised_and_what_it_had_committed_stays(table_db: DbWriter) -> None:
    def fail(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO t VALUES (1)")
        connection.execute("BEGIN")
        connection.execute("INSERT INTO t VALUES (2)")
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        table_db.run_without_transaction(fail)
    assert rows(table_db) == [1]


def test_it_may_close_its_connection(table_db: DbWriter) -> None:
    def copy(connection: sqlite3.Connection) -> int:
        with contextlib.closing(connection):
            connection.execute("INSERT INTO t VALUES (1)")
            return 5

    assert table_db.run_without_transaction(copy) == 5
    assert rows(table_db) == [1]


def test_the_connection_is_closed_afterwards(table_db: DbWriter) -> None:
    kept: list[sqlite3.Connection] = []
    table_db.run_without_transaction(kept.append)
    with pytest.raises(sqlite3.ProgrammingError):
        kept[0].execute("SELECT 1")


@pytest.mark.parametrize("sql", ["SELECT 1 UNION ALL SELECT 2", "INSERT INTO t VALUES (7), (8) RETURNING n"])
def test_a_statement_that_was_not_read_to_its_end_holds_nothing_up(table_db: DbWriter, sql: str) -> None:
    kept: list[sqlite3.Cursor] = []

    def read_half(connection: sqlite3.Connection) -> None:
        kept.append(sqlite3.Cursor(connection).execute(sql))
        kept.append(connection.execute("SELECT n FROM t"))

    table_db.run("INSERT INTO t VALUES (1), (2)")
    table_db.run_without_transaction(read_half)
    assert table_db.run("INSERT INTO t VALUES (9)", timeout=DEADLINE).rowcount == 1
    assert table_db.checkpoint().busy is False


def test_a_cursor_cannot_leave_it(table_db: DbWriter) -> None:
    with pytest.raises(TypeError, match="live Cursor"):
        table_db.run_without_transaction(lambda connection: connection.execute("SELECT 1"))


def test_it_waits_for_its_turn_and_those_behind_it_wait(db: DbWriter) -> None:
    db.run("CREATE TABLE t (n)")
    order: list[str] = []
    with parked(db):
        db.enqueue(lambda tx: order.append("before"))
        thread = threading.Thread(target=lambda: db.run_without_transaction(lambda connection: order.append("alone")))
        thread.start()
        eventually(lambda: db.stats().queue_depth == 2)
        last = db.enqueue(lambda tx: order.append("behind"))
    last.result(DEADLINE)
    thread.join(DEADLINE)
    assert order == ["before", "alone", "behind"]


def test_what_would_wait_for_the_writer_in_it_is_refused(table_db: DbWriter) -> None:
    def nest(connection: sqlite3.Connection) -> None:
        calls: list[Callable[[], object]] = [
            lambda: table_db.run("INSERT INTO t VALUES (1)"),
            lambda: table_db.read("SELECT 1"),
            lambda: table_db.run_without_transaction("VACUUM"),
            lambda: table_db.transaction().__enter__(),
            table_db.flush,
        ]
        for call in calls:
            with pytest.raises(ReentrantWriteError):
                call()
        table_db.enqueue("INSERT INTO t VALUES (2)")

    table_db.run_without_transaction(nest)
    table_db.flush(DEADLINE)
    assert rows(table_db) == [2]
    with pytest.raises(ReentrantWriteError):
        table_db.run(lambda tx: table_db.run_without_transaction(lambda connection: None))


def test_arguments_are_checked(table_db: DbWriter) -> None:
    async def later(connection: sqlite3.Connection) -> None: ...

    with pytest.raises(TypeError):
        table_db.run_without_transaction(later)  # type: ignore[unused-coroutine]
    with pytest.raises(TypeError):
        table_db.run_without_transaction(lambda connection: None, (1,))  # type: ignore[call-overload]


def test_max_hold_ends_its_statement(path: Path) -> None:
    with DbWriter(path, max_hold=0.05) as db:
        with pytest.raises(TransactionClosedError, match="max_hold"):
            db.run_without_transaction(lambda connection: connection.execute(ENDLESS).fetchall(), timeout=DEADLINE)
        db.run("CREATE TABLE t (n)")


@pytest.mark.parametrize("max_hold", [0.02, math.inf])
def test_an_error_that_max_hold_has_not_caused_is_the_functions_own(path: Path, max_hold: float) -> None:
    error = sqlite3.OperationalError("its own")
    error.sqlite_errorcode = sqlite3.SQLITE_ERROR if max_hold < DEADLINE else sqlite3.SQLITE_INTERRUPT
    until = monotonic() + 0.04

    def fail(connection: sqlite3.Connection) -> None:
        eventually(lambda: monotonic() > until)
        raise error

    with DbWriter(path, max_hold=max_hold) as db, pytest.raises(sqlite3.OperationalError, match="its own"):
        db.run_without_transaction(fail)


def test_sqlites_lock_is_waited_for_as_long_as_lock_timeout(path: Path) -> None:
    with DbWriter(path, lock_timeout=0.05) as db:
        db.run("CREATE TABLE t (n)")
        with holding_lock(path), pytest.raises(sqlite3.OperationalError, match="locked"):
            db.run_without_transaction(lambda connection: connection.execute("INSERT INTO t VALUES (1)"))
        assert db.run("INSERT INTO t VALUES (2)").rowcount == 1


@pytest.mark.parametrize("closes", [False, True])
@pytest.mark.parametrize("journal_mode", ["DELETE", "TRUNCATE", "PERSIST"])
def test_the_journal_mode_of_the_file_is_put_back(
    path: Path, journal_mode: Literal["DELETE", "TRUNCATE", "PERSIST"], closes: bool
) -> None:
    def change(connection: sqlite3.Connection) -> Any:
        mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if closes:
            connection.close()
        return mode

    with DbWriter(path, journal_mode=journal_mode) as db:
        db.run("CREATE TABLE t (n)")
        assert db.run_without_transaction(change) == "wal"
        db.run("INSERT INTO t VALUES (1)")
        with contextlib.closing(sqlite3.connect(path)) as other:
            assert other.execute("PRAGMA journal_mode").fetchone()[0] != "wal"


def test_the_log_is_checkpointed_by_the_writer_alone_and_stays_while_it_runs(path: Path) -> None:
    def write(connection: sqlite3.Connection) -> None:
        connection.executemany("INSERT INTO t VALUES (?)", [("x" * 4000,)] * 3000)
        sizes.append(log_size(path))

    sizes: list[int] = []
    with DbWriter(path, wal_limit=100_000) as db:
        db.run("CREATE TABLE t (n)")
        session = session_of(db)
        db.run_without_transaction(write)
        assert sizes[0] > 10_000_000
        assert session_of(db) is session
        db.flush()
        assert log_size(path) <= 100_000
        assert checkpointer_of(db).last is not None


def test_a_file_that_vacuum_made_smaller_is_not_taken_for_overwritten(table_db: DbWriter) -> None:
    def shrink(connection: sqlite3.Connection) -> None:
        connection.execute("DELETE FROM t")
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    table_db.run_many("INSERT INTO t VALUES (?)", [(f"{n:1000}",) for n in range(1000)])
    table_db.checkpoint()
    table_db.run_without_transaction(shrink)
    file_of(table_db).check()
    assert not file_of(table_db).is_smaller


def test_a_file_that_is_replaced_meanwhile_ends_the_gateway(db: DbWriter, path: Path) -> None:
    def replace(connection: sqlite3.Connection) -> None:
        os.rename(path, f"{path}.old")
        path.touch()

    with pytest.raises(WriterBrokenError):
        db.run_without_transaction(replace)
    assert db.health.startswith("broken")


def test_a_file_that_was_replaced_just_before_is_not_opened(db: DbWriter, path: Path) -> None:
    called: list[object] = []

    def replace() -> None:
        os.rename(path, f"{path}.old")
        path.touch()

    def replace_and_call(tx: Transaction) -> None:
        tx.on_commit(replace)
        db.enqueue(lambda tx: None)

    with parked(db):
        db.enqueue(replace_and_call)
        thread = threading.Thread(target=lambda: called.append(error_of(lambda: db.run_without_transaction(print))))
        thread.start()
        eventually(lambda: db.stats().queue_depth == 2)
    thread.join(DEADLINE)
    assert isinstance(called[0], WriterBrokenError)
    assert path.stat().st_size == 0


def test_what_a_failing_function_has_written_is_checkpointed_too(db: DbWriter) -> None:
    def fail(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE t (n)")
        raise KeyError

    db.checkpoint()
    assert not checkpointer_of(db).has_work
    with pytest.raises(KeyError):
        db.run_without_transaction(fail)
    assert checkpointer_of(db).has_work


def test_a_child_that_it_forks_neither_uses_nor_closes_the_connection(path: Path) -> None:
    code = f"""
import os, sys
from onewriter import DbWriter, ForkedError
kept = []
def fork(connection):
    kept.append(connection)
    connection.execute("INSERT INTO t VALUES (1)")
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        connection.execute("INSERT INTO t VALUES (2)")
db = DbWriter({str(path)!r}, inline=True)
db.run("CREATE TABLE t (n)")
parent = os.getpid()
try:
    db.run_without_transaction(fork)
except ForkedError:
    assert os.getpid() != parent
    kept[0].total_changes  # raises if it is closed
    sys.exit(0)
assert os.getpid() == parent
db.run("INSERT INTO t VALUES (3)")
print(db.read("SELECT n FROM t"), db.health)
"""
    child = run_child(code)
    assert child.stdout == "[(1,), (2,), (3,)] ok\n", child.stderr


def test_a_task_runs_a_function_alone(path: Path) -> None:
    async def main() -> None:
        async with AsyncDbWriter(path) as db:
            result = await db.run_without_transaction(lambda connection: connection.execute("SELECT 2").fetchone()[0])
            assert result == 2
            async with db.transaction():
                with pytest.raises(ReentrantWriteError):
                    await db.run_without_transaction(lambda connection: None)

    asyncio.run(main())


def test_the_modes_of_sqlite3_are_the_functions_own(table_db: DbWriter) -> None:
    def write(connection: sqlite3.Connection) -> None:
        for number, (name, mode) in enumerate(MODES):
            setattr(connection, name, mode)
            connection.execute("INSERT INTO t VALUES (?)", (number,))
            assert connection.in_transaction
            connection.commit()
            setattr(connection, name, {"autocommit": True}.get(name))

    table_db.run_without_transaction(write)
    assert rows(table_db) == list(range(len(MODES)))


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_a_transaction_that_sqlite3_began_by_itself_is_rolled_back_too(
    table_db: DbWriter, name: str, mode: object
) -> None:
    def leave_open(connection: sqlite3.Connection) -> None:
        setattr(connection, name, mode)
        connection.execute("INSERT INTO t VALUES (1)")

    with pytest.raises(sqlite3.ProgrammingError, match="left a transaction open"):
        table_db.run_without_transaction(leave_open)
    assert rows(table_db) == []


@pytest.mark.parametrize(("code", "unknown"), [(sqlite3.SQLITE_IOERR_READ, False), (sqlite3.SQLITE_IOERR_FSYNC, True)])
def test_an_error_of_a_function_leaves_its_commit_unknown_only_if_something_may_be_written(
    new_db: DbWriter, code: int, unknown: bool
) -> None:
    def fail(connection: sqlite3.Connection) -> None:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = code
        raise error

    with pytest.raises(CommitUnknownError if unknown else sqlite3.OperationalError):
        new_db.run_without_transaction(fail)
    assert (new_db.health == "ok") is not unknown


@pytest.mark.parametrize("stays", [False, True])
def test_a_file_that_another_program_has_switched_to_wal_is_written_as_before(path: Path, stays: bool) -> None:
    """The gateway's own readers, or the other program, keep it from being switched back."""
    with DbWriter(path, journal_mode="DELETE") as db:
        db.run("CREATE TABLE t (n)")
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute("PRAGMA journal_mode = WAL")
            if not stays:
                other.close()
            assert db.read("SELECT n FROM t") == []
            db.run_without_transaction("VACUUM")
            db.run("INSERT INTO t VALUES (1)")
            db.run_without_transaction(lambda connection: connection.execute("INSERT INTO t VALUES (2)").close())
            assert db.read("SELECT n FROM t") == [(1,), (2,)]
            assert db.stats().wal_bytes > 0  # known now, and kept small
    with DbWriter(path, journal_mode="DELETE") as db:
        assert db.read_value("PRAGMA journal_mode") == "delete"


def test_a_function_may_switch_the_file_back_to_the_gateways_journal_mode(path: Path) -> None:
    def switch(connection: sqlite3.Connection) -> str:
        (mode,) = connection.execute("PRAGMA journal_mode = DELETE").fetchone()
        return str(mode)

    with DbWriter(path, journal_mode="DELETE") as db:  # which has nothing to do, and does not look at the file again
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute("PRAGMA journal_mode = WAL")
        assert db.run_without_transaction(switch) == "delete"
        with contextlib.closing(sqlite3.connect(path)) as other:
            assert other.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_nothing_is_asked_behind_a_statement_that_commits_by_itself(path: Path) -> None:
    """A lock that refused the question would have the statement run again."""
    seen: list[str] = []

    def follow(connection: sqlite3.Connection, readonly: bool) -> None:
        if not readonly:
            connection.set_trace_callback(seen.append)

    with DbWriter(path, on_connect=follow) as db:
        db.run_script("CREATE TABLE t (n); CREATE TABLE k (n PRIMARY KEY) WITHOUT ROWID")
        for table in ("t", "k"):
            seen.clear()
            db.run_without_transaction(f"INSERT INTO {table} VALUES (1)")
            done = ["INSERT" in text for text in seen if "INSERT" in text or "pragma_table_list" in text]
            assert (done.count(True), done[-1], len(done) > 1) == (1, True, True)


def test_the_rowid_of_a_statement_that_commits_by_itself(db: DbWriter) -> None:
    alone = db.run_without_transaction
    db.run_script("CREATE TABLE t (n INTEGER PRIMARY KEY); CREATE TABLE k (n PRIMARY KEY) WITHOUT ROWID")
    assert [alone("INSERT INTO t VALUES (?)", (n,)).lastrowid for n in (7, -1, 8)] == [7, -1, 8]
    assert alone("REPLACE INTO t VALUES (8)").lastrowid == 8
    assert alone("INSERT OR IGNORE INTO t VALUES (8)").lastrowid is None
    assert alone("INSERT INTO k VALUES (1)").lastrowid is None
    assert alone("INSERT INTO t SELECT 9 RETURNING n").lastrowid == 9
    assert alone("UPDATE t SET n = 10 WHERE n = 9").lastrowid is None
    assert db.run("INSERT INTO t VALUES (11)").lastrowid == 11
    assert db.run("INSERT INTO k VALUES (2)").lastrowid is None
    db.run("INSERT INTO t VALUES (12)")
    assert alone("INSERT INTO k VALUES (3)").lastrowid is None
    for text in ("PRAGMA user_version", "SELECT 1", "VALUES (1)"):
        alone(text)
        assert db.run(f"INSERT INTO k VALUES ('{text}')").lastrowid is None


def test_the_rowid_where_a_table_of_that_name_in_another_file_has_none(path: Path) -> None:
    other = path.with_name("other.db")
    with DbWriter(other) as db:
        db.run("CREATE TABLE t (n PRIMARY KEY) WITHOUT ROWID")
    with DbWriter(path, on_connect=attaching(other)) as db:
        db.run("CREATE TABLE t (n)")
        assert [db.run_without_transaction("INSERT INTO t VALUES (1)").lastrowid for _ in range(2)] == [1, 2]
        assert db.run_without_transaction("INSERT INTO other.t VALUES (1)").lastrowid is None
