"""What a task of a program does inside its block: writes in every way, parts in parts, callbacks, rollbacks, reads."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
from collections.abc import Awaitable
from time import monotonic
from typing import Any

from experiments import Outcome
from experiments.told import Mark, Told, Unit, was_kept
from onewriter import AsyncDbWriter, AsyncTransaction, DbWriter, OneWriterError, Transaction

LARGEST_DEPTH = 3  # of parts in parts
INSERT = "INSERT INTO t VALUES (?, ?, ?)"
MINE = "SELECT n FROM t WHERE unit = ?"
Row = tuple[int, int, str]


class Failed(Exception):
    """What a task raises to fail a block or part."""


class Shared:
    """What all tasks of one program use."""

    gateway: DbWriter

    def __init__(self, outcome: Outcome, trouble: str, has_log: bool) -> None:
        self.outcome, self.trouble, self.has_log = outcome, trouble, has_log
        self.told = Told()

    def row(self, n: int, unit: int, chance: random.Random) -> Row:
        return n, unit, "z" * (chance.choice([1, 10, 3000]) if self.trouble == "full disk" else 1)


class Inside:
    """What one task does inside its block."""

    def __init__(self, shared: Shared, db: AsyncDbWriter, unit: Unit, chance: random.Random) -> None:
        self.shared, self.db, self.unit, self.chance = shared, db, unit, chance
        self.find = shared.outcome.find
        self.inserts = (self.by_transaction, self.by_gateway, self.as_many, self.beside_another, self.by_function)

    async def steps(self, tx: AsyncTransaction, beginning: Mark, depth: int) -> None:
        """``beginning``: of the part that they are in."""
        for _ in range(self.chance.choice([1, 1, 2, 3, 4])):
            way = self.chance.randrange(20)
            if way < 7:
                if not await self.insert(tx) and depth and self.chance.random() < 0.5:
                    raise Failed
            elif way < 14 and depth < LARGEST_DEPTH:
                await self.part(tx, depth)
            elif way < 16:
                await self.look()
            elif way < 18 and self.shared.has_log:
                await self.look_from_outside()
            elif way == 18:
                await tx.rollback()
                self.unit.undo(beginning)
            else:
                await asyncio.sleep(self.chance.choice([0, 0, 0.001, 0.03]))

    async def insert(self, tx: AsyncTransaction) -> bool:
        """Whether it came to its end. What is given up goes on while the task does, perhaps beyond the block."""
        n = self.unit.write()
        row, insert = self.shared.row(n, self.unit.number, self.chance), self.chance.choice(self.inserts)
        if self.chance.random() < 0.75:
            await insert(tx, row)
        else:
            try:
                await asyncio.wait_for(insert(tx, row), self.chance.random() * 0.002)
            except OneWriterError:
                raise
            except TimeoutError:
                return False
        self.unit.doubtful.discard(n)
        return True

    # Not coroutine functions: what a call belongs to is decided where it is made, and that must not be in another task.

    def by_transaction(self, tx: AsyncTransaction, row: Row) -> Awaitable[object]:
        return tx.execute(INSERT, row)

    def by_gateway(self, tx: AsyncTransaction, row: Row) -> Awaitable[object]:
        return self.db.run(INSERT, row)

    def as_many(self, tx: AsyncTransaction, row: Row) -> Awaitable[object]:
        return self.db.run_many(INSERT, [row])

    def beside_another(self, tx: AsyncTransaction, row: Row) -> Awaitable[object]:
        return asyncio.gather(self.db.run(INSERT, row), tx.execute("SELECT 1"))

    def by_function(self, tx: AsyncTransaction, row: Row) -> Awaitable[object]:
        return self.db.run(functools.partial(self.function, row))

    def function(self, row: Row, tx: Transaction) -> None:
        """On the writer's thread, in the block."""
        gateway, unit = self.shared.gateway, self.unit
        gateway.run(INSERT, row)
        with contextlib.suppress(Failed), tx.savepoint():
            lost = self.shared.told.number()
            unit.undone.add(lost)
            gateway.run(INSERT, (lost, unit.number, ""))
            raise Failed
        seen = gateway.read(MINE, (unit.number,))
        if row[:1] not in seen or (lost,) in seen:
            self.find(f"a function does not see row {row[0]} of its own, or sees {lost}, which was undone: {seen}")

    async def part(self, tx: AsyncTransaction, depth: int) -> None:
        """A savepoint, or a block in the block; it may fail, or have little time."""
        chance, unit, beginning = self.chance, self.unit, self.unit.mark()
        manager: Any = tx.savepoint() if chance.random() < 0.5 else self.db.transaction()
        fails, limit = chance.random() < 0.5, chance.choice([None, None, chance.random() * 0.01])
        try:
            async with asyncio.timeout(limit), manager as nested:
                await self.steps(nested or tx, beginning, depth + 1)
                if chance.random() < 0.5:
                    unit.keep_callbacks(nested or tx)
                if fails:
                    raise Failed
        except Failed:
            unit.undo(beginning)
            if chance.random() < 0.2:
                compute(chance.random() * 0.01)
        except OneWriterError:
            raise
        except TimeoutError as error:
            if was_kept(error.__cause__):
                self.shared.outcome.notes["parts kept, although cancelled"] += 1
            else:
                unit.undo(beginning)

    async def look(self) -> None:
        unit = self.unit
        seen = {n for (n,) in await self.db.read(MINE, (unit.number,))}
        if not unit.certain <= seen <= set(unit.written):
            self.find(f"a block does not see {unit.certain - seen}, or sees {seen - set(unit.written)}")

    async def look_from_outside(self) -> None:
        async with self.db.reader() as reader:
            if (await reader.execute(MINE, (self.unit.number,))).fetchall():
                self.find("a reader sees what is not committed")
            async for _ in reader.stream("SELECT n FROM t"):
                if self.chance.random() < 0.3:
                    break


def compute(seconds: float) -> None:
    """Keep the loop, and the interpreter, from others: the writer thread comes late to what it was sent."""
    until = monotonic() + seconds
    while monotonic() < until:
        pass
