"""Savepoints of tasks that are left out of order, or are not left: as with threads, and without a wait for ever."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from aio_helpers import left_in_a_closed_loop, opened, rows, run
from helpers import DEADLINE
from onewriter import AsyncDbWriter, AsyncTransaction, TransactionClosedError

INSERT = "INSERT INTO t VALUES (?)"
Enter = Callable[[AsyncDbWriter, AsyncTransaction], contextlib.AbstractAsyncContextManager[Any]]
ENTERS: list[Enter] = [lambda _, tx: tx.savepoint(), lambda db, _: db.transaction()]
kinds = pytest.mark.parametrize("enter", ENTERS, ids=["savepoint", "nested block"])


@kinds
def test_one_that_is_left_before_one_of_the_same_task_inside_it_keeps_that_too(path: Path, enter: Enter) -> None:
    async def inside(db: AsyncDbWriter, tx: AsyncTransaction) -> AsyncIterator[None]:
        async with enter(db, tx):
            await tx.execute(INSERT, (1,))
            yield

    async def main() -> None:
        async with opened(path) as db:
            async with db.transaction() as tx:
                async with tx.savepoint():
                    generator = inside(db, tx)
                    await anext(generator)
                with pytest.raises(TransactionClosedError, match="savepoint"):
                    await anext(generator)
                async with tx.savepoint():
                    await tx.execute(INSERT, (2,))
            assert await rows(db) == [1, 2]

    run(main)


@kinds
def test_two_generators_in_lockstep_end_in_any_order(path: Path, enter: Enter) -> None:
    async def part(db: AsyncDbWriter, tx: AsyncTransaction, n: int) -> AsyncIterator[None]:
        async with enter(db, tx):
            await tx.execute(INSERT, (n,))
            yield

    async def main() -> None:
        async with opened(path) as db:
            async with db.transaction() as tx:
                first, second = part(db, tx, 1), part(db, tx, 2)
                await anext(first)
                await anext(second)
                with pytest.raises(StopAsyncIteration):
                    await anext(first)
                with pytest.raises(TransactionClosedError, match="savepoint"):
                    await anext(second)
            assert await rows(db) == [1, 2]

    run(main)


def test_one_whose_task_has_ended_keeps_no_other_waiting(path: Path) -> None:
    """As of a fixture, whose end comes in another task; it ends with the one around it."""
    kept: list[Any] = []

    async def enters(tx: AsyncTransaction) -> None:
        kept.append(tx.savepoint())
        await kept[-1].__aenter__()
        await tx.execute(INSERT, (1,))

    async def main() -> None:
        async with opened(path) as db:
            async with db.transaction() as tx:
                async with tx.savepoint():
                    await asyncio.create_task(enters(tx))
                await asyncio.create_task(enters(tx))
                async with tx.savepoint():
                    await tx.execute(INSERT, (2,))
                await kept[-1].__aexit__(None, None, None)
            assert await rows(db) == [1, 1, 2]

    run(main)


def test_one_whose_loop_is_closed_keeps_no_other_waiting_though_its_task_is_referred_to(path: Path) -> None:
    tasks: list[Any] = []

    async def main() -> None:
        async with opened(path) as db, db.transaction() as tx:
            entered = asyncio.Event()

            async def part() -> None:
                tasks.append(asyncio.current_task())
                async with tx.savepoint():
                    await tx.execute(INSERT, (1,))
                    entered.set()
                    await asyncio.Event().wait()

            tasks.append(await asyncio.to_thread(left_in_a_closed_loop, part(), entered.is_set))
            async with tx.savepoint():
                await tx.execute(INSERT, (2,))

    run(main)
    tasks.clear()


def test_who_waits_for_one_is_told_when_max_hold_is_over(path: Path) -> None:
    async def main() -> None:
        async with opened(path) as db:
            with pytest.raises(TransactionClosedError):
                async with db.transaction(max_hold=0.05) as tx:
                    release = asyncio.Event()

                    async def holds() -> None:
                        async with tx.savepoint():
                            await release.wait()

                    holder = asyncio.create_task(holds())
                    await asyncio.sleep(0)
                    with pytest.raises(TransactionClosedError):
                        async with tx.savepoint():
                            pytest.fail("it was entered")
                    release.set()
                    with contextlib.suppress(TransactionClosedError):
                        await holder

    run(main)


@kinds
def test_one_that_is_open_behind_the_end_of_its_block_keeps_nobody_from_waiting(path: Path, enter: Enter) -> None:
    async def inside(db: AsyncDbWriter, tx: AsyncTransaction) -> AsyncIterator[None]:
        async with enter(db, tx):
            yield

    async def main() -> None:
        async with opened(path) as db:
            async with db.transaction() as tx:
                generator = inside(db, tx)
                await anext(generator)
            with pytest.raises(TransactionClosedError):
                await db.run(INSERT, (1,))  # which is inside the one that has ended
            await db.flush(DEADLINE)
            async with asyncio.timeout(DEADLINE):
                await db.close()
            with pytest.raises(TransactionClosedError):
                await anext(generator)

    run(main)
