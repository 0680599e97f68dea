"""What waits for the writer: order, room, time limits, and what close makes of it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import sqlite3
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, assert_type

import pytest

from helpers import BRIEFLY, DEADLINE, eventually, holding_lock, parked, pool_of, queue_of, raising, rows, state_of
from onewriter import (
    AsyncDbWriter,
    DbWriter,
    QueueFullError,
    ReentrantWriteError,
    Result,
    Ticket,
    Transaction,
    WriterClosedError,
    WriteTimeoutError,
)
from onewriter.base.state import State
from onewriter.read.claim import Claim, new_claim
from onewriter.read.pool import ReaderPool
from onewriter.write import queue as queue_module
from onewriter.write.jobs import StatementJob
from onewriter.write.queue import JobQueue
from onewriter.write.ticket import Job

INSERT = "INSERT INTO t VALUES (?)"


@pytest.fixture
def db(path: Path) -> Iterator[DbWriter]:
    """A gateway with room for three, and a table."""
    with DbWriter(path, maxsize=3) as db:
        db.run("CREATE TABLE t (n INTEGER PRIMARY KEY)")
        yield db


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def insert(n: int) -> Callable[[Transaction], Result]:
    return lambda tx: tx.execute(INSERT, (n,))


class Stay:
    """A job that holds the writer from ``entered`` until ``release``, and then writes a row."""

    def __init__(self, n: int) -> None:
        self.entered = threading.Event()
        self.release = threading.Event()
        self._n = n

    def __call__(self, tx: Transaction) -> int:
        self.entered.set()
        assert self.release.wait(DEADLINE)
        tx.execute(INSERT, (self._n,))
        return self._n


def test_jobs_run_in_the_order_in_which_they_were_accepted(path: Path) -> None:
    ran: list[int] = []

    def note(n: int) -> Callable[[Transaction], None]:
        return lambda tx: ran.append(n)

    with DbWriter(path) as db:
        with parked(db):
            for n in range(200):
                db.enqueue(note(n))
        db.flush(timeout=DEADLINE)
    assert ran == list(range(200))


def test_run_returns_after_everything_that_was_accepted_before_it(db: DbWriter) -> None:
    with parked(db):
        tickets = [db.enqueue(INSERT, (n,)) for n in range(3)]
    assert db.run("SELECT count(*) FROM t", timeout=DEADLINE).rows == [(3,)]
    assert all(ticket.done() for ticket in tickets)


def test_flush_waits_for_what_was_accepted_and_raises_nothing_of_its_errors(path: Path) -> None:
    with DbWriter(path, on_error=lambda ticket: None) as db:
        with parked(db):
            ticket = db.enqueue("INSERT INTO nowhere VALUES (1)")
        db.flush(timeout=DEADLINE)
        assert ticket.done()


@pytest.mark.parametrize("timeout", [0, BRIEFLY])
def test_a_full_queue_refuses_after_the_timeout_and_recovers_by_itself(db: DbWriter, timeout: float) -> None:
    with parked(db):
        for n in range(3):
            db.enqueue(INSERT, (n,))
        with pytest.raises(QueueFullError, match="'late'"):
            db.enqueue(INSERT, (100,), label="late", timeout=timeout)
    db.enqueue(INSERT, (3,), timeout=DEADLINE)
    db.flush(timeout=DEADLINE)
    assert rows(db) == [0, 1, 2, 3]


def test_producers_that_wait_for_room_all_get_in(db: DbWriter, pool: ThreadPoolExecutor) -> None:
    with parked(db):
        calls = [pool.submit(db.enqueue, INSERT, (n,), timeout=DEADLINE) for n in range(20)]
    tickets: list[Ticket[Any]] = [call.result(timeout=DEADLINE) for call in calls]
    for ticket in tickets:
        ticket.result(timeout=DEADLINE)
    assert rows(db) == list(range(20))


def test_a_withdrawn_job_gives_its_room_back_at_once(db: DbWriter) -> None:
    with parked(db):
        tickets = [db.enqueue(INSERT, (n,)) for n in range(3)]
        with pytest.raises(QueueFullError):
            db.enqueue(INSERT, (3,), timeout=0)
        assert "nearly full" in db.health
        assert all([ticket.cancel() for ticket in tickets])
        assert (db.stats().queue_depth, db.health) == (0, "ok")
        for n in range(10, 13):
            db.enqueue(INSERT, (n,), timeout=0)
        with pytest.raises(QueueFullError, match="3 of 3 jobs"):
            db.enqueue(INSERT, (13,), timeout=0)
    db.flush(timeout=DEADLINE)
    assert rows(db) == [10, 11, 12]


def test_withdrawn_jobs_keep_no_room_when_nothing_else_was_queued(db: DbWriter) -> None:
    with parked(db):
        tickets = [db.enqueue(INSERT, (n,)) for n in range(3)]
        assert all([ticket.cancel() for ticket in tickets])
    db.flush(timeout=DEADLINE)
    assert queue_of(db).fill == "0 of 3 jobs are queued"
    with parked(db):
        for n in range(3):
            db.enqueue(INSERT, (n,), timeout=0)
    db.flush(timeout=DEADLINE)
    assert rows(db) == [0, 1, 2]


def test_who_waits_for_room_gets_that_of_a_withdrawn_job(db: DbWriter, pool: ThreadPoolExecutor) -> None:
    with parked(db):
        tickets = [db.enqueue(INSERT, (n,)) for n in range(3)]
        waiting = pool.submit(db.enqueue, INSERT, (3,), timeout=DEADLINE)
        eventually(lambda: queue_of(db)._room)
        assert tickets[1].cancel()
        waiting.result(timeout=DEADLINE)
        assert db.stats().queue_depth == 3
    db.flush(timeout=DEADLINE)
    assert rows(db) == [0, 2, 3]


def test_a_finalizer_may_withdraw_jobs_while_others_get_their_room(db: DbWriter, pool: ThreadPoolExecutor) -> None:
    class Room(OrderedDict[Any, None]):
        looks = 0

        def __iter__(self) -> Iterator[Any]:
            self.looks += 1
            if self.looks == 1:
                queued[1].cancel()  # the garbage collector may run as the iterator is made
            return super().__iter__()

    queue_of(db)._room = room = Room()
    with parked(db):
        queued = [db.enqueue(INSERT, (n,)) for n in range(3)]
        waiting = []
        for n in (3, 4):
            waiting.append(pool.submit(db.enqueue, INSERT, (n,), timeout=DEADLINE))
            eventually(lambda: len(room) == len(waiting))
        assert queued[0].cancel()
        tickets = [each.result(DEADLINE) for each in waiting]
    assert [ticket.result(DEADLINE).rowcount for ticket in tickets] == [1, 1]
    assert rows(db) == [2, 3, 4]
    assert db.stats().queue_depth == 0


def test_a_finalizer_may_withdraw_jobs_while_those_that_wait_are_refused(
    db: DbWriter, pool: ThreadPoolExecutor
) -> None:
    class Room(OrderedDict[Any, None]):
        def __iter__(self) -> Iterator[Any]:
            first = super().__iter__()
            queued[1].cancel()  # the garbage collector may run behind each step
            return first

    queue_of(db)._room = room = Room()
    with parked(db):
        queued = [db.enqueue(INSERT, (n,)) for n in range(3)]
        waiting = pool.submit(db.enqueue, INSERT, (3,), timeout=DEADLINE)
        eventually(lambda: len(room) == 1)
        db.close(timeout=0)
        with pytest.raises(WriterClosedError):
            waiting.result(DEADLINE)


def test_a_job_that_is_withdrawn_after_it_was_taken_gives_room_once(db: DbWriter) -> None:
    stay = Stay(100)
    with parked(db):
        db.enqueue(stay)
        taken = db.enqueue(INSERT, (1,))  # together with the one before it
    assert stay.entered.wait(DEADLINE)
    assert taken.cancel()
    for n in range(3):
        db.enqueue(INSERT, (n,), timeout=0)
    with pytest.raises(QueueFullError):
        db.enqueue(INSERT, (3,), timeout=0)
    assert db.stats().queue_depth == 3
    stay.release.set()
    db.flush(timeout=DEADLINE)
    assert rows(db) == [0, 1, 2, 100]


def test_withdrawn_jobs_do_not_pile_up_behind_one_that_waits(db: DbWriter) -> None:
    with parked(db):
        first = db.enqueue(INSERT, (0,))
        before = first
        for n in range(1, 1000):
            ticket = db.enqueue(INSERT, (n,), timeout=0)
            if before is not first:
                assert before.cancel()
            before = ticket
        assert len(queue_of(db).queue) < 200
        assert db.stats().queue_depth == 2
        assert first.cancel()
        assert 0.0 <= db.stats().oldest_age < DEADLINE
    db.flush(timeout=DEADLINE)
    assert rows(db) == [999]


def test_a_finalizer_may_withdraw_jobs_while_its_thread_takes_them(db: DbWriter) -> None:
    """The collector runs wherever something is made, so inside the queue's own lock too."""
    queue = queue_of(db)
    with parked(db):
        tickets = [db.enqueue(INSERT, (n,)) for n in range(3)]

        class Finalizing(deque[Any]):
            def popleft(self) -> Any:
                job = super().popleft()
                assert tickets[0].cancel()
                assert tickets[2].cancel()
                return job

        with queue.mutex:
            queue.queue = Finalizing(queue.queue)
            jobs = queue.take_now(10)
            queue.queue = deque()
        assert [job.cancelled() for job in jobs] == [True, False, True]
        assert (queue.depth, queue._bounded) == (0, 0)
        jobs[1].cancel()
    db.run(INSERT, (7,))
    assert rows(db) == [7]


