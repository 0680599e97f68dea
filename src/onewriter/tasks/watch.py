"""AsyncWatch: a task's ``async with db.watch(…)``."""

from __future__ import annotations

import asyncio
import functools
import math
import weakref
from collections.abc import AsyncIterator
from time import monotonic
from typing import Self, TypeVar

from onewriter.base.arguments import check_timeout
from onewriter.base.strict import Strict
from onewriter.base.task_waits import within
from onewriter.base.waiting import seconds_until
from onewriter.live.hub import LiveQueries
from onewriter.live.query import Answer, Reading
from onewriter.live.watch import WAIT, Step, Watching
from onewriter.read.read import Read
from onewriter.tasks.reader import TaskReads

T = TypeVar("T")


class AsyncWatch(Strict, Watching[T]):
    """What ``AsyncDbWriter.watch`` returns: as ``Watch``, for ``async with`` and ``async for``.

    After a cancelled wait or read, ``next`` can be called again. Tasks of any event loop may iterate, and any of them
    may leave the block.
    """

    def __init__(
        self, live: LiveQueries, read: Read[T], key: object, every: float, gateway: object, reads: TaskReads
    ) -> None:
        super().__init__(live, read, key, every, gateway)
        self._reads = reads

    async def __aenter__(self) -> Self:
        self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._leave()

    def close(self) -> None:
        """End the watch before the block ends. Not a coroutine."""
        self._leave()

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        answer = await self._wait(None)
        if answer is None:
            raise StopAsyncIteration
        return self._rows(answer)

    async def next(self, timeout: float | None = None) -> T:
        """As ``Watch.next``."""
        check_timeout(timeout)
        answer = await self._wait(timeout)
        if answer is None:
            raise self._ended()
        return self._rows(answer)

    async def _wait(self, timeout: float | None) -> Answer | None:
        until = math.inf if timeout is None else monotonic() + timeout
        loop = asyncio.get_running_loop()
        while True:
            future: asyncio.Future[None] = loop.create_future()
            step = self._next_step(functools.partial(weakref.ref, future))
            if step.answer is not None:
                if self._is_news(step.answer):
                    return step.answer
            elif step.reading is not None:
                await self._use_thread(step.reading, until)
            elif step.signal is None:
                return None
            elif not await self._sleep(future, step, until):
                raise self._late(timeout)

    async def _use_thread(self, reading: Reading, until: float) -> None:
        try:
            if self._reads.here() is None:
                await self._reads.use(reading.label, functools.partial(self._live.read, reading), until)
            else:  # this task may have the last connection, in a reader() block
                self._refuse_in_reader(awaits=True)
                self._live.finish(reading, await self._reads.call(self._live.read_beside, reading))
        except BaseException as error:
            self._failed(reading, error)

    async def _sleep(self, future: asyncio.Future[None], step: Step, until: float) -> bool:
        """Wait for ``future``, the signal of ``step``; False: not before ``until``."""
        try:
            self._live.state.refuse_endless_wait(WAIT, awaits=True)
            with within(future, seconds_until(min(until, step.until))):
                await future
            return monotonic() < until
        finally:
            self._forget(step)
