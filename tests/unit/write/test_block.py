"""``with db.transaction()``: the loan of the writer, and how it ends when it does not end well."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import math
import sqlite3
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from helpers import DEADLINE, eventually, file_of, holding_lock, in_threads, parked, queue_of, rows, state_of
from onewriter import (
    DbWriter,
    ReentrantWriteError,
    Transaction,
    TransactionClosedError,
    WriterBrokenError,
    WriterClosedError,
    WriteTimeoutError,
)
from onewriter.base import garbage
from onewriter.write import block as block_module
from onewriter.write import driver
from onewriter.write.block import ThreadBlock

INSERT = "INSERT INTO t VALUES (?)"
ENDLESS = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) "


@pytest.fixture
def db(path: Path) -> Iterator[DbWriter]:
    with DbWriter(path) as gateway:
        gateway.run("CREATE TABLE t (n UNIQUE)")
        yield gateway


@pytest.fixture
def both(any_db: DbWriter) -> DbWriter:
    any_db.run("CREATE TABLE t (n UNIQUE)")
    return any_db


def test_a_block_is_committed_at_its_end_and_rolled_back_if_it_raises(both: DbWriter, path: Path) -> None:
    with both.transaction(label="good") as tx:
        tx.execute(INSERT, (1,))
        assert tx.label == "good"
    with pytest.raises(LookupError), both.transaction() as tx:
        tx.execute(INSERT, (2,))
        raise LookupError
    assert rows(both) == [1]


def test_a_block_that_cannot_be_committed_raises_at_its_end(both: DbWriter) -> None:
    both.run_script("""
        CREATE TABLE parent (id INTEGER PRIMARY KEY);
        CREATE TABLE child (id INTEGER REFERENCES parent DEFERRABLE INITIALLY DEFERRED);
    """)
    with pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"), both.transaction() as tx:
        tx.execute("INSERT INTO child VALUES (1)")
    assert both.read("SELECT * FROM child") == []


def test_what_ran_before_a_block_is_committed_and_told_first(db: DbWriter) -> None:
    before = db.enqueue(INSERT, (1,))
    with db.transaction() as tx:
        assert before.done()
        tx.execute(INSERT, (2,))
        assert db.stats().commits == 2


def test_a_transaction_is_for_any_thread_and_dead_after_its_block(both: DbWriter) -> None:
    with both.transaction() as tx, ThreadPoolExecutor() as pool:
        lent = tx.connection
        pool.submit(tx.execute, INSERT, (1,)).result(DEADLINE)
        assert pool.submit(lambda: lent.execute("SELECT n FROM t").fetchall()).result(DEADLINE) == [(1,)]
        assert pool.submit(lambda: tx.connection).result(DEADLINE) is lent
        with both.transaction() as inner:
            pass
        dead: list[Callable[[], object]] = [
            lambda: inner.execute("SELECT 1"),
            lambda: inner.on_commit(print),
            lambda: inner.connection,
        ]
        for use in dead:
            with pytest.raises(TransactionClosedError, match="has ended"):
                use()
        tx.execute("SELECT 1")
    uses: list[Callable[[], object]] = [
        lambda: tx.execute("SELECT 1"),
        lambda: tx.executemany(INSERT, [(1,)]),
        lambda: tx.executescript("SELECT 1"),
        lambda: tx.savepoint().__enter__(),
        lambda: tx.on_commit(print),
        lambda: tx.on_rollback(print),
        lambda: tx.connection,
        lambda: lent.execute("SELECT 1"),
        lambda: lent.in_transaction,
    ]
    for use in uses:
        with pytest.raises(TransactionClosedError, match="has ended"):
            use()


def test_callbacks_of_a_block_run_in_its_thread_when_the_lock_is_free(both: DbWriter, path: Path) -> None:
    told: list[object] = []

    def tell(what: str) -> Callable[[], object]:
        def callback() -> None:
            with holding_lock(path):
                told.append((what, threading.get_ident()))

        return callback

    with both.transaction() as tx:
        tx.on_commit(tell("first"))
        tx.on_rollback(tell("never"))
        with pytest.raises(LookupError), tx.savepoint():
            tx.on_commit(tell("never either"))
            tx.on_rollback(tell("undone"))
            raise LookupError
        tx.on_commit(tell("second"))
    with pytest.raises(LookupError), both.transaction() as tx:
        tx.on_commit(tell("not at all"))
        tx.on_rollback(tell("rolled back"))
        raise LookupError
    me = threading.get_ident()
    assert told == [(what, me) for what in ("undone", "first", "second", "rolled back")]


def test_a_callback_that_raises_is_logged_and_the_next_one_runs(
    both: DbWriter, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[int] = []
    with both.transaction() as tx:
        tx.on_commit(lambda: 1 // 0)
        tx.on_commit(lambda: told.append(1))
    assert told == [1]
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_a_block_that_was_not_entered_cannot_be_left(both: DbWriter) -> None:
    block = both.transaction()
    with pytest.raises(RuntimeError, match="not entered"):
        block.__exit__(None, None, None)
    with block as tx:
        tx.execute(INSERT, (1,))
    assert rows(both) == [1]


def test_a_block_in_too_deep_a_recursion_ends_although_its_error_is_kept(
    db: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # pytest's needs more room than there is

    def at_depth(depth: int) -> None:
        if depth:
            at_depth(depth - 1)
        else:
            with db.transaction() as tx:
                tx.execute("SELECT 1")

    kept = []
    for depth in range(sys.getrecursionlimit() - 100, sys.getrecursionlimit()):
        try:
            at_depth(depth)
        except RecursionError as error:
            kept.append(error)  # and with its traceback the block
        db.run("SELECT 1", timeout=DEADLINE)
    assert kept


def test_a_caller_that_gives_up_leaves_nothing_behind(db: DbWriter) -> None:
    with parked(db), pytest.raises(WriteTimeoutError) as caught, db.transaction(timeout=0.01):
        pass
    assert not caught.value.started
    assert "park" in str(caught.value)
    db.run(INSERT, (1,), timeout=DEADLINE)


def test_a_grant_in_the_moment_of_giving_up_is_taken(db: DbWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait times out; before the job is withdrawn, the writer starts it."""

    def times_out(*_: object) -> bool:
        release.set()
        with pytest.raises(TimeoutError):  # waits behind the block, which has started by then
            in_threads(lambda: db.enqueue("SELECT 1").result(0.2))
        return False

    with parked(db) as release:
        monkeypatch.setattr(driver, "wait_in_slices", times_out)
        with db.transaction(timeout=0.01) as tx:
            tx.execute(INSERT, (1,))
    assert rows(db) == [1]


