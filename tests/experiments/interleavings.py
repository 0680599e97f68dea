"""Interleavings: every hand-over of the gateway, in each order of its steps that a few switches of threads make.

All schedules without a switch that need not be, then all with one, and so on: most faults of this kind need one or two
(https://www.microsoft.com/en-us/research/publication/iterative-context-bounding-for-systematic-testing-of-multithreaded-programs/).
A finding names its schedule, which ``replay`` runs again and prints.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import shutil
import sqlite3
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from experiments import Outcome
from experiments.scheduler import Event, Loop, Schedule, Scheduler, installed
from onewriter import (
    AsyncDbWriter,
    DbWriter,
    ForkedError,
    QueueFullError,
    ReadTimeoutError,
    Ticket,
    Transaction,
    TransactionClosedError,
    WriterClosedError,
    WriteTimeoutError,
)
from onewriter.ends import exit as at_exit

INSERT = "INSERT INTO t VALUES (?)"
COUNT = "SELECT count(*) FROM t"
SOON = 0.1  # seconds: a wait that may end by its time


class Play:
    """What a scenario plays with: it runs some functions at once, and says what is not true afterwards."""

    def __init__(self, path: Path, scheduler: Scheduler) -> None:
        self.path = path
        self.scheduler = scheduler
        self.acknowledged: set[int] = set()
        self.refused: set[int] = set()  # what must not be in the file
        self.jobs: int | None = None  # committed, if not one for each row
        self.db: DbWriter
        self.kept: list[object] = []  # of a gateway that was forked

    def check(self, is_true: object, text: str) -> None:
        if not is_true:
            self.scheduler.find(text)

    def open(self, **options: Any) -> DbWriter:
        options = {"synchronous": "OFF", "slow_after": 10_000.0, **options}
        self.db = DbWriter(self.path, on_connect=self._add_pause, **options)
        return self.db

    def _add_pause(self, connection: sqlite3.Connection, is_reader: bool) -> None:
        connection.create_function("pause", 1, self._pause)

    def _pause(self, value: int) -> int:
        self.scheduler.point()
        return value

    # Calls that keep what they were told

    def run(self, db: DbWriter, n: int, **options: Any) -> None:
        try:
            db.run(INSERT, (n,), **options)
            self.acknowledged.add(n)
        except WriterClosedError:
            self.refused.add(n)
        except WriteTimeoutError as error:
            if error.started:
                self._keep(n, cast(Ticket[Any], error.ticket))
            else:
                self.refused.add(n)

    def enqueue(self, db: DbWriter, n: int, **options: Any) -> Ticket[Any] | None:
        try:
            ticket = db.enqueue(INSERT, (n,), **options)
        except (WriterClosedError, QueueFullError):
            self.refused.add(n)
            return None
        return ticket

    def put(self, db: DbWriter, n: int, **options: Any) -> None:
        ticket = self.enqueue(db, n, **options)
        if ticket is not None:
            self._keep(n, ticket)

    def _keep(self, n: int, ticket: Ticket[Any]) -> None:
        try:
            good = ticket.exception() is None
        except CancelledError:
            good = False
        (self.acknowledged if good else self.refused).add(n)

    def block(self, db: DbWriter, n: int, sql: str = INSERT, **options: Any) -> None:
        try:
            with db.transaction(**options) as tx:
                tx.execute(sql, (n,))
            self.acknowledged.add(n)
        except (WriterClosedError, TransactionClosedError):
            self.refused.add(n)
        except WriteTimeoutError as error:
            self.check(not error.started, f"{error!r} says that the block has started")
            self.refused.add(n)

    def end(self, db: DbWriter) -> None:
        """The gateway goes on, then closes, and the file has what it is to have."""
        others = 0 if db.closed else 2
        if others:
            db.run("DELETE FROM t WHERE n = ?", (-1,), timeout=None)
            with db.transaction(timeout=None) as tx:
                tx.execute("DELETE FROM t WHERE n = ?", (-1,))
        report = db.close()
        self.check(not report.unfinished, f"unfinished: {report}")
        jobs = len(self.acknowledged) if self.jobs is None else self.jobs
        self.check(report.committed == jobs + others, f"counted wrongly: {report}")
        core = db._core
        self.check(core.queue.depth == 0 and core.queue._bounded == 0, f"in the queue: {core.queue.fill}")
        self.check(core.queue.guest is None, "a turn is taken")
        self.check(core.pool.in_use == 0 and core.pool._count == 0, f"readers: {core.pool._count} in the pool")
        # All of it is in the file itself by now, without a log.
        with contextlib.closing(sqlite3.connect(f"file:{self.path}?immutable=1", uri=True)) as connection:
            rows = [n for (n,) in connection.execute("SELECT n FROM t ORDER BY n")]
        self.check(rows == sorted(self.acknowledged), f"rows {rows}, acknowledged {sorted(self.acknowledged)}")
        self.check(not self.acknowledged & self.refused, f"both: {self.acknowledged & self.refused}")
        # The gap in which SQLite's lock is left free after it was held for long ends by its time.
        jumps = [where for where in self.scheduler.jumps if "_leave_a_gap" not in where]
        self.check(not jumps, f"waits that nobody ended in time: {jumps}")


# Scenarios ------------------------------------------------------------------------------------------------------------


def put_and_sleep(play: Play) -> None:
    """The writer falls asleep as jobs come."""
    db = play.open()
    play.scheduler.at_once(lambda: play.run(db, 1), lambda: play.put(db, 2))
    play.end(db)


def put_and_idle(play: Play) -> None:
    """It empties the log when it has been idle, as a job comes."""
    db = play.open()
    play.run(db, 1)
    play.scheduler.at_once(lambda: play.run(db, 2), lambda: play.put(db, 3))
    play.end(db)


def turn_and_put(play: Play) -> None:
    """A block takes its own turn as a job comes."""
    db = play.open()
    play.scheduler.at_once(lambda: play.block(db, 1), lambda: play.run(db, 2))
    play.end(db)


def turn_and_turn(play: Play) -> None:
    """Two blocks take theirs."""
    db = play.open()
    play.scheduler.at_once(lambda: play.block(db, 1), lambda: play.block(db, 2))
    play.end(db)


def turn_and_jobs(play: Play) -> None:
    """A block, and one after it, as the writer is woken."""
    db = play.open()

    def blocks() -> None:
        play.block(db, 1)
        play.block(db, 2)

    play.scheduler.at_once(blocks, lambda: play.put(db, 3))
    play.end(db)


def turn_and_no_time(play: Play) -> None:
    """A block gives up waiting as it is granted."""
    db = play.open()
    play.scheduler.at_once(lambda: play.block(db, 1), lambda: play.block(db, 2, timeout=SOON))
    play.end(db)


def leave_and_max_hold(play: Play) -> None:
    """A block is left as it is taken back."""
    db = play.open()
    play.scheduler.at_once(lambda: play.block(db, 1, max_hold=SOON), lambda: play.run(db, 2))
    play.end(db)


def statement_and_max_hold(play: Play) -> None:
    """A block is taken back while SQLite runs its statement."""
    db = play.open()
    sql = "INSERT INTO t SELECT pause(?)"
    play.scheduler.at_once(lambda: play.block(db, 1, sql, max_hold=SOON), lambda: play.block(db, 2, sql))
    play.end(db)


def leave_and_close(play: Play) -> None:
    """A block is left, and another begins, as the gateway is closed."""
    db = play.open()
    play.scheduler.at_once(lambda: play.block(db, 1), lambda: play.block(db, 2), db.close)
    play.end(db)


def leave_and_call(play: Play) -> None:
    """A thread leaves a block as another thread uses its transaction."""
    shared_block(play, is_good=True)


def fail_and_call(play: Play) -> None:
    """The same by an error, which ends what the other thread does."""
    shared_block(play, is_good=False)


def shared_block(play: Play, is_good: bool) -> None:
    db = play.open()
    lent: list[Transaction] = []
    has_written: list[int] = []
    entered = Event(play.scheduler)

    def enter() -> None:
        with contextlib.suppress(ZeroDivisionError), db.transaction() as tx:
            lent.append(tx)
            entered.set()
            tx.execute(INSERT, (1,))
            has_written.append(1)
            if not is_good:
                raise ZeroDivisionError

    def use() -> None:
        entered.wait()
        try:
            lent[0].execute("INSERT INTO t SELECT pause(?)", (2,))
            has_written.append(2)
        except TransactionClosedError:
            play.refused.add(2)

    play.scheduler.at_once(enter, use)
    (play.acknowledged if is_good else play.refused).update(has_written)
    play.jobs = int(is_good)
    play.end(db)


def outcome_and_wait(play: Play) -> None:
    """A wait for an outcome begins, or ends by its time, as there is one."""
    db = play.open()
    ticket = play.enqueue(db, 1)
    assert ticket is not None

    def look() -> None:
        with contextlib.suppress(TimeoutError):
            ticket.result(SOON)

    play.scheduler.at_once(look, lambda: play._keep(1, ticket))
    play.end(db)


def failure_and_wait(play: Play) -> None:
    """A job fails as somebody begins to wait for it: its error is logged, or raised there."""
    told: list[Ticket[Any]] = []
    db = play.open(on_error=told.append)
    play.run(db, 1)
    ticket = db.enqueue(INSERT, (1,))

    def look() -> None:
        play.check(isinstance(ticket.exception(), sqlite3.IntegrityError), "it has not failed")

    play.scheduler.at_once(look, lambda: play.run(db, 2))
    db.flush()
    play.check(len(told) <= 1 and not db._core.state.reporting, f"told: {told}")
    play.end(db)


def timeout_and_start(play: Play) -> None:
    """A write is withdrawn as it starts."""
    db = play.open()
    play.scheduler.at_once(lambda: play.run(db, 1, timeout=SOON), lambda: play.run(db, 2, timeout=SOON))
    timed_out = db.stats().timed_out
    play.end(db)
    report = db.close()
    play.check(report.cancelled <= timed_out <= 2, f"{timed_out} timed out, {report}")


def cancel_and_start(play: Play) -> None:
    """A ticket is cancelled as its job starts, and somebody waits for it."""
    db = play.open()
    told: list[bool] = []
    called: list[object] = []

    def put() -> None:
        ticket = play.enqueue(db, 1)
        assert ticket is not None
        ticket.add_done_callback(called.append)
        told.append(ticket.cancel())
        play._keep(1, ticket)

    play.scheduler.at_once(put, lambda: play.run(db, 2))
    play.end(db)
    play.check(told == [1 in play.refused], f"cancel() said {told}")
    play.check(len(called) == 1, f"called back {len(called)} times")


def room_and_giving_up(play: Play) -> None:
    """A producer is admitted to a full queue as it gives up."""
    db = play.open(maxsize=1)
    play.scheduler.at_once(
        lambda: play.put(db, 1, timeout=SOON),
        lambda: play.put(db, 2, timeout=SOON),
        lambda: play.put(db, 3, timeout=SOON),
    )
    play.end(db)


def room_and_withdrawal(play: Play) -> None:
    """Room is made by a job that is withdrawn."""
    db = play.open(maxsize=1)

    def put_and_cancel() -> None:
        ticket = play.enqueue(db, 1)
        if ticket is not None:
            ticket.cancel()
            play._keep(1, ticket)

    play.scheduler.at_once(put_and_cancel, lambda: play.put(db, 2), lambda: play.put(db, 3, timeout=SOON))
    play.end(db)


def read(play: Play, db: DbWriter, **options: Any) -> None:
    try:
        found = db.read_value(COUNT, **options)
        play.check(found == 0, f"a read found {found}")
    except ReadTimeoutError:
        play.check("timeout" in options, "a read had no time")
    except WriterClosedError:
        play.check(db.closed, "a read was refused")


def snapshot(play: Play, db: DbWriter, **options: Any) -> None:
    try:
        with db.reader(**options) as connection:
            play.check(connection.execute(COUNT).fetchall() == [(0,)], "a reader saw something else")
    except ReadTimeoutError:
        play.check("timeout" in options, "a reader had no time")
    except WriterClosedError:
        play.check(db.closed, "a reader was refused")


def reader_given_back(play: Play) -> None:
    """The only connection is given back as others come for it."""
    db = play.open(readers=1)
    play.scheduler.at_once(lambda: read(play, db), lambda: read(play, db), lambda: snapshot(play, db))
    read(play, db)
    play.end(db)


def reader_and_no_time(play: Play) -> None:
    """It is given back as one of those that wait for it gives up."""
    db = play.open(readers=1)
    play.scheduler.at_once(lambda: snapshot(play, db), lambda: read(play, db, timeout=SOON), lambda: read(play, db))
    read(play, db)
    play.end(db)


def read_interrupted(play: Play) -> None:
    """The time of a read is over as it ends, and its connection goes to the next, whose statement is not ended."""
    db = play.open(readers=1)

    def be_late() -> None:
        with contextlib.suppress(ReadTimeoutError):
            db.read("SELECT pause(1) UNION ALL SELECT pause(2)", timeout=SOON)

    play.scheduler.at_once(be_late, lambda: read(play, db), lambda: snapshot(play, db))
    read(play, db)
    play.end(db)


def reader_left_and_used(play: Play) -> None:
    """A thread leaves a reader, as another thread uses its connection."""
    db = play.open(readers=1)
    lent: list[sqlite3.Connection] = []
    entered = Event(play.scheduler)

    def enter() -> None:
        with db.reader() as connection:
            lent.append(connection)
            entered.set()

    def use() -> None:
        entered.wait()
        with contextlib.suppress(sqlite3.ProgrammingError):
            play.check(lent[0].execute("SELECT pause(7)").fetchall() == [(7,)], "a reader saw something else")

    play.scheduler.at_once(enter, use, lambda: read(play, db))
    read(play, db)
    play.end(db)


def readers_and_checkpoint(play: Play) -> None:
    """Reads come, and go, while they are held back."""
    db = play.open(readers=2)
    read(play, db)
    play.scheduler.at_once(lambda: read(play, db), lambda: snapshot(play, db), db.checkpoint)
    play.end(db)


def close_and_put(play: Play) -> None:
    """The gateway is closed as jobs come."""
    db = play.open()
    play.scheduler.at_once(lambda: play.put(db, 1), lambda: play.run(db, 2), db.close)
    play.end(db)


def close_and_withdraw(play: Play) -> None:
    """What is queued is withdrawn as the writer takes it, and as a block comes."""
    db = play.open()
    ticket = play.enqueue(db, 1)
    assert ticket is not None
    play.scheduler.at_once(lambda: play._keep(1, ticket), lambda: play.block(db, 2), lambda: db.close(drain=False))
    play.end(db)


def close_and_close(play: Play) -> None:
    """Two close it, each in its way, as a job comes."""
    db = play.open()
    play.scheduler.at_once(lambda: play.put(db, 1), lambda: db.close(drain=False), db.close)
    play.end(db)


def close_and_no_time(play: Play) -> None:
    """Close has no time."""
    db = play.open()
    play.scheduler.at_once(lambda: play.put(db, 1), lambda: play.run(db, 2), lambda: db.close(SOON))
    play.end(db)


def close_and_read(play: Play) -> None:
    """The gateway is closed as reads come."""
    db = play.open(readers=1)
    play.scheduler.at_once(lambda: read(play, db), lambda: snapshot(play, db), db.close)
    play.end(db)


def publish_and_next(play: Play) -> None:
    """A watch is told of a commit as it falls asleep."""
    db = play.open()
    seen: list[int] = []

    def look() -> None:
        with db.watch(COUNT, every=0.0) as live:
            for [(count,)] in live:
                seen.append(count)
                if count == 2:
                    return

    play.scheduler.at_once(look, lambda: play.run(db, 1), lambda: play.put(db, 2))
    play.end(db)
    play.check(seen == sorted(set(seen)), f"seen: {seen}")


def watch_and_close(play: Play) -> None:
    """A watch gives its last rows as the gateway is closed."""
    db = play.open()
    seen: list[int] = []

    def look() -> None:
        with contextlib.suppress(WriterClosedError), db.watch(COUNT, every=0.0) as live:
            seen.append(-1)
            for [(count,)] in live:
                seen.append(count)

    play.scheduler.at_once(look, lambda: play.run(db, 1), db.close)
    play.end(db)
    play.check(not seen or seen[-1] == len(play.acknowledged), f"seen: {seen}, of {play.acknowledged}")


def watch_and_leave(play: Play) -> None:
    """A watch is left by another thread as it is told of a commit."""
    db = play.open()
    live = db.watch(COUNT, every=0.0)

    def look() -> None:
        for _ in live:
            pass

    with live:
        play.scheduler.at_once(look, lambda: play.run(db, 1), live.close)
    play.end(db)
    play.check(db._core.state.live is None, "it is watched on")


def inline_turns(play: Play) -> None:
    """Threads are the writer in turns."""
    db = play.open(inline=True)
    play.scheduler.at_once(lambda: play.run(db, 1), lambda: play.block(db, 2), lambda: play.put(db, 3))
    play.end(db)


def inline_and_close(play: Play) -> None:
    """One of them closes it."""
    db = play.open(inline=True)
    play.scheduler.at_once(lambda: play.run(db, 1, timeout=SOON), lambda: play.block(db, 2, timeout=SOON), db.close)
    play.end(db)


def become_child(play: Play, db: DbWriter, ticket: Ticket[Any] | None) -> None:
    """Fork, and be the child: every call tells so, and none waits for a lock that another thread of the parent had."""
    core = db._core
    play.scheduler.fork()
    play.kept += core.writer.after_fork_in_child()
    core.driver.forget()
    at_exit.forget(core.writer)
    calls: list[Callable[[], object]] = [
        lambda: db.run(INSERT, (9,)),
        lambda: db.enqueue(INSERT, (9,)),
        lambda: db.read(COUNT),
        lambda: db.transaction().__enter__(),
        lambda: db.reader().__enter__(),
        lambda: db.watch(COUNT).__enter__(),
        db.flush,
        db.checkpoint,
    ]
    if ticket is not None and not ticket.done():
        calls += [ticket.result, ticket.cancel]
    for call in calls:
        try:
            call()
        except ForkedError:
            continue
        play.check(False, f"{call} works in a child")
    play.check(db.close().committed <= 2, "close")
    play.check("forked" in db.health or "broken" in db.health, db.health)
    play.check(db.stats().running is None, "a job runs in the child")


def fork_and_calls(play: Play) -> None:
    """A thread forks as others write and read."""
    db = play.open()
    ticket = play.enqueue(db, 1)

    def child() -> None:
        become_child(play, db, ticket)
        play.scheduler.stop()

    play.scheduler.at_once(lambda: play.run(db, 2), lambda: db.read(COUNT), child)


def fork_and_block(play: Play) -> None:
    """A thread forks inside a block, as others wait for theirs."""
    db = play.open()

    def child() -> None:
        try:
            with db.transaction() as tx:
                tx.execute(INSERT, (1,))
                become_child(play, db, None)
                with contextlib.suppress(ForkedError):
                    tx.execute(INSERT, (1,))
                    play.check(False, "a block works in a child")
            play.check(False, "a block is committed in a child")
        except ForkedError:
            play.scheduler.stop()

    play.scheduler.at_once(lambda: play.block(db, 2), lambda: play.run(db, 3), child)


def in_loop(play: Play, *tasks: Coroutine[Any, Any, object]) -> None:
    """Run the tasks in a loop of the calling thread."""

    async def all_of_them() -> None:
        await asyncio.gather(*tasks)

    loop = Loop(play.scheduler)
    try:
        loop.run_until_complete(all_of_them())
    finally:
        loop.close()


async def task_block(play: Play, db: DbWriter, n: int, seconds: float | None = None, **options: Any) -> None:
    """A task's block, which is cancelled after some ``seconds``."""
    try:
        async with asyncio.timeout(seconds), AsyncDbWriter.wrap(db).transaction(**options) as tx:
            await tx.execute("INSERT INTO t SELECT pause(?)", (n,))
        play.acknowledged.add(n)
    except (WriterClosedError, TransactionClosedError):
        play.refused.add(n)
    except WriteTimeoutError as error:
        play.check(not error.started, f"{error!r} says that the block has started")
        play.refused.add(n)
    except TimeoutError as error:
        is_committed = any("was committed" in note for note in getattr(error.__cause__, "__notes__", ()))
        (play.acknowledged if is_committed else play.refused).add(n)


