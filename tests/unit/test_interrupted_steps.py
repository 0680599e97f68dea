"""What a signal handler raises may come at any step of a call: nothing hangs, is lost, or is told twice.

CPython looks for signals behind a call of C code and at the beginning of a function. Each such place of this package,
in the calling thread, is interrupted in its turn.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any

import pytest

import onewriter
from helpers import DEADLINE, driver_of, eventually, parked, pool_of, queue_of, rows, rows_in, state_of
from interrupting import Interrupter, SignalError
from onewriter import DbWriter, Ticket, Transaction, WriterClosedError, core
from onewriter.base.waiting import Flag, call_if_free
from onewriter.ends import exit as at_exit
from onewriter.write.own_turn import OwnTurn
from onewriter.write.parts import Parts
from onewriter.write.ticket import TicketFuture

INSERT = "INSERT INTO t (n) VALUES (?)"


class ClosedError(WriterClosedError):
    """The same, as from a call of a gateway that is closed."""


class Told:
    """What the callbacks said: of which rows, and whether they are committed."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, bool]] = []
        self.heard = False  # the last block has its callbacks

    def of(self, tx: Transaction, row: int) -> None:
        self.heard = False
        tx.on_commit(lambda: self.rows.append((row, True)))
        tx.on_rollback(lambda: self.rows.append((row, False)))
        self.heard = True


def block(db: DbWriter, row: int, told: Told) -> None:
    with db.transaction() as tx:
        told.of(tx, row)
        tx.execute(INSERT, (row,))


def failing_block(db: DbWriter, row: int, told: Told) -> None:
    with pytest.raises(LookupError), db.transaction() as tx:
        told.of(tx, row)
        tx.execute(INSERT, (row,))
        raise LookupError


def block_that_waits(db: DbWriter, row: int, told: Told) -> None:
    with db.transaction(max_hold=DEADLINE) as tx:  # which the writer thread sees to
        told.of(tx, row)
        tx.execute(INSERT, (row,))


def block_with_a_read(db: DbWriter, row: int, told: Told) -> None:
    with db.transaction() as tx:
        told.of(tx, row)
        assert db.read("SELECT 1") == [(1,)]
        tx.execute(INSERT, (row,))


def lent_transaction(db: DbWriter, row: int, told: Told) -> None:
    with db.transaction() as tx, tx.connection as connection:
        told.of(tx, row)
        connection.execute(INSERT, (row,))


def block_around_another(db: DbWriter, row: int, told: Told) -> None:
    with db.transaction(), db.transaction() as tx:
        told.of(tx, row)
        tx.execute(INSERT, (row,))


def statement(db: DbWriter, row: int, told: Told) -> None:
    db.run(INSERT, (row,))


def function(db: DbWriter, row: int, told: Told) -> None:
    db.run(lambda tx: tx.execute(INSERT, (row,)).rowcount)


def read(db: DbWriter, row: int, told: Told) -> None:
    assert db.read("SELECT 1") == [(1,)]


def reader(db: DbWriter, row: int, told: Told) -> None:
    with db.reader():
        assert db.read("SELECT 1") == [(1,)]


def watched(db: DbWriter, row: int, told: Told) -> None:
    with db.watch("SELECT n FROM t") as live:
        live.next(DEADLINE)


SILENT = {statement, function}  # without callbacks
WRITES = {*SILENT, *(block, block_that_waits, block_with_a_read, block_around_another, lent_transaction)}


@pytest.fixture
def db(path: Path) -> Iterator[DbWriter]:
    with DbWriter(path, synchronous="OFF", readers=1) as db:
        db.run("CREATE TABLE t (n INTEGER PRIMARY KEY)")
        yield db


def leave_to_the_collector(db: DbWriter, max_hold: float | None) -> None:
    entry = db.transaction(max_hold=max_hold)
    tx = entry.__enter__()
    tx.execute(INSERT, (-1,))
    del tx
    kept.append(entry)
    del entry


