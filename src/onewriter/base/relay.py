"""Relay: threads that are woken together, each by the one before."""

from __future__ import annotations

import contextlib
from _thread import LockType
from collections import deque
from operator import methodcaller

release = methodcaller("release")


class Relay:
    """``line`` has the locks by which threads are to be woken; each of them, once it is awake, wakes the next.

    All at once, they would wake only to wait again, for the GIL, which costs more than what each has to do.

    Threads: any; what one does not come to, as it is interrupted, another one does when it next looks.
    """

    def __init__(self) -> None:
        self.line: deque[LockType] = deque()

    def pass_on(self) -> None:
        """Wake the next, if there is one."""
        with contextlib.suppress(IndexError):
            # Taken out and woken in one step: what a signal handler raises in between would leave the thread asleep.
            next(map(release, iter(self.line.popleft, None)))

    def leave(self, signal: LockType) -> None:
        """Its thread waits no more: it would not wake the next."""
        with contextlib.suppress(ValueError):
            self.line.remove(signal)
