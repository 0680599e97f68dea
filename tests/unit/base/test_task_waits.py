"""How tasks wait: each loop has time limits of its own, and alone keeps its tasks."""

from __future__ import annotations

import asyncio
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from aio_helpers import run
from helpers import DEADLINE, eventually, parked
from onewriter import AsyncDbWriter, DbWriter, WriteTimeoutError
from onewriter.base import task_waits
from onewriter.base.task_waits import TaskWaits


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