kept: list[object] = []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # nobody gets what is raised there
@pytest.mark.parametrize("max_hold", [None, DEADLINE])
def test_an_interrupt_of_the_finalizer_of_a_block_leaves_it_to_the_writer(db: DbWriter, max_hold: float | None) -> None:
    for step in range(1, 100):
        leave_to_the_collector(db, max_hold)
        with contextlib.suppress(SignalError), Interrupter(step) as interrupter:
            kept.clear()
        db.run(INSERT, (step,), timeout=DEADLINE)
        assert db.read("SELECT n FROM t ORDER BY n") == [(n,) for n in range(1, step + 1)], interrupter.where
        if not interrupter.where:
            break
    else:
        pytest.fail("there are more steps than that")


def interrupt_each_step(
    db: DbWriter, call: Callable[[DbWriter, int, Told], None], error: type[Exception] = SignalError, then: int = 0
) -> None:
    told = Told()
    call(db, 0, told)
    for row in range(1, 1000):
        interrupter, is_through, told.heard = Interrupter(row, error, then), False, False
        eventually(lambda: queue_of(db)._asleep)  # so that each time the same steps come
        try:
            with interrupter:
                call(db, row, told)
            is_through = True
        except (error, KeyboardInterrupt):  # that, where it came while SQLite asked whether it may
            pass
        # What was raised came out, but for that in the finalizer of a lent cursor.
        assert call is lent_transaction or not (is_through and interrupter.where), interrupter.where
        db.flush(DEADLINE)
        found = bool(db.read("SELECT n FROM t WHERE n = ?", (row,), timeout=DEADLINE))
        assert found or not is_through or call not in WRITES, interrupter.where
        assert not found or call is not failing_block, interrupter.where
        said = [committed for of, committed in told.rows if of == row]
        assert said == [found] or (said == [] and (call in SILENT or not told.heard)), interrupter.where
        assert db.health == "ok", interrupter.where
        assert (state_of(db).job, state_of(db).entering, queue_of(db).guest) == (None, set(), None), interrupter.where
        assert db.stats().readers_in_use == 0, interrupter.where
        if not interrupter.where:
            break
    else:
        pytest.fail("there are more steps than that")
    with parked(db), pytest.raises(onewriter.WriteTimeoutError), db.transaction(timeout=0.01):
        pass  # the turn is the writer's
    assert pool_of(db).waiting == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "call", [*sorted(WRITES, key=lambda call: call.__name__), failing_block, read, reader, watched]
)
def test_an_interrupt_at_any_step_leaves_nothing_behind(
    db: DbWriter, call: Callable[[DbWriter, int, Told], None]
) -> None:
    interrupt_each_step(db, call)


@pytest.mark.parametrize("call", [block, block_that_waits, failing_block])
def test_an_error_as_of_a_closed_gateway_does_so_too(db: DbWriter, call: Callable[[DbWriter, int, Told], None]) -> None:
    interrupt_each_step(db, call, ClosedError)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("call", [statement, function, block, block_that_waits, read, reader, watched])
def test_an_error_as_of_a_lock_that_is_not_acquired_comes_out_too(
    db: DbWriter, call: Callable[[DbWriter, int, Told], None]
) -> None:
    interrupt_each_step(db, call, RuntimeError)


@pytest.mark.parametrize("then", [1, 2, 4, 8])
def test_a_second_interrupt_while_the_first_is_seen_to_does_so_too(db: DbWriter, then: int) -> None:
    interrupt_each_step(db, block, then=then)


def lends_cursors(tx: Transaction, row: int) -> None:
    for _ in range(2):  # each is freed, under the connection's lock
        tx.connection.execute("SELECT 1").fetchall()
    tx.execute(INSERT, (row,))


def has_a_failing_part(tx: Transaction, row: int) -> None:
    tx.execute(INSERT, (row,))
    with contextlib.suppress(LookupError), tx.savepoint():
        tx.execute(INSERT, (-row,))
        raise LookupError


