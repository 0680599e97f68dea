"""Cancellation, loops and the end of a program, as asyncio programs meet them."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from pathlib import Path

import pytest

from helpers import DEADLINE, run_child
from onewriter import AsyncDbWriter, Transaction, WriterClosedError

INSERT = "INSERT INTO t VALUES (?)"


def rows_in(path: Path) -> list[tuple[int]]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return connection.execute("SELECT n FROM t ORDER BY n").fetchall()


@pytest.mark.parametrize("ending", ["", "raise SystemExit(3)", "raise LookupError('mine')", "await db.close()"])
def test_a_program_that_forgets_to_close_ends_and_has_written_all_it_enqueued(path: Path, ending: str) -> None:
    child = run_child(
        f"""
import asyncio
from onewriter import AsyncDbWriter
async def main():
    global db
    db = AsyncDbWriter({str(path)!r})
    await db.open()
    await db.run("CREATE TABLE t (n)")
    for n in range(500):
        db.enqueue("INSERT INTO t VALUES (?)", (n,))
    {ending or "pass"}
asyncio.run(main())
"""
    )
    assert child.returncode == {"raise SystemExit(3)": 3, "raise LookupError('mine')": 1}.get(ending, 0), child.stderr
    assert rows_in(path) == [(n,) for n in range(500)]


def test_an_interrupt_in_a_block_ends_the_program_and_undoes_the_block(path: Path) -> None:
    child = run_child(
        f"""
import asyncio, os, signal
from onewriter import AsyncDbWriter
async def main():
    async with AsyncDbWriter({str(path)!r}) as db:
        await db.run("CREATE TABLE t (n)")
        await db.run("INSERT INTO t VALUES (1)")
        async with db.transaction() as tx:
            await tx.execute("INSERT INTO t VALUES (2)")
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(30)
asyncio.run(main())
"""
    )
    assert "KeyboardInterrupt" in child.stderr
    assert rows_in(path) == [(1,)]


def test_calls_during_and_after_close_say_so(path: Path) -> None:
    async def main() -> None:
        db = await AsyncDbWriter(path).open()
        await db.run("CREATE TABLE t (n)")
        tasks = [asyncio.create_task(db.run(INSERT, (n,))) for n in range(200)]
        await asyncio.sleep(0)
        closing = asyncio.create_task(db.close())
        await asyncio.sleep(0)
        for call in (lambda: db.run(INSERT, (-1,)), lambda: db.read("SELECT 1")):
            with contextlib.suppress(WriterClosedError):
                await call()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        report = await closing
        written = sum(not isinstance(outcome, BaseException) for outcome in outcomes)
        assert all(isinstance(o, WriterClosedError) for o in outcomes if isinstance(o, BaseException))
        assert len([row for row in rows_in(path) if row[0] >= 0]) == written
        assert report.failed == 0

    asyncio.run(main())


def test_cancelled_waits_do_no_harm_to_the_writer(path: Path) -> None:
    async def main() -> None:
        async with AsyncDbWriter(path) as db:
            await db.run("CREATE TABLE t (n)")
            entered, release = threading.Event(), threading.Event()

            def slow(tx: Transaction) -> None:
                entered.set()
                release.wait(DEADLINE)
                tx.execute(INSERT, (1,))

            started = db.enqueue(slow)
            await asyncio.to_thread(entered.wait, DEADLINE)
            waiting = db.enqueue(INSERT, (2,))
            assert waiting.cancel()
            assert not started.cancel()
            for n in range(3, 23):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(asyncio.wrap_future(db.enqueue(INSERT, (n,)).future()), 0.001)
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(db.enqueue(INSERT, (n,)), 0.001)
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(db.run(INSERT, (n,)), 0.001)
            release.set()
            await started
            await db.run(INSERT, (99,))

    asyncio.run(main())
    assert rows_in(path) == [(1,), (99,)]
