"""Savepoints of tasks that are left out of order, or are not left: as with threads, and without a wait for ever."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from aio_helpers import beats, opened, rows, run
from helpers import DEADLINE, raising
from onewriter import AsyncDbWriter, AsyncTransaction, TransactionClosedError
from onewriter.tasks import block

INSERT = "INSERT INTO t VALUES (?)"
Enter = Callable[[AsyncDbWriter, AsyncTransaction], contextlib.AbstractAsyncContextManager[Any]]
ENTERS: list[Enter] = [lambda _, tx: tx.savepoint(), lambda db, _: db.transaction()]
kinds = pytest.mark.parametrize("enter", ENTERS, ids=["savepoint", "nested block"])


async def part(entry: contextlib.AbstractAsyncContextManager[Any], tx: AsyncTransaction, n: int) -> AsyncIterator[None]:
    """Is in it, with a row, until it is asked for more."""
    async with entry:
        await tx.execute(INSERT, (n,))
        yield


async def write_in_savepoint(tx: AsyncTransaction, n: int, go_on: asyncio.Event | None = None) -> None:
    if go_on is not None:
        await go_on.wait()
    async with tx.savepoint():
        await tx.execute(INSERT, (n,))


@kinds
def test_one_that_is_left_before_one_of_the_same_task_inside_it_keeps_that_too(path: Path, enter: Enter) -> None:
    async def main() -> None:
        async with opened(path) as db:
            async with db.transaction() as tx:
                go_on = asyncio.Event()
                other = asyncio.create_task(write_in_savepoint(tx, 4, go_on))
                async with tx.savepoint():
                    generator = part(enter(db, tx), tx, 1)
                    await anext(generator)
                go_on.set()
                await other  # it has ended, though nobody has left it
                go_on.clear()
                other = asyncio.create_task(write_in_savepoint(tx, 3, go_on))
                async with tx.savepoint():
                    with pytest.raises(TransactionClosedError, match="savepoint"):
                        await anext(generator)
                    go_on.set()
                    waiting = await beats(3, other)  # for this one, which is open yet
                    await tx.execute(INSERT, (2,))
                await waiting
            assert await rows(db) == [1, 2, 3, 4]

    run(main)


@kinds
def test_one_that_has_ended_with_the_one_around_it_waits_for_no_other_task_as_it_is_left(
    path: Path, enter: Enter
) -> None:
    async def main() -> None:
        async with opened(path) as db:
            async with db.transaction() as tx:
                entered, leave = asyncio.Event(), asyncio.Event()

                async def other() -> None:
                    async with tx.savepoint():
                        await tx.execute(INSERT, (2,))
                        entered.set()
                        await leave.wait()

                generator = part(enter(db, tx), tx, 1)
                async with tx.savepoint():
                    await anext(generator)
                task = asyncio.create_task(other())
                await entered.wait()
                with pytest.raises(TransactionClosedError, match="savepoint"):
                    await anext(generator)
                leave.set()
                await task
            assert await rows(db) == [1, 2]

    run(main)


def test_one_of_another_task_that_has_ended_is_not_waited_for(path: Path) -> None:
    """It is between two of one task, as where both tasks have one context."""

    async def main() -> None:
        async with opened(path) as db:
            async with db.transaction() as tx:
                context = contextvars.copy_context()
                first, second, third = (asyncio.Event() for _ in range(3))

                async def between() -> None:
                    await first.wait()
                    with pytest.raises(LookupError):
                        async with tx.savepoint():
                            second.set()
                            await third.wait()
                            raise LookupError

                async def innermost() -> AsyncIterator[None]:
                    async with tx.savepoint():
                        yield

                async def around() -> None:
                    async with tx.savepoint():
                        first.set()
                        await second.wait()
                        generator = innermost()
                        await anext(generator)
                        third.set()
                        await task
                    with pytest.raises(TransactionClosedError, match="ended with the one around it"):
                        await anext(generator)

                loop = asyncio.get_running_loop()
                task = loop.create_task(between(), context=context)
                await loop.create_task(around(), context=context)
                await tx.execute(INSERT, (1,))
            assert await rows(db) == [1]

    run(main)


@kinds
def test_one_that_nobody_can_leave_is_undone_before_the_one_around_it_is_kept(path: Path, enter: Enter) -> None:
    async def main() -> None:
        async with opened(path) as db:
            async with db.transaction() as tx:
                async with tx.savepoint():
                    entry = enter(db, tx)
                    await entry.__aenter__()
                    await tx.execute(INSERT, (1,))
                    del entry
                await tx.execute(INSERT, (2,))
            assert await rows(db) == [2]

    run(main)


@kinds
def test_two_generators_in_lockstep_end_in_any_order(path: Path, enter: Enter) -> None:
    async def main() -> None:
        async with opened(path) as db:
            async with db.transaction() as tx:
                first, second = part(enter(db, tx), tx, 1), part(enter(db, tx), tx, 2)
                await anext(first)
                await anext(second)
                with pytest.raises(StopAsyncIteration):
                    await anext(first)
                with pytest.raises(TransactionClosedError, match="savepoint"):
                    await anext(second)
            assert await rows(db) == [1, 2]

    run(main)


def test_one_that_a_helping_task_has_entered_is_waited_for(path: Path) -> None:
    """As ``asyncio.shield`` or ``gather`` has it done: that this task has ended means nothing."""

    async def main() -> None:
        async with opened(path) as db:
            async with db.transaction() as tx:
                stack, order = contextlib.AsyncExitStack(), []
                await asyncio.shield(stack.enter_async_context(tx.savepoint()))

                async def other() -> None:
                    await write_in_savepoint(tx, 2)
                    order.append("other")

                waiting = await beats(3, other())
                await tx.execute(INSERT, (1,))
                order.append("first")
                await stack.__aexit__(LookupError, LookupError(), None)
                await waiting
            assert (order, await rows(db)) == (["first", "other"], [2])

    run(main)


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


def test_a_task_that_nobody_refers_to_waits_for_the_one_of_another(path: Path) -> None:
    """As for asyncio's own locks: in a loop that goes on, it is not collected in the midst of its wait."""

    async def main() -> None:
        async with opened(path) as db:
            async with db.transaction() as tx:
                around, done = contextvars.copy_context(), asyncio.Event()

                async def write() -> None:
                    await write_in_savepoint(tx, 2)
                    done.set()

                async with tx.savepoint():
                    asyncio.get_running_loop().call_soon(lambda: asyncio.create_task(write()), context=around)
                    await tx.execute(INSERT, (1,))
                    gc.collect()
                async with asyncio.timeout(DEADLINE):
                    await done.wait()
            assert await rows(db) == [1, 2]

    run(main)


def test_who_waits_for_one_goes_on_though_a_signal_handler_raises_as_it_is_woken(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with opened(path) as db:
            async with db.transaction() as tx:
                go_on = asyncio.Event()
                other = asyncio.create_task(write_in_savepoint(tx, 1, go_on))
                with monkeypatch.context() as patched, pytest.raises(LookupError):
                    async with tx.savepoint():
                        go_on.set()
                        waiting = await beats(3, other)
                        patched.setattr(block, "wake", raising(LookupError))
                await waiting
            assert await rows(db) == [1]

    run(main)