def inserts(tx: Transaction, row: int) -> None:
    tx.execute(INSERT, (row,))


@pytest.mark.parametrize("error", [None, LookupError])
@pytest.mark.parametrize("work", [inserts, lends_cursors, has_a_failing_part])
def test_a_handler_may_leave_the_block_of_its_thread_at_any_step(
    db: DbWriter, work: Callable[[Transaction, int], None], error: type[Exception] | None
) -> None:
    """Also where the thread is just leaving it: two that end it at the same time would crash the process."""
    for row in range(1, 1000):
        entry = db.transaction()

        def leave(entry: contextlib.AbstractContextManager[Transaction] = entry) -> None:
            with contextlib.suppress(RuntimeError, onewriter.OneWriterError):  # not entered yet; or it ends later
                entry.__exit__(error, None if error is None else error(), None)

        is_through = False
        with Interrupter(row, handler=leave) as interrupter:
            try:
                with entry as tx:
                    work(tx, row)
                is_through = True
            except (onewriter.TransactionClosedError, sqlite3.ProgrammingError):  # that of a connection it has lent
                pass
        db.flush(DEADLINE)
        found = {n for (n,) in db.read("SELECT n FROM t")} & {row, -row}
        # In the midst of a part that fails, it is kept with the block, and TransactionClosedError says so.
        assert found == {row} if is_through and error is None else found <= {row, -row}, interrupter.where
        assert found <= {row} or not is_through, interrupter.where
        assert (state_of(db).job, queue_of(db).guest, db.health) == (None, None, "ok"), interrupter.where
        if not interrupter.where:
            break
    else:
        pytest.fail("there are more steps than that")


@pytest.mark.parametrize("read", [lambda db: db.read("SELECT 1"), lambda db: db.reader().__enter__()])
def test_a_handler_may_read_at_any_step_of_a_block_or_is_told_that_it_cannot(
    path: Path, read: Callable[[DbWriter], object]
) -> None:
    with DbWriter(path, synchronous="OFF") as db:
        db.run("CREATE TABLE t (n)")
        refused = 0

        def handler() -> None:
            nonlocal refused
            try:
                read(db)
            except onewriter.ReentrantWriteError:
                refused += 1

        for row in range(1, 1000):
            eventually(lambda: queue_of(db)._asleep)  # so that each time the same steps come
            with Interrupter(row, handler=handler) as interrupter:
                block(db, row, Told())
            if not interrupter.where:
                break
        else:
            pytest.fail("there are more steps than that")
        assert refused
        assert rows(db) == list(range(1, row + 1))


