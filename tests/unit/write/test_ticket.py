"""Ticket: the handle of a write's outcome."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from helpers import BRIEFLY, DEADLINE, holding_lock, notes_of, parked, rows, state_of
from onewriter import DbWriter, ForkedError, ReentrantWriteError, Result, Ticket, Transaction

INSERT = "INSERT INTO t VALUES (?)"
LONG = "INSERT INTO t VALUES (1) -- a text that is longer than sixty characters are"


@pytest.fixture
def unheard() -> list[Ticket[Any]]:
    """The tickets that on_error was given."""
    return []


@pytest.fixture
def db(path: Path, unheard: list[Ticket[Any]]) -> Iterator[DbWriter]:
    with DbWriter(path, on_error=unheard.append) as db:
        db.run("CREATE TABLE t (n INTEGER PRIMARY KEY)")
        yield db


def count_rows(tx: Transaction) -> int:
    count: int = tx.execute("SELECT count(*) FROM t").rows[0][0]
    return count


def test_a_statements_ticket_gives_its_result(db: DbWriter) -> None:
    result = db.enqueue("INSERT INTO t VALUES (7) RETURNING n").result(timeout=DEADLINE)
    assert isinstance(result, Result)
    assert (result.rows, result.rowcount, result.lastrowid) == ([(7,)], 1, 7)


def test_a_functions_ticket_gives_what_the_function_returned(db: DbWriter) -> None:
    ticket = db.enqueue(count_rows)
    assert ticket.result(timeout=DEADLINE) == 0
    assert ticket.exception(timeout=DEADLINE) is None
    assert ticket.result() == 0


def test_a_failed_job_raises_what_sqlite_raised_with_a_note_that_names_the_job(db: DbWriter) -> None:
    db.run(INSERT, (1,))
    with parked(db):
        ticket = db.enqueue(INSERT, (1,), label="the second one")
    error = ticket.exception(timeout=DEADLINE)
    assert type(error) is sqlite3.IntegrityError
    assert error.sqlite_errorcode == sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY
    assert "the second one" in "\n".join(error.__notes__)
    with pytest.raises(sqlite3.IntegrityError):
        ticket.result(timeout=DEADLINE)


def test_a_failed_job_raises_the_error_of_its_own(db: DbWriter) -> None:
    def fail(tx: Transaction) -> None:
        tx.execute(INSERT, (1,))
        raise LookupError("its own")

    with parked(db):
        ticket = db.enqueue(fail)
    with pytest.raises(LookupError, match="its own"):
        ticket.result(timeout=DEADLINE)
    assert rows(db) == []


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_an_error_that_ends_threads_elsewhere_reaches_the_caller_only(db: DbWriter, error: BaseException) -> None:
    def fail(tx: Transaction) -> None:
        raise error

    with parked(db):
        ticket = db.enqueue(fail)
        behind = db.enqueue(INSERT, (1,))
    assert type(ticket.exception(timeout=DEADLINE)) is type(error)
    assert behind.result(timeout=DEADLINE).rowcount == 1


def test_the_states_of_a_job_are_told(db: DbWriter) -> None:
    entered, release = threading.Event(), threading.Event()

    def stay(tx: Transaction) -> None:
        entered.set()
        assert release.wait(DEADLINE)

    with parked(db):
        ticket = db.enqueue(stay)
        assert (ticket.done(), ticket.running(), ticket.cancelled()) == (False, False, False)
    assert entered.wait(DEADLINE)
    assert (ticket.done(), ticket.running(), ticket.cancelled()) == (False, True, False)
    release.set()
    assert ticket.result(timeout=DEADLINE) is None
    assert (ticket.done(), ticket.running(), ticket.cancelled()) == (True, False, False)


def test_a_wait_that_ends_first_does_not_withdraw_the_job(db: DbWriter) -> None:
    with parked(db):
        ticket = db.enqueue(INSERT, (1,))
        with pytest.raises(TimeoutError):
            ticket.result(timeout=BRIEFLY)
        with pytest.raises(TimeoutError):
            ticket.exception(timeout=0)
    assert ticket.result(timeout=DEADLINE).rowcount == 1


def test_many_threads_can_wait_for_one_ticket(db: DbWriter) -> None:
    with ThreadPoolExecutor(8) as pool:
        with parked(db):
            ticket = db.enqueue(lambda tx: "outcome")
            waits = [pool.submit(ticket.result, DEADLINE) for _ in range(8)]
        assert [wait.result(timeout=DEADLINE) for wait in waits] == ["outcome"] * 8


def test_a_ticket_resolves_only_after_the_row_is_there_for_others(db: DbWriter, path: Path) -> None:
    connection = sqlite3.connect(path)
    try:
        for n in range(50):
            db.enqueue(INSERT, (n,)).result(timeout=DEADLINE)
            assert connection.execute("SELECT max(n) FROM t").fetchone() == (n,)
    finally:
        connection.close()


def test_a_withdrawn_job_never_runs(db: DbWriter) -> None:
    ran: list[str] = []
    with parked(db):
        tickets: list[Ticket[Any]] = [
            db.enqueue(INSERT, (1,)),
            db.enqueue(lambda tx: ran.append("function")),
            db.enqueue(INSERT, (2,)),
        ]
        assert [ticket.cancel() for ticket in tickets[:2]] == [True, True]
        assert tickets[0].cancel()
        assert (tickets[0].cancelled(), tickets[0].done(), tickets[0].running()) == (True, True, False)
        with pytest.raises(concurrent.futures.CancelledError):
            tickets[0].result(timeout=DEADLINE)
        with pytest.raises(concurrent.futures.CancelledError):
            tickets[1].exception(timeout=DEADLINE)
    db.flush(timeout=DEADLINE)
    assert ran == []
    assert rows(db) == [2]


def test_a_job_that_runs_or_ran_cannot_be_withdrawn(db: DbWriter) -> None:
    told: list[bool] = []
    tickets: list[Ticket[None]] = []
    with parked(db):
        tickets.append(db.enqueue(lambda tx: told.append(tickets[0].cancel())))
    assert tickets[0].result(timeout=DEADLINE) is None
    assert told == [False]
    assert not tickets[0].cancel()
    assert not tickets[0].cancelled()


def test_a_withdrawal_wakes_whoever_waits(db: DbWriter) -> None:
    with ThreadPoolExecutor() as pool, parked(db):
        ticket = db.enqueue(INSERT, (1,))
        wait = pool.submit(ticket.result, DEADLINE)
        assert ticket.cancel()
        with pytest.raises(concurrent.futures.CancelledError):
            wait.result(timeout=DEADLINE)


def test_callbacks_are_called_once_in_order_on_the_writer_thread_after_commit(db: DbWriter, path: Path) -> None:
    called: list[tuple[str, Ticket[Any], bool, int]] = []
    both = threading.Event()

    def committed_rows() -> int:
        connection = sqlite3.connect(path)
        try:
            count: int = connection.execute("SELECT count(*) FROM t").fetchone()[0]
            return count
        finally:
            connection.close()

    def note(name: str, ticket: Ticket[Any]) -> None:
        called.append((name, ticket, ticket.done(), committed_rows()))
        if name == "second":
            both.set()

    with parked(db):
        ticket = db.enqueue(INSERT, (1,))
        ticket.add_done_callback(lambda ticket: note("first", ticket))
        ticket.add_done_callback(lambda ticket: note("second", ticket))
        threads: list[int] = []
        ticket.add_done_callback(lambda ticket: threads.append(threading.get_ident()))
        assert called == []
    assert both.wait(DEADLINE)
    db.run("SELECT 1", timeout=DEADLINE)
    assert called == [("first", ticket, True, 1), ("second", ticket, True, 1)]
    assert threads == [db.run(lambda tx: threading.get_ident(), timeout=DEADLINE)]


def test_adding_a_callback_or_a_wait_does_not_copy_those_before_it(db: DbWriter) -> None:
    """A hundred thousand would copy five thousand million."""

    async def lists_after_each(ticket: Ticket[Any]) -> list[tuple[object, object]]:
        found: list[tuple[object, object]] = []
        with contextlib.ExitStack() as waits:
            for _ in range(3):
                ticket.add_done_callback(lambda ticket: None)
                waits.enter_context(ticket.arrival())
                assert not ticket.wait(0)
                found.append((ticket._callbacks, ticket._waiters))
        return found

    with parked(db):
        first, *others = asyncio.run(lists_after_each(db.enqueue(INSERT, (1,))))
    for callbacks, waiters in others:
        assert callbacks is first[0]
        assert waiters is first[1]


def test_a_callback_added_late_is_called_at_once_in_the_callers_thread(db: DbWriter) -> None:
    ticket = db.enqueue(INSERT, (1,))
    ticket.result(timeout=DEADLINE)
    db.flush(timeout=DEADLINE)
    threads: list[int] = []
    ticket.add_done_callback(lambda ticket: threads.append(threading.get_ident()))
    assert threads == [threading.get_ident()]


def test_a_callback_is_called_for_failed_and_withdrawn_jobs_too(db: DbWriter) -> None:
    called: list[Ticket[Any]] = []
    with parked(db):
        failed = db.enqueue("INSERT INTO nowhere VALUES (1)")
        failed.add_done_callback(called.append)
        withdrawn = db.enqueue(INSERT, (1,))
        withdrawn.add_done_callback(called.append)
        assert withdrawn.cancel()
        assert called == [withdrawn]
    db.flush(timeout=DEADLINE)
    db.run("SELECT 1", timeout=DEADLINE)
    assert called == [withdrawn, failed]


def test_a_callback_that_fails_is_logged_and_stops_nothing(db: DbWriter, caplog: pytest.LogCaptureFixture) -> None:
    called: list[Ticket[Any]] = []

    def fail(ticket: Ticket[Any]) -> None:
        raise LookupError("of the callback")

    with parked(db):
        ticket = db.enqueue(INSERT, (1,))
        ticket.add_done_callback(fail)
        ticket.add_done_callback(called.append)
    db.flush(timeout=DEADLINE)
    assert db.run("SELECT 1", timeout=DEADLINE).rows == [(1,)]
    assert called == [ticket]
    logged = [record for record in caplog.records if record.exc_info and record.exc_info[0] is LookupError]
    assert [record.levelname for record in logged] == ["ERROR"]


def test_a_failure_is_told_to_on_error_unless_a_callback_hears_of_it(db: DbWriter, unheard: list[Ticket[Any]]) -> None:
    with parked(db):
        alone = db.enqueue("INSERT INTO nowhere VALUES (1)")
        heard = db.enqueue("INSERT INTO nowhere VALUES (2)")
        heard.add_done_callback(lambda ticket: None)
        db.enqueue(INSERT, (1,))
    db.flush(timeout=DEADLINE)
    db.run("SELECT 1", timeout=DEADLINE)
    assert unheard == [alone]


def test_a_future_of_the_same_outcome_works_with_wait_and_as_completed(db: DbWriter) -> None:
    with parked(db):
        tickets: list[Ticket[int]] = [db.enqueue(lambda tx, n=n: n) for n in range(5)]  # type: ignore[misc]
        futures = [ticket.future() for ticket in tickets]
        assert all(isinstance(future, concurrent.futures.Future) for future in futures)
        assert concurrent.futures.wait(futures, timeout=0).done == set()
    done, not_done = concurrent.futures.wait(futures, timeout=DEADLINE)
    assert (done, not_done) == (set(futures), set())
    assert sorted(future.result() for future in concurrent.futures.as_completed(futures, DEADLINE)) == list(range(5))


def test_a_future_of_a_failed_job_has_its_error(db: DbWriter) -> None:
    with parked(db):
        future = db.enqueue("INSERT INTO nowhere VALUES (1)").future()
    with pytest.raises(sqlite3.OperationalError, match="nowhere"):
        future.result(timeout=DEADLINE)


def test_a_future_of_a_withdrawn_job_is_cancelled(db: DbWriter) -> None:
    with parked(db):
        ticket = db.enqueue(INSERT, (1,))
        future = ticket.future()
        assert ticket.cancel()
        assert future.cancelled()
        assert concurrent.futures.wait([future], timeout=DEADLINE).not_done == set()


def test_a_future_asked_for_late_has_the_outcome_already(db: DbWriter) -> None:
    ticket = db.enqueue(lambda tx: "outcome")
    ticket.result(timeout=DEADLINE)
    db.flush(timeout=DEADLINE)
    assert ticket.future().result(timeout=0) == "outcome"


def test_cancelling_a_future_withdraws_the_job(db: DbWriter) -> None:
    with parked(db):
        ticket = db.enqueue(INSERT, (1,))
        assert ticket.future().cancel()
        assert ticket.cancelled()
    db.flush(timeout=DEADLINE)
    assert rows(db) == []


def test_a_ticket_can_be_awaited_by_several_tasks_and_on_several_loops(db: DbWriter) -> None:
    async def outcome(ticket: Ticket[str]) -> str:
        return await ticket

    async def outcomes(ticket: Ticket[str]) -> list[str]:
        return await asyncio.wait_for(asyncio.gather(*(outcome(ticket) for _ in range(5))), DEADLINE)

    ticket = db.enqueue(lambda tx: "outcome")
    assert asyncio.run(outcomes(ticket)) == ["outcome"] * 5
    assert asyncio.run(outcomes(ticket)) == ["outcome"] * 5


def test_awaiting_a_failed_job_raises_its_error(db: DbWriter) -> None:
    async def outcome() -> Result:
        return await db.enqueue("INSERT INTO nowhere VALUES (1)")

    with pytest.raises(sqlite3.OperationalError, match="nowhere"):
        asyncio.run(asyncio.wait_for(outcome(), DEADLINE))


def test_awaiting_does_not_block_the_loop(db: DbWriter) -> None:
    """The writer is let go by the loop itself, while a task awaits."""

    async def await_and_let_go() -> int:
        entered, release = threading.Event(), threading.Event()

        def stay(tx: Transaction) -> int:
            entered.set()
            assert release.wait(DEADLINE)
            return 1

        ticket = db.enqueue(stay)
        asyncio.get_running_loop().call_soon(release.set)
        return await ticket

    assert asyncio.run(asyncio.wait_for(await_and_let_go(), DEADLINE)) == 1


def test_sequences_rise_in_commit_order_and_only_committed_jobs_have_one(db: DbWriter) -> None:
    with parked(db):
        tickets = [db.enqueue(INSERT, (n % 7,)) for n in range(10)]
        assert [ticket.sequence for ticket in tickets] == [None] * 10
    db.flush(timeout=DEADLINE)
    assert [ticket.sequence for ticket in tickets[7:]] == [None] * 3
    sequences = [ticket.sequence for ticket in tickets[:7]]
    assert None not in sequences
    assert sequences == sorted(set(sequences), key=lambda sequence: sequence or 0)
    later = db.enqueue(INSERT, (100,))
    later.result(timeout=DEADLINE)
    assert (later.sequence or 0) > (sequences[-1] or 0)


def test_the_default_label_is_the_functions_name_or_the_beginning_of_the_sql(db: DbWriter) -> None:
    sql = "INSERT INTO t VALUES (1) /* a comment that makes this statement much longer than sixty characters */"
    assert db.enqueue(sql).label == sql[:60]
    assert db.enqueue(count_rows).label == "count_rows"
    assert db.enqueue(count_rows, label="mine").label == "mine"


def test_timings_are_there_once_the_job_is_over(db: DbWriter) -> None:
    with parked(db):
        ticket = db.enqueue(INSERT, (1,))
    ticket.result(timeout=DEADLINE)
    db.flush(timeout=DEADLINE)
    timings = ticket.timings
    assert timings is not None
    assert min(timings.queued, timings.lock_wait, timings.run, timings.commit) >= 0
    assert timings.queued > 0


def test_a_ticket_shows_its_label_and_state(db: DbWriter) -> None:
    with parked(db):
        ticket = db.enqueue(INSERT, (1,), label="mine")
        assert "mine" in repr(ticket)


def test_an_outcome_that_comes_as_the_time_runs_out_counts(db: DbWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = Ticket.wait

    def wait_too_long(ticket: Ticket[Any], timeout: float | None) -> bool:
        wait(ticket, None)
        return False

    with parked(db) as release:
        ticket = db.enqueue(INSERT, (1,))
        monkeypatch.setattr(Ticket, "wait", wait_too_long)
        release.set()
        assert ticket.result(BRIEFLY).rowcount == 1


def test_a_future_of_a_ticket_refuses_an_endless_wait_too(db: DbWriter) -> None:
    def job(tx: Transaction) -> None:
        future = db.enqueue(INSERT, (1,)).future()
        for wait in (future.result, future.exception):
            with pytest.raises(ReentrantWriteError):
                wait()

    db.run(job)
    assert db.enqueue(INSERT, (2,)).future().result(DEADLINE).rowcount == 1


def test_a_job_is_named_after_what_it_calls(any_db: DbWriter) -> None:
    class Counter:
        def __call__(self, tx: Transaction) -> None:
            pass

    def count(tx: Transaction) -> None:
        pass

    place = "test_a_job_is_named_after_what_it_calls.<locals>."
    labels = [any_db.enqueue(function).label for function in (count, partial(count), Counter())]
    assert labels == [f"{place}count", f"{place}count", f"{place}Counter"]


def test_attempts_are_told_from_the_second_on(table_db: DbWriter, path: Path) -> None:
    table_db.run("INSERT INTO t VALUES (1)")
    with pytest.raises(sqlite3.IntegrityError) as caught:
        table_db.run("INSERT INTO t VALUES (1)")
    assert "job 'INSERT INTO t VALUES (1)' (called from test_ticket.py" in notes_of(caught.value)
    assert "attempts to get" not in notes_of(caught.value)
    with DbWriter(path, lock_timeout=0.05) as other, holding_lock(path):
        with pytest.raises(sqlite3.OperationalError) as busy:
            other.run("INSERT INTO t VALUES (2)")
        assert "attempts to get SQLite's lock: " in notes_of(busy.value)


@pytest.mark.parametrize(
    "run",
    [
        lambda table_db: table_db.run(LONG),
        lambda table_db: table_db.run_many(LONG, [()]),
        lambda table_db: table_db.run_script(LONG),
        lambda table_db: table_db.run_without_transaction(LONG),
    ],
)
def test_a_label_that_is_cut_says_so_in_messages(table_db: DbWriter, run: Callable[[DbWriter], object]) -> None:
    table_db.run("INSERT INTO t VALUES (1)")
    with pytest.raises(sqlite3.IntegrityError) as caught:
        run(table_db)
    assert f"{LONG[:60]}…' (called from" in notes_of(caught.value)


def test_a_label_itself_is_the_first_sixty_characters(table_db: DbWriter) -> None:
    assert table_db.enqueue(LONG).label == LONG[:60]
    assert "…" not in table_db.enqueue("SELECT 1").describe()
    assert "…" not in table_db.enqueue_many(INSERT, [(1,)]).describe()
    assert table_db.enqueue("SELECT 1", label="x" * 70).describe().startswith(f"'{'x' * 70}' ")


def test_in_a_forked_child_only_a_ticket_with_an_outcome_says_that_it_cannot_be_cancelled(
    db: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = db.enqueue("SELECT 1")
    done.result(DEADLINE)
    with parked(db):
        pending = db.enqueue("SELECT 1")
        with monkeypatch.context() as patch:
            patch.setattr(state_of(db), "forked", True)
            with pytest.raises(ForkedError):
                pending.cancel()
            assert not done.cancel()
    assert pending.result(DEADLINE).rows == [(1,)]


def test_a_failure_is_logged_although_somebody_had_waited_for_it_and_gave_up(
    db: DbWriter, caplog: pytest.LogCaptureFixture
) -> None:
    with parked(db):
        ticket = db.enqueue("INSERT INTO nowhere VALUES (1)")
        with pytest.raises(TimeoutError):
            ticket.result(0)
    db.flush(DEADLINE)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
