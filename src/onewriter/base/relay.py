"""Relay: threads that are woken together, each by the one before."""

from __future__ import annotations

import contextlib
from asyncio import Future
from collections import deque
from operator import methodcaller
from typing import Any

release = methodcaller("release")


class Relay:
    """``line`` has the locks by which threads are to be woken; each of them, once it is awake, wakes the next.

    All at once, they would wake only to wait again, for the GIL, which costs more than what each has to do.

    Threads: any. As long as there is a line, one is awake that will wake the next. One that is interrupted at that is
             made up for by those that wait: see ``wait_in_slices``.
    """

    def __init__(self) -> None:
        self.line: deque[Any] = deque()

    def line_up(self, waiters: list[Any]) -> list[Any]:
        """Have the threads among ``waiters`` wake one another; returns the futures of tasks.

        To be called where nobody can cease to wait: who does so afterwards finds itself in line.
        """
        if set(map(type, waiters)) == {Future}:  # as nearly always
            return waiters
        self.line.extend(waiter for waiter in waiters if not isinstance(waiter, Future))
        return [waiter for waiter in waiters if isinstance(waiter, Future)]

    def pass_on(self) -> None:
        """Wake the next, if there is one."""
        with contextlib.suppress(IndexError):
            # Taken out and woken in one step: what a signal handler raises in between would leave the thread asleep.
            next(map(release, iter(self.line.popleft, None)))

    def leave(self, signal: Any) -> None:
        """Its thread has ceased to wait, and no outcome knows it any more."""
        try:
            self.line.remove(signal)
        except ValueError:
            self.pass_on()  # perhaps it was woken after all