def test_while_a_thread_ends_its_block_nobody_else_does(db: DbWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    end, seen = OwnTurn.end, list[bool]()

    def ends(self: OwnTurn, block: Any) -> bool:
        driver_of(db).hand_over(block)  # as a finalizer in any thread
        driver_of(db).leave(block)
        seen.append(queue_of(db).is_handed_over)
        return end(self, block)

    monkeypatch.setattr(OwnTurn, "end", ends)
    eventually(lambda: queue_of(db)._asleep)  # so that the block has the turn in its own thread
    block(db, 1, Told())
    assert (seen, rows(db)) == ([False], [1])


def reads(db: DbWriter, _: DbWriter) -> None:
    with db.reader():
        pass


def writes_elsewhere(_: DbWriter, other: DbWriter) -> None:
    with other.transaction():
        pass


@pytest.mark.parametrize("act", [reads, writes_elsewhere])
def test_a_thread_is_inside_its_block_whatever_a_handler_enters_meanwhile(
    db: DbWriter, act: Callable[[DbWriter, DbWriter], None], tmp_path: Path
) -> None:
    with DbWriter(tmp_path / "other.db", synchronous="OFF") as other:
        for row in range(1, 1000):
            entry = db.transaction()
            with Interrupter(row, handler=lambda: act(db, other)) as interrupter:
                entry.__enter__()
            try:
                assert db.in_writer(), interrupter.where
                db.run(INSERT, (row,), timeout=DEADLINE)  # a part of the block
            finally:
                entry.__exit__(None, None, None)
            if not interrupter.where:
                break
        else:
            pytest.fail("there are more steps than that")


def test_inline_a_handler_may_enqueue_at_any_step_of_a_block(path: Path) -> None:
    with DbWriter(path, inline=True, synchronous="OFF") as db:
        db.run("CREATE TABLE t (n INTEGER PRIMARY KEY)")
        for row in range(1, 1000):
            tickets: list[onewriter.Ticket[Any]] = []
            # A wait for the turn, which its own thread has, would end by QueueFullError.

            def enqueue(row: int = row, tickets: list[onewriter.Ticket[Any]] = tickets) -> None:
                tickets.append(db.enqueue(INSERT, (row,), timeout=0.01))

            with Interrupter(row, handler=enqueue) as interrupter, db.transaction() as tx:
                tx.execute("SELECT 1")
            db.flush(DEADLINE)
            assert [ticket.result(DEADLINE).lastrowid for ticket in tickets] == [row] * len(tickets)
            if not interrupter.where:
                break
        else:
            pytest.fail("there are more steps than that")


def savepoint_part(db: DbWriter, tx: Transaction, row: int) -> None:
    with tx.savepoint():
        tx.execute(INSERT, (row,))
        raise LookupError


def nested_part(db: DbWriter, tx: Transaction, row: int) -> None:
    with db.transaction() as inner:
        inner.execute(INSERT, (row,))
        raise LookupError


def nested_run(db: DbWriter, tx: Transaction, row: int) -> None:
    def fails(inner: Transaction) -> None:
        inner.execute(INSERT, (row,))
        raise LookupError

    db.run(fails)


def failing_script(db: DbWriter, tx: Transaction, row: int) -> None:
    tx.executescript(f"INSERT INTO t VALUES ({row}); INSERT INTO t VALUES ({row})")


@pytest.mark.parametrize("part", [savepoint_part, nested_part, nested_run, failing_script])
def test_a_part_that_fails_is_undone_although_a_handler_raises_meanwhile(
    db: DbWriter, part: Callable[[DbWriter, Transaction, int], None]
) -> None:
    errors: list[Exception] = []  # kept, as by a logger: each holds the frames that it came through
    for row in range(10, 2000, 10):
        with db.transaction() as tx:
            interrupter = Interrupter(row // 10)
            try:
                with interrupter:
                    part(db, tx, row)
            except (LookupError, sqlite3.IntegrityError, SignalError) as error:
                if "Entry.__exit__" not in interrupter.where:  # the part is not left then, and held by the frames
                    errors.append(error)
            except KeyboardInterrupt:  # as above
                pass
            db.run(INSERT, (row + 1,), timeout=DEADLINE)  # the block goes on, and this thread is inside it
        db.run(INSERT, (row + 2,), timeout=DEADLINE)  # and after it no more
        assert db.read("SELECT n FROM t WHERE n >= ?", (row,)) == [(row + 1,), (row + 2,)], interrupter.where
        if not interrupter.where:
            break
    else:
        pytest.fail("there are more steps than that")
    assert len(errors) > 20


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("kind", ["block", "own turn", "function"])
def test_a_part_whose_undoing_was_interrupted_is_undone_before_anything_else(
    db: DbWriter, monkeypatch: pytest.MonkeyPatch, kind: str, goes_on: bool
) -> None:
    def interrupted(*_: object) -> None:
        raise SignalError

    def work(tx: Transaction) -> None:
        with monkeypatch.context() as patch, contextlib.suppress(SignalError), tx.savepoint():
            tx.execute(INSERT, (1,))
            patch.setattr(Parts, "undo", interrupted)
            raise LookupError
        if goes_on:
            tx.execute(INSERT, (2,))

    if kind == "function":
        db.run(work)
    else:
        eventually(lambda: queue_of(db)._asleep)
        with db.transaction(max_hold=DEADLINE if kind == "block" else None) as tx:
            work(tx)
    assert rows(db) == [2] * goes_on


def test_a_lock_that_is_taken_if_it_is_free_is_free_again() -> None:
    called: list[int] = []
    for place in range(1, 100):
        lock = threading.Lock()
        try:
            with Interrupter(place) as interrupter:
                call_if_free(lock, lambda place=place: called.append(place))  # type: ignore[misc]
        except SignalError:
            assert not lock.locked(), interrupter.where
        else:
            break
    assert place > 3
    assert called[-1] == place
    with lock:
        call_if_free(lock, called.clear)
    assert called


def note(told: list[str], what: str, _: object) -> None:
    told.append(what)


def enqueue_with_patience(db: DbWriter) -> object:
    return db.enqueue("SELECT 1", timeout=None)


def both_wait(db: DbWriter, job: Ticket[Any]) -> bool:
    """A thread for ``job``, and one for room in the queue."""
    return bool(job._waiters and queue_of(db)._room)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SignalError, RuntimeError])
