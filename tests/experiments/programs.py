"""Programs of tasks, made at random: in two loops, tasks with blocks, parts in parts, functions, callbacks, reads,
streams and watches are cancelled, or have no time, at any moment; another process takes the lock, the disk is full, or
the gateway is closed meanwhile.

The seed makes the program, not the moments: a finding comes again after some runs of its program.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import functools
import random
import sqlite3
import subprocess
import sys
import threading
import traceback
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from pathlib import Path
from time import sleep
from typing import Any

from experiments import HANG, Outcome, child, environment, integrity
from experiments.inside import INSERT, Failed, Inside, Row, Shared
from experiments.schedules import Pauses, at_once
from experiments.told import Unit
from helpers import names_in
from onewriter import AsyncDbWriter, AsyncTransaction, DbWriter, OneWriterError, Transaction, WriteTimeoutError

LOOPS = 2
PATIENCE = 0.5  # seconds, after which the tasks that have not ended are cancelled
LONG = HANG / 4  # seconds for tasks that have to end
COUNT = "SELECT count(*) FROM t"
TROUBLES = ("no trouble", "lock", "full disk")
HOLDER = """
import os, random, sqlite3, sys, time

parent, chance = os.getppid(), random.Random(int(sys.argv[2]))
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=5)
while os.getppid() == parent:
    try:
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        continue
    time.sleep(chance.random() * 0.15)
    connection.execute("ROLLBACK")
    time.sleep(chance.random() * 0.1)
