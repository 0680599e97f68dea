"""Tasks whose timeouts and cancellations come in the same moments as everything else."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from experiments import HANG, Outcome, integrity
from onewriter import AsyncDbWriter, ReadTimeoutError, WriteTimeoutError

TASKS = 16
INSERT = "INSERT INTO t VALUES (?)"


def run(size: int, seed: int, folder: Path) -> Outcome:
    """``size`` operations by sixteen tasks; many are cancelled, or have next to no time."""
    outcome = Outcome()
    asyncio.run(_load(outcome, size, seed, folder / "app.db"))
    integrity(folder / "app.db", outcome, "tasks")
    return outcome


async def _load(outcome: Outcome, size: int, seed: int, path: Path) -> None:
    acknowledged: list[int] = []
    unknown: list[int] = []

    async def one(db: AsyncDbWriter, chance: random.Random, n: int) -> None:
        timeout = chance.choice([0.0, 0.001, 0.003, 0.01, 30.0])
        way = chance.randrange(5)
        if way == 0:
            await db.run(INSERT, (n,), timeout=timeout)
        elif way == 1:
            async with db.transaction(timeout=timeout) as tx:
                await tx.execute(INSERT, (n,))
                if chance.random() < 0.2:
                    raise LookupError
        elif way == 2:
            async with db.transaction(timeout=timeout) as tx, tx.savepoint():
                await tx.execute(INSERT, (n,))
        elif way == 3:
            await db.read("SELECT count(*) FROM t", timeout=timeout)
        else:
            async with db.reader(timeout=timeout) as reader:
                await reader.execute("SELECT count(*) FROM t")
        if way < 3:
            acknowledged.append(n)

    async def task(db: AsyncDbWriter, number: int) -> None:
        chance = random.Random(seed * TASKS + number)
        for n in range(number, size, TASKS):
            operation = asyncio.create_task(one(db, chance, n))
            if chance.random() < 0.5:
                await asyncio.sleep(chance.choice([0.0, 0.0001, 0.001, 0.003]))
                operation.cancel()
            done, _ = await asyncio.wait([operation], timeout=HANG)
            if not done:
                outcome.hung += 1
                outcome.find(f"operation {n} hangs: {db.health}")
                return
            outcome.trials += 1
            try:
                operation.result()
            except (asyncio.CancelledError, WriteTimeoutError):
                unknown.append(n)
            except (LookupError, ReadTimeoutError):
                pass
            except BaseException as error:
                outcome.find(f"operation {n}: {error!r}")

    async with AsyncDbWriter(path, readers=2, slow_after=60) as db:
        await db.run("CREATE TABLE t (n)")
        await asyncio.gather(*[task(db, number) for number in range(TASKS)])
        await db.run("CREATE TABLE after (n)", timeout=HANG)
        if db.stats().readers_in_use:
            outcome.find("a connection was lost")
        rows = [n for (n,) in await db.read("SELECT n FROM t")]
    outcome.acknowledged = len(acknowledged)
    outcome.lost = len(set(acknowledged) - set(rows))
    if len(rows) != len(set(rows)) or not set(rows) <= set(acknowledged) | set(unknown):
        outcome.find("rows that nobody wrote, or twice")