def test_a_ticket_that_is_cancelled_tells_everybody_at_whatever_step_something_is_raised(
    path: Path, error: type[BaseException]
) -> None:
    with DbWriter(path, synchronous="OFF", maxsize=1) as db, ThreadPoolExecutor(2) as threads:
        db.run("CREATE TABLE t (n)")
        cancelled = 0
        for step in range(1, 1000):
            told: list[str] = []
            with parked(db):
                job = db.enqueue("INSERT INTO t VALUES (1)")
                job.add_done_callback(functools.partial(note, told, "first"))
                future = job.future()
                job.add_done_callback(functools.partial(note, told, "last"))
                waits_for_it = threads.submit(job.exception)
                waits_for_room = threads.submit(enqueue_with_patience, db)
                eventually(functools.partial(both_wait, db, job))
                is_through = False
                with contextlib.suppress(error), Interrupter(step, error) as interrupter:
                    job.cancel()
                    is_through = True
                # What is raised in a callback is logged, if it is no interrupt; and that of a Future is one.
                is_in_callback = any(name in interrupter.where for name in ("TicketFuture", "Ticket.cancelled"))
                assert not (is_through and interrupter.where) or is_in_callback, interrupter.where
                if job.cancelled():
                    assert told == ["first", "last"], interrupter.where
                    with pytest.raises(CancelledError):
                        waits_for_it.result(DEADLINE)
                    waits_for_room.result(DEADLINE)
            waits_for_room.result(DEADLINE)  # it may be admitted behind a flush
            db.flush(DEADLINE)
            assert (told, future.done()) == (["first", "last"], True), interrupter.where
            cancelled += job.cancelled()
            assert (queue_of(db)._bounded, db.stats().cancelled) == (0, cancelled), interrupter.where
            if not interrupter.where:
                break
        else:
            pytest.fail("there are more steps than that")


@pytest.mark.parametrize("outcome", ["committed", "failed", "cancelled"])
def test_the_future_of_a_ticket_is_done_whatever_is_raised_as_it_is_told(db: DbWriter, outcome: str) -> None:
    with parked(db):
        job = db.enqueue(INSERT, ("text",) if outcome == "failed" else (1,))
        if outcome == "cancelled":
            job.cancel()
    db.flush(DEADLINE)
    for step in range(2, 100):  # the first is its own begin
        future, called = TicketFuture(job), list[object]()
        future.add_done_callback(called.append)
        with contextlib.suppress(SignalError), Interrupter(step) as interrupter:
            future.resolve(job)
        assert (called, future.cancelled()) == ([future], outcome == "cancelled"), interrupter.where
        assert wait_for([future], DEADLINE).done
        if not interrupter.where:
            break
    else:
        pytest.fail("there are more steps than that")

    future = TicketFuture(job)
    told = future.set_running_or_notify_cancel

    def is_told_and_interrupted() -> bool:
        told()
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(future, "set_running_or_notify_cancel", is_told_and_interrupted)
        future.resolve(job)
    assert wait_for([future], DEADLINE).done
    future = TicketFuture(job)
    future.add_done_callback(interrupts)
    with pytest.raises(KeyboardInterrupt):
        future.resolve(job)
    assert wait_for([future], DEADLINE).done


