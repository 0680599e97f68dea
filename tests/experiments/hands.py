"""Blocks and readers that go from hand to hand: entered, used and left in different threads of pools and in different
tasks, with copied contexts, as frameworks do with the dependencies of a request, while others write there too.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import faulthandler
import gc
import itertools
import queue
import random
import sqlite3
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from experiments import HANG, Outcome, integrity
from onewriter import AsyncDbWriter, DbWriter, ReentrantWriteError, Transaction, WriteTimeoutError

STORIES = 4  # at once
INSERT = "INSERT INTO t VALUES (?)"
COUNT = "SELECT count(*) FROM t"


class Fate:
    """Which rows were acknowledged, which were undone, and of which nobody knows."""

    def __init__(self) -> None:
        self._next = itertools.count()
        self.there: set[int] = set()
        self.undone: set[int] = set()
        self.unknown: set[int] = set()

    def number(self) -> int:
        return next(self._next)

    def judge(self, path: Path, outcome: Outcome) -> None:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            rows = [n for (n,) in connection.execute("SELECT n FROM t")]
        found = set(rows)
        outcome.acknowledged += len(self.there)
        outcome.lost += len(self.there - found)
        if self.there - found:
            outcome.find(f"acknowledged, and not there: {sorted(self.there - found)[:9]}")
        if self.undone & found:
            outcome.find(f"rolled back or withdrawn, and there: {sorted(self.undone & found)[:9]}")
        if found - self.there - self.unknown - self.undone or len(found) != len(rows):
            outcome.find("rows that nobody wrote, or twice")


class PlainThread:
    """A thread with a queue of its own; what it runs has a context of its own, unless the caller gives one."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        context = contextvars.Context()
        self._calls.put((future, context.run, function, arguments))
        return future

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            future, run, function, arguments = call
            try:
                result = run(function, *arguments)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            del call, future, run, function, arguments

    def shutdown(self, wait: bool = True) -> None:
        self._calls.put(None)
        if wait:
            self._thread.join(HANG)


class Hands:
    """The threads in which one story happens; some are busy with the work of strangers, which waits."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._hands: list[Any] = [self._new() for _ in range(3)]
        self._busy: dict[Any, Future[Any]] = {}
        self.context = contextvars.copy_context()

    def _new(self) -> Any:
        return PlainThread() if self._chance.random() < 0.5 else ThreadPoolExecutor(1)

    def _free(self) -> list[Any]:
        return [hand for hand in self._hands if hand not in self._busy or self._busy[hand].done()]

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """In any thread that has nothing to do: in the story's context, in a copy of it, or in none."""
        hand, way = self._chance.choice(self._free()), self._chance.randrange(3)
        if way == 0:
            future = hand.submit(self.context.run, function, *arguments)
        elif way == 1:
            future = hand.submit(self.context.copy().run, function, *arguments)
        else:
            future = hand.submit(function, *arguments)
        return future.result(HANG)

    def stranger(self, function: Callable[..., Any], *arguments: Any) -> Future[Any] | None:
        """Work of somebody else in one of these threads; not in the last free one, or the story could not go on."""
        free = self._free()
        if len(free) < 2:
            return None
        hand = self._chance.choice(free)
        future: Future[Any] = hand.submit(function, *arguments)
        self._busy[hand] = future
        return future

    def lose_one(self) -> None:
        """The thread ends, and a new one comes in its place."""
        free = self._free()
        if free:
            hand = self._chance.choice(free)
            hand.shutdown()
            self._hands[self._hands.index(hand)] = self._new()

    def shutdown(self) -> None:
        for hand in self._hands:
            hand.shutdown()


