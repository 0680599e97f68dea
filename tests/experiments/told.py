"""What the tasks of a program were told: which rows must be in the file in the end, and which callbacks were due."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

from experiments import Outcome
from experiments.hands import Fate
from helpers import notes_of
from onewriter import AsyncTransaction


class Callback(NamedTuple):
    is_of_commit: bool
    number: int


class Mark(NamedTuple):
    """A moment of a block: how many of each there were."""

    written: int
    kept: int


class Told(Fate):
    """The same of callbacks. Threads: any."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[Callback] = []
        self.due: set[Callback] = set()
        self.possible: set[Callback] = set()

    def judge_callbacks(self, outcome: Outcome) -> None:
        called = set(self.called)
        if len(called) != len(self.called):
            outcome.find("a callback was called twice")
        if self.due - called:
            outcome.find(f"not called: {sorted(self.due - called)[:9]}")
        if called - self.due - self.possible:
            outcome.find(f"called, and not due: {sorted(called - self.due - self.possible)[:9]}")


class Unit:
    """What the tasks of one block were told of it.

    Threads: those of the loops; ``settle`` when they have ended.
    """

    def __init__(self, told: Told) -> None:
        self.told, self.number = told, told.number()
        self.committed: bool | None = None  # until it has ended
        self.written: list[int] = []
        self.doubtful: set[int] = set()  # of these: no call has returned that has written it
        self.undone: set[int] = set()
        self.kept: list[Callback] = []
        self.due: set[Callback] = set()  # those of parts that were undone

    @property
    def certain(self) -> set[int]:
        return set(self.written) - self.doubtful

    def write(self) -> int:
        """The number of a row that is about to be written."""
        n = self.told.number()
        self.doubtful.add(n)
        self.written.append(n)
        return n

    def keep_callbacks(self, tx: AsyncTransaction) -> None:
        for callback in (Callback(True, self.told.number()), Callback(False, self.told.number())):
            keep = tx.on_commit if callback.is_of_commit else tx.on_rollback
            keep(functools.partial(self.told.called.append, callback))
            self.kept.append(callback)

    def mark(self) -> Mark:
        return Mark(len(self.written), len(self.kept))

    def undo(self, since: Mark) -> None:
        self.undone.update(self.written[since.written :])
        self.due.update(callback for callback in self.kept[since.kept :] if not callback.is_of_commit)
        del self.written[since.written :], self.kept[since.kept :]

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Around the block: how it ends says what becomes of all."""
        try:
            yield
        except BaseException as error:  # a task that is cancelled as it leaves hears of the outcome by a note
            self.committed = was_committed(error)
            raise
        self.committed = True

    def settle(self) -> None:
        told = self.told
        told.undone |= self.undone
        told.due |= self.due
        if self.committed is None:  # its task hangs, which is a finding
            told.unknown.update(self.written)
            told.possible.update(self.kept)
            return
        if self.committed:
            told.there |= self.certain
            told.unknown |= self.doubtful.intersection(self.written)
        else:
            told.undone.update(self.written)
        told.due.update(callback for callback in self.kept if callback.is_of_commit is self.committed)


def was_committed(error: BaseException) -> bool:
    return "was committed" in notes_of(error)


def was_kept(error: BaseException | None) -> bool:
    """Whether the part out of which ``error`` came stays in its transaction: it was cancelled behind its end. Of a part
    inside that one, the same is said, and a second note that it is undone with that one after all.
    """
    notes = "" if error is None else notes_of(error)
    return "stays in its transaction" in notes and "it does no more" not in notes
