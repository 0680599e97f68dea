"""Parts: the open savepoints of a transaction, and the callbacks that were kept in each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from onewriter.base.arguments import check_callback
from onewriter.errors import TransactionClosedError
from onewriter.write.session import WriteSession

Callback = Callable[[], object]


class Mark(NamedTuple):
    """An open savepoint: how deep it is, and how many callbacks there were at its beginning."""

    depth: int
    after_commit: int
    after_rollback: int


class Parts:
    """Made for a transaction that has a savepoint or a callback; most have none.

    Locks: the session's lock guards all of it; a task, which cannot wait for that, keeps its callbacks under another.
    """

    __slots__ = ("_after_commit", "_after_rollback", "_marks", "_session", "_undone")

    def __init__(self, session: WriteSession) -> None:
        self._session = session
        self._marks: tuple[Mark, ...] = ()
        self._after_commit: list[Callback] = []
        self._after_rollback: list[Callback] = []
        self._undone: list[Callback] = []  # on_rollback of savepoints that were rolled back

    def callbacks(self, committed: bool) -> list[Callback]:
        """What is to be called, now that the transaction has ended."""
        return self._undone + (self._after_commit if committed else self._after_rollback)

    def keep(self, committed: bool, fn: Any) -> None:
        """Keep what is to be called after COMMIT, or else after a rollback."""
        check_callback("the callback", fn)
        (self._after_commit if committed else self._after_rollback).append(fn)

    def begin(self) -> Mark:
        mark = Mark(len(self._marks), len(self._after_commit), len(self._after_rollback))
        self._session.internal(f"SAVEPOINT {self._name_of(mark)}")
        self._marks = (*self._marks, mark)
        return mark

    def end(self, mark: Mark) -> None:
        if not self._is_open(mark):
            raise TransactionClosedError("this savepoint ended with the one around it")
        self._marks = self._marks[: mark.depth]
        self._session.internal(f"RELEASE {self._name_of(mark)}")

    def undo(self, mark: Mark) -> None:
        """Undo what it has done, and end it; one that has ended by now stays as it is."""
        if self._is_open(mark):
            self._marks = self._marks[: mark.depth]
            self._forget_since(mark)
            self._session.internal(f"ROLLBACK TO {self._name_of(mark)}")
            self._session.internal(f"RELEASE {self._name_of(mark)}")

    def undo_innermost(self) -> None:
        """Undo what the innermost part has done so far; it stays open. Without one, all of the job."""
        if self._marks:
            self._forget_since(self._marks[-1])
            self._session.internal(f"ROLLBACK TO {self._name_of(self._marks[-1])}")
        else:
            self._forget_since(Mark(0, 0, 0))
            self._session.undo_to_mark()

    def _name_of(self, mark: Mark) -> str:
        return f"{self._session.guard.mark}_{mark.depth + 1}"

    def _is_open(self, mark: Mark) -> bool:
        return len(self._marks) > mark.depth and self._marks[mark.depth] is mark

    def _forget_since(self, mark: Mark) -> None:
        del self._after_commit[mark.after_commit :]
        self._undone = self._undone + self._after_rollback[mark.after_rollback :]
        del self._after_rollback[mark.after_rollback :]
