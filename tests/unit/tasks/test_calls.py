"""How tasks wait for each other, and for what a thread does for them."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from aio_helpers import beats, opened, run, until
from helpers import DEADLINE, handling, parked, raising
from onewriter import AsyncDbWriter, AsyncReader, DbWriter, WriteTimeoutError
from onewriter.base import task_waits, threads
from onewriter.tasks import calls


def test_a_task_that_is_interrupted_as_it_lines_up_gets_no_turn() -> None:
    class Line(deque[Any]):
        def append(self, asker: object) -> None:
            super().append(asker)
            raise LookupError

    async def main() -> None:
        turn = calls.Turn()
        mine = turn.take()
        turn._line = Line()
        with pytest.raises(LookupError):
            await asyncio.create_task(turn.acquire())
        turn.release(mine)
        assert turn.take() is not None

    run(main)


def test_who_waits_for_its_turn_goes_on_though_a_signal_handler_raises_as_it_is_woken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        turn = calls.Turn()
        mine = turn.take()
        waiting = await beats(3, turn.acquire())
        with monkeypatch.context() as patched, pytest.raises(LookupError):
            patched.setattr(calls, "wake", raising(LookupError))
            turn.release(mine)
        turn.release(await waiting)

    run(main)


def test_flush_waits_until_what_the_writer_reports_is_logged(path: Path) -> None:
    logged, free = [], threading.Event()

    def emit(record: logging.LogRecord) -> None:
        free.wait(DEADLINE)
        logged.append(record.getMessage())

    async def main() -> None:
        with handling(emit), DbWriter(path) as inner:
            shared = AsyncDbWriter.wrap(inner)
            shared.enqueue("INSERT INTO missing VALUES (1)")
            asyncio.get_running_loop().call_later(0.1, free.set)
            await shared.flush()
            assert len(logged) == 1

    run(main)


def test_a_short_timeout_does_not_wait_for_the_tick_of_the_long_ones(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_waits, "TICK", 10 * DEADLINE)

    async def main() -> None:
        with DbWriter(path) as inner, parked(inner):
            async with asyncio.timeout(DEADLINE):
                with pytest.raises(WriteTimeoutError):
                    await AsyncDbWriter.wrap(inner).run("SELECT 1", timeout=0.05)

    run(main)


def test_tasks_of_several_loops_take_turns() -> None:
    """Also where one of the loops is closed before it is its turn."""
    turns: list[str] = []

    async def use(name: str) -> None:
        mine = await turn.acquire()
        turns.append(name)
        await asyncio.sleep(0)
        turn.release(mine)

    async def wait_for_ever() -> None:
        await turn.acquire()
        turns.append("never")

    async def hold() -> None:
        held = await turn.acquire()
        waiting.append(closed.create_task(wait_for_ever()))
        closed.call_soon(closed.stop)
        threads = [threading.Thread(target=asyncio.run, args=[use(name)]) for name in "ab"]
        await asyncio.to_thread(closed.run_forever)
        for thread in threads:
            thread.start()
        mine = [asyncio.create_task(use("c")), asyncio.create_task(use("given up"))]
        await until(lambda: len(turn._line) == 5)
        mine.pop().cancel()
        closed.close()
        turns.append("first")
        turn.release(held)
        await mine[0]
        for thread in threads:
            await asyncio.to_thread(thread.join, DEADLINE)

    turn = calls.Turn()
    closed = asyncio.new_event_loop()
    waiting: list[asyncio.Task[None]] = []
    run(hold)
    assert (turns[0], sorted(turns[1:])) == ("first", ["a", "b", "c"])
    assert turn._owner is None
    waiting.clear()
    gc.collect()  # here, since asyncio logs that


def test_a_task_that_is_cancelled_in_the_moment_of_its_turn_passes_it_on() -> None:
    async def main() -> None:
        turn = calls.Turn()
        held = await turn.acquire()
        first, second = (asyncio.create_task(turn.acquire()) for _ in range(2))
        await until(lambda: len(turn._line) == 2)
        turn.release(held)
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await second

    run(main)


def test_tasks_of_two_loops_share_a_reader(path: Path) -> None:
    async def count(reader: AsyncReader) -> None:
        for _ in range(20):
            assert (await reader.execute("SELECT count(*) FROM t")).rows == [(0,)]

    async def main() -> None:
        async with opened(path) as db, db.reader() as reader:
            other = asyncio.create_task(asyncio.to_thread(lambda: asyncio.run(count(reader))))
            await count(reader)
            await other

    run(main)


def test_a_task_whose_loop_is_closed_loses_its_turn_and_takes_none_from_who_has_it() -> None:
    turn, loop = calls.Turn(), asyncio.new_event_loop()
    lost = loop.run_until_complete(turn.acquire())

    async def main() -> None:
        acquired, release = asyncio.Event(), asyncio.Event()

        async def other() -> None:
            mine = await turn.acquire()
            acquired.set()
            await release.wait()
            turn.release(mine)

        next_one = await beats(5, other())
        loop.close()
        await acquired.wait()
        turn.release(lost)  # as that task is collected
        assert turn.take() is None
        release.set()
        await next_one
        assert turn.take() is not None

    run(main)


def test_a_task_that_was_interrupted_as_it_took_the_turn_does_not_wait_for_itself() -> None:
    async def main() -> None:
        turn = calls.Turn()
        assert turn.take() is not None  # Ctrl-C came before it was stored
        mine = turn.take()
        assert mine is not None
        assert await turn.acquire() is not mine

    run(main)


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_task_that_ended_without_giving_the_turn_back_has_lost_it(is_kept: bool) -> None:
    async def main() -> None:
        turn = calls.Turn()
        kept: list[Any] = []

        async def take() -> None:
            kept.append(asyncio.current_task() if is_kept else None)
            turn.take()

        await asyncio.create_task(take())
        async with asyncio.timeout(DEADLINE):
            mine = await turn.acquire()
        turn.release(mine)
        assert turn._owner is None

    run(main)


def test_a_turn_that_came_back_as_a_task_was_about_to_wait_for_it_is_given_to_that_task() -> None:
    async def main() -> None:
        turn = calls.Turn()
        assert turn.take() is not None
        waiting = await beats(3, turn.acquire())
        turn._owner = None
        turn.release(await waiting)

    run(main)


def test_where_no_task_runs_a_turn_is_kept_until_it_is_given_back() -> None:
    async def main() -> None:
        turn, loop = calls.Turn(), asyncio.get_running_loop()
        taken: list[Any] = []
        loop.call_soon(lambda: taken.extend([turn.take(), turn.take()]))
        await until(lambda: bool(taken))
        assert taken[1] is None
        turn.release(taken[0])

    run(main)


@pytest.mark.parametrize("where", ["as it waited", "as the thread was started"])
def test_what_a_thread_makes_for_a_task_that_was_interrupted_is_undone(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def start(thread: threading.Thread) -> None:
        threads.start(thread)
        raise KeyboardInterrupt

    class Interrupted(asyncio.Future[None]):
        def __await__(self) -> Any:
            raise KeyboardInterrupt

    async def main() -> None:
        loop = asyncio.get_running_loop()
        gate, undone = threading.Event(), threading.Event()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if where == "as it waited":
                patch.setattr(loop, "create_future", lambda: Interrupted(loop=loop))
            else:
                patch.setattr(calls, "start", start)
            await calls.in_thread(lambda: gate.wait(DEADLINE), lambda made: undone.set())
        gate.set()
        assert await asyncio.to_thread(undone.wait, DEADLINE)

    run(main)
