"""What a signal handler raises may come at any step of what a task does: nothing hangs, or stays with nobody.

Each such place of this package, in the loop's thread, is interrupted in its turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import types
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from aio_helpers import opened, run, until
from helpers import DEADLINE, pool_of
from interrupting import Interrupter, SignalError
from onewriter import AsyncDbWriter
from onewriter.read.reader import Reader

INSERT = "INSERT INTO t VALUES (?)"
MOST_STEPS = 1000


class InTasks(Interrupter):
    """Not where the loop wakes a task: asyncio logs what is raised there, and goes on."""

    def _look(self, frame: types.FrameType, event: str, found: object) -> None:
        if frame.f_code.co_name not in ("resolve", "_resolve_each", "_tick", "_resolve_late"):
            super()._look(frame, event, found)


async def read(db: AsyncDbWriter, path: Path) -> None:
    await db.read("SELECT n FROM t")


async def reader(db: AsyncDbWriter, path: Path) -> None:
    async with db.reader() as snapshot:
        await snapshot.execute("SELECT n FROM t")


async def run_statement(db: AsyncDbWriter, path: Path) -> None:
    await db.run(INSERT, (1,))


async def block(db: AsyncDbWriter, path: Path) -> None:
    async with db.transaction() as tx:
        await tx.execute(INSERT, (1,))


async def savepoint(db: AsyncDbWriter, path: Path) -> None:
    await one_after_the_other(db, fails=False)


async def failing_savepoint(db: AsyncDbWriter, path: Path) -> None:
    with contextlib.suppress(LookupError):
        await one_after_the_other(db, fails=True)


async def one_after_the_other(db: AsyncDbWriter, *, fails: bool) -> None:
    """A savepoint that was interrupted keeps no other task from its own."""
    async with db.transaction() as tx:

        async def other() -> None:
            async with tx.savepoint():
                await tx.execute(INSERT, (2,))

        try:
            async with tx.savepoint():
                await tx.execute(INSERT, (1,))
                if fails:
                    raise LookupError
        finally:
            await asyncio.create_task(other())


async def cancelled_reader(db: AsyncDbWriter, path: Path) -> None:
    """Cancelled as it begins."""
    pin, loop, task = Reader.pin, asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def pin_later(reader: Reader) -> None:
        pin(reader)
        loop.call_soon_threadsafe(task.cancel)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reader, "pin", pin_later)
        with contextlib.suppress(asyncio.CancelledError):
            async with db.reader():
                pass
    task.uncancel()


async def cancelled_read(db: AsyncDbWriter, path: Path) -> None:
    """Cancelled as a thread has it."""
    reading = asyncio.create_task(db.read("SELECT n FROM t"))
    await asyncio.sleep(0)
    reading.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reading


async def watch(db: AsyncDbWriter, path: Path) -> None:
    async with db.watch("SELECT count(*) FROM t") as live:
        await live.next()


async def opening(db: AsyncDbWriter, path: Path) -> None:
    """Of another gateway; interrupted, it can be opened again."""
    other = AsyncDbWriter(path)
    try:
        await other.open()
    except SignalError:
        await asyncio.create_task(other.open())
        raise
    finally:
        await other.close()


async def interrupted(interrupter: Interrupter, work: Coroutine[Any, Any, None]) -> None:
    with interrupter:
        await work


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "work",
    [
        read,
        reader,
        run_statement,
        block,
        savepoint,
        failing_savepoint,
        cancelled_reader,
        cancelled_read,
        watch,
        opening,
    ],
)
def test_an_interrupt_at_any_step_leaves_nothing_behind(
    path: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[[AsyncDbWriter, Path], Coroutine[Any, Any, None]]
) -> None:
    async def main() -> None:
        monkeypatch.setattr(gc, "enable", lambda: None)  # what is lost is not to be found by chance
        async with opened(path, readers=1) as db:
            for step in range(1, MOST_STEPS):
                interrupter = InTasks(step)

                with contextlib.suppress(SignalError):
                    await asyncio.create_task(interrupted(interrupter, work(db, path)))
                async with asyncio.timeout(DEADLINE), db.transaction() as tx, tx.savepoint():
                    await tx.execute(INSERT, (step,))
                async with asyncio.timeout(DEADLINE), db.reader() as snapshot:
                    await snapshot.execute("SELECT n FROM t")
                await until(lambda: pool_of(db).in_use == 0)
                if not interrupter.where:
                    return
        pytest.fail("there are more steps than that")

    try:
        run(main)
    finally:
        monkeypatch.undo()
        gc.enable()