def interrupts(_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("arguments", [{"timeout": 0, "drain": False}, {"timeout": 0}], ids=str)
def test_a_close_that_is_interrupted_at_any_step_leaves_no_job_without_an_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]
) -> None:
    monkeypatch.setattr(core, "GRACE", 0.0)
    with ThreadPoolExecutor(1) as threads:
        for step in range(1, 1000):
            told: list[str] = []
            db = DbWriter(tmp_path / f"{step}.db", synchronous="OFF", maxsize=2)
            with parked(db):
                jobs = [db.enqueue("CREATE TABLE t (n)"), db.enqueue("INSERT INTO t VALUES (1)")]
                for job in jobs:
                    job.add_done_callback(functools.partial(note, told, "done"))
                waits_for_room = threads.submit(enqueue_with_patience, db)
                eventually(functools.partial(getattr, queue_of(db), "_room"))
                with contextlib.suppress(SignalError), Interrupter(step) as interrupter:
                    db.close(**arguments)
                if queue_of(db).refusing:
                    with pytest.raises(WriterClosedError):
                        waits_for_room.result(DEADLINE)
            for job in jobs:
                assert job.wait(DEADLINE), interrupter.where
            db.close()
            assert told == ["done"] * 2, interrupter.where
            if not interrupter.where:
                break
        else:
            pytest.fail("there are more steps than that")


def test_a_close_that_gives_up_tells_all_that_it_has_withdrawn_and_nobody_else(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "GRACE", 0.0)
    entered, release, told = threading.Event(), threading.Event(), list[object]()

    def is_told(job: Ticket[Any]) -> None:
        told.append(job)
        raise KeyboardInterrupt

    def hold(tx: Transaction) -> None:
        entered.set()
        release.wait(DEADLINE)

    db = DbWriter(path, synchronous="OFF")
    running = db.enqueue(hold)
    running.add_done_callback(told.append)
    assert entered.wait(DEADLINE)
    jobs = [db.enqueue("SELECT 1") for _ in range(4)]
    for job in jobs:
        job.add_done_callback(is_told)
    with pytest.raises(KeyboardInterrupt):
        db.close(0)
    assert told == jobs
    release.set()
    db.close()
    assert told == [*jobs, running]


def test_a_handler_may_open_a_watch_of_the_same_query_at_any_step_of_another(db: DbWriter) -> None:
    def handler() -> None:
        with db.watch("SELECT count(*) FROM t") as other:
            other.next(DEADLINE)

    with db.watch("SELECT count(*) FROM t") as live:
        assert live.next(DEADLINE) == [(0,)]
        for step in range(1, 1000):
            db.run(INSERT, (step,))
            with Interrupter(step, handler=handler) as interrupter:
                found = live.next(DEADLINE)
            assert found == [(step,)], interrupter.where
            if not interrupter.where:
                break
        else:
            pytest.fail("there are more steps than that")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a connection, as it is opened
def test_a_backup_that_is_interrupted_at_any_step_leaves_no_descriptor_and_no_file(db: DbWriter, path: Path) -> None:
    target, before = path.with_name("copy.db"), set[tuple[int, int]]()
    for at in range(1, 1000):
        # KeyboardInterrupt: where it came while SQLite asked whether it may
        with contextlib.suppress(SignalError, KeyboardInterrupt), Interrupter(at) as interrupter:
            db.backup(target)
        if not open_besides(path) <= before:
            gc.collect()  # a connection, as it is opened
            assert at == 1 or open_besides(path) <= before, interrupter.where
        before |= open_besides(path)
        assert [found.name for found in path.parent.glob("*.unfinished")] == [], interrupter.where
        if not interrupter.where:
            break
    else:
        pytest.fail("there are more steps than that")
    assert rows_in(target) == rows_in(path)