class Teller:
    """Tells one story after another, in ``Hands`` of its own."""

    def __init__(self, db: DbWriter, seed: int, fate: Fate, outcome: Outcome) -> None:
        self.db, self.fate, self.outcome = db, fate, outcome
        self.chance = random.Random(seed)
        self.hands = Hands(self.chance)
        self.waiting: list[tuple[Future[Any], set[int]]] = []

    def tell(self, count: int) -> None:
        for _ in range(count):
            (self.block, self.block, self.reader)[self.chance.randrange(3)]()
            for future, rows in self.waiting:
                self.settle(future, rows)
            self.waiting.clear()
            self.outcome.trials += 1
        self.hands.shutdown()

    def settle(self, future: Future[Any], rows: set[int]) -> None:
        try:
            future.result(HANG)
        except WriteTimeoutError as error:
            (self.fate.unknown if error.started else self.fate.undone).update(rows)
        except LookupError:
            self.fate.undone.update(rows)
        else:
            self.fate.there.update(rows)

    def strangers(self) -> None:
        """Others write in these threads meanwhile."""
        for _ in range(self.chance.randrange(3)):
            n, way = self.fate.number(), self.chance.randrange(5)
            if way == 0:
                future = self.hands.stranger(self.db.run, INSERT, (n,))
            elif way == 1:
                future = self.hands.stranger(lambda n=n: self.db.run(INSERT, (n,), timeout=0.002))
            elif way == 2:
                future = self.hands.stranger(lambda n=n: self.db.enqueue(INSERT, (n,)).result(HANG))
            elif way == 3:
                future = self.hands.stranger(self.whole_block, n)
            else:
                future = self.hands.stranger(self.db.read, COUNT)
            if future is not None:
                self.waiting.append((future, {n} if way != 4 else set()))

    def whole_block(self, n: int) -> None:
        with self.db.transaction() as tx:
            tx.execute(INSERT, (n,))
            if n % 3 == 0:
                raise LookupError

    def block(self) -> None:
        """A block, from its entry to its end, of one of several kinds."""
        rows: set[int] = set()

        def dependency() -> Iterator[Transaction]:
            with self.db.transaction() as tx:
                yield tx

        story: Any = dependency()
        tx = self.hands.call(next, story)
        for _ in range(self.chance.randrange(5)):
            self.strangers()
            if self.chance.random() < 0.15:
                self.hands.lose_one()
            rows |= self.hands.call(self.write, tx, rows)
        self.strangers()
        end = self.chance.choice(["next", "next", "throw", "close", "drop"])
        if end == "next":
            self.hands.call(next, story, None)
        elif end == "throw":
            with contextlib.suppress(LookupError):
                self.hands.call(story.throw, LookupError())
        elif end == "close":
            self.hands.call(story.close)
        del story, tx
        (self.fate.there if end == "next" else self.fate.undone).update(rows)

    def write(self, tx: Transaction, before: set[int]) -> set[int]:
        """A part of the block, in whatever thread: returns the rows that it has added."""
        n, way = self.fate.number(), self.chance.randrange(5)
        if way == 0:
            tx.execute(INSERT, (n,))
        elif way == 1:
            tx.connection.executemany(INSERT, [(n,)])
            tx.connection.commit()
        elif way == 2:
            with tx.savepoint():
                tx.execute(INSERT, (n,))
        else:
            with contextlib.suppress(LookupError), tx.savepoint():
                tx.execute(INSERT, (n,))
                raise LookupError
            self.fate.undone.add(n)
        there = {n for (n,) in tx.execute("SELECT n FROM t")}
        if not before <= there or there & self.fate.undone:
            self.outcome.find("a block does not see its own rows, or sees what was undone")
        return set() if way > 2 else {n}

    def reader(self) -> None:
        """A snapshot that stays as it is, wherever it is used."""

        def dependency() -> Iterator[sqlite3.Connection]:
            with self.db.reader() as connection:
                yield connection

        story: Any = dependency()
        connection = self.hands.call(next, story)
        before = self.hands.call(seen, connection)
        for _ in range(self.chance.randrange(4)):
            self.strangers()
            if self.chance.random() < 0.15:
                self.hands.lose_one()
            if self.hands.call(seen, connection) != before:
                self.outcome.find("a snapshot changed")
        if self.chance.random() < 0.8:
            self.hands.call(next, story, None)
        del story, connection


def seen(connection: sqlite3.Connection) -> Any:
    return connection.execute(COUNT).fetchone()


