"""How tasks wait: each loop has time limits of its own, and alone keeps its tasks."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from aio_helpers import beats, run, until
from helpers import DEADLINE, eventually, in_threads, parked
from onewriter import AsyncDbWriter, DbWriter, WriteTimeoutError
from onewriter.base import task_waits
from onewriter.base.task_waits import TICK, TaskWaits, waits_of, within


def test_each_loop_has_its_own_timeouts(path: Path) -> None:
    with DbWriter(path) as inner:
        shared = AsyncDbWriter.wrap(inner)

        async def leave() -> None:
            await shared.run("SELECT 1")  # the loop ends before the look at its timeouts

        async def wait() -> None:
            with parked(inner), pytest.raises(WriteTimeoutError):
                await shared.run("SELECT 1", timeout=1.0)

        run(leave)
        run(wait)


@pytest.mark.parametrize("timeout", [0.5, 30.0])
def test_what_waits_in_a_loop_that_was_closed_is_collected(path: Path, timeout: float) -> None:
    with DbWriter(path) as inner:
        shared = AsyncDbWriter.wrap(inner)
        with parked(inner):
            loops = [asyncio.new_event_loop() for _ in range(3)]
            for loop in loops:
                task = loop.create_task(shared.run("SELECT 1", timeout=timeout))
                loop.call_soon(loop.stop)
                loop.run_forever()
                loop.close()
                del task
            alive = [weakref.ref(loop) for loop in loops]
            del loops, loop
        inner.run("SELECT 1")
        eventually(lambda: gc.collect() >= 0 and [one() for one in alive] == [None] * 3)


def test_a_task_that_is_collected_while_its_loop_looks_who_is_late_keeps_no_other_waiting() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        waits = TaskWaits(loop)
        first, second = loop.create_future(), loop.create_future()

        class Collecting(float):
            def __le__(self, now: float) -> bool:
                waits.remove(second, None)
                return super().__le__(now)

        for future in (first, second):
            waits.add(future, 1.0)
            waits._waiting[future] = Collecting(0.0)
        await first
        assert not waits._waiting

    run(main)


def test_a_look_at_the_deadlines_that_is_interrupted_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> float:
        monkeypatch.undo()
        raise LookupError

    async def main() -> None:
        loop = asyncio.get_running_loop()
        told: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _, context: told.append(context))
        future = loop.create_future()
        task_waits.waits_of(loop).add(future, 1.0)
        monkeypatch.setattr(task_waits, "monotonic", interrupted)
        async with asyncio.timeout(DEADLINE):
            await future
        assert isinstance(told[0]["exception"], LookupError)

    run(main)


class Timers:
    """What is noted of a loop's timers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[asyncio.TimerHandle] = []
        self._later = asyncio.get_running_loop().call_later
        monkeypatch.setattr(asyncio.get_running_loop(), "call_later", self._note)

    def _note(self, delay: float, callback: Any, *args: Any, **options: Any) -> asyncio.TimerHandle:
        timer = self._later(delay, callback, *args, **options)
        if getattr(callback, "__module__", "").startswith("onewriter."):  # and not asyncio's own
            self.made.append(timer)
        return timer


def test_many_waits_have_one_look_and_it_ends_with_the_last_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        timers = Timers(monkeypatch)
        futures = [loop.create_future() for _ in range(10)]
        with contextlib.ExitStack() as stack:
            for timeout, future in zip([None, DEADLINE] * 5, futures, strict=True):
                stack.enter_context(within(future, timeout))
            assert len(timers.made) == 1
            await until(lambda: len(timers.made) > 2)
        made = len(timers.made)
        await until(lambda: loop.time() > timers.made[-1].when() + TICK)
        assert len(timers.made) == made
        with within(futures[0], None):  # and begins again
            assert len(timers.made) == made + 1

    run(main)


def test_a_short_wait_takes_its_timer_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        timers = Timers(monkeypatch)
        with within(asyncio.get_running_loop().create_future(), 0.9):
            pass
        (timer,) = timers.made
        assert timer.cancelled()

    run(main)


def test_a_wait_without_a_limit_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        timers, future = Timers(monkeypatch), asyncio.get_running_loop().create_future()
        with within(future, None):
            monkeypatch.setattr(task_waits, "monotonic", lambda: 1e300)
            await until(lambda: len(timers.made) > 2)
            assert not future.done()

    run(main)


def test_the_look_keeps_nothing_of_the_task_that_waited_first() -> None:
    """Its context, say, while others wait."""

    class Request:
        pass

    request: contextvars.ContextVar[Request] = contextvars.ContextVar("request")

    async def main() -> None:
        loop, request_is_over = asyncio.get_running_loop(), asyncio.Event()
        other = loop.create_future()
        known: list[weakref.ref[Request]] = []

        async def first() -> None:
            request.set(Request())
            known.append(weakref.ref(request.get()))
            with within(loop.create_future(), None):
                await request_is_over.wait()

        task = asyncio.create_task(first())
        await asyncio.sleep(0)
        with within(other, None):
            request_is_over.set()
            await task
            del task
            await asyncio.sleep(0)  # asyncio's own step is over
            gc.collect()
            assert known[0]() is None

    run(main)


def test_each_thread_has_the_waits_of_its_own_loop() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with within(loop.create_future(), None):
            mine = waits_of(loop)
            assert mine.loop is loop
            in_threads(lambda: run(other))
            assert waits_of(loop) is mine

    async def other() -> None:
        loop = asyncio.get_running_loop()
        assert waits_of(loop).loop is loop

    run(main)


@pytest.mark.parametrize("how", ["told", "found", "cancelled"])
def test_what_is_over_is_looked_at_no_more(how: str) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        signal, is_over, waits = loop.create_future(), asyncio.Event(), waits_of(loop)
        task = asyncio.create_task(waits.wait(signal, is_over.is_set))
        await beats(3, task)
        assert waits_of(loop) is waits
        if how == "told":
            signal.set_result(None)
        elif how == "found":
            is_over.set()
        else:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert (waits._looks, waits._waiting) == ({}, {})

    run(main)