async def task_run(play: Play, db: DbWriter, n: int, **options: Any) -> None:
    try:
        await AsyncDbWriter.wrap(db).run(INSERT, (n,), **options)
        play.acknowledged.add(n)
    except WriterClosedError:
        play.refused.add(n)
    except WriteTimeoutError as error:
        if error.started:
            with contextlib.suppress(Exception):
                await cast(Ticket[Any], error.ticket)
            play._keep(n, cast(Ticket[Any], error.ticket))
        else:
            play.refused.add(n)


def task_and_block(play: Play) -> None:
    """The block of a task, whose statements the writer runs, beside that of a thread."""
    db = play.open()
    play.scheduler.at_once(lambda: in_loop(play, task_block(play, db, 1)), lambda: play.block(db, 2))
    play.end(db)


def tasks_and_cancellation(play: Play) -> None:
    """The block of a task is cancelled as it begins, runs or ends, beside another of its loop."""
    db = play.open()
    play.scheduler.at_once(
        lambda: in_loop(play, task_block(play, db, 1, SOON), task_run(play, db, 2)), lambda: play.run(db, 3)
    )
    play.end(db)


def task_and_no_time(play: Play) -> None:
    """The block of a task gives up waiting as it is granted; and a write as it starts."""
    db = play.open()
    play.scheduler.at_once(
        lambda: in_loop(play, task_block(play, db, 1, timeout=SOON), task_run(play, db, 2, timeout=SOON)),
        lambda: play.block(db, 3),
    )
    play.end(db)