def test_who_gives_up_its_place_in_a_line_is_not_looked_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand that give up at once would be ten thousand walks along the line."""

    def compare(one: object, other: object) -> bool:
        raise AssertionError("the line is walked along")

    for kind in (queue_module._Waiter, Claim):
        monkeypatch.setattr(kind, "__eq__", compare, raising=False)
        monkeypatch.setattr(kind, "__hash__", object.__hash__)

    async def main(db: DbWriter, readers: ReaderPool) -> None:
        gateway = AsyncDbWriter.wrap(db)
        with parked(db):
            db.enqueue(INSERT, (0,))
            taken = new_claim("the only one")
            assert readers.ask(taken, asyncio.get_running_loop().create_future)
            tasks = [asyncio.create_task(gateway.enqueue_wait(INSERT, (n,), timeout=None)) for n in range(1, 50)]
            reads = [asyncio.create_task(gateway.read("SELECT 1", timeout=None)) for _ in range(50)]
            while len(queue_of(db)._room) < 49 or readers.waiting < 50:
                await asyncio.sleep(0)
            for task in reversed([*tasks, *reads]):
                task.cancel()
            await asyncio.wait([*tasks, *reads])
            assert all(task.cancelled() for task in (*tasks, *reads))
            assert len(queue_of(db)._room) == readers.waiting == 0
            readers.end(taken)
        await gateway.close()

    with DbWriter(path, maxsize=1, readers=1) as db:
        db.run("CREATE TABLE t (n)")
        asyncio.run(main(db, pool_of(db)))
        db.flush(timeout=DEADLINE)
        assert db.read("SELECT n FROM t") == [(0,)]


def test_what_goes_over_maxsize_wakes_a_writer_that_an_interrupt_has_left_asleep(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DbWriter(path, maxsize=1) as db:
        db.run("CREATE TABLE t (n)")
        db.checkpoint()  # so that it sleeps until it is woken
        eventually(lambda: queue_of(db)._asleep)
        with monkeypatch.context() as patch:
            patch.setattr(queue_of(db), "_wake", raising(LookupError))
            with pytest.raises(LookupError):
                db.enqueue(INSERT, (1,))
        with state_of(db).lock:  # as in a finalizer inside it, which does not wait for room
            ticket = db.enqueue(INSERT, (2,))
        ticket.result(DEADLINE)
        assert rows(db) == [1, 2]


@pytest.fixture
def bare() -> JobQueue:
    """A queue that no writer takes from."""
    return JobQueue(3, State(math.inf))


def job_for(queue: JobQueue) -> StatementJob:
    return StatementJob(queue._state, "SELECT 1", (), None, sys._getframe(), bounded=True)


def test_a_writer_that_wakes_and_a_block_that_takes_its_turn_do_not_both_have_it(
    bare: JobQueue, pool: ThreadPoolExecutor
) -> None:
    block = job_for(bare)
    taking = pool.submit(bare.take, 1)
    eventually(lambda: bare._asleep)
    with bare.mutex:  # as the block's thread is inside take_turn
        bare._token.release()
        with pytest.raises(TimeoutError):
            taking.result(BRIEFLY)
        assert bare.take_turn(block)
    assert taking.result(DEADLINE) is None
    assert (bare.guest, bare.taken) == (block, [block])


@pytest.mark.parametrize("end", [lambda queue, block: queue.give_turn(), JobQueue.give_way, JobQueue.hand_over])
def test_a_turn_ends_at_once_for_who_looks_inside_the_lock(
    bare: JobQueue, pool: ThreadPoolExecutor, end: Callable[[JobQueue, StatementJob], None]
) -> None:
    """The writer would take the next jobs, and the rest of the ending would forget them; or end the next turn."""
    block = job_for(bare)
    bare._asleep = True
    assert bare.take_turn(block)
    with bare.mutex:
        ending = pool.submit(end, bare, block)
        with pytest.raises(TimeoutError):
            ending.result(BRIEFLY)
        assert (bare.guest, bare.taken, bare.is_handed_over) == (block, [block], False)
        assert not bare.queue
    ending.result(DEADLINE)
    assert bare.is_handed_over or bare.guest is None


STEPS: dict[str, Callable[[JobQueue, StatementJob], object]] = {
    "put": JobQueue.put,
    "put_unbounded": JobQueue.put_unbounded,
    "line_up": lambda queue, job: queue.line_up(job, threading.Lock()),
    "leave_line": lambda queue, job: queue.leave_line(queue_module._Waiter(job, threading.Lock())),
    "forget": JobQueue.forget,
    "take": lambda queue, job: queue.take(1, 0.0),
    "take_now": lambda queue, job: queue.take_now(1),
    "take_turn": JobQueue.take_turn,
    "refuse": lambda queue, job: queue.refuse(WriterClosedError("closed")),
    "unfinished": lambda queue, job: queue.unfinished(),
    "waiting_jobs": lambda queue, job: queue.waiting_jobs(),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_no_step_is_done_while_somebody_is_inside_the_queue(
    bare: JobQueue, pool: ThreadPoolExecutor, step: Callable[[JobQueue, StatementJob], object]
) -> None:
    with bare.mutex:
        other = pool.submit(step, bare, job_for(bare))
        with pytest.raises(TimeoutError):
            other.result(BRIEFLY)
    other.result(DEADLINE)


def test_the_place_of_a_withdrawn_job_is_not_looked_for_as_long_as_there_are_few(bare: JobQueue) -> None:
    """Each of thousands that give up at once would walk through the queue."""
    jobs = [job_for(bare) for _ in range(3)]
    for job in jobs:
        bare.put(job)
    assert jobs[1].cancel()
    assert (len(bare.queue), bare.depth) == (3, 2)
    assert bare.take_now(3) == jobs
    assert (bare.depth, bare._bounded, bare._withdrawn) == (0, 0, set())


def test_a_job_whose_withdrawal_the_writer_overtakes_gives_room_once(bare: JobQueue) -> None:
    """``cancel``: the job is withdrawn │ the writer takes it, and is through │ and only then the queue hears of it."""
    job, other = job_for(bare), job_for(bare)

    def overtake(job: Job[Any]) -> None:
        assert bare.take_now(1) == [job]
        bare.taken = []
        bare.put(other)
        bare.forget(job)

    bare.put(job)
    job._state.forget = overtake
    assert job.cancel()
    assert (bare.depth, bare._bounded, bare._withdrawn) == (1, 1, set())


def test_a_guest_that_gives_way_and_is_withdrawn_is_in_the_queue(bare: JobQueue) -> None:
    guest, other = job_for(bare), job_for(bare)
    guest.bounded = False
    bare._asleep = True
    assert bare.take_turn(guest)
    bare.put(other)
    bare.give_way(guest)
    assert guest.cancel()
    assert (bare.depth, bare._withdrawn) == (1, {guest})
    assert bare.take_now(2) == [guest, other]
    assert (bare.depth, bare._bounded, bare._withdrawn) == (0, 0, set())


def test_the_oldest_job_is_one_that_is_not_withdrawn(bare: JobQueue) -> None:
    jobs = [job_for(bare) for _ in range(3)]
    for age, job in enumerate(jobs):
        job.created_at = -float(age)
        bare.put(job)
    assert bare.oldest_age(0.0) == 0.0
    assert jobs[0].cancel()
    assert bare.oldest_age(0.0) == 1.0
    assert jobs[1].cancel()
    assert jobs[2].cancel()
    assert bare.oldest_age(0.0) == 0.0


def test_a_caller_that_waits_for_its_result_needs_no_room(db: DbWriter, pool: ThreadPoolExecutor) -> None:
    with parked(db):
        for n in range(3):
            db.enqueue(INSERT, (n,))
        runs = [pool.submit(db.run, INSERT, (n,), timeout=DEADLINE) for n in range(3, 8)]
    for run in runs:
        run.result(timeout=DEADLINE)
    assert rows(db) == list(range(8))


def test_a_job_or_block_that_enqueues_never_waits_for_room(db: DbWriter) -> None:
    def fan_out(tx: Transaction) -> None:
        for n in range(20):
            db.enqueue(INSERT, (n,), timeout=0)

    db.run(fan_out, timeout=DEADLINE)
    with db.transaction():
        for n in range(20, 40):
            db.enqueue(INSERT, (n,), timeout=0)
    db.flush(timeout=DEADLINE)
    assert rows(db) == list(range(40))


def test_what_a_job_enqueues_runs_even_if_the_job_is_rolled_back(db: DbWriter) -> None:
    def write_and_fail(tx: Transaction) -> None:
        tx.execute(INSERT, (1,))
        db.enqueue(INSERT, (2,))
        raise LookupError

    with pytest.raises(LookupError):
        db.run(write_and_fail, timeout=DEADLINE)
    db.flush(timeout=DEADLINE)
    assert rows(db) == [2]


class EnqueuesAtItsEnd:
    """Lets the writer go and enqueues, in its finalizer."""

    def __init__(self, db: DbWriter, release: threading.Event, outcomes: list[str]) -> None:
        self._db, self._release, self._outcomes = db, release, outcomes

    def __del__(self) -> None:
        self._release.set()
        try:
            self._db.enqueue(INSERT, (50,), timeout=5)
        except QueueFullError:
            self._outcomes.append("refused")
        else:
            self._outcomes.append("accepted")


def do_nothing_with(held: object, tx: Transaction) -> None:
    pass


def test_a_finalizer_that_runs_inside_cancel_can_enqueue_on_a_full_queue(db: DbWriter) -> None:
    """cancel() drops the function, and with it what only the function held: nothing the writer needs is kept then."""
    outcomes: list[str] = []
    stay = Stay(100)
    db.enqueue(stay)
    assert stay.entered.wait(DEADLINE)
    db.enqueue(INSERT, (0,))
    db.enqueue(INSERT, (1,))

    def enqueue_a_function_that_holds_one() -> Ticket[None]:
        held = EnqueuesAtItsEnd(db, stay.release, outcomes)
        return db.enqueue(partial(do_nothing_with, held))

    assert enqueue_a_function_that_holds_one().cancel()
    assert outcomes == ["accepted"]
    db.flush(timeout=DEADLINE)
    assert rows(db) == [0, 1, 50, 100]


def calls_that_wait(db: DbWriter) -> dict[str, Callable[[], object]]:
    return {
        "run, a statement": lambda: db.run(INSERT, (50,), label="mine", timeout=BRIEFLY),
        "run, a function": lambda: db.run(insert(50), label="mine", timeout=BRIEFLY),
        "run_many": lambda: db.run_many(INSERT, [(50,), (51,)], label="mine", timeout=BRIEFLY),
        "run_script": lambda: db.run_script("INSERT INTO t VALUES (50)", label="mine", timeout=BRIEFLY),
        "run_without_transaction": lambda: db.run_without_transaction("VACUUM", label="mine", timeout=BRIEFLY),
    }


CALLS = ["run, a statement", "run, a function", "run_many", "run_script", "run_without_transaction"]


@pytest.mark.parametrize("call", CALLS)
def test_a_job_that_has_not_started_in_time_is_withdrawn_and_never_runs(db: DbWriter, call: str) -> None:
    stay = Stay(1)
    staying = db.enqueue(stay, label="the long one")
    assert stay.entered.wait(DEADLINE)
    with pytest.raises(WriteTimeoutError, match="the long one") as caught:
        calls_that_wait(db)[call]()
    error = caught.value
    assert isinstance(error, TimeoutError)
    assert error.started is False
    assert error.ticket.label == "mine"
    assert error.ticket.cancelled()
    assert "mine" in str(error)
    stay.release.set()
    staying.result(timeout=DEADLINE)
    db.flush(timeout=DEADLINE)
    assert rows(db) == [1]


def test_a_job_that_has_started_goes_on_and_its_ticket_has_the_outcome(db: DbWriter) -> None:
    stay = Stay(1)
    with pytest.raises(WriteTimeoutError, match="mine") as caught:
        # Long enough that the job has surely entered; it does not end before it is let go.
        db.run(stay, label="mine", timeout=2)
    error = caught.value
    assert error.started is True
    assert error.ticket.running()
    assert not error.ticket.cancel()
    stay.release.set()
    assert error.ticket.result(timeout=DEADLINE) == 1
    assert rows(db) == [1]


def test_a_job_whose_batch_waits_for_the_lock_has_not_started(db: DbWriter, path: Path) -> None:
    with holding_lock(path), pytest.raises(WriteTimeoutError) as caught:
        db.run(INSERT, (1,), timeout=BRIEFLY)
    assert caught.value.started is False
    db.flush(timeout=DEADLINE)
    assert rows(db) == []


@pytest.mark.parametrize("timeout", [math.nan, -1])
def test_a_timeout_that_is_no_length_of_time_is_refused_and_nothing_is_accepted(db: DbWriter, timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout"):
        db.run(INSERT, (1,), timeout=timeout)
    with pytest.raises(ValueError, match="timeout"):
        db.enqueue(INSERT, (2,), timeout=timeout)
    db.flush(timeout=DEADLINE)
    assert rows(db) == []


def test_without_a_timeout_a_call_waits_until_the_writer_is_free(db: DbWriter, pool: ThreadPoolExecutor) -> None:
    with parked(db):
        run = pool.submit(db.run, INSERT, (1,), timeout=None)
        flush = pool.submit(db.flush)
    run.result(timeout=DEADLINE)
    flush.result(timeout=DEADLINE)
    assert rows(db) == [1]


def table_rows(path: Path) -> list[int]:
    connection = sqlite3.connect(path)
    try:
        return [n for (n,) in connection.execute("SELECT n FROM t ORDER BY n")]
    finally:
        connection.close()


def test_close_finishes_what_is_queued_and_counts_it(path: Path) -> None:
    db = DbWriter(path, on_error=lambda ticket: None)
    db.run("CREATE TABLE t (n INTEGER PRIMARY KEY)")
    before = 1
    with parked(db):
        for n in (1, 2, 1):
            db.enqueue(INSERT, (n,), label=f"row {n}")
        assert db.enqueue(INSERT, (9,), label="row 9").cancel()
    report = db.close(timeout=DEADLINE)
    assert db.closed
    assert report.committed in (before + 2, before + 3)  # the parked job may be one
    assert (report.failed, report.cancelled, report.unfinished) == (1, 1, 0)
    assert "row 1" in repr(report)
    assert "row 9" in repr(report)
    assert "row 2" not in repr(report)
    assert table_rows(path) == [1, 2]


def test_close_without_drain_withdraws_what_is_queued(path: Path) -> None:
    db = DbWriter(path)
    db.run("CREATE TABLE t (n INTEGER PRIMARY KEY)")
    stay = Stay(100)
    staying = db.enqueue(stay, label="the long one")
    assert stay.entered.wait(DEADLINE)
    tickets = [db.enqueue(INSERT, (n,)) for n in range(5)]
    report = db.close(timeout=BRIEFLY, drain=False)
    assert (report.cancelled, report.unfinished) == (5, 1)
    assert "the long one" in repr(report)
    for ticket in tickets:
        assert ticket.cancelled()
        with pytest.raises(concurrent.futures.CancelledError):
            ticket.result(timeout=DEADLINE)
    stay.release.set()
    assert staying.result(timeout=DEADLINE) == 100
    report = db.close(timeout=DEADLINE)
    assert (report.committed, report.cancelled, report.unfinished) == (2, 5, 0)
    assert table_rows(path) == [100]


def test_close_ends_in_time_and_says_what_is_unfinished(path: Path) -> None:
    db = DbWriter(path)
    db.run("CREATE TABLE t (n INTEGER PRIMARY KEY)")
    stay = Stay(100)
    staying = db.enqueue(stay)
    assert stay.entered.wait(DEADLINE)
    tickets = [db.enqueue(INSERT, (n,)) for n in range(5)]
    report = db.close(timeout=BRIEFLY)
    assert report.committed == 1
    assert report.unfinished >= 1
    assert report.cancelled + report.unfinished == 6
    stay.release.set()
    assert staying.result(timeout=DEADLINE) == 100
    report = db.close(timeout=DEADLINE)
    assert (report.failed, report.unfinished) == (0, 0)
    assert report.committed + report.cancelled == 7
    committed = [n for n, ticket in enumerate(tickets) if not ticket.cancelled()]
    assert [tickets[n].result(timeout=DEADLINE).rowcount for n in committed] == [1] * len(committed)
    assert table_rows(path) == [*committed, 100]


def test_a_closing_gateway_accepts_nothing(path: Path) -> None:
    db = DbWriter(path)
    db.run("CREATE TABLE t (n INTEGER PRIMARY KEY)")
    with parked(db):
        db.close(timeout=0)
        calls: list[Callable[[], object]] = [
            lambda: db.run(INSERT, (1,)),
            lambda: db.run(insert(1)),
            lambda: db.run_many(INSERT, [(1,)]),
            lambda: db.run_script("INSERT INTO t VALUES (1)"),
            lambda: db.run_without_transaction("VACUUM"),
            lambda: db.enqueue(INSERT, (1,)),
            lambda: db.enqueue(insert(1)),
        ]
        for call in calls:
            with pytest.raises(WriterClosedError):
                call()
    db.close(timeout=DEADLINE)
    for call in calls:
        with pytest.raises(WriterClosedError):
            call()
    assert table_rows(path) == []


def test_a_producer_that_waits_for_room_is_told_that_the_gateway_closes(path: Path, pool: ThreadPoolExecutor) -> None:
    db = DbWriter(path, maxsize=1)
    db.run("CREATE TABLE t (n INTEGER PRIMARY KEY)")
    with parked(db):
        db.enqueue(INSERT, (0,))
        producers = [pool.submit(db.enqueue, INSERT, (n,), timeout=DEADLINE) for n in range(1, 4)]
        db.close(timeout=0)
        for producer in producers:
            assert isinstance(producer.exception(timeout=DEADLINE), WriterClosedError)
    db.close(timeout=DEADLINE)
    assert table_rows(path) in ([], [0])


def test_close_may_be_called_twice_and_from_several_threads(path: Path, pool: ThreadPoolExecutor) -> None:
    db = DbWriter(path)
    db.run("CREATE TABLE t (n INTEGER PRIMARY KEY)")
    with parked(db):
        ticket = db.enqueue(INSERT, (1,))
        closes = [pool.submit(db.close, DEADLINE) for _ in range(4)]
    reports = [close.result(timeout=DEADLINE) for close in closes]
    assert {report.unfinished for report in reports} == {0}
    assert ticket.exception(timeout=DEADLINE) is None
    assert table_rows(path) == [1]
    assert db.close(timeout=DEADLINE).unfinished == 0


ENDLESS: dict[str, Callable[[DbWriter, Ticket[Any]], object]] = {
    "flush": lambda db, behind: db.flush(),
    "flush with a timeout": lambda db, behind: db.flush(timeout=DEADLINE),
    "close": lambda db, behind: db.close(),
    "result": lambda db, behind: behind.result(),
    "exception": lambda db, behind: behind.exception(timeout=DEADLINE),
    "run_without_transaction": lambda db, behind: db.run_without_transaction("VACUUM"),
    "read after": lambda db, behind: db.read("SELECT n FROM t", after=behind),
}


@pytest.mark.parametrize("wait", ENDLESS)
def test_a_wait_for_the_writer_inside_a_job_or_block_raises_at_once_and_it_may_go_on(
    table_db: DbWriter, wait: str
) -> None:
    def wait_for_itself(tx: Transaction, n: int = 1) -> str:
        behind = table_db.enqueue(INSERT, (n + 1,))
        tx.execute(INSERT, (n,))
        with pytest.raises(ReentrantWriteError):
            ENDLESS[wait](table_db, behind)
        return "went on"

    assert table_db.run(wait_for_itself, timeout=DEADLINE) == "went on"
    with table_db.transaction() as tx:
        wait_for_itself(tx, 3)
    table_db.flush(timeout=DEADLINE)
    assert rows(table_db) == [1, 2, 3, 4]


@pytest.mark.parametrize("wait", ENDLESS)
def test_a_wait_for_the_writer_inside_a_callback_of_the_writer_raises_at_once(db: DbWriter, wait: str) -> None:
    caught: list[BaseException] = []
    behind: list[Ticket[Any]] = []

    def wait_for_itself(ticket: Ticket[Any]) -> None:
        behind.append(db.enqueue(INSERT, (2,)))
        try:
            ENDLESS[wait](db, behind[0])
        except ReentrantWriteError as error:
            caught.append(error)

    with parked(db):
        db.enqueue(INSERT, (1,)).add_done_callback(wait_for_itself)
    db.flush(timeout=DEADLINE)
    db.run("SELECT 1", timeout=DEADLINE)
    assert len(caught) == 1
    assert behind[0].exception(timeout=DEADLINE) is None
    assert rows(db) == [1, 2]


def test_the_outcome_that_is_already_there_may_be_asked_for_inside_a_job(db: DbWriter) -> None:
    done = db.enqueue(INSERT, (1,))
    done.result(timeout=DEADLINE)
    assert db.run(lambda tx: done.result().rowcount, timeout=DEADLINE) == 1


def test_many_rows_are_handed_in_as_one_job_of_the_queue(any_db: DbWriter) -> None:
    any_db.run("CREATE TABLE t (n UNIQUE)")
    ticket = any_db.enqueue_many(INSERT, ((n,) for n in range(5)))
    assert assert_type(ticket, Ticket[Result]).result(DEADLINE).rowcount == 5
    failed = any_db.enqueue_many(INSERT, [(7,), (3,), (8,)], label="twice")
    assert isinstance(failed.exception(DEADLINE), sqlite3.IntegrityError)
    assert failed.label == "twice"
    assert rows(any_db) == list(range(5))
    with pytest.raises(sqlite3.ProgrammingError, match="RETURNING"):
        any_db.enqueue_many(f"{INSERT} RETURNING n", [(9,)])
    with pytest.raises(TypeError):
        any_db.enqueue_many(INSERT, ["ab"])  # type: ignore[list-item]


def test_many_rows_take_one_place_in_a_full_queue(path: Path) -> None:
    entered, release = threading.Event(), threading.Event()
    with DbWriter(path, maxsize=2) as db:

        def park(tx: Transaction) -> None:
            entered.set()
            release.wait(DEADLINE)
            db.enqueue_many(INSERT, [(6,)])  # inside a job it never waits

        db.run("CREATE TABLE t (n)")
        parks = db.enqueue(park)
        assert entered.wait(DEADLINE)
        db.enqueue_many(INSERT, [(n,) for n in range(5)])
        db.enqueue(INSERT, (5,))
        with pytest.raises(QueueFullError):
            db.enqueue_many(INSERT, [(9,)], timeout=BRIEFLY)
        release.set()
        parks.result(DEADLINE)
        db.flush(DEADLINE)
        assert rows(db) == list(range(7))


def test_a_task_hands_in_many_rows_and_never_waits(path: Path) -> None:
    async def main() -> None:
        async with AsyncDbWriter(path, maxsize=1) as db:
            await db.run("CREATE TABLE t (n)")
            assert (await db.enqueue_many(INSERT, [(0,), (1,)])).rowcount == 2
            async with db.transaction():
                db.enqueue_many(INSERT, [(2,)])
                inside = db.enqueue_many(INSERT, [(3,)])  # its own block keeps the writer from making room
            assert (await inside).rowcount == 1

    asyncio.run(main())


def test_a_consumer_that_looks_between_the_wake_and_the_end_of_a_turn_is_woken_again() -> None:
    waiting = JobQueue(3, State(math.inf))
    waiting.guest = object()
    wake = waiting._wake
    looked: list[bool] = []

    def wake_and_look() -> None:
        wake()
        if not looked:  # the consumer finds the guest there, and sleeps on
            looked.append(waiting._token.acquire(blocking=False) and waiting.guest is not None)

    waiting._wake = wake_and_look  # type: ignore[method-assign]
    waiting.give_turn()
    assert looked == [True]
    assert waiting._token.acquire(blocking=False)


@pytest.mark.parametrize("moment", ["before", "behind"])
@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_while_withdrawn_jobs_are_taken_out_loses_none_of_the_others(
    new_db: DbWriter, monkeypatch: pytest.MonkeyPatch, moment: str, times: int
) -> None:
    class Deque(deque[Any]):
        left = times

        def extendleft(self, jobs: Any) -> None:
            if moment == "behind":
                super().extendleft(jobs)
            if Deque.left:
                Deque.left -= 1
                raise KeyboardInterrupt
            if moment == "before":
                super().extendleft(jobs)

    db = new_db
    db.run("CREATE TABLE t (n)")
    with parked(db):
        tickets = [db.enqueue("INSERT INTO t VALUES (?)", (n,)) for n in range(200)]
        monkeypatch.setattr(queue_module, "deque", Deque)
        withdrawn = 0
        while Deque.left == times:
            withdrawn += 1
            try:
                tickets[withdrawn - 1].cancel()
            except KeyboardInterrupt:
                pass
        late = db.enqueue("INSERT INTO t VALUES (200)")
    assert late.result(DEADLINE).rowcount == 1
    assert rows(db) == list(range(withdrawn, 201))
    queue = queue_of(db)
    assert (queue.depth, queue._bounded, queue._withdrawn) == (0, 0, set())
    assert db.stats().cancelled == withdrawn


def test_a_signal_handler_that_withdraws_another_one_meanwhile_puts_no_job_back_twice(new_db: DbWriter) -> None:
    class Withdrawn(set[Any]):
        came = False

        def __contains__(self, job: object) -> bool:
            if not Withdrawn.came:
                Withdrawn.came = True
                tickets[150].cancel()
            return super().__contains__(job)

    db, queue = new_db, queue_of(new_db)
    db.run("CREATE TABLE t (n)")
    with parked(db):
        tickets = [db.enqueue("INSERT INTO t VALUES (?)", (n,)) for n in range(200)]
        queue._withdrawn = Withdrawn()
        withdrawn = 0
        while not Withdrawn.came:
            tickets[withdrawn].cancel()
            withdrawn += 1
        assert (queue.depth, queue._bounded) == (199 - withdrawn, 199 - withdrawn)
    db.flush(DEADLINE)
    assert rows(db) == [n for n in range(withdrawn, 200) if n != 150]
    assert (queue.depth, queue._bounded, queue._withdrawn) == (0, 0, set())


def test_what_a_finalizer_withdraws_while_jobs_are_taken_gives_its_room(
    bare: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = job_for(bare), job_for(bare)
    bare.put(first)
    bare.put(second)
    forget_places = queue_module._forget_places

    def collects(jobs: list[Any]) -> None:
        second.cancel()
        forget_places(jobs)

    monkeypatch.setattr(queue_module, "_forget_places", collects)
    assert bare.take_now(1) == [first]
    assert (bare._bounded, bare.depth) == (0, 0)


def test_a_job_that_a_signal_handler_withdraws_when_it_was_just_put_back_gives_its_room_once(
    bare: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deque(deque[Any]):
        def extendleft(self, jobs: Any) -> None:
            super().extendleft(jobs)
            second.cancel()

    first, second, third = job_for(bare), job_for(bare), job_for(bare)
    for job in (first, second, third):
        bare.put(job)
    monkeypatch.setattr(queue_module, "FEW", -2)  # the first that is withdrawn is worth a walk
    monkeypatch.setattr(queue_module, "deque", Deque)
    assert first.cancel()
    assert second.cancelled()
    assert bare.take_now(3) == [second, third]
    assert (bare._bounded, bare.depth, bare._withdrawn) == (0, 0, set())


@pytest.mark.parametrize(
    "look",
    [JobQueue.waiting_jobs, partial(JobQueue.take_now, limit=2), partial(JobQueue.take, limit=2)],
    ids=["wait", "take now", "take"],
)
def test_what_interrupts_have_left_aside_is_among_what_waits(
    bare: JobQueue, monkeypatch: pytest.MonkeyPatch, look: Callable[[JobQueue], Any]
) -> None:
    """The writer runs it, and who withdraws or fails all that waits does not pass it over."""
    first, second = job_for(bare), job_for(bare)
    bare.put(first)
    bare.put(second)
    with monkeypatch.context() as patch:
        patch.setattr(queue_module, "FEW", -1)  # the first that is withdrawn is worth a walk
        patch.setattr(bare, "_put_back", raising(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            first.cancel()
        assert not bare.queue
    monkeypatch.setattr(bare, "_token", None)  # for which there is no need to sleep
    assert look(bare) == [second]
