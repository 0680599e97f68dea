"""Reads: what they see, what they may not do, how long they take, and for which write they wait."""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import sqlite3
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from helpers import BRIEFLY, DEADLINE, in_threads, is_clean, notes_of, parked, pool_of, rows, writer_of
from onewriter import AsyncDbWriter, DbWriter, ReadTimeoutError, ReentrantWriteError, Ticket, Transaction
from onewriter.read.claim import Claim
from onewriter.read.clock import ReadClock

INSERT = "INSERT INTO t VALUES (?)"
ENDLESS = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT max(n) FROM c"
COUNT = "SELECT count(*) FROM t"


def test_the_forms_of_a_read(any_db: DbWriter) -> None:
    any_db.run("CREATE TABLE t (n INTEGER)")
    assert any_db.read_one("SELECT n FROM t") is None
    assert any_db.read_value("SELECT n FROM t") is None
    any_db.run_many(INSERT, [(1,), (2,)])
    assert any_db.read("SELECT n FROM t WHERE n > :least", {"least": 1}) == [(2,)]
    assert any_db.read_one("SELECT n FROM t") == (1,)
    assert any_db.read_value("SELECT n FROM t") == 1
    assert any_db.read(lambda connection: connection.execute("SELECT n FROM t").fetchall()) == [(1,), (2,)]


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO t VALUES (1)",
        "CREATE TEMP TABLE x (n)",
        "PRAGMA query_only = 0",
        "ATTACH ':memory:' AS other",
        "VACUUM INTO '/dev/null'",
        "DELETE FROM t",
    ],
)
def test_a_read_cannot_write_and_neither_can_the_next_one(any_db: DbWriter, sql: str) -> None:
    any_db.run("CREATE TABLE t (n INTEGER)")
    for _ in range(2):
        with pytest.raises(sqlite3.DatabaseError):
            any_db.read(sql)
    with any_db.transaction() as tx:
        with pytest.raises(sqlite3.DatabaseError):
            any_db.read(sql)
        with pytest.raises(sqlite3.DatabaseError):
            any_db.read(lambda connection: connection.execute(sql).fetchall())
        tx.execute(INSERT, (1,))
    assert any_db.read("SELECT n FROM t") == [(1,)]