def task_and_max_hold(play: Play) -> None:
    """The block of a task is taken back as it is used or left."""
    db = play.open()
    play.scheduler.at_once(lambda: in_loop(play, task_block(play, db, 1, max_hold=SOON)), lambda: play.run(db, 2))
    play.end(db)


def task_and_close(play: Play) -> None:
    """The gateway is closed as a task comes for a block."""
    db = play.open()
    play.scheduler.at_once(lambda: in_loop(play, task_block(play, db, 1), task_run(play, db, 2)), db.close)
    play.end(db)


@dataclass(frozen=True)
class Scenario:
    """``near``: see ``Scheduler``; ``fine``: of which files each step is looked at, as a second scenario."""

    function: Callable[[Play], None]
    near: float = 0.2
    fine: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.function.__name__ + " (fine)" * bool(self.fine)


QUEUE = ("write/queue.py", "write/driver.py")
TURN = ("write/queue.py", "write/own_turn.py", "write/driver.py", "write/entry.py", "write/block.py")
POOL = ("read/places.py", "read/pool.py")

SCENARIOS = (
    Scenario(put_and_sleep),
    Scenario(put_and_sleep, fine=QUEUE),
    Scenario(put_and_idle, near=0.6),
    Scenario(turn_and_put),
    Scenario(turn_and_put, fine=TURN),
    Scenario(turn_and_turn),
    Scenario(turn_and_turn, fine=TURN),
    Scenario(turn_and_jobs),
    Scenario(turn_and_no_time),
    Scenario(leave_and_max_hold),
    Scenario(leave_and_max_hold, fine=("write/block.py", "write/loan.py")),
    Scenario(statement_and_max_hold),
    Scenario(leave_and_close),
    Scenario(leave_and_call),
    Scenario(fail_and_call),
    Scenario(leave_and_call, fine=("write/loan.py", "write/own_turn.py")),
    Scenario(outcome_and_wait),
    Scenario(outcome_and_wait, fine=("write/ticket.py", "write/outcomes.py", "base/waiting.py")),
    Scenario(failure_and_wait),
    Scenario(timeout_and_start),
    Scenario(cancel_and_start),
    Scenario(room_and_giving_up),
    Scenario(room_and_withdrawal),
    Scenario(reader_given_back),
    Scenario(reader_given_back, fine=POOL),
    Scenario(reader_and_no_time),
    Scenario(reader_and_no_time, fine=POOL),
    Scenario(read_interrupted),
    Scenario(read_interrupted, fine=(*POOL, "read/clock.py")),
    Scenario(reader_left_and_used),
    Scenario(readers_and_checkpoint),
    Scenario(close_and_put),
    Scenario(close_and_withdraw),
    Scenario(close_and_close),
    Scenario(close_and_put, fine=("write/queue.py", "write/writer.py")),
    Scenario(close_and_no_time),
    Scenario(close_and_read),
    Scenario(publish_and_next),
    Scenario(publish_and_next, fine=("live/hub.py", "live/watch.py")),
    Scenario(watch_and_close),
    Scenario(watch_and_leave),
    Scenario(inline_turns),
    Scenario(inline_and_close),
    Scenario(inline_and_close, fine=("write/driver.py", "write/queue.py")),
    Scenario(fork_and_calls),
    Scenario(fork_and_calls, fine=("write/queue.py", "base/state.py")),
    Scenario(fork_and_block),
    Scenario(task_and_block),
    Scenario(tasks_and_cancellation),
    Scenario(tasks_and_cancellation, fine=("tasks/block.py",)),
    Scenario(task_and_no_time),
    Scenario(task_and_max_hold),
    Scenario(task_and_close),
)


