"""More of reads: what they see, what they cannot do, how they wait, and how a connection comes back."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from helpers import DEADLINE, in_threads, parked
from onewriter import (
    AsyncDbWriter,
    DbWriter,
    ReadTimeoutError,
    ReentrantWriteError,
    Ticket,
    Transaction,
    WriterBrokenError,
    WriterClosedError,
)
from onewriter.read.claim import Claim
from onewriter.read.reader import Reader

INSERT = "INSERT INTO t VALUES (?)"
COUNT = "SELECT count(*) FROM t"
TWO_ROWS = "SELECT 1 UNION SELECT 2"
ENDLESS = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT max(n) FROM c"


@pytest.fixture
def one(path: Path) -> Iterator[DbWriter]:
    """A gateway with a single connection to read, so that each read gets what the last one left."""
    with DbWriter(path, readers=1) as gateway:
        gateway.run("CREATE TABLE t (n INTEGER)")
        yield gateway


def is_clean(db: DbWriter) -> bool:
    """Whether the connection pins no old state: it sees a new row, and a checkpoint gets through."""
    before = db.run("SELECT count(*) FROM t").rows[0][0]
    db.run(INSERT, (0,))
    sees = db.read_value(COUNT) == before + 1
    return bool(sees and db.run_without_transaction("PRAGMA wal_checkpoint(TRUNCATE)").rows[0][0] == 0)


# What they see --------------------------------------------------------------------------------------------------------


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


# What they cannot do --------------------------------------------------------------------------------------------------

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


# How they come back ---------------------------------------------------------------------------------------------------

kept: list[Any] = []


def raise_midway(connection: sqlite3.Connection) -> None:
    kept.append(connection.execute(TWO_ROWS))
    kept[-1].fetchone()
    raise LookupError


def read_and_begin(connection: sqlite3.Connection) -> None:
    kept.append(connection)
    connection.execute("SELECT * FROM t, t AS u").fetchone()
    connection.execute("BEGIN IMMEDIATE")


def keep_generator(connection: sqlite3.Connection) -> None:
    kept.append(row for row in connection.execute("SELECT 1 UNION SELECT n FROM t"))
    next(kept[-1])


LEAVES: dict[str, Callable[[sqlite3.Connection], object]] = {
    "a cursor kept alive": lambda c: kept.append(c.execute("SELECT n FROM t UNION SELECT 7")),
    "a cursor kept midway": lambda c: kept.append(c.execute("SELECT 1 UNION SELECT n FROM t").fetchone()),
    "many cursors": lambda c: kept.extend(c.execute(TWO_ROWS) for _ in range(50)),
    "a generator kept": keep_generator,
    "an exception midway": raise_midway,
    "BEGIN": read_and_begin,
    "COMMIT": lambda c: c.execute("COMMIT"),
    "SAVEPOINT": lambda c: c.execute("SAVEPOINT mine").fetchall(),
    "SystemExit": lambda c: exit(c.execute(TWO_ROWS).fetchone()),
    "bytes": lambda c: setattr(c, "text_factory", bytes),
    "rows": lambda c: setattr(c, "row_factory", sqlite3.Row),
    "a bad statement": lambda c: c.execute("SELEC"),
    "a blob": lambda c: kept.append(c.blobopen("blobs", "data", 1, readonly=True)),
}


@pytest.mark.parametrize("leave", LEAVES.values(), ids=LEAVES)
def test_a_connection_comes_back_clean_whatever_was_done_with_it(
    one: DbWriter, leave: Callable[[sqlite3.Connection], object]
) -> None:
    one.run("CREATE TABLE blobs (data BLOB)")
    one.run("INSERT INTO blobs VALUES (x'01')")
    one.run_many(INSERT, [(n,) for n in range(50)])

    def in_a_reader() -> None:
        with one.reader() as connection:
            leave(connection)

    def in_a_function() -> None:
        one.read(lambda connection: leave(connection) and None)

    for way in (in_a_function, in_a_reader) * 2:
        with contextlib.suppress(LookupError, sqlite3.Error, SystemExit):
            way()
        assert is_clean(one)
        assert one.read("SELECT 'text'") == [("text",)]
    kept.clear()


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
            with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
                connection.execute(sql)
            before = connection.execute("SELECT count(*) FROM t").fetchone()
            one.run("INSERT INTO t VALUES (1)")
            assert connection.execute("SELECT count(*) FROM t").fetchone() == before
        assert is_clean(one)


# Waiting --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lent_elsewhere(db: DbWriter, label: str = "the long one") -> Iterator[threading.Event]:
    """Another thread has a connection, until the Event that it yields is set."""
    entered, release = threading.Event(), threading.Event()

    def stay() -> None:
        with db.reader(label=label):
            entered.set()
            release.wait(DEADLINE)

    with ThreadPoolExecutor(1) as pool:
        staying = pool.submit(stay)
        assert entered.wait(DEADLINE)
        try:
            yield release
        finally:
            release.set()
            staying.result(DEADLINE)


@pytest.mark.parametrize("timeout", [0, 0.02])
def test_a_read_that_gets_no_connection_in_time_says_who_has_them(path: Path, timeout: float) -> None:
    with DbWriter(path, readers=2) as db:
        with lent_elsewhere(db, "first"), lent_elsewhere(db, "second"):
            calls: list[Callable[[], object]] = [
                lambda: db.read("SELECT 1", timeout=timeout, label="mine"),
                lambda: db.read_one("SELECT 1", timeout=timeout, label="mine"),
                lambda: db.read(lambda connection: 1, timeout=timeout, label="mine"),
                lambda: db.reader(timeout=timeout, label="mine").__enter__(),
            ]
            for call in calls:
                with pytest.raises(ReadTimeoutError) as caught:
                    call()
                assert isinstance(caught.value, TimeoutError)
                assert all(word in str(caught.value) for word in ("'mine'", "first", "second", "2"))
        assert db.read("SELECT 1", timeout=DEADLINE) == [(1,)]


def test_who_gave_up_waiting_is_passed_over(one: DbWriter) -> None:
    with ThreadPoolExecutor() as pool:
        with lent_elsewhere(one):
            for _ in range(5):
                with pytest.raises(ReadTimeoutError):
                    one.read("SELECT 1", timeout=0.01)
            patient = pool.submit(one.read, "SELECT 2", timeout=DEADLINE)
            with pytest.raises(ReadTimeoutError):
                one.read("SELECT 1", timeout=0.01)
        assert patient.result(DEADLINE) == [(2,)]
    assert one.read("SELECT 3", timeout=0.5) == [(3,)]


def test_a_place_that_a_failed_opening_gives_up_goes_to_the_next_in_line(path: Path) -> None:
    entered, release = threading.Event(), threading.Event()
    refusals = [1]

    def hook(connection: sqlite3.Connection, readonly: bool) -> None:
        if readonly and refusals:
            refusals.pop()
            entered.set()
            release.wait(DEADLINE)
            raise LookupError("not this one")

    with DbWriter(path, readers=1, on_connect=hook) as db, ThreadPoolExecutor() as pool:
        first = pool.submit(db.read, "SELECT 1", timeout=DEADLINE)
        assert entered.wait(DEADLINE)
        with pytest.raises(ReadTimeoutError):
            db.read("SELECT 1", timeout=0.01)
        second = pool.submit(db.read, "SELECT 2", timeout=DEADLINE)
        release.set()
        assert isinstance(first.exception(DEADLINE), LookupError)
        assert second.result(DEADLINE) == [(2,)]


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


def test_the_time_limit_of_a_reader_block_is_for_its_entry_only(one: DbWriter) -> None:
    with one.reader(timeout=0) as connection:
        sql = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c LIMIT 600000) SELECT max(n) FROM c"
        assert connection.execute(sql).fetchone() == (600000,)
        assert one.read_value("SELECT 1") == 1


def test_a_read_without_a_limit_waits_until_a_connection_is_there(one: DbWriter) -> None:
    with ThreadPoolExecutor() as pool:
        with lent_elsewhere(one):
            reading = pool.submit(one.read, "SELECT 1", timeout=None)
        assert reading.result(DEADLINE) == [(1,)]


# After ----------------------------------------------------------------------------------------------------------------


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


# Forms ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "row"),
    [(sqlite3.Row, None), (lambda cursor, row: list(row), [5, 6]), (lambda cursor, row: row[1], 6)],
    ids=["Row", "list", "second column"],
)
def test_a_value_is_the_first_column_whatever_a_row_is(path: Path, factory: Any, row: Any) -> None:
    with DbWriter(path, row_factory=factory) as db:
        sql = "SELECT 5 AS a, 6 AS b UNION ALL SELECT 7, 8"
        assert (db.read_value(sql), len(db.read(sql))) == (5, 2)
        assert row is None or db.read_one(sql) == row
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


# Closed ---------------------------------------------------------------------------------------------------------------


def test_a_closed_gateway_reads_no_more(path: Path) -> None:
    db = DbWriter(path)
    ticket = db.enqueue("CREATE TABLE t (n)")
    ticket.result(DEADLINE)
    db.close()
    calls: list[Callable[[], object]] = [
        lambda: db.read("SELECT 1"),
        lambda: db.read_one("SELECT 1"),
        lambda: db.read_value("SELECT 1", after=ticket),
        lambda: db.read(lambda connection: 1),
        lambda: db.reader().__enter__(),
    ]
    for call in calls:
        with pytest.raises(WriterClosedError):
            call()


def test_close_waits_for_a_reader_and_refuses_the_next(one: DbWriter) -> None:
    with ThreadPoolExecutor() as pool:
        with lent_elsewhere(one) as release:
            closing = pool.submit(one.close)
            until = monotonic() + DEADLINE
            while not one.closed:
                assert monotonic() < until
            release.set()
        assert closing.result(DEADLINE).unfinished == 0
    with pytest.raises(WriterClosedError):
        one.read("SELECT 1")


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


def corrupt(*_: object) -> None:
    error = sqlite3.DatabaseError("database disk image is malformed")
    error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_CORRUPT, "SQLITE_CORRUPT"
    raise error


@pytest.mark.parametrize("way", ["block", "function"])
def test_damage_that_a_reader_meets_shows_in_the_health(db: DbWriter, way: str) -> None:
    assert db.health == "ok"
    with pytest.raises(sqlite3.DatabaseError):
        if way == "function":
            db.read(corrupt)
        else:
            with db.reader():
                corrupt()
    assert db.health == "degraded: database disk image is malformed"


def test_a_reader_that_is_not_slow_is_not_told_of(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with DbWriter(path, slow_after=60) as db:
        with db.reader():
            db.run("CREATE TABLE t (n)")
            db._loop.idle()
        assert caplog.messages == []


def test_a_place_that_comes_in_the_moment_nobody_waits_any_more_is_free(
    one: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = Claim("a read")
    claim.thread = 0  # of another thread
    with one.reader():
        assert not one._readers.line_up(claim)
        monkeypatch.setattr(Reader, "reset", lambda reader: False)
    monkeypatch.undo()
    assert (claim.is_admitted, claim.reader) == (True, None)  # the right to open another
    one._readers.end(claim)
    assert one.read_value(COUNT, timeout=DEADLINE) == 0


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
    assert caught.value.__notes__ == ["onewriter: PRAGMA wal_checkpoint is the writer's"]
    assert path.with_name("app.db-wal").stat().st_size == size > 0


def test_a_read_of_a_function_in_an_own_reader_has_a_time_of_its_own(db: DbWriter) -> None:
    with db.reader() as connection:
        for what in (ENDLESS, endless):
            with pytest.raises(ReadTimeoutError):
                db.read(what, timeout=0.05)
        assert connection.execute("SELECT 1").fetchone() == (1,)


def endless(connection: sqlite3.Connection) -> list[Any]:
    return connection.execute(ENDLESS).fetchall()


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


def test_closing_in_an_own_reader_with_a_time_limit_ends_in_time(path: Path) -> None:
    db = DbWriter(path, inline=True)
    with db.reader() as connection:
        assert db.close(timeout=0.05).unfinished == 0
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_a_connection_to_a_file_that_was_moved_meanwhile_is_closed(path: Path) -> None:
    connections: list[sqlite3.Connection] = []

    def hook(connection: sqlite3.Connection, readonly: bool) -> None:
        if readonly:
            connections.append(connection)
            path.rename(path.with_name("elsewhere.db"))

    db = DbWriter(path, on_connect=hook)
    with pytest.raises(WriterBrokenError, match="moved") as caught:
        db.read("SELECT 1")
    assert caught.value is not None  # with its traceback, which has the connection
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connections[0].execute("SELECT 1")
    path.with_name("elsewhere.db").rename(path)
    db.close()


class RaisesBehind(set[Any]):
    """As Ctrl-C does, which comes behind a call."""

    raises = False

    def discard(self, thing: Any) -> None:
        super().discard(thing)
        if self.raises:
            self.raises = False
            raise KeyboardInterrupt


@pytest.mark.parametrize("is_good", [True, False], ids=["to be lent again", "to be closed"])
def test_an_interrupt_as_a_connection_is_given_back_loses_nothing(
    one: DbWriter, monkeypatch: pytest.MonkeyPatch, is_good: bool
) -> None:
    lent = one._readers._lent = RaisesBehind(one._readers._lent)
    for _ in range(3):
        if not is_good:
            monkeypatch.setattr(Reader, "reset", lambda reader: False)
        with pytest.raises(KeyboardInterrupt), one.reader():
            lent.raises = True
        monkeypatch.undo()
        assert one.read_value("SELECT 1", timeout=DEADLINE) == 1
    assert one.stats().readers_in_use == 0
