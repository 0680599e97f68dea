"""Parts: the open savepoints of a transaction, and the callbacks that were kept in each."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from onewriter.base.arguments import check_callback
from onewriter.errors import TransactionClosedError
from onewriter.write.session import WriteSession

Callback = Callable[[], object]
T = TypeVar("T")
KEPT = "this savepoint ended with the one around it, whose outcome it shares"
LOST = "this savepoint ended with the one around it, which was undone; what was written in it later was not"


class Mark:
    """An open savepoint: its number, which rises inwards, and how many callbacks there were at its beginning.

    Attributes:
        of_library: a library has made it on the connection that it was lent; no part of the job ends with it.
        has_failed: it is to be undone, before anything else is done.
        kept_by: who ends it, weakly; if that is collected while it is open, it is undone.
        ended_with_outer: why it cannot be undone, if one around it has ended before.
    """

    __slots__ = ("after_commit", "after_rollback", "ended_with_outer", "has_failed", "kept_by", "number", "of_library")

    def __init__(self, number: int, after_commit: int, after_rollback: int, of_library: bool = False) -> None:
        self.number = number
        self.after_commit = after_commit
        self.after_rollback = after_rollback
        self.of_library = of_library
        self.has_failed = False
        self.ended_with_outer = ""
        self.kept_by: object = None


class Parts:
    """Made for a transaction that has a savepoint or a callback; most have none.

    Locks: the session's lock guards all of it, while the transaction is open.
    """

    __slots__ = ("_after_commit", "_after_rollback", "_calls", "_marks", "_session", "_undone", "has_failed")

    def __init__(self, session: WriteSession) -> None:
        self._session = session
        self._marks: tuple[Mark, ...] = ()
        self._after_commit: list[Callback] = []
        self._after_rollback: list[Callback] = []
        self._undone: list[Callback] = []  # on_rollback of savepoints that were rolled back
        self._calls: list[Iterator[tuple[Callback]]] = []  # the first of them: those that are yet to be made at the end
        self.has_failed = False  # one of them, that may not be undone yet

    def callbacks(self, committed: bool) -> Iterator[tuple[Callback]]:
        """What is to be called, now that the transaction has ended: each is there once, although several threads may
        ask, or one again after Ctrl-C.
        """
        functions = self._undone + (self._after_commit if committed else self._after_rollback)
        self._calls.append(iter([(function,) for function in functions]))
        self._undone, self._after_commit, self._after_rollback = [], [], []
        return self._calls[0]

    def keep(self, committed: bool, fn: Any) -> None:
        """Keep what is to be called after COMMIT, or else after a rollback."""
        check_callback("the callback", fn)
        (self._after_commit if committed else self._after_rollback).append(fn)

    def begin(self, *, of_library: bool = False) -> Mark:
        number = self._marks[-1].number + 1 if self._marks else 1
        mark = Mark(number, len(self._after_commit), len(self._after_rollback), of_library)
        self._session.internal(f"SAVEPOINT {self._name_of(mark)}")
        self._marks = (*self._marks, mark)
        return mark

    def end(self, mark: Mark) -> None:
        if mark not in self._marks:
            raise TransactionClosedError(mark.ended_with_outer or LOST)
        self._session.internal(f"RELEASE {self._name_of(mark)}")
        self._end_inner(mark, KEPT)

    def undo(self, mark: Mark) -> None:
        """Undo what it has done, and end it; one that has ended by now stays as it is.

        Raises:
            TransactionClosedError: it has ended with the one around it.
        """
        if mark.ended_with_outer:
            raise TransactionClosedError(mark.ended_with_outer)
        if mark in self._marks:
            self._forget_since(mark)
            try:
                self._session.internal(f"ROLLBACK TO {self._name_of(mark)}")
                # Refused while a RETURNING of a lent connection is half read; then it goes with the one around it.
                with contextlib.suppress(sqlite3.OperationalError):
                    self._session.internal(f"RELEASE {self._name_of(mark)}")
            except sqlite3.OperationalError as error:  # Ctrl-C came just behind its RELEASE
                if "no such savepoint" not in str(error):
                    raise
            self._end_inner(mark, LOST)  # the last step: until then it may have to be done again

    def _end_inner(self, mark: Mark, why: str) -> None:
        """It has ended, and with it those inside it, of other threads or tasks."""
        place = self._marks.index(mark)
        inner, self._marks = self._marks[place + 1 :], self._marks[:place]
        for other in inner:
            other.ended_with_outer = why

    def undo_failed(self) -> None:
        """Undo what has failed, if a signal handler has ended that, or a function of SQL could not do it."""
        for mark in self._marks:
            if mark.has_failed:
                self.undo(mark)  # with those inside it
                break
        self.has_failed = False

    def whole(self, function: Callable[..., T], *args: Any) -> T:
        """Call ``function``: all that it does, or nothing."""
        mark = self.begin()
        try:
            result = function(*args)
            self.end(mark)
            return result
        except BaseException:
            if self._session.connection.in_transaction:  # else it was undone with all
                self.has_failed = mark.has_failed = True  # as in WriteLoan.part
                self.undo(mark)
            raise

    def undo_innermost(self) -> None:
        """Undo what the innermost part has done so far; it stays open. Without one, all of the job."""
        part = next((mark for mark in reversed(self._marks) if not mark.of_library), None)
        if part is not None:
            self.undo_to(part, self._marks)
        else:
            self._forget_since(Mark(0, 0, 0))
            self._marks = ()
            self._session.undo_to_mark()

    def undo_to(self, mark: Mark, dropped: Sequence[Mark] = ()) -> None:
        """Undo what was done since; it stays open. Of those inside it, ``dropped`` end, and the others begin again."""
        self._forget_since(mark)
        self._session.internal(f"ROLLBACK TO {self._name_of(mark)}")
        before = self._before(mark)
        inner = self._marks[len(before) + 1 :]
        self._marks = (*before, mark)
        for other in inner:
            if other not in dropped:
                other.after_commit, other.after_rollback = len(self._after_commit), len(self._after_rollback)
                self._session.internal(f"SAVEPOINT {self._name_of(other)}")
                self._marks = (*self._marks, other)

    def is_open(self, mark: Mark) -> bool:
        return mark in self._marks

    def are_innermost(self, marks: Sequence[Mark]) -> bool:
        return self._marks[-len(marks) :] == tuple(marks)

    def _before(self, mark: Mark) -> tuple[Mark, ...]:
        return self._marks[: self._marks.index(mark)]

    def _name_of(self, mark: Mark) -> str:
        return f"{self._session.guard.mark}_{mark.number}"

    def forget(self, mark: Mark) -> None:
        """It is undone with all: its callbacks come before those of what is around it."""
        if mark in self._marks:
            self._forget_since(mark)

    def _forget_since(self, mark: Mark) -> None:
        del self._after_commit[mark.after_commit :]
        undone = self._after_rollback[mark.after_rollback :]
        self._undone = self._undone + undone  # and no call until they are taken out there: one step
        del self._after_rollback[mark.after_rollback :]
