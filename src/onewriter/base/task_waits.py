"""How tasks wait: with time limits, and kept by their loop alone."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from time import monotonic

from onewriter.base.waiting import Signal, resolve

TICK = 0.1  # seconds between two looks at what the tasks of a loop wait for


class TaskWaits:
    """What the tasks of one loop wait for, and until when.

    A few times a second it looks who is late, since one timer each costs too much. By that timer the loop keeps this,
    and so the futures, and so their tasks. What else knows a future of ours does so weakly: a loop that nobody refers
    to any more is collected with all its tasks, whatever they wait for, and what they have is given back.

    Threads: that of the loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._waiting: dict[asyncio.Future[None], float] = {}
        self._looks: dict[asyncio.Future[None], Callable[[], bool]] = {}  # of some of them: whether it is over
        self._ticks = False
        self._context = contextvars.Context()  # not the caller's: a look is nobody's, and would keep what it has

    def add(self, future: asyncio.Future[None], timeout: float | None) -> asyncio.TimerHandle | None:
        """Resolve ``future`` after so many seconds, None: never; returns what ``remove`` needs."""
        if timeout is not None and timeout < 1.0:  # a tick late would be late
            return self.loop.call_later(timeout, resolve, [future])
        self._waiting[future] = math.inf if timeout is None else monotonic() + timeout
        if not self._ticks:
            self.loop.call_later(TICK, self._tick, context=self._context)
            self._ticks = True  # not before: Ctrl-C may come, and two are no harm
        return None

    def remove(self, future: asyncio.Future[None], timer: asyncio.TimerHandle | None) -> None:
        if timer is None:
            self._waiting.pop(future, None)
        else:
            timer.cancel()

    async def wait(self, signal: asyncio.Future[None], is_over: Callable[[], bool]) -> None:
        """Wait for ``signal``, or until a look finds that ``is_over``: a signal handler may have raised where it was to
        be resolved."""
        try:
            self.add(signal, None)
            self._looks[signal] = is_over
            await signal
        finally:
            self._looks.pop(signal, None)
            self.remove(signal, None)

    def _tick(self) -> None:
        try:
            self._resolve_late()
            resolve([signal for signal, is_over in list(self._looks.items()) if is_over()])
        finally:  # whatever a signal handler has raised: asyncio logs it, and goes on
            self._ticks = False
            if self._waiting:
                self.loop.call_later(TICK, self._tick, context=self._context)
                self._ticks = True

    def _resolve_late(self) -> None:
        now = monotonic()
        waiting = list(self._waiting.items())  # copied in one step: a task that is collected meanwhile waits no more
        late = [future for future, until in waiting if until <= now]
        resolve(late)
        for future in late:
            self._waiting.pop(future, None)


class _Here(threading.local):
    last: Callable[[], TaskWaits | None] = type(None)


_here = _Here()


def waits_of(loop: asyncio.AbstractEventLoop) -> TaskWaits:
    """Those of the loop that runs in this thread."""
    waits = _here.last()
    if waits is None or waits.loop is not loop:
        waits = TaskWaits(loop)
        _here.last = weakref.ref(waits)
    return waits


@contextlib.contextmanager
def within(future: asyncio.Future[None], timeout: float | None) -> Iterator[None]:
    """For a task that waits for ``future``: resolve it after ``timeout`` seconds, if it is not resolved earlier."""
    waits, timer = waits_of(future.get_loop()), None
    try:
        timer = waits.add(future, timeout)
        yield
    finally:
        waits.remove(future, timer)


def new_signal(kept: list[asyncio.Future[None]]) -> Signal:
    """For one wait of the running task, which keeps the future in ``kept``."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    kept.append(future)
    return weakref.ref(future)