def test_an_interrupt_while_waiting_for_the_turn_leaves_nothing_behind(
    db: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    def interrupted_later(lock: Any, *_: object) -> bool:
        lock.acquire()
        raise KeyboardInterrupt

    with parked(db):
        monkeypatch.setattr(driver, "wait_in_slices", interrupted)
        with pytest.raises(KeyboardInterrupt), db.transaction():
            pass
    with parked(db) as release:
        monkeypatch.setattr(driver, "wait_in_slices", interrupted_later)
        release.set()
        with pytest.raises(KeyboardInterrupt), db.transaction():
            pass
    db.run(INSERT, (1,), timeout=DEADLINE)
    assert rows(db) == [1]


def test_a_block_that_gets_no_lock_raises_sqlites_error(path: Path) -> None:
    with DbWriter(path, lock_timeout=0.05) as db:
        with holding_lock(path), pytest.raises(sqlite3.OperationalError, match="locked"), db.transaction():
            pass
        with db.transaction() as tx:
            tx.execute("SELECT 1")


def expire(db: DbWriter, hold: Callable[[Transaction], object]) -> TransactionClosedError:
    with pytest.raises(TransactionClosedError) as caught, db.transaction(max_hold=0.05) as tx:
        tx.execute(INSERT, (1,))
        hold(tx)
    return caught.value


HOLDS: dict[str, Callable[[Transaction], object]] = {
    "a sleeping thread": lambda tx: threading.Event().wait(0.3),
    "a long SELECT": lambda tx: tx.execute(ENDLESS + "SELECT max(n) FROM c"),
    "a long INSERT": lambda tx: tx.execute("INSERT INTO t " + ENDLESS + "SELECT n + 10 FROM c"),
    "many statements": lambda tx: [tx.execute("SELECT 1") for _ in range(10**7)],
    "a lent connection": lambda tx: tx.connection.execute(ENDLESS + "SELECT max(n) FROM c"),
}


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
def test_a_block_that_holds_for_too_long_loses_the_writer(
    both: DbWriter, hold: Callable[[Transaction], object]
) -> None:
    assert "max_hold" in str(expire(both, hold))
    both.run(INSERT, (2,), timeout=DEADLINE)
    assert rows(both) == [2]


def test_a_python_function_inside_a_statement_is_waited_for_and_no_longer(path: Path) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def wait() -> bool:
        inside.set()
        return go_on.wait(DEADLINE)

    def hook(connection: sqlite3.Connection, readonly: bool) -> None:
        connection.create_function("wait", 0, wait)

    def expires(db: DbWriter) -> TransactionClosedError:
        # Long enough for it to come there on a busy machine, and shorter than the other waits.
        with pytest.raises(TransactionClosedError) as caught, db.transaction(max_hold=0.5) as tx:
            tx.execute(INSERT, (1,))
            tx.execute("SELECT wait() UNION ALL SELECT 2")
        return caught.value

    with DbWriter(path, on_connect=hook) as db, ThreadPoolExecutor() as pool:
        db.run("CREATE TABLE t (n UNIQUE)")
        expired = pool.submit(expires, db)
        assert inside.wait(DEADLINE)
        with pytest.raises(WriteTimeoutError):
            db.run(INSERT, (2,), timeout=1.0)
        go_on.set()
        assert "max_hold" in str(expired.result(DEADLINE))
        assert rows(db) == []


def test_an_expired_block_may_not_take_the_next_call_for_nested(db: DbWriter) -> None:
    expire(db, lambda tx: eventually(lambda: not db.in_writer()))
    assert not db.in_writer()
    db.run(INSERT, (2,))
    with db.transaction() as tx:
        tx.execute(INSERT, (3,))
    assert rows(db) == [2, 3]


def test_an_expired_block_says_why_also_when_it_has_long_been_rolled_back(db: DbWriter) -> None:
    def use(tx: Transaction) -> None:
        eventually(lambda: state_of(db).job is None)
        with pytest.raises(TransactionClosedError, match="longer than max_hold"):
            tx.execute(INSERT, (2,))

    assert "longer than max_hold" in str(expire(db, use))
    assert rows(db) == []


def test_the_own_error_of_an_expired_block_is_not_hidden(db: DbWriter) -> None:
    with pytest.raises(LookupError), db.transaction(max_hold=0.05) as tx:
        tx.execute(INSERT, (1,))
        eventually(lambda: not db.in_writer())
        raise LookupError
    assert rows(db) == []


def test_a_limit_of_the_gateway_ends_the_sql_of_jobs_and_blocks(path: Path) -> None:
    with DbWriter(path, max_hold=0.05) as db:
        db.run("CREATE TABLE t (n UNIQUE)")
        with pytest.raises(TransactionClosedError, match="max_hold"):
            db.run(ENDLESS + "SELECT max(n) FROM c")
        with pytest.raises(TransactionClosedError, match="max_hold"):
            db.run("INSERT INTO t " + ENDLESS + "SELECT n FROM c")
        with pytest.raises(TransactionClosedError, match="max_hold"):
            db.run(lambda tx: [tx.execute("SELECT 1") for _ in range(10**7)] and None)
        with pytest.raises(TransactionClosedError, match="max_hold"), db.transaction() as tx:
            tx.execute(ENDLESS + "SELECT max(n) FROM c")
        with parked(db):
            tickets = [db.enqueue(INSERT, (n,)) for n in range(3)]
            slow = db.enqueue("INSERT INTO t " + ENDLESS + "SELECT n + 10 FROM c")
            tickets.append(db.enqueue(INSERT, (3,)))
        assert isinstance(slow.exception(DEADLINE), TransactionClosedError)
        for ticket in tickets:
            ticket.result(DEADLINE)
        assert rows(db) == [0, 1, 2, 3]


def test_a_block_whose_thread_has_ended_is_left_by_another_or_collected(db: DbWriter) -> None:
    blocks = []

    def leave_open() -> None:
        block = db.transaction()
        blocks.append((block, block.__enter__()))
        blocks[-1][1].execute(INSERT, (len(blocks),))

    for _ in range(2):
        in_threads(leave_open)
        with pytest.raises(WriteTimeoutError, match="transaction"):
            db.run(INSERT, (3,), timeout=0.0)
        block, tx = blocks[-1]
        if len(blocks) == 1:
            block.__exit__(None, None, None)
    blocks.clear()
    del block
    with pytest.raises(TransactionClosedError):  # nobody can leave it any more
        tx.execute(INSERT, (4,))
    db.run(INSERT, (5,), timeout=DEADLINE)
    assert rows(db) == [1, 5]


def test_a_block_of_a_collected_generator_is_rolled_back(db: DbWriter) -> None:
    def generate() -> Iterator[int]:
        with db.transaction() as tx:
            tx.execute(INSERT, (1,))
            yield 1

    generator = generate()
    next(generator)
    del generator
    gc.collect()
    db.run(INSERT, (2,), timeout=DEADLINE)
    assert rows(db) == [2]


def test_close_lets_an_open_block_finish_or_reports_it(db: DbWriter) -> None:
    with ThreadPoolExecutor() as pool:
        with db.transaction(label="the open one") as tx:
            report = pool.submit(db.close, 0.05).result(DEADLINE)
            assert (report.unfinished, report.labels) == (1, ("the open one",))
            closer = pool.submit(db.close)
            tx.execute(INSERT, (1,))
        assert closer.result(DEADLINE).unfinished == 0
    with DbWriter(db.path) as again:
        assert rows(again) == [1]
    with pytest.raises(WriterClosedError), db.transaction():
        pass


def test_a_slow_holder_is_named_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with DbWriter(path, slow_after=0.05) as db:
        with db.transaction(label="slow block"):
            eventually(lambda: "slow block" in caplog.text)
        db.run(lambda tx: threading.Event().wait(0.1) and None, label="slow job")
        with db.reader(label="slow reader"):
            threading.Event().wait(0.1)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [label for label in ("slow block", "slow job", "slow reader") for text in told if label in text] == [
        "slow block",
        "slow job",
        "slow reader",
    ]
    assert all("test_block.py" in text for text in told if "slow reader" not in text)


@pytest.mark.parametrize("arguments", [{"timeout": -1}, {"max_hold": -1}, {"max_hold": float("nan")}])
def test_impossible_times_are_refused_at_the_call(both: DbWriter, arguments: Any) -> None:
    with pytest.raises(ValueError, match="seconds"):
        both.transaction(**arguments)


def test_an_error_of_a_read_in_a_block_that_was_taken_away_is_the_one_that_is_told(db: DbWriter) -> None:
    def wait_and_fail(connection: sqlite3.Connection) -> None:
        eventually(lambda: not db.in_writer())
        raise LookupError

    raised: list[BaseException] = []
    with pytest.raises(TransactionClosedError), db.transaction(max_hold=0.05):
        try:
            db.read(wait_and_fail)
        except Exception as error:
            raised.append(error)
    assert [type(error) for error in raised] == [LookupError]


def test_a_loops_thread_waits_for_a_block_that_was_entered_in_another_loop(db: DbWriter) -> None:
    async def enter() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            block.__enter__()

    async def late() -> None:
        with pytest.raises(WriteTimeoutError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it blocks the loop
            db.run(INSERT, (1,), timeout=0.01)

    with ThreadPoolExecutor(1) as pool:
        block = db.transaction()
        pool.submit(lambda: asyncio.run(enter())).result(DEADLINE)
        try:
            asyncio.run(late())
        finally:
            pool.submit(block.__exit__, None, None, None).result(DEADLINE)
    assert rows(db) == []


def test_a_file_that_was_moved_during_a_block_is_noticed_before_it_is_committed(path: Path) -> None:
    db = DbWriter(path)
    db.run("CREATE TABLE t (n)")
    with pytest.raises(WriterBrokenError, match="moved"), db.transaction() as tx:
        tx.execute("INSERT INTO t VALUES (1)")
        path.rename(path.with_name("elsewhere.db"))
        file_of(db).look_again_at = 0.0  # a tenth of a second ago
    report = db.close()
    assert (report.committed, report.failed) == (1, 1)


def test_a_block_given_back_in_the_moment_in_which_it_is_taken_leaves_its_thread_free(path: Path) -> None:
    with DbWriter(path) as db:
        for _ in range(50):
            with contextlib.suppress(TransactionClosedError), db.transaction(max_hold=0.0):
                pass
            db.run("SELECT 1")
            assert not db.in_writer()


@pytest.mark.parametrize("call", ["run", "read", "transaction", "run_many"])
def test_inside_a_block_that_max_hold_has_ended_the_gateways_calls_raise_too(new_db: DbWriter, call: str) -> None:
    new_db.run("CREATE TABLE t (n)")
    calls: dict[str, Callable[[], object]] = {
        "run": lambda: new_db.run(INSERT, (2,)),
        "read": lambda: new_db.read("SELECT * FROM t"),
        "transaction": lambda: new_db.transaction().__enter__(),
        "run_many": lambda: new_db.run_many(INSERT, [(2,)]),
    }
    with pytest.raises(TransactionClosedError), new_db.transaction(max_hold=0.01):
        threading.Thread(target=new_db.run, args=(INSERT, (1,))).start()
        eventually(lambda: not new_db.in_writer())
        with pytest.raises(TransactionClosedError, match="max_hold"):
            calls[call]()
        ticket = new_db.enqueue(INSERT, (3,))  # no part of the block
    new_db.run(INSERT, (4,))
    assert ticket.done()
    assert new_db.read("SELECT n FROM t WHERE n <> 1") == [(3,), (4,)]


def test_a_block_that_was_never_accepted_is_not_counted(path: Path) -> None:
    new_db = DbWriter(path)
    new_db.close()
    with pytest.raises(WriterClosedError), new_db.transaction():
        pass
    assert new_db.close().cancelled == 0


@pytest.mark.usefixtures("no_collections")
@pytest.mark.parametrize("who", ["a write", "close"])
@pytest.mark.parametrize("is_alone", [True, False], ids=["alone", "behind others"])
def test_a_block_that_nobody_can_reach_ends_when_others_wait(
    new_db: DbWriter, monkeypatch: pytest.MonkeyPatch, is_alone: bool, who: str
) -> None:
    """It is that of a generator in a reference cycle: only the garbage collector finds it."""

    db = new_db
    db.run("CREATE TABLE t (n)")

    def writes() -> Iterator[int]:
        with db.transaction() as tx:
            tx.execute(INSERT, (1,))
            yield 1
            raise AssertionError("it is never resumed")

    monkeypatch.setattr(garbage, "LONG", 0.01)
    cycle: list[Any] = [writes()]
    cycle.append(cycle)
    with contextlib.nullcontext() if is_alone else parked(db) as release:
        entered = ThreadPoolExecutor().submit(next, cycle[0])
        if release is not None:
            release.set()
    entered.result(DEADLINE)
    del entered
    cycle = []
    if who == "close":
        assert db.close().failed == 1
        return
    db.run(INSERT, (2,), timeout=DEADLINE)
    assert rows(db) == [2]


def test_the_collector_runs_for_a_block_only_if_others_wait_for_it(
    db: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[None] = []
    monkeypatch.setattr(garbage, "LONG", 0.0)
    monkeypatch.setattr(garbage, "collect_soon", lambda: runs.append(None))
    with db.transaction() as tx:
        block = tx._loan.job
        assert isinstance(block, block_module.Block)
        block.look_for_dropped()
        assert runs == []  # nobody waits
        ticket = db.enqueue("SELECT 1")
        eventually(lambda: bool(runs))
    ticket.result(DEADLINE)


@pytest.mark.usefixtures("no_collections")
def test_what_a_collected_generator_does_at_its_end_keeps_nobody_from_anything(
    db: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may write, and wait: the collector runs in a thread of its own."""
    written: list[int] = []

    def writes() -> Iterator[int]:
        try:
            with db.transaction():
                yield 1
        finally:
            written.append(db.run(INSERT, (2,)).rowcount)

    monkeypatch.setattr(garbage, "LONG", 0.01)
    cycle: list[Any] = [writes()]
    cycle.append(cycle)
    in_threads(functools.partial(next, cycle[0]))
    cycle = []
    db.run(INSERT, (1,), timeout=DEADLINE)
    eventually(lambda: written == [1])


def test_a_program_that_has_turned_the_collector_off_is_not_held_up_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[None] = []
    monkeypatch.setattr(gc, "collect", lambda: runs.append(None))
    gc.disable()
    try:
        garbage.collect_soon()
    finally:
        gc.enable()
    garbage.collect_soon()
    eventually(lambda: len(runs) == 1)


def test_those_that_were_taken_with_a_dropped_block_wait_for_it_too(
    db: DbWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[None] = []
    monkeypatch.setattr(garbage, "LONG", 0.01)
    monkeypatch.setattr(garbage, "collect_soon", lambda: runs.append(None))
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with db.transaction():
            entered.set()
            leave.wait(DEADLINE)

    with ThreadPoolExecutor() as threads:
        with parked(db):
            before = queue_of(db).depth
            holding = threads.submit(hold)
            eventually(lambda: queue_of(db).depth == before + 1)
            ticket = db.enqueue(INSERT, (1,))
        assert entered.wait(DEADLINE)
        eventually(lambda: bool(runs))
        leave.set()
        holding.result(DEADLINE)
    ticket.result(DEADLINE)


@pytest.mark.usefixtures("no_collections")
def test_close_ends_a_block_of_its_own_thread_that_nobody_can_reach(new_db: DbWriter) -> None:
    cycle: list[Any] = [new_db.transaction()]
    cycle.append(cycle)
    cycle[0].__enter__()
    with pytest.raises(ReentrantWriteError):
        new_db.close()
    cycle = []
    assert new_db.close().failed == 1


def test_a_savepoint_that_fails_while_its_block_commits_says_that_it_is_kept(path: Path) -> None:
    with DbWriter(path, journal_mode="DELETE") as db, ThreadPoolExecutor(1) as pool:
        db.run("CREATE TABLE t (n)")
        block = db.transaction()
        tx = pool.submit(block.__enter__).result()
        other = sqlite3.connect(path)
        with pytest.raises(TransactionClosedError, match="has ended"), tx.savepoint():
            tx.execute(INSERT, (1,))
            reading = other.execute("SELECT 1 FROM sqlite_schema")  # in this journal mode COMMIT waits for it
            left = pool.submit(block.__exit__, None, None, None)
            eventually(lambda: state_of(db).waiting is not None)
            raise LookupError
        assert reading.fetchone() == (1,)
        other.close()
        left.result(DEADLINE)
        assert rows(db) == [1]


def test_a_block_that_is_slow_by_now_is_looked_at_no_more_often_for_that(db: DbWriter) -> None:
    block = ThreadBlock(state_of(db), None, math.inf, sys._getframe())
    block.started_at = monotonic() - 2 * state_of(db).slow_after
    assert block._patience(math.inf) > 0.0
    block.started_at = monotonic()
    assert block._patience(math.inf) > 0.0
