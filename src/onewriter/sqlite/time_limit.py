"""TimeLimit: interrupts a statement whose time is over."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator


class TimeLimit:
    """A progress handler: SQLite calls it every so many virtual machine instructions, and it interrupts the statement
    once ``is_over`` returns True.

    Not ``interrupt()``: a late one would interrupt the next statement. Each call needs the GIL.

    A generator, because sqlite3 discards what a progress handler raises. CPython may run a signal handler, which may
    raise, where a function is entered, before its ``try``; a generator is resumed inside its ``try``, and so catches
    it, for ``raise_caught``.

    Threads: used by the one whose statement runs.
    """

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self._caught: BaseException | None = None
        self._answers = self._ask(is_over)
        next(self._answers)

    def set_on(self, connection: sqlite3.Connection, steps: int) -> None:
        connection.set_progress_handler(self._answers.__next__, steps)

    def raise_caught(self) -> None:
        """Raise what a signal handler raised in here, which ended the statement."""
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