def open_besides(path: Path) -> set[tuple[int, int]]:
    """The files that this process has open, but for those of the database."""
    found = set[tuple[int, int]]()
    for descriptor in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # that with which these are listed
            found.add((os.fstat(int(descriptor)).st_dev, os.fstat(int(descriptor)).st_ino))
    return found.difference((os.stat(name).st_dev, os.stat(name).st_ino) for name in path.parent.glob(f"{path.name}*"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a connection, as it is opened
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of a gateway that was opened
def test_an_opening_that_is_interrupted_at_any_step_leaves_no_thread_and_nothing_to_wait_for_at_exit(
    path: Path,
) -> None:
    threads, open_before, opened = set(threading.enumerate()), at_exit._open.copy(), list[DbWriter]()
    for at in range(1, 1000):
        with contextlib.suppress(SignalError, KeyboardInterrupt), Interrupter(at) as interrupter:
            opened.append(DbWriter(path))
        if opened:
            opened.pop().close()
        try:
            eventually(lambda: set(threading.enumerate()) <= threads and at_exit._open.keys() <= open_before.keys())
        except AssertionError:
            pytest.fail(interrupter.where)
        if not interrupter.where:
            break
    else:
        pytest.fail("there are more steps than that")


def test_a_flag_is_set_and_waited_for_whatever_is_raised_as_it_is_set() -> None:
    with ThreadPoolExecutor(1) as threads:
        for step in range(1, 100):
            flag = Flag()
            waits = threads.submit(flag.wait)
            eventually(functools.partial(getattr, flag, "_waiters"))
            with contextlib.suppress(SignalError), Interrupter(step) as interrupter:
                flag.set()
            flag.set()
            assert waits.result(DEADLINE), interrupter.where
            with contextlib.suppress(SignalError), Interrupter(step):
                flag.wait(DEADLINE)
            flag.clear()
            with contextlib.suppress(SignalError), Interrupter(step) as of_wait:
                assert not flag.wait(0)
            assert flag._waiters == [], of_wait.where
            if not interrupter.where and not of_wait.where:
                break
        else:
            pytest.fail("there are more steps than that")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a lent cursor's __del__
@pytest.mark.parametrize("way", ["savepoint", "nested", "library"])
def test_what_is_raised_at_any_step_of_a_functions_savepoint_undoes_nothing_of_the_jobs_before_it(
    path: Path, way: str
) -> None:
    """The savepoints have the same names in each job."""

    def leaves_one_open(tx: Transaction) -> None:
        tx.connection.execute(INSERT, (1,))  # begins a transaction of the library's

    def is_interrupted(at: int, tx: Transaction) -> None:
        tx.execute(INSERT, (3,))
        with Interrupter(at) as interrupter:
            where.append(interrupter)
            if way == "savepoint":
                with tx.savepoint():
                    tx.execute(INSERT, (4,))
            elif way == "nested":
                db.run(INSERT, (4,))
            else:
                tx.connection.execute(INSERT, (4,))
                tx.connection.commit()

    with DbWriter(path, synchronous="OFF") as db:
        db.run("CREATE TABLE t (n)")
        for at in range(1, 500):
            where = list[Interrupter]()
            with parked(db):
                tickets: list[Ticket[Any]] = [
                    db.enqueue(leaves_one_open),
                    db.enqueue(INSERT, (2,)),
                    db.enqueue(functools.partial(is_interrupted, at)),
                    db.enqueue(INSERT, (5,)),
                ]
            failed = isinstance(tickets[2].exception(DEADLINE), SignalError)
            assert [ticket.exception(DEADLINE) for ticket in (*tickets[:2], tickets[3])] == [None] * 3, where[0].where
            assert rows(db) == ([1, 2, 5] if failed else [1, 2, 3, 4, 5]), where[0].where
            db.run("DELETE FROM t")
            if not where[0].where:
                break
        else:
            pytest.fail("there are more steps than that")
