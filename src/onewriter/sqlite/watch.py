"""Watch: ends a statement when its time is over."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator


class Watch:
    """Has SQLite ask, every so many steps of its virtual machine, whether ``is_over``, and end the statement then.

    Not by interrupt(): one that comes late would hit the next statement. Each question needs the GIL.
    A signal handler runs, and may raise, wherever Python code does, so in this code too, and sqlite3 drops what the
    code it calls raises. A generator that goes on inside its ``try`` keeps it, for ``raise_caught``.

    Threads: the one whose statement runs.
    """

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self._caught: BaseException | None = None
        self._answers = self._ask(is_over)
        next(self._answers)

    def set_on(self, connection: sqlite3.Connection, steps: int) -> None:
        connection.set_progress_handler(self._answers.__next__, steps)

    def raise_caught(self) -> None:
        """Raise what a signal handler raised and what, so, ended the statement."""
        caught, self._caught = self._caught, None
        if caught is not None:
            raise caught from None

    def _ask(self, is_over: Callable[[], bool]) -> Iterator[bool]:
        answer = False
        while True:
            try:
                while True:
                    yield answer
                    answer = is_over()
            except GeneratorExit:
                return
            except BaseException as error:
                self._caught, answer = error, True