"""


class Program(Shared):
    """One program and its gateway.

    Threads: one for each loop; ``judge`` when they have ended.
    """

    def __init__(self, path: Path, seed: int, outcome: Outcome) -> None:
        self.chance = chance = random.Random(seed)
        super().__init__(outcome, TROUBLES[seed % len(TROUBLES)], has_log=chance.random() < 0.85)
        self.path, self.seed = path, seed
        self.units, self.tickets = list[Unit](), dict[int, Any]()
        self.loops: list[asyncio.AbstractEventLoop] = []
        self.all_loops = threading.Barrier(LOOPS)
        self.is_closed_early = chance.random() < 0.3
        self.has_pauses = chance.random() < 0.2
        self.switch_interval = chance.choice([0.005, 0.00001, 0.1])  # seconds
        self.is_slow = chance.random() < 0.5
        self.of_statements = random.Random(seed)

    def options(self) -> dict[str, Any]:
        chance = self.chance
        options: dict[str, Any] = {"synchronous": chance.choice(["OFF", "NORMAL"]), "slow_after": 60}
        if self.is_slow:
            options["on_connect"] = self.slow_down
        if not self.has_log:
            options["journal_mode"] = "DELETE"
        if chance.random() < 0.5:
            options["max_hold"] = chance.choice([0.02, 0.05, 0.2])
        if chance.random() < 0.3:
            options["readers"] = chance.choice([1, 2])
        if self.trouble == "full disk":
            options["pragmas"] = {"max_page_count": chance.randint(6, 30)}
        if self.trouble == "lock":
            options["lock_timeout"] = chance.choice([0.05, 0.1, 10])
        return options

    def slow_down(self, connection: sqlite3.Connection, readonly: bool) -> None:
        """A statement that takes its time leaves time for all else to happen meanwhile."""
        connection.set_trace_callback(self.linger)

    def linger(self, sql: str) -> None:
        if self.of_statements.random() < 0.3:
            sleep(self.of_statements.choice([0.0005, 0.003, 0.01]))

    def run(self) -> None:
        self.gateway = DbWriter(self.path, **self.options())
        self.gateway.run("CREATE TABLE t (n INTEGER PRIMARY KEY, unit INTEGER, text)")
        with holding_now_and_then(self.path, self.seed) if self.trouble == "lock" else contextlib.nullcontext():
            pauses = Pauses(self.seed) if self.has_pauses else contextlib.nullcontext()
            with pauses, switching_every(self.switch_interval):
                seeds = [self.chance.random() for _ in range(LOOPS)]
                at_once(*[functools.partial(asyncio.run, self.loop(random.Random(seed))) for seed in seeds])
            report = self.gateway.close(HANG)
        if report.unfinished:
            self.outcome.find(f"unfinished: {report}")
        self.judge()

    def judge(self) -> None:
        told, outcome = self.told, self.outcome
        for unit in self.units:
            unit.settle()
            outcome.notes["committed" if unit.committed else "rolled back"] += 1
        for n, ticket in self.tickets.items():
            if not ticket.done():
                outcome.find(f"the ticket of row {n} has no outcome after close")
                continue
            try:
                ticket.result(0)
            except BaseException:
                told.undone.add(n)
            else:
                told.there.add(n)
        told.judge(self.path, outcome)
        told.judge_callbacks(outcome)
        integrity(self.path, outcome, "the file")
        if self.has_log and names_in(self.path.parent) != [self.path.name]:
            outcome.find(f"left behind: {names_in(self.path.parent)}")

    # The loops --------------------------------------------------------------------------------------------------------

    async def loop(self, chance: random.Random) -> None:
        """Start tasks, and cancel some."""
        self.loops.append(asyncio.get_running_loop())
        closes = self.is_closed_early and len(self.loops) == 1
        await asyncio.to_thread(self.all_loops.wait, HANG)
        db, tasks, watches = AsyncDbWriter.wrap(self.gateway), list[asyncio.Task[None]](), set[asyncio.Task[None]]()
        stories = [self.block] * 6 + [self.write] * 2 + [self.read, self.watch, self.share, self.share]
        for _ in range(chance.randint(5, 20)):
            story, own = chance.choice(stories), random.Random(chance.random())
            tasks.append(asyncio.create_task(self.guarded(story, db, own)))
            if story == self.watch:
                watches.add(tasks[-1])
            if chance.random() < 0.3:
                await asyncio.sleep(chance.random() * 0.005)
            if chance.random() < 0.2:
                chance.choice(tasks).cancel()
        for _ in range(chance.randint(0, 6)):
            await asyncio.sleep(chance.random() * 0.02)
            chance.choice(tasks).cancel()
        if closes:
            await asyncio.sleep(chance.random() * 0.03)
            await asyncio.to_thread(self.gateway.close)
        await self.end(set(tasks), watches)
        await asyncio.to_thread(self.all_loops.wait, HANG)  # the tasks of one use the other

    async def end(self, tasks: set[asyncio.Task[None]], watches: set[asyncio.Task[None]]) -> None:
        """``watches`` need not end by themselves; nor others, in time, while another process has the lock."""
        if self.is_closed_early:
            _, pending = await asyncio.wait(tasks, timeout=LONG)
        else:
            await asyncio.wait(tasks - watches or tasks, timeout=PATIENCE)
            for task in tasks:
                task.cancel()
            _, pending = await asyncio.wait(tasks, timeout=LONG)
        for task in pending:
            self.outcome.hung += 1
            self.outcome.find(f"a task does not end: {task!r}")

    async def guarded(self, story: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> None:
        try:
            await story(*arguments)
        except (Failed, OneWriterError, sqlite3.Error, TimeoutError):
            pass  # of the limits and troubles; what else comes is a fault
        except Exception:
            self.outcome.find(f"an error: {traceback.format_exc()[-1500:]}")

    # What a task does -------------------------------------------------------------------------------------------------

    def unit(self) -> Unit:
        unit = Unit(self.told)
        self.units.append(unit)
        return unit

    async def block(self, db: AsyncDbWriter, chance: random.Random) -> None:
        unit = self.unit()
        with unit.ending():
            async with db.transaction(max_hold=chance.choice([None, None, 0.02, 0.01, 0.003])) as tx:
                beginning = unit.mark()
                unit.keep_callbacks(tx)
                await Inside(self, db, unit, chance).steps(tx, beginning, 0)
                if chance.random() < 0.15:
                    raise Failed

    async def share(self, db: AsyncDbWriter, chance: random.Random) -> None:
        """Several tasks, of both loops, in one block, which may end before they do."""
        unit, helpers = self.unit(), list[asyncio.Future[None]]()
        has_parts = chance.random() < 0.5  # all: what is written beside the part of another task is undone with it

        async def helper(tx: AsyncTransaction, row: Row, fails: bool) -> None:
            try:
                async with tx.savepoint() if has_parts else contextlib.nullcontext():
                    await tx.execute(INSERT, row)
                    if fails:
                        raise Failed
            except Failed:
                unit.written.remove(row[0])
                unit.undone.add(row[0])
            unit.doubtful.discard(row[0])

        try:
            with unit.ending():
                async with db.transaction() as tx:
                    for _ in range(chance.randint(1, 5)):
                        row = self.row(unit.write(), unit.number, chance)
                        one = helper(tx, row, has_parts and chance.random() < 0.4)
                        if chance.random() < 0.5:
                            helpers.append(asyncio.ensure_future(one))
                        else:
                            sent = asyncio.run_coroutine_threadsafe(one, chance.choice(self.loops))
                            helpers.append(asyncio.wrap_future(sent))
                    if chance.random() < 0.7:
                        await asyncio.gather(*helpers)
                    if chance.random() < 0.2:
                        raise Failed
        finally:
            await asyncio.gather(*helpers, return_exceptions=True)

    async def write(self, db: AsyncDbWriter, chance: random.Random) -> None:
        """A write of its own."""
        n = self.told.number()
        row, way = self.row(n, -1, chance), chance.randrange(5)
        try:
            if way == 0:
                await db.run(INSERT, row, timeout=chance.choice([30, 0.001, 0.01]))
            elif way == 1:
                await db.run(functools.partial(self.function, row, chance.random() < 0.3))
            elif way == 2:
                await asyncio.wait_for(db.run(INSERT, row), chance.random() * 0.02)
            else:
                ticket = self.tickets[n] = db.enqueue(INSERT, row)  # whose outcome says what becomes of it
                if way == 3:
                    await ticket
                if await db.read("SELECT n FROM t WHERE n = ?", (n,), after=ticket) != [(n,)]:
                    self.outcome.find(f"a read after row {n} does not see it")
        except WriteTimeoutError as error:
            if way < 3:
                self.tickets[n] = error.ticket
        except (asyncio.CancelledError, TimeoutError):
            self.told.unknown.add(n)
            raise
        except (Failed, OneWriterError, sqlite3.Error):
            if way < 3:
                self.told.undone.add(n)
        else:
            self.told.there.add(n)

    def function(self, row: Row, fails: bool, tx: Transaction) -> None:
        self.gateway.run(INSERT, row)
        if fails:
            raise Failed

    async def read(self, db: AsyncDbWriter, chance: random.Random) -> None:
        if chance.random() < 0.6:
            async with contextlib.aclosing(self.stream(db, chance)) as rows:
                async for _ in rows:
                    if chance.random() < 0.02:
                        break
        else:  # the loop closes the generator
            async for _ in self.stream(db, chance):
                if chance.random() < 0.05:
                    break

    async def stream(self, db: AsyncDbWriter, chance: random.Random) -> AsyncGenerator[Any, None]:
        async with db.reader() as reader:
            counts = (await reader.execute(COUNT)).fetchall()
            streamed = 0
            async for row in reader.stream("SELECT n FROM t"):
                streamed += 1
                yield row
                if chance.random() < 0.05:
                    await asyncio.sleep(0.001)
            counts += [(streamed,), *(await reader.execute(COUNT)).fetchall()]
            if len(set(counts)) != 1:
                self.outcome.find(f"a snapshot changed: {counts}")

    async def watch(self, db: AsyncDbWriter, chance: random.Random) -> None:
        last: Any = None
        async with db.watch("SELECT count(*), total(n) FROM t", every=0.002) as live:
            async for rows in live:
                if rows == last:
                    self.outcome.find(f"a watch gives the same twice: {rows}")
                last = rows
                if chance.random() < 0.1:
                    break


@contextlib.contextmanager
def switching_every(seconds: float) -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextlib.contextmanager
def holding_now_and_then(path: Path, seed: int) -> Iterator[None]:
    """Another process has SQLite's write lock more often than not."""
    with subprocess.Popen(child(HOLDER, path, seed), env=environment()) as process:
        try:
            yield
        finally:
            process.kill()


def run(size: int, seed: int, folder: Path) -> Outcome:
    """``size`` programs, with the seeds from ``seed`` on; each third one with the same trouble."""
    outcome = Outcome()
    for number in range(seed, seed + size):
        faulthandler.dump_traceback_later(HANG * 2, exit=True)
        place, before = folder / str(number), len(outcome.findings)
        place.mkdir()
        program = Program(place / "app.db", number, outcome)
        program.run()
        outcome.trials += 1
        found = outcome.findings[before:]
        outcome.findings[before:] = [f"program {number}, {program.trouble}: {text}" for text in found]
    faulthandler.cancel_dump_traceback_later()
    return outcome
