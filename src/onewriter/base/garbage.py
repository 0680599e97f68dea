"""What a framework has dropped in a reference cycle, with the block it is inside: it is there until a collection."""

from __future__ import annotations

import contextlib
import gc
import threading

from onewriter.base.threads import start

LONG = 5.0  # seconds for which something is kept from others before it is looked for there: a collection stops all
MOST = 12  # times that, at most, from one look to the next


class Search:
    """When to look there for one thing: after ``pause`` seconds, and less and less often."""

    __slots__ = ("_at", "_pause")

    def __init__(self, since: float, pause: float) -> None:
        self._at, self._pause = since + pause, pause

    def is_due(self, now: float) -> bool:
        if now < self._at:
            return False
        self._pause = min(2 * self._pause, MOST * LONG)
        self._at = now + self._pause
        return True


def collect_soon() -> None:
    """Have the garbage collector run, unless the program has turned it off. In a thread of its own, since code of the
    user's that it finalizes may wait, or write.
    """
    if gc.isenabled():
        with contextlib.suppress(RuntimeError):  # the interpreter ends, or the system has no thread left
            start(threading.Thread(target=gc.collect, name="onewriter-collect", daemon=True))
