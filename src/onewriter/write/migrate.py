"""Migration: the steps that bring the schema to the version that a program needs, one job each."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping, Set
from typing import TypeAlias

from onewriter.base.arguments import check_job, check_label, exact, name_of
from onewriter.base.state import State
from onewriter.sqlite.guard import Mode
from onewriter.sqlite.result import refuse_live
from onewriter.sqlite.statement import inside_of_dump
from onewriter.write.jobs import LoanJob
from onewriter.write.loan import WriteLoan
from onewriter.write.ticket import LABEL_LENGTH
from onewriter.write.transaction import Transaction

Step: TypeAlias = str | Callable[[Transaction], object]


class Migration:
    """Threads: made where it is called for; ``perform`` runs on the writer's."""

    def __init__(
        self, state: State, steps: Iterable[Step], label: str | None, frame: types.FrameType, enforces_keys: bool
    ) -> None:
        # A set has no order, and steps taken in another one would count as run.
        if isinstance(steps, str | Set | Mapping) or not isinstance(steps, Iterable):
            raise TypeError(f"steps must be a sequence of scripts and functions, not {type(steps).__name__}")
        self.steps = tuple(exact(step) if isinstance(step, str) else step for step in steps)
        for step in self.steps:
            if not isinstance(step, str):
                check_job(step, ())
        self._state = state
        self._label = check_label(label) or "migrate"
        self._frame = frame
        # As https://www.sqlite.org/lang_altertable.html#otheralter has it: off, and checked before COMMIT.
        self._foreign_keys = False if enforces_keys else None

    def is_at_end(self, version: int) -> bool:
        """Whether nothing is left to do at this ``PRAGMA user_version``; raises ValueError if it is none of ours."""
        if not 0 <= version <= len(self.steps):
            raise ValueError(
                f"the database is at version {version} (PRAGMA user_version), and this program knows "
                f"{len(self.steps)} steps: it was made or migrated by a newer or another program"
            )
        return version == len(self.steps)

    def job(self) -> StepJob:
        return StepJob(self, self._state, self._label, self._frame, self._foreign_keys)

    def perform(self, loan: WriteLoan, job: StepJob) -> int:
        # Inside the transaction: another process may have been here since somebody looked.
        version: int = loan.call(loan.session.internal, "PRAGMA user_version", mode=Mode.GATEWAY)[0][0]
        if self.is_at_end(version):
            return version
        step = self.steps[version]
        job.step = f", in step {version + 1} of migrate, {describe_step(step)}"
        if isinstance(step, str):
            loan.script(inside_of_dump(step)[0])
        else:
            refuse_live(step(Transaction(loan)))  # a generator, say, which would never run
        loan.call(loan.session.internal, f"PRAGMA user_version = {version + 1}", mode=Mode.GATEWAY)
        return version + 1


class StepJob(LoanJob[int]):
    """The next step, whichever that is when SQLite's lock is there; its result is the version then."""

    __slots__ = ("step",)

    def __init__(
        self, migration: Migration, state: State, label: str, frame: types.FrameType, foreign_keys: bool | None
    ) -> None:
        super().__init__(state, lambda loan: migration.perform(loan, self), label, frame, "", foreign_keys)
        self.exclusive = True  # so that no other job makes it run twice
        self.step = ""  # which one it is, when that is known

    def describe(self) -> str:
        return super().describe() + self.step


def describe_step(step: Step) -> str:
    return repr(step.strip()[:LABEL_LENGTH]) if isinstance(step, str) else repr(name_of(step))