async def tasks(shared: AsyncDbWriter, db: DbWriter, seed: int, count: int, fate: Fate, outcome: Outcome) -> None:
    """The same with tasks: each step of a story is one, and strangers are others."""
    chance = random.Random(seed)
    strangers: list[tuple[asyncio.Task[Any], int]] = []

    async def step(awaitable: Any) -> Any:
        context = contextvars.copy_context() if chance.random() < 0.5 else contextvars.Context()

        async def here() -> Any:
            return await awaitable

        return await asyncio.wait_for(asyncio.create_task(here(), context=context), HANG)

    def stranger() -> None:
        n = fate.number()
        timeout = chance.choice([0.0, 0.002, HANG])
        strangers.append((asyncio.create_task(shared.run(INSERT, (n,), timeout=timeout)), n))

    async def dependency() -> AsyncIterator[Any]:
        async with shared.transaction() as tx:
            yield tx

    async def story() -> None:
        rows, generator = set[int](), dependency()
        tx = await step(anext(generator))
        for _ in range(chance.randrange(4)):
            stranger()
            n = fate.number()
            await step(tx.execute(INSERT, (n,)))
            rows.add(n)
        fails = chance.random() < 0.4
        if fails:
            with contextlib.suppress(LookupError):
                await step(generator.athrow(LookupError()))  # type: ignore[attr-defined]
        else:
            await step(anext(generator, None))
        (fate.undone if fails else fate.there).update(rows)

    async def block_of_thread() -> None:
        """A block of threads in a task, which waits in its midst: others run in this thread meanwhile."""
        n = fate.number()
        try:
            with db.transaction(timeout=HANG) as tx:
                stranger()
                await asyncio.sleep(0)
                tx.execute(INSERT, (n,))
        except ReentrantWriteError:  # another task of this thread has the writer: to wait would be for ever
            fate.undone.add(n)
        else:
            fate.there.add(n)

    for _ in range(count):
        await asyncio.gather(*[chance.choice([story, story, block_of_thread])() for _ in range(STORIES)])
        for task, n in strangers:
            try:
                await asyncio.wait_for(task, HANG)
            except WriteTimeoutError as error:
                (fate.unknown if error.started else fate.undone).add(n)
            else:
                fate.there.add(n)
        strangers.clear()
        outcome.trials += STORIES


def run(size: int, seed: int, folder: Path) -> Outcome:
    """``size`` stories in threads for each of four tellers, and as many in tasks."""
    outcome, fate, path = Outcome(), Fate(), folder / "app.db"
    errors: list[str] = []  # as text: an error refers to the block in which it was raised
    faulthandler.dump_traceback_later(HANG * 2 + size, exit=True)
    with DbWriter(path, readers=2, slow_after=60) as db:
        db.run("CREATE TABLE t (n)")

        def guarded(function: Callable[[int], object], number: int) -> None:
            try:
                function(number)
            except BaseException:
                errors.append(traceback.format_exc()[-800:])

        def loop(number: int) -> None:
            asyncio.run(tasks(AsyncDbWriter.wrap(db), db, seed * 100 + number, size, fate, outcome))

        def teller(number: int) -> None:
            Teller(db, seed * 100 + number, fate, outcome).tell(size)

        work = [(teller, number) for number in range(STORIES)] + [(loop, STORIES)]
        threads = [threading.Thread(target=guarded, args=one, daemon=True) for one in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG * 2)
            if thread.is_alive():
                outcome.hung += 1
                outcome.find(f"a story does not end: {db.health}")
        db.run("CREATE TABLE after (n)", timeout=HANG)
        gc.collect()
        if db.stats().readers_in_use:
            outcome.find("a connection was lost")
        report = db.close(HANG)
    if report.unfinished:
        outcome.find(f"unfinished: {report}")
    faulthandler.cancel_dump_traceback_later()
    outcome.findings += [f"an error: {error}" for error in errors]
    fate.judge(path, outcome)
    integrity(path, outcome, "hands")
    return outcome