def test_bad_arguments_are_refused_at_the_call(any_db: DbWriter) -> None:
    async def coroutine(connection: sqlite3.Connection) -> None:
        pass

    calls: list[Any] = [
        lambda: any_db.read(3),  # type: ignore[call-overload]
        lambda: any_db.read_value(b"SELECT 1"),  # type: ignore[arg-type]
        lambda: any_db.read("SELECT ?", "a"),
        lambda: any_db.read(lambda connection: 1, (1,)),  # type: ignore[call-overload]
        lambda: any_db.read(coroutine),
        lambda: any_db.read("SELECT 1", label=3),  # type: ignore[call-overload]
        lambda: any_db.read("SELECT 1", timeout="3"),  # type: ignore[call-overload]
        lambda: any_db.read("SELECT 1", after=3),  # type: ignore[call-overload]
        lambda: any_db.reader(label=3),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(TypeError):
            call()
    with pytest.raises(ValueError, match="seconds"):
        any_db.read("SELECT 1", timeout=float("nan"))


def test_after_waits_for_that_write(db: DbWriter, tmp_path: Path) -> None:
    db.run("CREATE TABLE t (n INTEGER)")
    with ThreadPoolExecutor() as pool:
        with parked(db):
            ticket = db.enqueue(INSERT, (1,))
            failing = db.enqueue("INSERT INTO nowhere VALUES (1)")
            withdrawn = db.enqueue(INSERT, (2,))
            withdrawn.cancel()
            reading = pool.submit(db.read, "SELECT n FROM t", after=ticket)
            with pytest.raises(ReadTimeoutError, match="INSERT INTO t"):
                db.read("SELECT n FROM t", after=ticket, timeout=0.01)
        assert reading.result(DEADLINE) == [(1,)]
    with pytest.raises(sqlite3.OperationalError, match="nowhere"):
        db.read("SELECT 1", after=failing)
    with pytest.raises(concurrent.futures.CancelledError):
        db.read("SELECT 1", after=withdrawn)
    with DbWriter(tmp_path / "other.db") as other, pytest.raises(ValueError, match="another"):
        other.read("SELECT 1", after=ticket)


def test_a_query_that_runs_for_too_long_ends_and_harms_no_later_one(one: DbWriter) -> None:
    for _ in range(3):
        with pytest.raises(ReadTimeoutError, match="WITH RECURSIVE"):
            one.read(ENDLESS, timeout=0.05)
        with pytest.raises(ReadTimeoutError):
            one.read(lambda connection: connection.execute(ENDLESS).fetchall(), timeout=0.05)
        with one.reader() as connection:
            with pytest.raises(ReadTimeoutError):
                one.read(ENDLESS, timeout=0.05)
            assert connection.execute("SELECT 1").fetchone() == (1,)
        for n in range(300):
            assert one.read_value("SELECT ?", (n,)) == n


@pytest.mark.parametrize("journal_mode", ["WAL", "DELETE"])
def test_every_thread_sees_its_own_acknowledged_writes_at_once(path: Path, journal_mode: Any) -> None:
    with DbWriter(path, journal_mode=journal_mode, readers=2) as db:
        db.run("CREATE TABLE t (thread, n)")

        def write_and_read(thread: int) -> None:
            for n in range(25):
                db.run("INSERT INTO t VALUES (?, ?)", (thread, n))
                assert db.read_value("SELECT max(n) FROM t WHERE thread = ?", (thread,)) == n
                with db.transaction() as tx:
                    tx.execute("UPDATE t SET n = n WHERE thread = ?", (thread,))

        in_threads(*[lambda thread=thread: write_and_read(thread) for thread in range(4)])


def test_a_read_sees_none_of_a_transaction_that_is_not_over(one: DbWriter) -> None:
    with ThreadPoolExecutor(1) as pool:
        with one.transaction() as tx:
            tx.execute(INSERT, (1,))
            assert pool.submit(one.read, COUNT, timeout=DEADLINE).result(DEADLINE) == [(0,)]
        assert pool.submit(one.read, COUNT, timeout=DEADLINE).result(DEADLINE) == [(1,)]


def test_a_read_does_not_wait_for_the_writer(one: DbWriter) -> None:
    with parked(one):
        one.enqueue(INSERT, (1,))
        assert one.read_value(COUNT) == 0
        with one.reader() as connection:
            assert connection.execute(COUNT).fetchone() == (0,)


def test_a_read_inside_a_function_that_reads_sees_the_same_snapshot(one: DbWriter) -> None:
    """With one connection, it would wait for itself otherwise."""

    def function(connection: sqlite3.Connection) -> list[Any]:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(one.run, INSERT, (1,)).result(DEADLINE)
        with one.reader(timeout=0) as again:
            return [
                connection.execute(COUNT).fetchone()[0],
                one.read_value(COUNT, timeout=0.0 + DEADLINE),
                one.read(lambda inner: inner.execute(COUNT).fetchone()[0]),
                again.execute(COUNT).fetchone()[0],
            ]

    assert one.read(function) == [0] * 4
    assert one.read_value(COUNT) == 1


def test_an_error_in_a_reader_that_tells_of_no_damage_is_no_matter_of_health(one: DbWriter) -> None:
    with pytest.raises(sqlite3.OperationalError), one.reader() as connection:
        connection.execute("SELECT * FROM missing")
    assert one.health == "ok"


WAITS: dict[str, Callable[[DbWriter], object]] = {
    "run": lambda db: db.run(INSERT, (1,), timeout=None),
    "transaction": lambda db: db.transaction(timeout=None).__enter__(),
    "flush": lambda db: db.flush(),
}


@pytest.mark.parametrize("call", WAITS)
def test_where_a_reader_keeps_commits_waiting_a_wait_for_one_inside_it_is_refused_at_once(
    path: Path, call: str
) -> None:
    with DbWriter(path, journal_mode="DELETE") as db:
        db.run("CREATE TABLE t (n)")
        with db.reader():
            with pytest.raises(ReentrantWriteError, match=r"inside a reader\(\) waits for a COMMIT"):
                WAITS[call](db)
            ticket = db.enqueue(INSERT, (2,))
        assert ticket.result(DEADLINE).rowcount == 1
        with pytest.raises(ReentrantWriteError, match=r"inside a reader\(\) waits for a COMMIT"):
            db.read(lambda connection: WAITS[call](db))
        with db.reader():
            db.backup(path.with_name("backup.db"))  # waits for no COMMIT
        with db.transaction() as tx, db.reader():
            assert tx.execute(INSERT, (3,)).rowcount == 1
            db.run(INSERT, (4,))  # a part of the block
        assert rows(db) == [2, 3, 4]


def test_where_a_reader_keeps_commits_waiting_close_with_a_timeout_ends_inside_it(path: Path) -> None:
    with DbWriter(path, journal_mode="DELETE") as db, db.reader():
        with pytest.raises(ReentrantWriteError, match="waits for all readers"):
            db.close()
        assert db.close(0.05).unfinished == 0


def test_a_reader_inside_a_reader_may_be_left_later(one: DbWriter) -> None:
    """Two generators that have one each, say."""

    def counts() -> Generator[int, None, None]:
        with one.reader() as connection:
            while True:
                yield connection.execute(COUNT).fetchone()[0]

    first, second = counts(), counts()
    assert (next(first), next(second)) == (0, 0)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(one.run, INSERT, (1,)).result(DEADLINE)
        first.close()
        assert next(second) == 0
        assert one.read_value(COUNT, timeout=DEADLINE) == 0  # it is inside the second, as before
        assert one.stats().readers_in_use == 1
        pool.submit(second.close).result(DEADLINE)
    assert one.stats().readers_in_use == 0
    assert one.read_value(COUNT) == 1


def test_a_reader_that_is_left_in_the_moment_its_last_inner_one_is_comes_back(one: DbWriter) -> None:
    class Late(list[Callable[[], object]]):
        def append(self, function: Callable[[], object]) -> None:
            reader.shares.clear()  # another thread leaves the inner one here, and finds nothing to end
            reader.end_late()
            super().append(function)

    with one.reader() as connection:
        with one.reader():
            (reader,) = pool_of(one)._readers
        reader.when_out, reader.shares = Late(), {object(): None}
        assert connection.execute(COUNT).fetchone() == (0,)
    assert one.stats().readers_in_use == 0
    with pytest.raises(sqlite3.ProgrammingError, match="has ended"):
        connection.execute(COUNT)


def test_a_reader_inside_a_reader_that_is_left_earlier_ends_nothing(one: DbWriter) -> None:
    with one.reader() as connection:
        with one.reader() as inner:
            assert inner is connection
        assert inner.execute(COUNT).fetchone() == (0,)
        assert one.stats().readers_in_use == 1
    assert one.stats().readers_in_use == 0
    with pytest.raises(sqlite3.ProgrammingError, match="has ended"):
        inner.execute(COUNT)


WRITES = [
    "INSERT INTO t VALUES (1)",
    "/* SELECT */ insert into main.t select 1",
    "WITH x AS (SELECT 1) INSERT INTO t SELECT * FROM x",
    "INSERT INTO t VALUES (1) RETURNING n",
    "UPDATE t SET n = 2",
    "CREATE TABLE x (n)",
    "CREATE TEMP TABLE x (n)",
    "CREATE TEMPORARY VIEW x AS SELECT 1",
    "DROP TABLE t",
    "ALTER TABLE t RENAME TO x",
    "PRAGMA query_only = 0",
    "pragma Query_Only(off)",
    "PRAGMA user_version = 7",
    "ATTACH ':memory:' AS x",
    "-- no\n attach database '' as x",
    "DETACH main",
    "VACUUM",
    "VACUUM INTO ?",
    "CREATE INDEX i ON t (n)",
    "ANALYZE",
]


@pytest.mark.parametrize("sql", WRITES)
def test_sql_that_writes_is_refused_on_every_way_to_read(one: DbWriter, tmp_path: Path, sql: str) -> None:
    one.run(INSERT, (1,))
    before = sorted(entry.name for entry in tmp_path.iterdir())
    params = (str(tmp_path / "copy.db"),) if "?" in sql else ()

    def in_a_reader() -> None:
        with one.reader() as connection:
            connection.execute(sql, params)

    def in_a_script() -> None:
        with one.reader() as connection:
            connection.executescript(f"SELECT 1; {sql}")

    ways: list[Callable[[], object]] = [
        lambda: one.read(sql, params),
        lambda: one.read_one(sql, params),
        lambda: one.read_value(sql, params),
        lambda: one.read(lambda connection: connection.execute(sql, params).fetchall()),
        in_a_reader,
        *([] if params else [in_a_script]),
    ]
    for way in ways * 2:
        with pytest.raises(sqlite3.DatabaseError):
            way()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == before
    assert one.read("SELECT n FROM t") == [(1,)]
    assert one.read_value("PRAGMA user_version") == 0
    assert is_clean(one)


def test_a_savepoint_typed_into_a_read_ends_with_it(one: DbWriter) -> None:
    for _ in range(3):
        assert one.read("SAVEPOINT mine") == []
        assert is_clean(one)


@pytest.mark.parametrize("sql", ["BEGIN", "begin deferred", "COMMIT", "/**/ ROLLBACK", "END"])
def test_a_read_cannot_begin_or_end_a_transaction_even_with_a_text_that_was_tried_before(
    one: DbWriter, sql: str
) -> None:
    for _ in range(3):
        with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
            one.read(sql)
        with one.reader() as connection:
            if not sql.lower().startswith("begin"):  # that is the library's own transaction, inside the snapshot
                with pytest.raises(sqlite3.OperationalError, match="no transaction is active"):
                    connection.execute(sql)
            connection.execute("BEGIN")
            before = connection.execute("SELECT count(*) FROM t").fetchone()
            one.run("INSERT INTO t VALUES (1)")
            connection.execute("COMMIT")
            assert connection.execute("SELECT count(*) FROM t").fetchone() == before
        assert is_clean(one)


def test_a_query_that_is_cut_off_says_so_in_every_form_and_the_next_one_is_not(one: DbWriter) -> None:
    calls: list[Callable[[], object]] = [
        lambda: one.read(ENDLESS, timeout=0.02, label="endless"),
        lambda: one.read_one(ENDLESS, timeout=0.02, label="endless"),
        lambda: one.read_value(ENDLESS, timeout=0.02, label="endless"),
        lambda: one.read(lambda c: c.execute(ENDLESS).fetchall(), timeout=0.02, label="endless"),
    ]
    for call in calls:
        with pytest.raises(ReadTimeoutError, match="endless"):
            call()
        assert (
            one.read_value(
                "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c LIMIT 400000) SELECT max(n) FROM c"
            )
            == 400000
        )
        assert is_clean(one)


def test_every_form_of_read_can_wait_for_a_write(one: DbWriter) -> None:
    with ThreadPoolExecutor() as pool:
        with parked(one):
            ticket = one.enqueue(INSERT, (1,))

            def in_a_reader() -> Any:
                with one.reader(after=ticket) as connection:
                    return connection.execute(COUNT).fetchone()[0]

            forms: list[Callable[[], Any]] = [
                lambda: one.read(COUNT, after=ticket)[0][0],
                lambda: one.read_one(COUNT, after=ticket)[0],
                lambda: one.read_value(COUNT, after=ticket),
                lambda: one.read(lambda c: c.execute(COUNT).fetchone()[0], after=ticket),
                in_a_reader,
            ]
            waiting = [pool.submit(form) for form in forms]
            assert not any(future.done() for future in waiting)
        assert [future.result(DEADLINE) for future in waiting] == [1] * 5
        assert [form() for form in forms] == [1] * 5


@pytest.mark.parametrize("wrong", [1, "ticket", object()], ids=["a number", "a text", "an object"])
def test_after_is_a_ticket_of_this_gateway(one: DbWriter, tmp_path: Path, wrong: Any) -> None:
    with DbWriter(tmp_path / "other.db") as other:
        foreign = other.enqueue("SELECT 1")
        for call in (one.read, one.read_one, one.read_value):
            with pytest.raises(TypeError, match="after"):
                call("SELECT 1", after=wrong)
            with pytest.raises(ValueError, match="after"):
                call("SELECT 1", after=foreign)
        with pytest.raises(ValueError, match="after"):
            one.reader(after=foreign).__enter__()
    assert one.read("SELECT 1") == [(1,)]


def test_after_a_failed_write_each_read_raises_its_error_and_takes_no_connection(one: DbWriter) -> None:
    with parked(one):
        failed = one.enqueue(lambda tx: 1 // 0)
        failed.add_done_callback(lambda ticket: None)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            one.read("SELECT 1", after=failed)
        with pytest.raises(ZeroDivisionError):
            one.reader(after=failed).__enter__()
    assert one.read("SELECT 1", timeout=0.5) == [(1,)]


def test_inside_a_job_a_read_may_come_after_what_is_done_but_not_after_what_waits_behind_it(one: DbWriter) -> None:
    done = one.enqueue(INSERT, (1,))
    done.result(DEADLINE)

    def job(tx: Transaction) -> Any:
        behind = one.enqueue(INSERT, (2,))
        with pytest.raises(ReentrantWriteError):
            one.reader(after=behind).__enter__()
        return one.read_value(COUNT, after=done)

    assert one.run(job) == 1


@pytest.mark.parametrize(
    ("factory", "row"),
    [
        (sqlite3.Row, None),
        (lambda cursor, row: list(row), [5, 6]),
        (lambda cursor, row: {"row": row}, {"row": (5, 6)}),
        (lambda cursor, row: row[1], 6),
    ],
    ids=["Row", "list", "dict", "second column"],
)
def test_a_value_is_the_first_column_whatever_a_row_is(path: Path, factory: Any, row: Any) -> None:
    with DbWriter(path, row_factory=factory) as db:
        sql = "SELECT 5 AS a, 6 AS b UNION ALL SELECT 7, 8"
        assert (db.read_value(sql), len(db.read(sql))) == (5, 2)
        assert row is None or [db.read_one(sql), db.read(sql)[0], db.run(sql).rows[0]] == [row] * 3
        with db.reader():
            assert db.read_value(sql) == 5
        assert db.run(lambda tx: db.read_value(sql)) == 5
        assert db.read_value("SELECT NULL") is None
        assert db.read_value("SELECT 1 WHERE 0") is None
        assert db.read_one("SELECT 1 WHERE 0") is None


def test_only_the_first_row_is_asked_for_where_one_is_wanted(one: DbWriter) -> None:
    endless_rows = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT n FROM c"
    assert one.read_one(endless_rows) == (1,)
    assert one.read_value(endless_rows) == 1
    assert is_clean(one)


@pytest.mark.parametrize("call", ["reader", "read", "backup", "asyncio"])
def test_a_snapshot_that_meets_a_lock_is_begun_once_it_is_free(path: Path, call: str) -> None:
    """In the rollback-journal modes a COMMIT keeps readers out for a moment."""
    with DbWriter(path, journal_mode="DELETE") as db:
        db.run("CREATE TABLE t (n INTEGER)")
        db.run(INSERT, (1,))
        assert db.read_value(COUNT) == 1  # the connection is there already
        other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        other.execute("BEGIN EXCLUSIVE")
        timer = threading.Timer(0.1, other.execute, ["COMMIT"])
        timer.start()
        if call == "reader":
            with db.reader() as connection:
                assert connection.execute(COUNT).fetchone() == (1,)
        elif call == "read":
            assert db.read(lambda connection: connection.execute(COUNT).fetchone()) == (1,)
        elif call == "backup":
            db.backup(path.parent / "copy.db")
        else:
            assert asyncio.run(count_in_task(db)) == [(1,)]
        timer.join(DEADLINE)
        other.close()
        db.run(INSERT, (2,))
        assert db.read_value(COUNT) == 2


async def count_in_task(db: DbWriter) -> list[Any]:
    async with AsyncDbWriter.wrap(db).reader() as reader:
        return (await reader.execute(COUNT)).rows


def test_an_error_that_has_nothing_to_do_with_time_is_told_although_the_time_is_up(db: DbWriter) -> None:
    db.read("SELECT 1")  # so that a connection is there
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        db.read("SELECT * FROM nowhere", timeout=0)


@pytest.mark.parametrize("way", ["block", "function", "statement", "stream"])
def test_damage_that_a_reader_meets_shows_in_the_health(damaged: Path, way: str) -> None:
    async def read_on() -> None:
        async with AsyncDbWriter.wrap(db).reader() as reader:
            async for _ in reader.stream("SELECT * FROM bad"):
                pass

    with DbWriter(damaged) as db:
        assert db.health == "ok"
        with pytest.raises(sqlite3.DatabaseError, match="malformed"):
            if way == "function":
                db.read(lambda connection: connection.execute("SELECT * FROM bad").fetchall())
            elif way == "statement":
                db.read("SELECT * FROM bad")
            elif way == "block":
                with db.reader() as connection:
                    connection.execute("SELECT * FROM bad").fetchall()
            else:
                asyncio.run(read_on())
        assert db.health == "degraded: database disk image is malformed"


def test_a_reader_that_is_not_slow_is_not_told_of(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with DbWriter(path, slow_after=60) as db:
        with db.reader():
            db.run("CREATE TABLE t (n)")
            writer_of(db).idle()
        assert caplog.messages == []


def test_a_write_that_is_committed_as_the_time_runs_out_is_read(db: DbWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = Ticket.wait

    def wait_too_long(ticket: Ticket[Any], timeout: float | None) -> bool:
        wait(ticket, None)
        return False

    db.run("CREATE TABLE t (n)")
    with parked(db) as release:
        ticket = db.enqueue(INSERT, (1,))
        monkeypatch.setattr(Ticket, "wait", wait_too_long)
        release.set()
        assert db.read("SELECT n FROM t", after=ticket) == [(1,)]


@pytest.mark.parametrize("mode", ["", "(PASSIVE)", "(TRUNCATE)"])
def test_a_reader_cannot_checkpoint(db: DbWriter, path: Path, mode: str) -> None:
    db.run("CREATE TABLE t (n)")
    db.checkpoint("FULL")
    size = path.with_name("app.db-wal").stat().st_size
    with pytest.raises(sqlite3.DatabaseError, match="not authorized") as caught:
        db.read(f"PRAGMA wal_checkpoint{mode}")
    assert caught.value.__notes__ == ["onewriter: PRAGMA wal_checkpoint is refused on a reader"]
    assert path.with_name("app.db-wal").stat().st_size == size > 0


def test_a_read_of_a_function_in_an_own_reader_has_a_time_of_its_own(db: DbWriter) -> None:
    with db.reader() as connection:
        for what in (ENDLESS, endless):
            with pytest.raises(ReadTimeoutError):
                db.read(what, timeout=0.05)
        assert connection.execute("SELECT 1").fetchone() == (1,)


def endless(connection: sqlite3.Connection) -> list[Any]:
    return connection.execute(ENDLESS).fetchall()


def test_an_interrupt_as_a_read_in_a_reader_begins_leaves_that_to_other_threads(
    db: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = ReadClock.limit
    calls: list[float] = []

    def interrupted(clock: ReadClock, claim: Claim, deadline: float) -> None:
        limit(clock, claim, deadline)
        calls.append(deadline)
        if len(calls) == 1:
            raise KeyboardInterrupt

    with db.reader() as connection:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(ReadClock, "limit", interrupted)
            db.read("SELECT 1", timeout=5.0)
        assert calls[1] == math.inf  # of the block
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(connection.execute, "SELECT 1").result(DEADLINE).fetchone() == (1,)


def test_a_block_inside_a_reader_inside_a_block_sees_its_own_writes(db: DbWriter) -> None:
    db.run("CREATE TABLE t (n)")

    def nested(tx: Transaction) -> int:
        tx.execute(INSERT, (3,))
        return int(db.read_value(COUNT))

    with db.transaction() as tx:
        tx.execute(INSERT, (1,))
        assert db.read_value(COUNT) == 1
        with db.reader():
            assert db.read_value(COUNT) == 0
            with db.transaction() as inner:
                inner.execute(INSERT, (2,))
                assert db.read_value(COUNT) == 2
            assert db.run(nested) == 3
            assert db.read_value(COUNT) == 0
        assert db.read_value(COUNT) == 3


def test_a_write_that_a_snapshot_will_never_show_is_not_waited_for(db: DbWriter) -> None:
    db.run("CREATE TABLE t (n)")
    early = db.enqueue(INSERT, (1,))
    with db.reader(after=early):
        assert db.read_value(COUNT, after=early) == 1
        late = db.enqueue(INSERT, (2,))
        for _ in range(2):  # not yet committed, and committed
            with pytest.raises(ReentrantWriteError, match="would never be seen here"):
                db.read_value(COUNT, after=late)
            in_threads(late.result)
    assert db.read_value(COUNT, after=late) == 2

    async def main() -> None:
        shared = AsyncDbWriter.wrap(db)
        async with shared.reader():
            latest = shared.enqueue(INSERT, (3,))
            with pytest.raises(ReentrantWriteError, match="would never be seen here"):
                await shared.read_value(COUNT, after=latest)

    asyncio.run(main())


def test_a_snapshot_is_one_of_attached_files_too(path: Path) -> None:
    other = path.with_name("other.db")

    def attach(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.execute("ATTACH ? AS other", (str(other),))
        connection.execute("PRAGMA other.journal_mode = WAL")

    with DbWriter(path, on_connect=attach) as db:
        db.run("CREATE TABLE t (n)")
        db.run("CREATE TABLE other.u (n)")
        with db.reader() as connection:
            in_threads(lambda: db.run_script("INSERT INTO t VALUES (1); INSERT INTO other.u VALUES (1)"))
            assert connection.execute("SELECT (SELECT count(*) FROM t), (SELECT count(*) FROM other.u)").fetchone() == (
                0,
                0,
            )
        assert db.read_one("SELECT (SELECT count(*) FROM t), (SELECT count(*) FROM other.u)") == (1, 1)


def test_a_reader_sees_the_moment_of_its_entry(table_db: DbWriter) -> None:
    table_db.run(INSERT, (1,))
    with table_db.reader() as connection:
        ticket = table_db.enqueue(INSERT, (2,))
        table_db.run(INSERT, (3,))
        for _ in range(2):
            assert connection.execute("SELECT count(*) FROM t").fetchone() == (1,)
            assert table_db.read_value("SELECT count(*) FROM t") == 1
            assert table_db.read(lambda c: c.execute("SELECT count(*) FROM t").fetchone()) == (1,)
        with table_db.reader() as inner:
            assert inner is connection
    assert rows(table_db) == [1, 2, 3]
    with table_db.reader(after=ticket) as connection:
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (3,)


def test_of_a_reader_and_a_block_the_inner_one_decides(table_db: DbWriter) -> None:
    with table_db.transaction() as tx:
        tx.execute(INSERT, (1,))
        with table_db.reader() as connection:
            assert connection.execute("SELECT count(*) FROM t").fetchone() == (0,)
            assert rows(table_db) == []
        assert rows(table_db) == [1]
    with table_db.reader(), table_db.transaction() as tx:
        tx.execute(INSERT, (2,))
        assert rows(table_db) == [1, 2]
        with table_db.reader() as connection:
            assert connection.execute("SELECT count(*) FROM t").fetchone() == (1,)


def in_a_block(table_db: DbWriter) -> None:
    with table_db.transaction():
        table_db.read("DELETE FROM t")


def in_a_reader(table_db: DbWriter) -> None:
    with table_db.reader() as connection:
        connection.execute("INSERT INTO t VALUES (1)")


@pytest.mark.parametrize(
    "read",
    [
        lambda table_db: table_db.read("INSERT INTO t VALUES (1)"),
        lambda table_db: table_db.read_one("INSERT INTO t VALUES (1) RETURNING n"),
        lambda table_db: table_db.read_value("CREATE TEMP TABLE x (n)"),
        lambda table_db: table_db.read(lambda connection: connection.execute("DELETE FROM t")),
        in_a_block,
        in_a_reader,
    ],
)
def test_a_read_that_would_write_points_at_run(table_db: DbWriter, read: Callable[[DbWriter], object]) -> None:
    with pytest.raises(sqlite3.OperationalError) as caught:
        read(table_db)
    assert notes_of(caught.value).count("use run") == 1


@pytest.mark.parametrize("sql", ["PRAGMA locking_mode = EXCLUSIVE", "PRAGMA journal_mode = DELETE"])
def test_a_read_cannot_change_how_its_connection_locks(table_db: DbWriter, sql: str) -> None:
    for _ in range(5):
        with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
            table_db.read(sql)
        table_db.run("SELECT 1")
        assert table_db.read("SELECT 1") == [(1,)]


def test_a_read_inside_a_read_does_not_open_the_outer_one_for_writing(table_db: DbWriter) -> None:
    def outer(connection: sqlite3.Connection) -> None:
        table_db.read("SELECT 1")
        table_db.read(lambda inner: inner.execute("SELECT 1").fetchall())
        connection.execute("INSERT INTO t VALUES (1)")

    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        table_db.run(lambda tx: table_db.read(outer))
    table_db.run("INSERT INTO t VALUES (1)")


def test_a_read_in_a_reader_inside_a_function_that_takes_too_long_says_that_and_the_function_goes_on(
    one: DbWriter,
) -> None:
    def function(tx: Transaction) -> None:
        with one.reader(), pytest.raises(ReadTimeoutError):
            one.read(ENDLESS, timeout=0.05)
        tx.execute("CREATE TABLE after_it (n)")

    one.run(function)
    assert one.read("SELECT count(*) FROM after_it") == [(0,)]


def test_who_leaves_a_reader_waits_for_the_call_that_another_thread_is_in(path: Path) -> None:
    entered, release = threading.Event(), threading.Event()

    def stay() -> None:
        entered.set()
        release.wait(DEADLINE)

    def connect(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.create_function("stay", 0, stay)

    with DbWriter(path, on_connect=connect) as db, ThreadPoolExecutor(2) as pool:
        entry = db.reader()
        lent = entry.__enter__()
        calling = pool.submit(lent.execute, "SELECT stay()")
        assert entered.wait(DEADLINE)
        leaving = pool.submit(entry.__exit__, None, None, None)
        with pytest.raises(TimeoutError):
            leaving.result(BRIEFLY)
        release.set()
        leaving.result(DEADLINE)
        assert calling.exception(DEADLINE) is None


@pytest.mark.parametrize("empty", ["", "-- nothing", ";"])
def test_a_text_without_a_statement_does_not_raise_what_the_read_before_it_did(path: Path, empty: str) -> None:
    with DbWriter(path, readers=1) as db:
        for _ in range(2):
            with pytest.raises(sqlite3.OperationalError, match="no such table"):
                db.read("SELECT * FROM missing")
            assert db.read(empty) == []
            assert db.read_one(empty) is None
            with pytest.raises(sqlite3.ProgrammingError):
                db.read(empty, (1,))
