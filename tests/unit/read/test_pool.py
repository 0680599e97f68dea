"""The pool of connections that read: who waits for one, and how it comes back."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sqlite3
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from helpers import DEADLINE, eventually, in_threads, is_clean, pool_of, writer_of
from onewriter import (
    AsyncDbWriter,
    DbWriter,
    ReadTimeoutError,
    ReentrantWriteError,
    WriterBrokenError,
    WriterClosedError,
)
from onewriter.base import garbage
from onewriter.base.waiting import thread_signal
from onewriter.read import pool as pool_module
from onewriter.read.claim import NOBODY, Claim, new_claim
from onewriter.read.places import Idle
from onewriter.read.pool import ReaderPool
from onewriter.read.reader import Reader

INSERT = "INSERT INTO t VALUES (?)"
COUNT = "SELECT count(*) FROM t"
TWO_ROWS = "SELECT 1 UNION SELECT 2"


def test_waiters_for_a_connection_are_served_in_order_or_told(one: DbWriter) -> None:
    served: list[int] = []
    with ThreadPoolExecutor() as pool:
        with one.reader(label="the long one"):
            waiting = []
            for n in range(4):
                waiting.append(pool.submit(one.read, lambda connection, n=n: served.append(n)))
                while pool_of(one).waiting <= n:
                    pass
            with pytest.raises(ReadTimeoutError, match="the long one"):
                pool.submit(one.read, "SELECT 1", timeout=0.01).result(DEADLINE)
        for reading in waiting:
            reading.result(DEADLINE)
    assert served == [0, 1, 2, 3]


def test_who_is_in_a_reader_waits_for_none_but_gets_an_additional_connection(one: DbWriter) -> None:
    with one.reader() as before, one.transaction() as tx:
        tx.execute(INSERT, (1,))
        with one.reader() as apart, one.transaction(), one.reader() as another:
            for connection in (before, apart, another):
                assert connection.execute(COUNT).fetchone() == (0,)
        with one.watch(COUNT) as live:
            assert live.next(timeout=DEADLINE) == [(0,)]
        assert pool_of(one).in_use == 1
    assert (pool_of(one).in_use, one.read_value(COUNT)) == (0, 1)


def test_tasks_whose_loop_runs_inside_a_reader_wait_as_all_do(path: Path) -> None:
    async def read(db: DbWriter) -> None:
        async with AsyncDbWriter.wrap(db).reader():
            await asyncio.sleep(0)
            assert pool_of(db).in_use == 2

    async def main() -> None:
        await asyncio.gather(*(read(db) for _ in range(5)))

    with DbWriter(path, readers=2) as db, db.reader():
        asyncio.run(main())


def test_who_is_in_a_block_only_waits_as_all_do(one: DbWriter) -> None:
    reader = one.reader()
    in_threads(reader.__enter__)
    with one.transaction(), pytest.raises(ReadTimeoutError), one.reader(timeout=0.0):
        pass
    reader.__exit__(None, None, None)


def test_so_does_a_task(one: DbWriter) -> None:
    async def main() -> None:
        db = AsyncDbWriter.wrap(one)
        async with db.reader() as before, db.transaction() as tx:
            await tx.execute(INSERT, (1,))
            async with db.reader() as apart, db.transaction(), db.reader() as another:
                for snapshot in (before, apart, another):
                    assert (await snapshot.execute(COUNT)).rows == [(0,)]
            async with db.watch(COUNT) as live:
                assert await anext(live) == [(0,)]
        assert await db.read_value(COUNT) == 1

    asyncio.run(main())
    assert pool_of(one).in_use == 0


@pytest.mark.parametrize("how", ["read", "function", "reader", "backup"])
def test_a_read_in_too_deep_a_recursion_gives_its_connection_back(
    one: DbWriter, how: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # pytest's needs more room than there is

    def block() -> None:
        with one.reader() as connection:
            connection.execute("SELECT 1").fetchall()

    calls: dict[str, Callable[[], object]] = {
        "read": lambda: one.read("SELECT 1"),
        "function": lambda: one.read(lambda connection: connection.execute("SELECT 1").fetchall()),
        "reader": block,
        "backup": lambda: one.backup(path.with_name("backup.db")),
    }

    def at_depth(depth: int) -> None:
        if depth:
            at_depth(depth - 1)
        else:
            calls[how]()

    refused = 0
    for depth in range(sys.getrecursionlimit() - 100, sys.getrecursionlimit()):
        try:
            at_depth(depth)
        except RecursionError:
            refused += 1
        eventually(lambda: pool_of(one).in_use == 0)
    assert refused > 0
    assert one.read("SELECT 1") == [(1,)]


def test_a_finalizer_that_reads_while_the_line_is_looked_at_harms_no_other_read(one: DbWriter) -> None:
    class Line(OrderedDict[Claim, None]):
        looks = 0

        def __iter__(self) -> Iterator[Claim]:
            self.looks += 1
            if self.looks == 1:
                one.read("SELECT 2")  # the garbage collector may run as the iterator is made
            return super().__iter__()

    pool_of(one)._line = line = Line()
    assert one.read("SELECT 1") == [(1,)]
    assert line.looks > 1


def test_an_interrupt_while_waiting_for_a_connection_loses_none(one: DbWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is handed over in the moment of the interrupt."""

    class Interrupted:
        def acquire(self, timeout: float) -> bool:
            block.__exit__(None, None, None)
            raise KeyboardInterrupt

        def release(self) -> None:
            pass

    with ThreadPoolExecutor(1) as pool:
        block = one.reader()
        pool.submit(block.__enter__).result(DEADLINE)
        monkeypatch.setattr(pool_module, "thread_signal", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            one.read("SELECT 1")
        assert one.read("SELECT 1", timeout=DEADLINE) == [(1,)]


def test_waiters_are_told_when_the_gateway_closes(one: DbWriter) -> None:
    with ThreadPoolExecutor() as pool:
        with one.reader():
            waiting = pool.submit(one.read, "SELECT 1")
            eventually(lambda: pool_of(one).waiting)
            closing = pool.submit(one.close)
            with pytest.raises(WriterClosedError):
                waiting.result(DEADLINE)
        closing.result(DEADLINE)


def test_close_with_a_time_limit_does_not_wait_for_a_reader_for_ever(path: Path) -> None:
    db = DbWriter(path)
    with db.reader() as connection:
        assert db.close(timeout=0.05).unfinished == 0
        assert connection.execute("SELECT 1").fetchone() == (1,)
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA journal_mode = DELETE")


def test_close_in_the_midst_of_an_own_read_is_refused_where_it_would_never_end(one: DbWriter) -> None:
    with (
        one.reader(),
        pytest.raises(ReentrantWriteError, match="close waits for all readers, and this thread or task has one"),
    ):
        one.close()
    with pytest.raises(ReentrantWriteError):
        one.read(lambda connection: one.close())
    assert not one.closed
    with ThreadPoolExecutor(1) as pool, one.reader():
        closing = pool.submit(one.close)
        eventually(lambda: one.closed)
        assert not closing.done()
    closing.result(DEADLINE)


def test_readers_are_opened_when_they_are_needed(path: Path) -> None:
    opened: list[bool] = []
    with DbWriter(path, readers=3, on_connect=lambda connection, readonly: opened.append(readonly)) as db:
        assert opened == [False]
        for _ in range(5):
            db.read("SELECT 1")
        assert opened == [False, True]
        both_in = threading.Barrier(3, timeout=DEADLINE)
        with ThreadPoolExecutor() as pool:
            for _ in range(3):
                pool.submit(db.read, lambda connection: both_in.wait() and None)
        assert opened == [False, True, True, True]


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


def test_a_place_that_comes_in_the_moment_nobody_waits_any_more_is_free(
    one: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = new_claim("a read")
    claim.thread = 0  # of another thread
    with one.reader():
        assert not pool_of(one).ask(claim, thread_signal)
        monkeypatch.setattr(Reader, "reset", lambda reader: False)
    monkeypatch.undo()
    assert (pool_of(one).is_out(claim), pool_of(one)._lent_to(claim)) == (True, None)  # the right to open another
    pool_of(one).end(claim)
    assert one.read_value(COUNT, timeout=DEADLINE) == 0


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


def idle_as(db: DbWriter, kind: type[Idle]) -> None:
    """Replace the list of connections that nobody has."""
    pool = pool_of(db)
    pool._idle = pool._door = kind(pool._idle)


class RaisesBehind(Idle):
    """As Ctrl-C does, which comes behind a call."""

    raises = False

    def append(self, reader: Reader) -> None:
        super().append(reader)
        if RaisesBehind.raises:
            RaisesBehind.raises = False
            raise KeyboardInterrupt


def read(db: DbWriter) -> None:
    db.read("SELECT 1")


def read_by_function(db: DbWriter) -> None:
    db.read(lambda connection: 1)


def read_in_a_block(db: DbWriter) -> None:
    with db.reader():
        pass


WAYS = [read, read_by_function, read_in_a_block]


@pytest.mark.parametrize("way", WAYS)
def test_an_interrupt_as_a_connection_is_given_back_loses_nothing(
    one: DbWriter, way: Callable[[DbWriter], None]
) -> None:
    idle_as(one, RaisesBehind)
    for _ in range(3):
        RaisesBehind.raises = True
        with pytest.raises(KeyboardInterrupt):
            way(one)
        assert one.read_value("SELECT 1", timeout=DEADLINE) == 1
    assert (one.stats().readers_in_use, pool_of(one)._count) == (0, 1)


@pytest.mark.parametrize("is_plain", [True, False], ids=["a read", "a block"])
def test_who_waits_is_woken_although_the_giving_back_was_interrupted(one: DbWriter, is_plain: bool) -> None:
    def another_comes() -> None:
        if not waiting:
            waiting.append(others.submit(one.read, "SELECT 2", timeout=DEADLINE))
            eventually(lambda: pool_of(one).waiting)

    class Interrupted(RaisesBehind):
        def append(self, reader: Reader) -> None:
            if is_plain:
                another_comes()
            super().append(reader)

    waiting: list[Any] = []
    one.read("SELECT 1")
    idle_as(one, Interrupted)
    with ThreadPoolExecutor(1) as others:
        RaisesBehind.raises = True
        with pytest.raises(KeyboardInterrupt):
            if is_plain:
                one.read("SELECT 1")
            else:
                with one.reader():
                    another_comes()
        assert waiting[0].result(DEADLINE) == [(2,)]


@pytest.mark.parametrize("way", WAYS)
def test_an_interrupt_as_a_connection_is_closed_loses_nothing(
    one: DbWriter, monkeypatch: pytest.MonkeyPatch, way: Callable[[DbWriter], None]
) -> None:
    close_place = ReaderPool._close_place
    interrupted: list[object] = []

    def interrupted_once(pool: ReaderPool, claim: Any, reader: Reader) -> None:
        if claim not in interrupted:
            interrupted.append(claim)
            raise KeyboardInterrupt
        close_place(pool, claim, reader)

    for _ in range(3):
        one.read("SELECT 1")
        (reader,) = pool_of(one)._readers
        reader.guard.is_spoilt = reader.guard.leaves_traces = True
        monkeypatch.setattr(ReaderPool, "_close_place", interrupted_once)
        with pytest.raises(KeyboardInterrupt):
            way(one)
        monkeypatch.undo()
        assert one.read_value("SELECT 1", timeout=DEADLINE) == 1
    assert (one.stats().readers_in_use, pool_of(one)._count, pool_of(one)._most) == (0, 1, 1)


def test_an_interrupt_as_one_that_is_too_many_is_closed_loses_nothing(
    one: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_one_too_many(connection: sqlite3.Connection) -> None:
        pool_of(one)._most = 0

    def interrupted(*_: object) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(ReaderPool, "_close_place", interrupted)
    with pytest.raises(KeyboardInterrupt):
        one.read(is_one_too_many)
    pool_of(one)._most = 1
    assert one.read_value("SELECT 1", timeout=DEADLINE) == 1


def test_who_comes_in_the_moment_a_connection_is_given_back_gets_it(one: DbWriter) -> None:
    class Meanwhile(Idle):
        def append(self, reader: Reader) -> None:
            if not got:
                got.append(others.submit(one.read, "SELECT 2", timeout=None))
                eventually(lambda: pool_of(one).waiting)
            super().append(reader)

    got: list[Any] = []
    one.read("SELECT 1")
    idle_as(one, Meanwhile)
    with ThreadPoolExecutor(1) as others:
        assert one.read("SELECT 1") == [(1,)]
        assert got[0].result(DEADLINE) == [(2,)]


def test_one_that_is_given_back_in_the_moment_the_gateway_closes_is_closed(one: DbWriter) -> None:
    class Meanwhile(Idle):
        def append(self, reader: Reader) -> None:
            if not closing:
                closing.append(others.submit(one.close))
                eventually(lambda: pool_of(one)._closed)
            super().append(reader)

    closing: list[Any] = []
    one.read("SELECT 1")
    (reader,) = pool_of(one)._readers
    idle_as(one, Meanwhile)
    with ThreadPoolExecutor(1) as others:
        assert one.read("SELECT 1") == [(1,)]
        closing[0].result(DEADLINE)
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        reader.connection.execute("SELECT 1")


def test_nobody_takes_a_connection_that_is_given_back_in_the_moment_it_is_interrupted(
    one: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, late = pool_of(one), new_claim("late", 0.0)
    reader, lent_to = pool.wait_for(late), pool._lent_to

    def given_back_then(claim: Any) -> Reader | None:
        found = lent_to(claim)
        reader.claim = NOBODY
        pool._idle.append(reader)
        assert list(pool._door) == []
        return found

    monkeypatch.setattr(pool, "_lent_to", given_back_then)
    with pool._lock:
        pool._interrupt(late)
    monkeypatch.undo()
    assert one.read("SELECT 1") == [(1,)]
    assert pool.in_use == 0


def test_a_gateway_that_is_out_of_service_lends_no_connection_that_is_idle(one: DbWriter) -> None:
    one.read("SELECT 1")
    writer_of(one)._go_out_of_service(LookupError("gone"))
    with pytest.raises(WriterBrokenError, match="gone"):
        one.read("SELECT 1")


def test_a_savepoint_begins_nothing_that_a_later_read_is_in(one: DbWriter) -> None:
    one.read("SELECT 1")
    (reader,) = pool_of(one)._readers
    for _ in range(2):
        with one.reader():
            reader.select("SAVEPOINT mine", ())  # as it may be in the statement cache
        for _ in range(2):
            assert one.read("SAVEPOINT mine") == []
            assert is_clean(one)
    assert list(pool_of(one)._readers) == [reader]


def test_a_claim_that_leaves_the_line_is_lent_nothing_by_a_finalizer_of_that_moment(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DbWriter(path, readers=1) as db:
        pool = pool_of(db)
        out, waiting = new_claim("out"), new_claim("waiting")
        pool.wait_for(out)
        waiting.thread = 0  # or else it would be lent one beside that of this thread
        assert not pool.ask(waiting, thread_signal)
        looks: list[Claim] = []
        look = pool._lent_to

        def given_back_behind(claim: Claim) -> Reader | None:
            looks.append(claim)
            found = look(claim)
            if looks == [waiting, waiting]:  # the second is that under the lock
                pool.end(out)
            return found

        monkeypatch.setattr(pool, "_lent_to", given_back_behind)
        pool.end(waiting)
        assert pool.in_use == 0
        assert db.read_value("SELECT 7", timeout=DEADLINE) == 7


def test_what_a_signal_handler_raised_in_a_backup_comes_out(db: DbWriter) -> None:
    """SQLite discards it where it asks whether something is allowed."""

    def copy(connection: sqlite3.Connection) -> None:
        (reader,) = (one for one in pool_of(db)._readers if one.connection is connection)
        reader.guard._caught = LookupError("of a signal handler"), threading.get_ident()
        raise sqlite3.DatabaseError("not authorized")

    with pytest.raises(LookupError, match="of a signal handler"):
        pool_of(db).backup("backup", copy)


@pytest.fixture
def dropped(one: DbWriter, monkeypatch: pytest.MonkeyPatch, no_collections: None) -> None:
    """The only connection is that of a generator in a reference cycle, which nobody can reach."""

    def rows() -> Iterator[Any]:
        with one.reader() as connection:
            yield from connection.execute("SELECT 1 UNION SELECT 2")

    monkeypatch.setattr(garbage, "LONG", 0.01)
    cycle: list[Any] = [rows()]
    cycle.append(cycle)
    in_threads(functools.partial(next, cycle[0]))
    cycle = []
    assert pool_of(one).in_use == 1


@pytest.mark.usefixtures("dropped")
def test_a_read_gets_the_connection_of_a_block_that_nobody_can_reach(one: DbWriter) -> None:
    assert one.read("SELECT 1", timeout=DEADLINE) == [(1,)]


@pytest.mark.usefixtures("dropped")
def test_a_read_of_a_task_gets_it_too(one: DbWriter) -> None:
    async def main() -> None:
        assert await AsyncDbWriter.wrap(one).read("SELECT 1", timeout=DEADLINE) == [(1,)]

    asyncio.run(main())


@pytest.mark.usefixtures("dropped")
def test_close_ends_a_block_that_nobody_can_reach(one: DbWriter) -> None:
    one.close()


def test_close_is_refused_on_the_thread_of_a_loop_whose_task_is_in_a_reader(one: DbWriter) -> None:
    async def main() -> None:
        entered, leave = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            with one.reader():
                entered.set()
                await leave.wait()

        holding = asyncio.create_task(hold())
        await entered.wait()
        with pytest.raises(ReentrantWriteError):
            one.close(timeout=None)
        leave.set()
        await holding

    asyncio.run(main())


@pytest.mark.usefixtures("no_collections")
def test_close_is_not_refused_for_one_in_its_own_thread_that_nobody_can_reach(one: DbWriter) -> None:
    cycle: list[Any] = [one.reader()]
    cycle.append(cycle)
    cycle[0].__enter__()
    with pytest.raises(ReentrantWriteError, match="close waits for all readers"):
        one.close()
    cycle = []
    one.close()


def test_the_collector_runs_for_a_block_only_if_others_wait_for_it(
    one: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[None] = []
    monkeypatch.setattr(garbage, "LONG", 0.01)
    monkeypatch.setattr(garbage, "collect_soon", lambda: runs.append(None))
    with one.reader():
        pool_of(one)._help_those_that_wait()
        assert runs == []
        reading = ThreadPoolExecutor().submit(one.read, "SELECT 1")
        eventually(lambda: bool(runs))
    assert reading.result(DEADLINE) == [(1,)]


def test_it_does_not_run_for_a_read_which_ends_by_itself(one: DbWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[None] = []
    begun, end = threading.Event(), threading.Event()
    monkeypatch.setattr(garbage, "LONG", 0.0)
    monkeypatch.setattr(garbage, "collect_soon", lambda: runs.append(None))
    pool = pool_of(one)

    def wait(_: sqlite3.Connection) -> bool:
        begun.set()
        return end.wait(DEADLINE)

    with ThreadPoolExecutor() as threads:
        first = threads.submit(one.read, wait)
        assert begun.wait(DEADLINE)
        second = threads.submit(one.read, "SELECT 1")
        eventually(lambda: pool.waiting == 1)
        pool._help_those_that_wait()
        end.set()
        first.result(DEADLINE)
        assert second.result(DEADLINE) == [(1,)]
    assert runs == []


def test_it_is_looked_for_less_and_less_often() -> None:
    search = garbage.Search(100.0, 5.0)
    assert [now for now in range(100, 200) if search.is_due(now)] == [105, 115, 135, 175]


def test_a_reader_whose_thread_has_no_room_for_the_call_is_given_back_by_another_thread(
    one: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, me = pool_of(one), threading.get_ident()

    def end(claim: Claim) -> None:
        if threading.get_ident() == me:
            raise RecursionError
        ReaderPool.end(pool, claim)

    with monkeypatch.context() as patched, pytest.raises(RecursionError):
        patched.setattr(pool, "end", end)
        with one.reader() as connection:
            connection.execute("SELECT 1").fetchall()
    eventually(lambda: pool.in_use == 0)
    assert one.read("SELECT 1", timeout=DEADLINE) == [(1,)]


def test_a_signal_handler_that_reads_while_its_thread_waits_for_a_connection_has_one_of_its_own(
    one: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []

    class Interrupted:
        def __init__(self) -> None:
            self._signal = thread_signal()
            self.release = self._signal.release

        def acquire(self, timeout: float) -> bool:
            monkeypatch.undo()
            read.append(one.read_value("SELECT 2", timeout=DEADLINE))
            block.__exit__(None, None, None)
            return bool(self._signal.acquire(timeout=timeout))

    with ThreadPoolExecutor(1) as pool:
        block = one.reader()
        pool.submit(block.__enter__).result(DEADLINE)
        monkeypatch.setattr(pool_module, "thread_signal", Interrupted)
        assert one.read_value("SELECT 1", timeout=DEADLINE) == 1
    assert read == [2]
    assert (pool_of(one).in_use, len(pool_of(one)._readers)) == (0, 1)


def test_a_claim_that_a_signal_handler_has_admitted_meanwhile_is_admitted_once(path: Path) -> None:
    class Loop(asyncio.SelectorEventLoop):
        came = False

        def is_closed(self) -> bool:
            if not self.came:  # a signal handler may come in any call
                self.came = True
                db.read("SELECT 1", timeout=DEADLINE)
            return super().is_closed()

    with DbWriter(path, readers=2) as db, contextlib.closing(Loop()) as loop:
        pool, claim = pool_of(db), new_claim("a task's")
        claim.loop = weakref.ref(loop)
        assert pool.ask(claim, thread_signal)
        assert (loop.came, pool.in_use) == (True, 1)
        pool.end(claim)
        assert pool.in_use == 0


def test_what_comes_back_while_it_is_seen_whether_one_waits_for_itself_is_lent_once(
    one: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def waits(claim: Claim, is_threads: bool) -> bool:
        block.__exit__(None, None, None)
        return True

    block = one.reader()
    in_threads(block.__enter__)
    monkeypatch.setattr(pool_of(one), "_waits_for_itself", waits)
    assert one.read_value("SELECT 1", timeout=DEADLINE) == 1
    assert (pool_of(one).in_use, len(pool_of(one)._readers)) == (0, 1)


def test_an_additional_connection_that_an_interrupt_keeps_from_its_use_is_closed(
    one: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, reader_of = pool_of(one), ReaderPool.reader_of

    def interrupted(self: ReaderPool, claim: Claim) -> Reader:
        reader_of(self, claim)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ReaderPool, "reader_of", interrupted)
        pool.use_beside("beside", lambda reader: None)
    assert (pool.in_use, pool._most, len(pool._readers)) == (0, 1, 0)
    assert one.read("SELECT 1") == [(1,)]


def test_a_pause_begins_as_soon_as_the_last_connection_has_come_back(one: DbWriter) -> None:
    readers, has_begun = pool_of(one), threading.Event()

    def pause() -> None:
        with readers.pause(2 * DEADLINE):
            has_begun.set()

    with ThreadPoolExecutor(1) as pool:
        with one.reader():
            pausing = pool.submit(pause)
            eventually(lambda: readers._paused_until)
            assert not has_begun.is_set()
        assert has_begun.wait(DEADLINE)
        pausing.result(DEADLINE)
