"""The kinds of jobs: a statement, a function, what runs outside any transaction, and what is no write."""

from __future__ import annotations

import sqlite3
import types
from collections.abc import Callable
from time import monotonic
from typing import Any, TypeVar, cast

from onewriter.base.call_site import one_of
from onewriter.base.state import State
from onewriter.sqlite.guard import Mode
from onewriter.sqlite.result import LIVE_RESULTS, Result, refuse_live
from onewriter.sqlite.statement import Parameters, describe_sql
from onewriter.write.loan import WriteLoan
from onewriter.write.ticket import LABEL_LENGTH, PENDING, Job
from onewriter.write.transaction import Transaction

T = TypeVar("T")


class StatementJob(Job[Result]):
    """One SQL statement; ``work`` is its parameters."""

    __slots__ = ("bounded", "sql")
    mode = Mode.ALONE

    def __init__(
        self, state: State, sql: str, parameters: Parameters, label: str | None, frame: types.FrameType, bounded: bool
    ) -> None:
        # Not super().__init__, and nothing that can wait: this is most of what enqueue does.
        self._state = state
        self._label = label
        instruction = frame.f_lasti
        self._code, self._instruction = frame.f_code, one_of(instruction, instruction)
        self._stage = PENDING
        self._result = self._error = self._waiters = self._callbacks = None
        self.bounded = bounded
        self.created_at = monotonic()
        self.sql = sql
        self.work = parameters

    @property
    def label(self) -> str:
        return self._label or self.sql[:LABEL_LENGTH]

    def _is_cut(self) -> bool:
        return not self._label and len(self.sql) > LABEL_LENGTH

    @property
    def exclusive(self) -> bool:  # type: ignore[override]
        # A text that can roll the whole transaction back would make the jobs before it run again.
        return describe_sql(self.sql).isolated

    def perform(self, loan: WriteLoan) -> Result:
        return loan.statement(self.sql, self.work)

    def _value(self) -> Result:
        # For a plain INSERT of one row the writer sets the rowid only: the rest may never be asked for.
        result = self._result
        if type(result) is int:
            result = self._result = Result([], 1, result, None)
        return result  # type: ignore[no-any-return]


class BareStatementJob(StatementJob):
    """One SQL statement outside any transaction, for VACUUM and PRAGMA."""

    __slots__ = ()
    in_transaction = False
    exclusive = True

    def perform(self, loan: WriteLoan) -> Result:
        return loan.bare_statement(self.sql, self.work)


class FunctionJob(Job[T]):
    """A function of the Transaction, which is its ``work``."""

    __slots__ = ("bounded",)
    needs_savepoint = True

    def __init__(
        self, state: State, function: Callable[[Any], T], label: str, frame: types.FrameType, bounded: bool
    ) -> None:
        # As in StatementJob.
        self._state = state
        self._label = label
        instruction = frame.f_lasti
        self._code, self._instruction = frame.f_code, one_of(instruction, instruction)
        self._stage = PENDING
        self._result = self._error = self._waiters = self._callbacks = None
        self.bounded = bounded
        self.created_at = monotonic()
        self.work = function

    def perform(self, loan: WriteLoan) -> T:
        result: T = self.work(Transaction(loan))
        if isinstance(result, LIVE_RESULTS):
            refuse_live(result)
        return result


class RebuildJob(FunctionJob[T]):
    """One with ``foreign_keys=``, which runs alone."""

    __slots__ = ("foreign_keys",)
    exclusive = True

    def __init__(
        self, state: State, function: Callable[[Any], T], label: str, frame: types.FrameType, foreign_keys: bool
    ) -> None:
        super().__init__(state, function, label, frame, False)
        self.foreign_keys = foreign_keys


class LoanJob(FunctionJob[T]):
    """What the gateway itself does on the loan for a call of the user's: many rows, or a script."""

    __slots__ = ("cut", "exclusive", "foreign_keys")

    def __init__(
        self,
        state: State,
        function: Callable[[WriteLoan], T],
        label: str | None,
        frame: types.FrameType,
        sql: str,
        foreign_keys: bool | None = None,
        bounded: bool = False,
    ) -> None:
        """``sql``: the text that it is about."""
        super().__init__(state, function, label or sql[:LABEL_LENGTH], frame, bounded)
        self.exclusive = foreign_keys is not None or describe_sql(sql).isolated
        self.foreign_keys = foreign_keys
        self.cut = not label and len(sql) > LABEL_LENGTH

    def _is_cut(self) -> bool:
        return self.cut

    def perform(self, loan: WriteLoan) -> T:
        return cast(T, self.work(loan))


class ConnectionJob(FunctionJob[T]):
    """A function with a connection of its own, on which it begins and commits as it likes."""

    __slots__ = ()
    exclusive = True
    in_transaction = needs_savepoint = False

    def call(self, connection: sqlite3.Connection) -> T:
        result: T = self.work(connection)
        return refuse_live(result)


class ControlJob(Job[T]):
    """No write: a function that the writer calls between two transactions, or, for flush, only a place in the queue."""

    __slots__ = ()
    exclusive = True
    in_stats = logs_failure = False

    def call(self) -> T | None:
        return None if self.work is None else cast(T, self.work())