# Exploring ------------------------------------------------------------------------------------------------------------


def play(scenario: Scenario, schedule: Schedule, folder: Path, log: list[str] | None = None) -> Scheduler:
    """Run one schedule of it."""
    scheduler = Scheduler(schedule, scenario.near, scenario.fine)
    scheduler.log = log
    path = folder / "play.db"
    shutil.copyfile(_template(folder), path)
    play = Play(path, scheduler)
    scheduler.run(lambda: scenario.function(play))
    if scheduler.is_over:
        vars(play.db).pop("_core", None)  # its threads were abandoned: nobody can close it
    for thing in play.kept:
        if isinstance(thing, sqlite3.Connection):
            sqlite3.Connection.close(thing)
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    return scheduler


def _template(folder: Path) -> Path:
    path = folder / "template.db"
    if not path.exists():
        with DbWriter(path) as db:
            db.run("CREATE TABLE t (n INTEGER PRIMARY KEY)")
    return path


@dataclass
class Explored:
    """How many schedules were played with each number of switches, and how many of those were left."""

    played: list[int]
    left: list[int]
    finding: str = ""


def explore(run: Callable[[Schedule], Scheduler], bound: int, most: int, seed: int = 1) -> Explored:
    """Play all schedules with up to ``bound`` switches that need not be, fewest first; if there are more than ``most``,
    some with each number of them.
    """
    chance = random.Random(seed)
    todo: list[list[dict[int, int]]] = [[{}], *([] for _ in range(bound))]
    explored = Explored([0] * (bound + 1), [0] * (bound + 1))
    for switches, schedules in enumerate(todo):
        share = (most - sum(explored.played)) // (bound + 1 - switches)
        while schedules and explored.played[switches] < share:
            place = chance.randrange(len(schedules))
            schedules[place], schedules[-1] = schedules[-1], schedules[place]
            schedule = schedules.pop()
            scheduler = run(schedule)
            explored.played[switches] += 1
            if scheduler.finding:
                explored.finding = f"{scheduler.finding}; schedule {schedule}"
                return explored
            _branch(schedule, scheduler, todo)
        explored.left[switches] = len(schedules)
    return explored


def _branch(schedule: dict[int, int], scheduler: Scheduler, todo: list[list[dict[int, int]]]) -> None:
    """Add those that differ from ``schedule`` in one later choice."""
    first, spent = max(schedule, default=-1) + 1, 0
    for place, choice in enumerate(scheduler.choices):
        if place >= first:
            for other, cost in enumerate(choice.costs):
                if other != choice.chosen and spent + cost < len(todo):
                    todo[spent + cost].append({**schedule, place: other})
        spent += choice.costs[choice.chosen]


def run(size: int, seed: int, folder: Path, bound: int = 3) -> Outcome:
    """Up to ``size`` schedules of each hand-over."""
    outcome = Outcome()
    for scenario in SCENARIOS:
        explored = explore_scenario(scenario, bound, size, seed, folder)
        outcome.trials += sum(explored.played)
        outcome.notes[scenario.name] = sum(explored.played)
        if explored.finding:
            outcome.find(f"{scenario.name}: {explored.finding}")
    return outcome


def explore_scenario(scenario: Scenario, bound: int, most: int, seed: int, folder: Path) -> Explored:
    with installed(), collecting_nothing():
        play(scenario, {}, folder)  # what is done once only, is done: the next runs have the same steps
        return explore(lambda schedule: play(scenario, schedule, folder), bound, most, seed)


@contextlib.contextmanager
def collecting_nothing() -> Iterator[None]:
    """A finalizer in the midst of a run would be another step, which comes elsewhere the next time."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def replay(name: str, schedule: Schedule, folder: Path) -> str:
    """Run it again, and tell each choice."""
    log: list[str] = []
    with installed(), collecting_nothing():
        scheduler = play(next(one for one in SCENARIOS if one.name == name), schedule, folder, log)
    return "\n".join([*log, scheduler.finding or "no finding"])
